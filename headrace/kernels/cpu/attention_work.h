// What the schedule of attention hands to its kernels: the call, and one piece of it. Plain numbers and pointers.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

constexpr int kKeyBlock = 64;      // keys per step; blocks begin at multiples of it, whoever computes them
constexpr int kPartialExtra = 16;  // floats after a partial row: its largest score, its sum, padding
constexpr int kRowStep = 6;        // query rows the prefill kernel computes at a time
constexpr int kMostSoftRows = 96;  // rows whose scores are there at a time over products of bf16, at most

// Of keys, values or their scales, in elements (codes, where two share a byte).
struct CacheStrides {
  int64_t page, token, head;
};
// Of queries, results and masks, in elements.
struct RowStrides {
  int64_t token, head;
};

struct AttentionCall {
  const char* keys;
  const char* values;
  const float* key_scales;    // what a (token, head)'s codes are multiplied by; null: nothing
  const float* value_scales;
  const float* sinks;         // [heads], a score without a value; null: none
  CacheStrides key_strides, value_strides, key_scale_strides, value_scale_strides;
  RowStrides query_strides, out_strides, lse_strides, mask_strides;
  int64_t heads, kv_heads, group, head_dim, value_dim, page_size;
  int64_t window_left, window_right;  // keys before and after a query's own that it sees; negative: all
  int64_t mask_columns, mask_column_stride;
  double scale, softcap;  // softcap 0: none
  DType query_type, kv_type, out_type, mask_type;  // mask_type u8: 0 hides; else: added to the scores
  bool top_left;          // a query's own key is counted from the beginning, not from the end
};

// Some tokens of one request, some KV heads, some keys. Tokens are counted from the request's first new one.
struct AttentionWork {
  const int32_t* pages;  // the request's row of the page table; null: all its keys are in `page`, from `first_slot` on
  int64_t page, first_slot;
  const char* query;  // at the request's first token, as are the next three
  char* out;
  char* lse;          // float, double for float64
  const char* mask;   // null: none
  const float* alibi;         // [heads]: what each key of distance costs; null: nothing
  const int32_t* first_keys;  // [tokens]: the keys each sees, instead of the window; null: the window decides
  const int32_t* last_keys;
  int64_t query_len, key_len;
  int64_t token_begin, token_end, head_begin, head_end, key_begin, key_end;
  int64_t chunk_len;     // keys, a multiple of kKeyBlock: where what was gathered is folded together; 0: nowhere
  float* partial;        // unfinished rows of the first chunk [heads, rows, partial_stride]; null: rows are finished
  int64_t partial_step;  // floats from one chunk's to the next one's
  float* scratch;
  bool in_order;         // few rows: sum products as the tile kernel does, element after element
  const AttentionWork* following;  // few rows: what this thread does next, of as many heads; null: nothing
  int64_t fetched;       // few rows: how many of the first block's keys were prefetched before it
};

// The unfinished rows of one KV head of an item: `pieces` of each, `step` floats apart, in the order of their keys.
struct AttentionMerge {
  const float* partial;
  int64_t step, pieces, head;
};

// NOTE: static, so that no instruction set's copy of these can replace another's.
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded_lanes(int64_t n) { return (n + 15) & ~int64_t{15}; }
static inline int64_t partial_stride(const AttentionCall& c) { return padded_lanes(c.value_dim) + kPartialExtra; }
static inline int64_t num_rows(const AttentionCall& c, const AttentionWork& w) { return (w.token_end - w.token_begin) * c.group; }

// The key at a token's own place.
static inline int64_t own_key(const AttentionCall& c, const AttentionWork& w, int64_t token) {
  return (c.top_left ? 0 : w.key_len - w.query_len) + token;
}
// The keys a token sees: first_key .. last_key, both included; none where the last comes before the first.
static inline int64_t first_key(const AttentionCall& c, const AttentionWork& w, int64_t token) {
  if (w.first_keys) return greater(w.first_keys[token], 0);
  return c.window_left < 0 ? 0 : greater(own_key(c, w, token) - c.window_left, 0);
}
static inline int64_t last_key(const AttentionCall& c, const AttentionWork& w, int64_t token) {
  if (w.last_keys) return lesser(w.last_keys[token], w.key_len - 1);
  return c.window_right < 0 ? w.key_len - 1 : lesser(own_key(c, w, token) + c.window_right, w.key_len - 1);
}
// What the tokens [begin, end) see between them, as [first, end).
struct KeyRange {
  int64_t begin, end;
};
static inline KeyRange keys_seen(const AttentionCall& c, const AttentionWork& w, int64_t begin, int64_t end) {
  KeyRange seen{w.key_len, 0};
  for (int64_t token = begin; token < end; token += w.first_keys ? 1 : greater(end - 1 - begin, 1)) {
    int64_t first = first_key(c, w, token), last = last_key(c, w, token);
    if (first > last && w.first_keys) continue;
    seen.begin = lesser(seen.begin, first);
    seen.end = greater(seen.end, last + 1);
  }
  return seen.begin < seen.end ? seen : KeyRange{0, 0};
}

// Scratch: of each row its query, what was gathered in this chunk (values, sums, largest score) and in those before.
static inline int64_t row_floats(const AttentionCall& c) {
  return padded_lanes(c.head_dim) + padded_lanes(c.value_dim) + 16 + 1 + partial_stride(c);
}
static inline int64_t few_scratch_floats(const AttentionCall& c, int64_t heads, int64_t rows) {
  return heads * (rows * row_floats(c) + 64) + rows * kKeyBlock + padded_lanes(rows) + 2 * kKeyBlock + 64;
}
static inline int64_t tile_scratch_floats(const AttentionCall& c, int64_t rows) {
  int64_t width = padded_lanes(c.head_dim) + padded_lanes(c.value_dim);
  return padded_lanes(rows) * row_floats(c) + kKeyBlock * width + kMostSoftRows * kKeyBlock + 256;
}

}  // namespace headrace
