// attention, many query rows per KV head (prefill), over products of bf16: VDPBF16PS or AMX tiles.
// Wins: more than 16 rows per KV head where queries and keys are bf16, or may be rounded to it.
// Schedule: that of attention_prefill.h; keys and values are packed once per block of 64 for all rows of the item; 32 rows (24
// over vectors) at a time scores, online softmax, weights rounded to bf16, weighted values. Queries stay bf16: the scale is
// applied to the scores. Bound: bf16 products, and over tiles the softmax, which costs about as much as 64 dimensions do.
// Error: scores are sums of exact products in float; weights are rounded to bf16, their sum and all else is float.
#pragma once
#include "attention_decode.h"
#include "softmax_bf16.h"

namespace headrace {
namespace HEADRACE_ISA {

#if defined(HEADRACE_BF16_VECTORS)
constexpr int kSoftRows = 24;  // rows whose scores are there at a time
#else
constexpr int kSoftRows = kProductRows;
#endif
static_assert(kSoftRows <= kMostSoftRows, "");

// The buffers of a work item (tile_scratch_floats: half of what floats take, but for the rows added).
struct TileBf16 {
  uint16_t *query, *keys, *values;
  float *scores, *keep, *factors;
  Gathered rows;
  Multiplier multiplier;

  static int64_t readable(int64_t rows) { return (rows + kRowsReadable - 1) / kRowsReadable * kRowsReadable; }

  TileBf16(const AttentionCall& c, const AttentionWork& w) {
    int64_t n = readable(num_rows(c, w));
    query = reinterpret_cast<uint16_t*>(w.scratch);
    keys = query + n * padded_depth(c.head_dim);
    values = keys + kKeyBlock * padded_depth(c.head_dim);
    rows.acc = reinterpret_cast<float*>(values + kKeyBlock * padded_depth(c.value_dim));
    rows.sums = rows.acc + n * padded_lanes(c.value_dim);
    rows.whole = rows.sums + n * kLanes;
    scores = rows.whole + n * partial_stride(c);
    keep = scores + kSoftRows * kKeyBlock;
    factors = keep + padded_lanes(kSoftRows);
    rows.top = factors + 2 * kKeyBlock;
  }
  Gathered from(const AttentionCall& c, int64_t row) const {
    return {rows.acc + row * padded_lanes(c.value_dim), rows.sums + row * kLanes, rows.top + row, nullptr};
  }
};

// All rows of one KV head: [token][head of the group][padded_depth].
static void load_queries_bf16(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, uint16_t* to) {
  int64_t depth = padded_depth(c.head_dim), rows = num_rows(c, w);
  with_element(c.query_type, [&](auto element) {
    using E = decltype(element);
    for (int64_t r = 0; r < rows; ++r, to += depth) {
      int64_t token = w.token_begin + r / c.group, head = kv_head * c.group + r % c.group;
      const auto* from = reinterpret_cast<const typename E::type*>(w.query) + token * c.query_strides.token + head * c.query_strides.head;
      for (int64_t j = 0; j < c.head_dim; j += kDepthStep) store_words(to + j, load_as_words<E>(from + j, c.head_dim - j));
    }
  });
}

// 32 elements of a key or value from `p` on, n of which exist.
template <class E> static inline Floats load_scaled_words(const typename E::type* p, int64_t n, const float* scale) {
  if (!E::scaled || !scale) return load_as_words<E>(p, n);
  Floats factor = broadcast(*scale);
  return round_words(mul(load_first<E>(p, n), factor), n > kLanes ? mul(load_first<E>(E::at(p, kLanes), n - kLanes), factor) : zero());
}

// Keys of the block that starts at `start`, of which those of `places` exist, from `begin` on; zeros around them.
template <class E>
static void pack_block(const AttentionCall& c, const AttentionWork& w, int64_t start, int64_t begin, const Places& places,
                       const TileBf16& t) {
  const auto *keys = keys_of<E>(c, w.head_begin), *values = values_of<E>(c, w.head_begin);
  bool key_scales = E::scaled && c.key_scales, value_scales = E::scaled && c.value_scales;
  float *key_factors = t.factors, *value_factors = t.factors + kKeyBlock;
  if (key_scales) load_scales(c.key_scales, places.key_scale, places.count, w.head_begin * c.key_scale_strides.head, key_factors);
  if (value_scales) load_scales(c.value_scales, places.value_scale, places.count, w.head_begin * c.value_scale_strides.head, value_factors);
  int64_t skipped = begin - start;
  auto there = [&](int64_t i) { return i >= skipped && i - skipped < places.count; };
  pack_keys(c.head_dim, t.keys, [&](int64_t i, int64_t j) {
    if (!there(i)) return zero();
    const float* scale = key_scales ? key_factors + i - skipped : nullptr;
    return load_scaled_words<E>(E::at(keys, places.key[i - skipped] + j), c.head_dim - j, scale);
  });
  pack_values(c.value_dim, t.values, [&](int64_t i, int64_t j) {
    if (!there(i)) return zero();
    const float* scale = value_scales ? value_factors + i - skipped : nullptr;
    return load_scaled_words<E>(E::at(values, places.value[i - skipped] + j), c.value_dim - j, scale);
  });
}

// Part `part` of `parts` of the block that is packed next. Packing reads keys far apart, which no processor foresees.
template <class E>
static void prefetch_block(const AttentionCall& c, const AttentionWork& w, const Places& places, int64_t part, int64_t parts) {
  const auto *keys = keys_of<E>(c, w.head_begin), *values = values_of<E>(c, w.head_begin);
  asm volatile("");  // NOTE: without an effect, gcc drops calls of functions that only prefetch
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(typename E::type)) * E::per_item;
  for (int64_t i = places.count * part / parts; i < places.count * (part + 1) / parts; ++i) {
    for (int64_t j = 0; j < c.head_dim; j += line) HEADRACE_PREFETCH(E::at(keys, places.key[i] + j));
    for (int64_t j = 0; j < c.value_dim; j += line) HEADRACE_PREFETCH(E::at(values, places.value[i] + j));
  }
}

// Up to kSoftRows rows against one block of keys. What none of them sees is not computed.
static void attend_rows_bf16(const AttentionCall& c, const AttentionWork& w, int64_t row, int64_t rows, int64_t start,
                             int64_t begin, int64_t end, TileBf16& t) {
  int64_t first_token = w.token_begin + row / c.group, last_token = w.token_begin + (row + rows - 1) / c.group;
  KeyRange seen = keys_seen(c, w, first_token, last_token + 1);
  int64_t from = greater(seen.begin, begin) - start, to = lesser(seen.end, end) - start;
  if (from >= to) return;
  int64_t column = from & ~int64_t{kLanes - 1}, depth = padded_depth(c.head_dim);
  t.multiplier.multiply(rows, padded_lanes(to) - column,
                        {t.query + row * depth, t.keys + 2 * column, t.scores + column, depth, 2 * kKeyBlock, kKeyBlock, depth, nullptr});
  bool all_seen = !w.first_keys && from == 0 && to == kKeyBlock && first_key(c, w, last_token) <= start &&
                  last_key(c, w, first_token) >= start + kKeyBlock - 1;
  float factor = static_cast<float>(c.scale);
  if (!all_seen || c.softcap > 0 || w.alibi || w.mask) factor = adjust_rows(c, w, w.head_begin, row, rows, start, begin, end, t.scores);
  Gathered g = t.from(c, row);
  soften_bf16(t.scores, rows, factor, g.top, g.sums, t.keep);
  int64_t first = from & ~int64_t{kDepthStep - 1}, width = padded_lanes(c.value_dim), packed = 2 * padded_depth(c.value_dim);
  const auto* weights = reinterpret_cast<const uint16_t*>(t.scores);
  t.multiplier.multiply(rows, width, {weights + first, t.values + first / 2 * packed, g.acc, 2 * kKeyBlock, packed, width,
                                      padded_depth(to - first), t.keep});
}

template <class E> static void attend_rows_of_head_bf16(const AttentionCall& c, const AttentionWork& w) {
  TileBf16 t(c, w);
  int64_t rows = num_rows(c, w), readable = TileBf16::readable(rows), depth = padded_depth(c.head_dim), chunk = 0;
  load_queries_bf16(c, w, w.head_begin, t.query);
  memset(t.query + rows * depth, 0, static_cast<size_t>((readable - rows) * depth) * 2);
  memset(t.scores, 0, kSoftRows * kKeyBlock * 4);
  begin_chunk(c, readable, t.rows);
  if (w.key_begin >= w.key_end) return finish_chunk(c, w, w.head_begin, t.rows, 0, true);
  Places places;
  find_places(c, w, w.key_begin, lesser((w.key_begin / kKeyBlock + 1) * kKeyBlock, w.key_end), places);
  for (int64_t start = w.key_begin & ~int64_t{kKeyBlock - 1}; start < w.key_end; start += kKeyBlock) {
    int64_t begin = greater(start, w.key_begin), end = lesser(start + kKeyBlock, w.key_end);
    pack_block<E>(c, w, start, begin, places, t);
    find_places(c, w, end, lesser(end + kKeyBlock, w.key_end), places);
    for (int64_t r = 0; r < rows; r += kSoftRows) {
      prefetch_block<E>(c, w, places, r / kSoftRows, (rows + kSoftRows - 1) / kSoftRows);
      attend_rows_bf16(c, w, r, lesser(kSoftRows, rows - r), start, begin, end, t);
    }
    if (!ends_chunk(w, end)) continue;
    finished_tops(t.rows.top, rows);
    finish_chunk(c, w, w.head_begin, t.rows, chunk++, end == w.key_end);
    if (end < w.key_end) begin_chunk(c, readable, t.rows);
  }
}

static void attend_tile_bf16(const AttentionCall& c, const AttentionWork& w) {
  with_cached(c.kv_type, [&](auto element) { attend_rows_of_head_bf16<decltype(element)>(c, w); });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
