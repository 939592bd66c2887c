// What Python can ask for: each function checks its tensors, then hands an Op to the runner (a pool runs it, a program
// records it). Shape words: tokens, heads, head_dim, pages, page_size as in the Python ops.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"
#include "runtime.h"

namespace headrace {

using WeightRef = std::shared_ptr<PackedWeight>;

// x [tokens, dim] f32|f16|bf16, weight [dim] f32 -> out [tokens, dim] f32|f16|bf16
void submit_rms_norm(Runner& runner, Isa isa, TensorRef out, TensorRef x, TensorRef weight, float eps);

// One product of x: out [tokens, rows] = x [tokens, cols] weight^T (+ bias [rows] f32) (+ residual [tokens, rows] f32)
struct LinearPart {
  WeightRef weight;
  TensorRef out, bias, residual;
};
// Quantized weights meet int8 activations, unless `exact`: then everything is fp32.
void submit_linear(Runner& runner, Isa isa, TensorRef x, std::vector<LinearPart> parts, bool exact);
// out = silu(x gate^T) * (x up^T)
void submit_linear_gated(Runner& runner, Isa isa, TensorRef x, WeightRef gate, WeightRef up, TensorRef out, bool exact);

// ids [tokens] i32 -> out [tokens, cols] f32. An id outside the table throws.
void submit_embedding(Runner& runner, TensorRef out, TensorRef ids, WeightRef table);
// rows [outputs] i32 of x [tokens, dim] f32 -> out [outputs, dim] f32
void submit_select_rows(Runner& runner, TensorRef out, TensorRef x, TensorRef rows);

// raw: the matrix as a file holds it
WeightRef pack_weight(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, const uint8_t* raw, int64_t raw_bytes);

}  // namespace headrace
