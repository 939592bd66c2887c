// Which table belongs to which instruction set. AVX512-BF16 adds products of bf16 to AVX-512, AMX adds tiles to those.
#include "kernels.h"

namespace headrace {

const Kernels& kernels_for(Isa isa) {
  if (isa == Isa::amx_emulated) return amx_emulated_kernels();
#if defined(__x86_64__)
  if (isa == Isa::amx) return amx_kernels();
  if (isa == Isa::avx512_bf16) return avx512_bf16_kernels();
  if (isa == Isa::avx512) return avx512_kernels();
  if (isa == Isa::avx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace headrace
