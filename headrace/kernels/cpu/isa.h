// Instruction sets: what this CPU has, and the highest one that kernels may use.
#pragma once
#include <string>
#include <vector>

namespace headrace {

// Ordered: each level includes the ones before it.
//   avx2    AVX2, FMA, F16C
//   avx512  AVX-512 F, BW, DQ, VL, VBMI and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later)
//   avx512_bf16  the same, and products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4 and later)
//   amx     AVX512-BF16, and AMX tiles with bf16 and int8 products
//   amx_emulated  not a level: amx's kernels on portable code, for tests
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4, amx_emulated = 5 };

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument

// The highest level this CPU and operating system can run. AMX is asked of the kernel on first use.
Isa best_isa();

// Flags beyond the levels, for `headrace doctor`: "avx512_bf16", "avx512_fp16", "amx_fp16", ...
std::vector<std::string> cpu_flags();

}  // namespace headrace
