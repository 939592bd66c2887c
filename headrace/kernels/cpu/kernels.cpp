// Which table belongs to which instruction set. AMX adds tiles to AVX-512; its vector kernels are the same.
#include "kernels.h"

namespace headrace {

const Kernels& kernels_for(Isa isa) {
  if (isa == Isa::amx_emulated) return amx_emulated_kernels();
#if defined(__x86_64__)
  if (isa == Isa::amx) return amx_kernels();
  if (isa >= Isa::avx512) return avx512_kernels();
  if (isa == Isa::avx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace headrace
