// Included last by each instruction set's translation unit: the table of what was compiled there.
#pragma once
#include "kernels.h"
#include "linear.h"
#include "norm.h"
#include "roof.h"

namespace headrace {
namespace HEADRACE_ISA {

static const Kernels kTable = {
    rms_norm, quantize_row, tile, unpack_panel, finish_row, widen_row, silu_gate,
    read_bytes, multiply_floats, multiply_bytes,
};

}  // namespace HEADRACE_ISA
}  // namespace headrace
