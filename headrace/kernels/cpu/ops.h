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
// What quantized weights meet: activations in int8; in two int8, 16 bits together; or in fp32, everything being fp32.
enum class Precision : int { fast = 0, fine = 1, exact = 2 };
void submit_linear(Runner& runner, Isa isa, TensorRef x, std::vector<LinearPart> parts, Precision precision);
// out = silu(x gate^T) * (x up^T)
void submit_linear_gated(Runner& runner, Isa isa, TensorRef x, WeightRef gate, WeightRef up, TensorRef out,
                         Precision precision);

// ids [tokens] i32 -> out [tokens, cols] f32. An id outside the table throws.
void submit_embedding(Runner& runner, TensorRef out, TensorRef ids, WeightRef table);
// rows [outputs] i32 of x [tokens, dim] f32 -> out [outputs, dim] f32
void submit_select_rows(Runner& runner, TensorRef out, TensorRef x, TensorRef rows);

// logits [rows, vocab] f32 -> out [rows] i32.
// reals [rows, 6] f64: temperature, top_p, min_p, repetition, presence and frequency penalty
// integers [rows, 3] i64: top_k, seed, number of the draw
// seen_*: for penalties, may be absent. ids [n] i32 rising within a row, counts [n] i32, starts [rows + 1] i32.
struct SampleTensors {
  TensorRef logits, out, reals, integers, seen_ids, seen_counts, seen_starts;
};
void submit_sample(Runner& runner, Isa isa, const SampleTensors& tensors);

// positions [tokens] i32, inverse_frequencies [rotary_dim / 2] f32|f64 -> table [tokens, rotary_dim] f32: cosines, then
// sines, times magnitude
void submit_rope_table(Runner& runner, TensorRef table, TensorRef positions, TensorRef inverse_frequencies, float magnitude);
// Queries rotated to query_out, keys rotated and values converted to the pages, at slots [tokens] i32 (page * page_size +
// offset). With norms [head_dim], each head is rms-normalized before. A slot outside the pages throws.
struct RopeAppendTensors {
  TensorRef query_out, query, key, value, key_pages, value_pages, slots, table, query_norm, key_norm;
};
void submit_rope_append(Runner& runner, Isa isa, RopeAppendTensors tensors, bool interleaved, float eps);

// query [tokens, heads, head_dim] against pages -> out [tokens, heads, value_dim]; page_table [requests, max_pages],
// sequence_lens [requests], query_starts [requests + 1]: i32, read when it runs. Lengths and pages that do not fit throw.
struct PagedAttentionTensors {
  TensorRef out, query, key_pages, value_pages, page_table, sequence_lens, query_starts;
};
void submit_paged_attention(Runner& runner, Isa isa, PagedAttentionTensors tensors, int64_t window_left, float scale,
                            float softcap);

// parts of one attention, each out [..., heads, value_dim] f32|f16|bf16 (or all f64) and lse [..., heads] f32 -> the whole, the
// same shapes. sinks [heads] f32 may be absent.
struct MergeTensors {
  std::vector<TensorRef> outs, lses;
  TensorRef out, lse, sinks;
};
void submit_merge_attention(Runner& runner, Isa isa, MergeTensors tensors);

// raw: the matrix as a file holds it
WeightRef pack_weight(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, const uint8_t* raw, int64_t raw_bytes);

}  // namespace headrace
