// Included last by each instruction set's translation unit: the table of what was compiled there.
#pragma once
#include "append.h"
#include "attention_backward_double.h"
#include "attention_backward_fp32.h"
#include "attention_double.h"
#include "attention_prefill.h"
#include "kernels.h"
#include "linear.h"
#include "merge.h"
#include "norm.h"
#include "sampling.h"
#include "roof.h"

namespace headrace {
namespace HEADRACE_ISA {

static const Kernels kTable = {
    rms_norm, quantize_coarse, quantize_fine, tile, unpack_panel, finish, widen_row, silu_gate,
    read_bytes, multiply_floats, multiply_bytes,
    find_peak, weigh, keep_heavy, typical_keys, measure_above, gather_between,
    append_heads, convert_row, attend_few, attend_tile, attend_double, merge_pieces,
    merge_parts, gradient_row, attend_backward, attend_backward_double,
};

}  // namespace HEADRACE_ISA
}  // namespace headrace
