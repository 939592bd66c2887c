// What the schedule of paged attention hands to its kernels: the call, and one piece of it. Plain numbers and pointers.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

constexpr int kKeyBlock = 64;      // keys per step; blocks begin at multiples of it, whoever computes them
constexpr int kPartialExtra = 16;  // floats after a partial row: its largest score, its sum, padding
constexpr int kMaxChunks = 34;     // pieces a request's keys are cut into: 32, and one more at each end
constexpr int kRowStep = 6;        // query rows the prefill kernel computes at a time

// Strides in elements.
struct AttentionCall {
  const char* query;  // [tokens, heads, head_dim]
  char* out;          // [tokens, heads, value_dim]
  const char* key_pages;
  const char* value_pages;
  int64_t query_stride, out_stride, key_page_stride, value_page_stride;
  int64_t heads, kv_heads, group, head_dim, value_dim, page_size;
  int64_t window_left;   // keys before a query's own that it sees; negative: all
  float scale, softcap;  // softcap 0: none
  DType query_type, kv_type, out_type;
};

// Some tokens of one request, some KV heads, some keys. Tokens are counted from the request's first new one.
struct AttentionWork {
  const int32_t* pages;  // the request's row of the page table
  int64_t first_row;     // of query and out: where the request begins
  int64_t query_len, key_len;
  int64_t token_begin, token_end, head_begin, head_end, key_begin, key_end;
  int64_t chunk_len;  // few rows: keys after which what was accumulated is written down, and a new chunk begun
  float* partial;     // few rows: the first chunk's unfinished rows [kv_heads, rows, partial_stride]; null: rows go to out
  int64_t partial_step;  // floats from one chunk's to the next one's
  float* scratch;
};

// The unfinished rows of one KV head of one request: `chunks` pieces of each, `step` floats apart.
struct AttentionMerge {
  const float* partial;
  int64_t step, chunks, first_row, rows, head;
};

// NOTE: static, so that no instruction set's copy of these can replace another's.
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded_lanes(int64_t n) { return (n + 15) & ~int64_t{15}; }
static inline int64_t partial_stride(const AttentionCall& c) { return padded_lanes(c.value_dim) + kPartialExtra; }

// The keys a token sees: first_key .. last_key, both included; last_key is negative where there is none.
static inline int64_t last_key(const AttentionWork& w, int64_t token) { return w.key_len - w.query_len + token; }
static inline int64_t first_key(const AttentionCall& c, int64_t last) {
  return c.window_left < 0 || last < c.window_left ? 0 : last - c.window_left;
}

static inline int64_t few_scratch_floats(const AttentionCall& c, int64_t heads, int64_t rows) {
  int64_t per_row = padded_lanes(c.head_dim) + padded_lanes(c.value_dim) + kPartialExtra + 16;
  return heads * (rows * per_row + 16) + rows * kKeyBlock + padded_lanes(rows) + 8 * kKeyBlock;
}
static inline int64_t tile_scratch_floats(const AttentionCall& c, int64_t rows) {
  int64_t width = padded_lanes(c.head_dim) + padded_lanes(c.value_dim);
  return rows * (width + 17) + kKeyBlock * width + kRowStep * kKeyBlock + 16 + 8 * kKeyBlock + 64;
}

}  // namespace headrace
