// All kernels, compiled for avx2.
#define HEADRACE_ISA avx2
#define HEADRACE_AVX2 1
#include "kernels_table.h"

namespace headrace {
const Kernels& avx2_kernels() { return avx2::kTable; }
}  // namespace headrace
