// AVX512-BF16's kernels, and products over AMX tiles.
#define HEADRACE_ISA amx
#define HEADRACE_AVX512 1
#define HEADRACE_AVX512_BF16 1
#define HEADRACE_AMX 1
#include "kernels_bf16.h"
#include "strip.h"

namespace headrace {

const Kernels& amx_kernels() {
  static const Kernels table = amx::with_bf16(amx::with_strips(avx512_bf16_kernels()));
  return table;
}

}  // namespace headrace
