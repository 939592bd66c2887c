// All kernels, compiled for portable.
#define HEADRACE_ISA portable

#include "kernels_table.h"

namespace headrace {
const Kernels& portable_kernels() { return portable::kTable; }
}  // namespace headrace
