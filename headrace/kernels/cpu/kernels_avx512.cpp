// All kernels, compiled for avx512.
#define HEADRACE_ISA avx512
#define HEADRACE_AVX512 1
#include "kernels_table.h"

namespace headrace {
const Kernels& avx512_kernels() { return avx512::kTable; }
}  // namespace headrace
