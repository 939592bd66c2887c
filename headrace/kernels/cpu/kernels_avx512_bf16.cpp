// AVX-512's kernels, and products of bf16 pairs.
#define HEADRACE_ISA avx512_bf16
#define HEADRACE_AVX512 1
#define HEADRACE_AVX512_BF16 1
#include "kernels.h"

namespace headrace {

const Kernels& avx512_bf16_kernels() { return avx512_kernels(); }

}  // namespace headrace
