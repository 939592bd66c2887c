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
// What is multiplied: x [tokens, cols], or rms_norm(x, norm [cols] f32, eps) where there is a norm.
struct LinearInput {
  TensorRef x, norm;
  float eps;
  Precision precision;
};
void submit_linear(Runner& runner, Isa isa, const LinearInput& input, std::vector<LinearPart> parts);
// out = silu(x gate^T) * (x up^T)
void submit_linear_gated(Runner& runner, Isa isa, const LinearInput& input, WeightRef gate, WeightRef up, TensorRef out);

// ids [tokens] i32 -> out [tokens, cols] f32. An id outside the table throws.
void submit_embedding(Runner& runner, TensorRef out, TensorRef ids, WeightRef table);
// rows [outputs] i32 of x [tokens, dim] f32 -> out [outputs, dim] f32
void submit_select_rows(Runner& runner, TensorRef out, TensorRef x, TensorRef rows);

// logits [rows, vocab] f32 -> out [rows] i32.
// reals [rows, 6] f64: temperature, top_p, min_p, repetition, presence and frequency penalty
// integers [rows, 3] i64: top_k, seed, number of the draw (below 0: this row is left out)
// seen_*: for penalties, may be absent. ids [n] i32 rising within a row, counts [n] i32, starts [rows + 1] i32.
struct SampleTensors {
  TensorRef logits, out, reals, integers, seen_ids, seen_counts, seen_starts;
};
void submit_sample(Runner& runner, Isa isa, const SampleTensors& tensors);

// positions [tokens] i32, inverse_frequencies [rotary_dim / 2] f32|f64 -> table [tokens, rotary_dim] f32: cosines, then
// sines, times magnitude
void submit_rope_table(Runner& runner, TensorRef table, TensorRef positions, TensorRef inverse_frequencies, float magnitude);
// Keys and values [tokens, kv_heads, ...] f32|f16|bf16 converted or quantized to pages [pages, page_size, kv_heads, ...]
// f32|f16|bf16|f8|i8|u8 (two int4 in a byte), at slots [tokens] i32 (page * page_size + offset); with a table, keys and
// queries are rotated; with norms [head_dim] f32, each head is rms-normalized before; spread: both are multiplied by a
// Hadamard matrix after. scales f32 [pages, page_size,
// kv_heads]: written; [pages, 1, kv_heads]: read. latent [tokens, kv_heads, latent_dim] comes before the key in its pages.
// Only key, key_pages and slots must be there. A slot outside the pages throws, and so does a scale that is no scale.
struct AppendTensors {
  TensorRef key, latent, value, key_pages, value_pages, key_scales, value_scales, slots;
  TensorRef query, query_out, table, query_norm, key_norm;
};
void submit_append_pages(Runner& runner, Isa isa, AppendTensors tensors, bool interleaved, bool spread, float eps);

// Layouts, by rank of the query: dense [batch, tokens, heads, head_dim] against keys [batch, keys, kv_heads, head_dim];
// ragged [tokens, heads, head_dim] with query_starts [requests + 1] against keys [keys, kv_heads, head_dim], of which request r
// has key_lens[r] from key_starts[r] on; or against pages [pages, page_size, kv_heads, head_dim] found by page_table
// [requests, max_pages]. Starts, lengths and pages are i32, read when it runs; what does not fit throws. Any strides, the
// last dimension contiguous. Arrays that may be absent are null.
struct AttentionTensors {
  TensorRef out, lse, query, key, value, query_starts, key_starts, key_lens, page_table, key_scales, value_scales, mask, sinks,
      alibi_slopes, first_keys, last_keys;
};
enum class Arithmetic { fp32, bf16, fp64 };
struct AttentionOptions {
  bool top_left, batch_invariant;
  int64_t window_left, window_right;  // negative: open
  double scale, softcap;              // softcap 0: none
  Arithmetic arithmetic;
};
void submit_attention(Runner& runner, Isa isa, const AttentionTensors& tensors, const AttentionOptions& options);

// How that call would be divided: into how many parts at most one item is, intervals in all, bytes of partial results.
// Nothing but starts and lengths is read.
struct AttentionDivision {
  int64_t splits, intervals, workspace_bytes;
};
AttentionDivision attention_division(int64_t threads, Isa isa, const AttentionTensors& tensors, const AttentionOptions& options);

// Gradients of query, key, value and sinks from those of out and lse (d_lse may be absent). The forward's arrays, lse among
// them, are read; no pages, no codes. d_query, d_key, d_value: like their arrays; d_sinks [heads] f32 if there are sinks.
// One call gives one result, bit for bit, on any number of threads.
struct AttentionGradientTensors {
  AttentionTensors forward;
  TensorRef d_out, d_lse, d_query, d_key, d_value, d_sinks;
};
void submit_attention_backward(Runner& runner, Isa isa, const AttentionGradientTensors& tensors, const AttentionOptions& options);

// parts of one attention, each out [..., heads, value_dim] f32|f16|bf16 and lse [..., heads] f32, or all f64 -> the whole, the
// same shapes. sinks [heads] f32 may be absent.
struct MergeTensors {
  std::vector<TensorRef> outs, lses;
  TensorRef out, lse, sinks;
};
void submit_merge_attention(Runner& runner, Isa isa, MergeTensors tensors);

// raw: the matrix as a file holds it
WeightRef pack_weight(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, const uint8_t* raw, int64_t raw_bytes);

// The same from an open file, read a piece at a time: nothing of it is mapped or held. Throws ReadFailed.
WeightRef pack_file(Pool& pool, Arena& arena, WeightFormat format, int64_t rows, int64_t cols, int file, int64_t offset);
int64_t packed_bytes(WeightFormat format, int64_t rows, int64_t cols);  // what that takes from the arena

struct ReadFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace headrace
