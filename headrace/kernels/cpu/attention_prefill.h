// attention, many query rows per KV head (prefill): two matrix products per tile, in registers.
// Wins: more than 16 rows per KV head. Schedule: a work item is up to 192 rows (all heads of the group) of one KV head; it
// walks its keys 64 at a time: keys transposed and values converted to float once, then 6 rows at a time scores, online
// softmax, weighted values, as sums of outer products (6 x 64 in 24 registers with AVX-512, 6 x 16 in 12 pairs with AVX2).
// Blocks nobody sees are skipped, columns nobody of the 6 sees too. Bound: fp32 multiply-adds.
// NOTE: a row's bits depend on its keys only, not on the rows beside it: blocks begin at multiples of 64, hidden keys add
// exact zeros, and chunks are folded as a merge would. So any chunking of a prompt gives the same result.
// Measured: 72-76 % of float32 FMA (2048 tokens, causal, 32/8 heads of 128, 2 cores of Zen 4, November 2026).
#pragma once
#include "attention_decode.h"

namespace headrace {
namespace HEADRACE_ISA {

#if defined(HEADRACE_AVX512)
constexpr int kVectorsTogether = 4;
#else
constexpr int kVectorsTogether = 1;
#endif

// c [rows, vectors x 16] = c * keep + a [rows, depth] b [depth, vectors x 16]; without keep, what was in c is dropped.
// NOTE: unrolled by order, or else gcc keeps the sums in memory at both ends of the loop over the depth.
template <int rows, int vectors>
static inline void outer_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                  int64_t c_stride, int64_t depth, const float* keep) {
  Floats total[rows][vectors], x[vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) total[r][i] = zero();
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    for (int i = 0; i < vectors; ++i) x[i] = load(b + i * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < vectors; ++i) total[r][i] = fma_of(a + r * a_stride + k, x[i], total[r][i]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      float* to = c + r * c_stride + i * kLanes;
      store(to, keep ? fma(load(to), broadcast(keep[r]), total[r][i]) : total[r][i]);
    }
}

struct Product {
  const float *a, *b;
  float* c;
  int64_t a_stride, b_stride, c_stride, depth;
  const float* keep;
};

template <int rows> static void multiply(const Product& p, int64_t columns) {
  int64_t j = 0;
  for (; j + kVectorsTogether * kLanes <= columns; j += kVectorsTogether * kLanes)
    outer_products<rows, kVectorsTogether>(p.a, p.a_stride, p.b + j, p.b_stride, p.c + j, p.c_stride, p.depth, p.keep);
  for (; j < columns; j += kLanes)
    outer_products<rows, 1>(p.a, p.a_stride, p.b + j, p.b_stride, p.c + j, p.c_stride, p.depth, p.keep);
}

static void multiply_rows(int64_t rows, const Product& p, int64_t columns) {
  switch (rows) {
    case 1: return multiply<1>(p, columns);
    case 2: return multiply<2>(p, columns);
    case 3: return multiply<3>(p, columns);
    case 4: return multiply<4>(p, columns);
    case 5: return multiply<5>(p, columns);
    default: return multiply<kRowStep>(p, columns);
  }
}

// Sixteen keys, dimension by dimension: to[dim * 64 + key]. Keys without a place are zero.
template <class E>
static void load_keys(const AttentionCall& c, const typename E::type* base, const Places& places, int64_t first,
                      const float* scales, float* to) {
  for (int64_t j = 0; j < c.head_dim; j += kLanes) {
    Floats square[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      int64_t at = first + i;
      square[i] = at >= 0 && at < places.count ? load_first<E>(E::at(base, places.key[at] + j), c.head_dim - j) : zero();
      if (E::scaled && scales && at >= 0 && at < places.count) square[i] = mul(square[i], broadcast(scales[at]));
    }
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(to + (j + i) * kKeyBlock, square[i]);
  }
}

template <class E>
static void load_value(const AttentionCall& c, const typename E::type* from, const float* scale, float* to) {
  for (int64_t j = 0; j < c.value_dim; j += kLanes) {
    Floats x = load_first<E>(E::at(from, j), c.value_dim - j);
    store(to + j, E::scaled && scale ? mul(x, broadcast(*scale)) : x);
  }
}

// The buffers of a work item (tile_scratch_floats).
struct Tile64 {
  float *query, *keys, *values, *scores, *keep, *factors;
  Gathered rows;

  Tile64(const AttentionCall& c, const AttentionWork& w) {
    int64_t n = num_rows(c, w);
    query = w.scratch;
    keys = query + n * padded_lanes(c.head_dim);
    values = keys + kKeyBlock * padded_lanes(c.head_dim);
    rows.acc = values + kKeyBlock * padded_lanes(c.value_dim);
    rows.sums = rows.acc + n * padded_lanes(c.value_dim);
    rows.whole = rows.sums + n * kLanes;
    scores = rows.whole + n * partial_stride(c);
    keep = scores + kRowStep * kKeyBlock;
    factors = keep + kLanes;
    rows.top = factors + 2 * kKeyBlock;
  }
  Gathered from(const AttentionCall& c, int64_t row) const {
    return {rows.acc + row * padded_lanes(c.value_dim), rows.sums + row * kLanes, rows.top + row, nullptr};
  }
};

// Keys [begin, end) of the block that starts at `start`, zeros around them.
template <class E>
static void load_block(const AttentionCall& c, const AttentionWork& w, int64_t start, int64_t begin, int64_t end, const Tile64& t) {
  Places places;
  find_places(c, w, begin, end, places);
  const auto *keys = keys_of<E>(c, w.head_begin), *values = values_of<E>(c, w.head_begin);
  float *key_scales = c.key_scales ? t.factors : nullptr, *value_scales = c.value_scales ? t.factors + kKeyBlock : nullptr;
  if (key_scales) load_scales(c.key_scales, places.key_scale, places.count, w.head_begin * c.key_scale_strides.head, key_scales);
  if (value_scales) load_scales(c.value_scales, places.value_scale, places.count, w.head_begin * c.value_scale_strides.head, value_scales);
  int64_t skipped = begin - start, width = padded_lanes(c.value_dim);
  for (int64_t first = 0; first < kKeyBlock; first += kLanes)
    load_keys<E>(c, keys, places, first - skipped, key_scales, t.keys + first);
  memset(t.values, 0, static_cast<size_t>(kKeyBlock * width) * 4);
  for (int64_t i = 0; i < places.count; ++i)
    load_value<E>(c, E::at(values, places.value[i]), value_scales ? value_scales + i : nullptr, t.values + (skipped + i) * width);
}

// Up to 6 rows against one block of keys.
static void attend_rows(const AttentionCall& c, const AttentionWork& w, int64_t row, int64_t rows, int64_t start, int64_t begin,
                        int64_t end, const Tile64& t) {
  KeyRange seen = keys_seen(c, w, w.token_begin + row / c.group, w.token_begin + (row + rows - 1) / c.group + 1);
  int64_t from = greater(seen.begin, begin) - start, to = lesser(seen.end, end) - start;
  if (from >= to) return;
  int64_t column = from & ~int64_t{kLanes - 1}, columns = padded_lanes(to) - column;
  int64_t width = padded_lanes(c.value_dim), depth = padded_lanes(c.head_dim);
  multiply_rows(rows, {t.query + row * depth, t.keys + column, t.scores + column, depth, kKeyBlock, kKeyBlock, c.head_dim, nullptr},
                columns);
  int64_t first_token = w.token_begin + row / c.group, last_token = w.token_begin + (row + rows - 1) / c.group;
  bool all_seen = !w.first_keys && from == 0 && to == kKeyBlock && first_key(c, w, last_token) <= start &&
                  last_key(c, w, first_token) >= start + kKeyBlock - 1;
  bool adjusted = !all_seen || c.softcap > 0 || w.alibi || w.mask;
  for (int64_t r = row; adjusted && r < row + rows; ++r) {
    int64_t token = w.token_begin + r / c.group, head = w.head_begin * c.group + r % c.group;
    adjust_scores(c, w, token, head, start, begin, end, t.scores + (r - row) * kKeyBlock);
  }
  Gathered g = t.from(c, row);
  soften(t.scores, rows, g.top, g.sums, t.keep);
  multiply_rows(rows, {t.scores + from, t.values + from * width, g.acc, kKeyBlock, width, width, to - from, t.keep}, width);
}

template <class E> static void attend_rows_of_head(const AttentionCall& c, const AttentionWork& w) {
  int64_t rows = num_rows(c, w), chunk = 0;
  Tile64 t(c, w);
  load_queries(c, w, w.head_begin, t.query);
  begin_chunk(c, rows, t.rows);
  if (w.key_begin >= w.key_end) return finish_chunk(c, w, w.head_begin, t.rows, 0, true);
  for (int64_t start = w.key_begin & ~int64_t{kKeyBlock - 1}; start < w.key_end; start += kKeyBlock) {
    int64_t begin = greater(start, w.key_begin), end = lesser(start + kKeyBlock, w.key_end);
    load_block<E>(c, w, start, begin, end, t);
    for (int64_t r = 0; r < rows; r += kRowStep) attend_rows(c, w, r, lesser(kRowStep, rows - r), start, begin, end, t);
    if (!ends_chunk(w, end)) continue;
    finish_chunk(c, w, w.head_begin, t.rows, chunk++, end == w.key_end);
    if (end < w.key_end) begin_chunk(c, rows, t.rows);
  }
}

static void attend_tile(const AttentionCall& c, const AttentionWork& w) {
  with_cached(c.kv_type, [&](auto element) { attend_rows_of_head<decltype(element)>(c, w); });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
