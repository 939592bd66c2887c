// What the backward of attention hands to its kernels, beside the call and the request of attention_work.h. Plain numbers
// and pointers.
#pragma once
#include <cstdint>

#include "attention_work.h"

namespace headrace {

constexpr int64_t kGradientRows = 64;   // query rows that are computed together
constexpr int64_t kGradientKeys = 128;  // keys that a piece of work has a multiple of
constexpr int64_t kMostGradientKeys = 256;  // whose gradients are gathered at a time, at most
constexpr int64_t kOpposed = 32;        // dimensions are padded to a multiple of it

// One token: for each head log of all its weights, and what its scores' gradients have in common.
struct GradientRow {
  const char* d_out;
  const char* out;  // [heads, value_dim], strided
  const char* lse;  // as the forward gave them, float or double; d_lse may be null
  const char* d_lse;
  const float* sinks;  // [heads]; null: none
  float* totals;       // [heads]: log of the sum of weights, the sink's too; +infinity where no key is seen
  float* deltas;       // [heads]
  double* d_sinks;     // [heads], added to; null: none
  int64_t heads, value_dim, d_out_step, out_step, lse_step, d_lse_step;
  DType d_out_type, out_type;
};

struct GradientCall {
  const float* totals;  // [tokens, heads], as above
  const float* deltas;
  char* d_keys;
  char* d_values;
  CacheStrides d_key_strides, d_value_strides;
  RowStrides d_out_strides, d_query_strides, d_lse_strides;
  DType d_out_type;
};

// Some rows of one request, one KV head, some keys. A row is (token, query head of the group), counted from the request's
// first token. Gradients of keys are gathered over all calls from one that `begins` to the one that `ends`.
struct GradientWork {
  AttentionWork rows;  // the request: what it sees, where its queries and keys are
  const char* d_out;   // at the request's first token, as are the next two
  const char* d_lse;   // doubles; null: none
  char* d_query;
  int64_t first_token;  // the request's, in totals and deltas
  int64_t head;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;  // from 0 on those of the request; others have no gradient, which is written too
  bool wants_queries, wants_keys, begins, ends;
  float* scratch;
  double* d_sinks;  // float64 alone: [heads], added to
};

static inline int64_t padded_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Scratch in floats, for whichever way products are computed.
static inline int64_t gradient_scratch_floats(const AttentionCall& c, int64_t rows) {
  int64_t query = padded_to(c.head_dim, kOpposed), value = padded_to(c.value_dim, kOpposed);
  int64_t keys = kMostGradientKeys * (3 * query + 2 * value) + kKeyBlock * query;
  int64_t tile = kGradientRows * 2 * (query + value) + kKeyBlock * kGradientRows * 6 + 16 * kKeyBlock;
  return keys + tile + greater(query, kKeyBlock) + 16 * kGradientRows + padded_to(rows, kGradientRows) * query + 256;
}

}  // namespace headrace
