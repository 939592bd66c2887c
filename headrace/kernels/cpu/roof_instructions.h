// Multiplication probes that need instructions beyond the levels of isa.h.
// NOTE: no std:: here: one of these is compiled with flags the other code must not have (see simd.h).
#pragma once
#include <stdint.h>

namespace headrace {

// Each does `rounds` rounds of products, leaves their sum in result[2] and returns the number of operations.
// result[0] and result[1] are small factors. NOTE: undefined instructions unless the CPU has what the name says.
int64_t multiply_bf16_avx512(int64_t rounds, float* result);
int64_t multiply_bf16_amx(int64_t rounds, float* result);
int64_t multiply_int8_amx(int64_t rounds, float* result);

}  // namespace headrace
