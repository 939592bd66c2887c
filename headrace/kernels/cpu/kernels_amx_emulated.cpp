// Portable kernels, and products over emulated AMX tiles: for tests on machines without.
#define HEADRACE_ISA amx_emulated

#include "kernels_bf16.h"
#include "strip.h"

namespace headrace {

const Kernels& amx_emulated_kernels() {
  static const Kernels table = amx_emulated::with_bf16(amx_emulated::with_strips(portable_kernels()));
  return table;
}

}  // namespace headrace
