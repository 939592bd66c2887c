// AVX-512's kernels, and products of bf16 pairs.
#define HEADRACE_ISA avx512_bf16
#define HEADRACE_AVX512 1
#define HEADRACE_AVX512_BF16 1
#include "kernels_bf16.h"

namespace headrace {

const Kernels& avx512_bf16_kernels() {
  static const Kernels table = avx512_bf16::with_bf16(avx512_kernels());
  return table;
}

}  // namespace headrace
