// attention, many query rows per KV head (prefill), over products of bf16: VDPBF16PS or AMX tiles.
// Wins: more than 16 rows per KV head where queries and keys are bf16, or may be rounded to it.
// Schedule: that of attention_prefill.h; keys and values are packed once per block of 64 for all rows of the item; 24 rows at a
// time (32 over tiles) scores, online softmax, weights rounded to bf16, weighted values. Over tiles the softmax costs nearly
// what the products do: it runs between those of the rows after and of the rows before. Queries stay bf16: the scale is
// applied to the scores. Bound: bf16 products. Zen 4, one core: 2048 causal tokens, 32 and 8 heads of 128, at 72 % of what
// VDPBF16PS reaches alone, 1.95 times the float kernel (November 2026). Over tiles: not measured, tested on emulated ones.
// Error: scores are sums of exact products in float; weights are rounded to bf16, their sum and all else is float.
#pragma once
#include "attention_decode.h"
#include "softmax_bf16.h"

namespace headrace {
namespace HEADRACE_ISA {

#if defined(HEADRACE_BF16_VECTORS)
constexpr int kSoftRows = 24;  // rows that are softened together
constexpr int kStages = 1;     // groups of them under way at a time
#else
constexpr int kSoftRows = kProductRows;
constexpr int kStages = 3;
#endif
static_assert(kSoftRows * kStages <= kMostSoftRows, "");

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
    keep = scores + kStages * kSoftRows * kKeyBlock;
    factors = keep + padded_lanes(kStages * kSoftRows);
    rows.top = factors + 2 * kKeyBlock;
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

// Keys of the block that starts at `start`, of which those of `places` exist, from `begin` on; zeros around them. Beside each
// load stands a prefetch of its counterpart in the block after: they lie far apart, which no processor foresees.
template <class E>
static void pack_block(const AttentionCall& c, const AttentionWork& w, int64_t start, int64_t begin, const Places& places,
                       const Places& next, const TileBf16& t) {
  const auto *keys = keys_of<E>(c, w.head_begin), *values = values_of<E>(c, w.head_begin);
  bool key_scales = E::scaled && c.key_scales, value_scales = E::scaled && c.value_scales;
  float *key_factors = t.factors, *value_factors = t.factors + kKeyBlock;
  if (key_scales) load_scales(c.key_scales, places.key_scale, places.count, w.head_begin * c.key_scale_strides.head, key_factors);
  if (value_scales) load_scales(c.value_scales, places.value_scale, places.count, w.head_begin * c.value_scale_strides.head, value_factors);
  int64_t skipped = begin - start;
  constexpr int64_t bytes = kDepthStep * static_cast<int64_t>(sizeof(typename E::type)) / E::per_item;
  auto there = [&](int64_t i) { return i >= skipped && i - skipped < places.count; };
  pack_keys(c.head_dim, t.keys, [&](int64_t i, int64_t j) {
    for (int64_t b = 0; i < next.count && b < bytes; b += 64)
      HEADRACE_PREFETCH(reinterpret_cast<const char*>(E::at(keys, next.key[i] + j)) + b);
    if (!there(i)) return zero();
    const float* scale = key_scales ? key_factors + i - skipped : nullptr;
    return load_scaled_words<E>(E::at(keys, places.key[i - skipped] + j), c.head_dim - j, scale);
  });
  pack_values(c.value_dim, t.values, [&](int64_t i, int64_t j) {
    for (int64_t b = 0; i < next.count && b < bytes; b += 64)
      HEADRACE_PREFETCH(reinterpret_cast<const char*>(E::at(values, next.value[i] + j)) + b);
    if (!there(i)) return zero();
    const float* scale = value_scales ? value_factors + i - skipped : nullptr;
    return load_scaled_words<E>(E::at(values, places.value[i - skipped] + j), c.value_dim - j, scale);
  });
}

// Up to kSoftRows rows against one block of keys. What none of them sees, outside [from, to) of the block, is not computed.
struct SoftGroup {
  int64_t row, rows, from, to;
  bool all_seen;
  float *scores, *keep;
};

static SoftGroup group_of(const AttentionCall& c, const AttentionWork& w, int64_t number, int64_t start, int64_t begin, int64_t end,
                          const TileBf16& t) {
  int64_t row = number * kSoftRows, rows = lesser(kSoftRows, num_rows(c, w) - row), stage = number % kStages;
  int64_t first_token = w.token_begin + row / c.group, last_token = w.token_begin + (row + rows - 1) / c.group;
  KeyRange seen = keys_seen(c, w, first_token, last_token + 1);
  int64_t from = greater(seen.begin, begin) - start, to = lesser(seen.end, end) - start;
  bool all_seen = !w.first_keys && from == 0 && to == kKeyBlock && first_key(c, w, last_token) <= start &&
                  last_key(c, w, first_token) >= start + kKeyBlock - 1;
  return {row, rows, from, to, all_seen, t.scores + stage * kSoftRows * kKeyBlock, t.keep + stage * kSoftRows};
}

static void plan_scores(const AttentionCall& c, const SoftGroup& g, TileBf16& t) {
  if (g.from >= g.to) return;
  int64_t column = g.from & ~int64_t{kLanes - 1}, depth = padded_depth(c.head_dim);
  t.multiplier.plan(g.rows, padded_lanes(g.to) - column, {t.query + g.row * depth, t.keys + 2 * column, g.scores + column, depth,
                                                          2 * kKeyBlock, kKeyBlock, depth, nullptr});
}

static void plan_values(const AttentionCall& c, const SoftGroup& g, TileBf16& t) {
  if (g.from >= g.to) return;
  int64_t first = g.from & ~int64_t{kDepthStep - 1}, width = padded_lanes(c.value_dim), packed = 2 * padded_depth(c.value_dim);
  const auto* weights = reinterpret_cast<const uint16_t*>(g.scores);
  t.multiplier.plan(g.rows, width, {weights + first, t.values + first / 2 * packed, t.rows.acc + g.row * width, 2 * kKeyBlock,
                                    packed, width, padded_depth(g.to - first), g.keep});
}

static void soften_group(const AttentionCall& c, const AttentionWork& w, const SoftGroup& g, int64_t start, int64_t begin,
                         int64_t end, TileBf16& t) {
  if (g.from >= g.to) return;
  bool adjusted = !g.all_seen || c.softcap > 0 || w.alibi || w.mask;
  float factor = static_cast<float>(c.scale);
  if (adjusted) factor = adjust_rows(c, w, w.head_begin, g.row, g.rows, start, begin, end, g.scores);
  soften_bf16(g.scores, g.rows, factor, t.rows.top + g.row, t.rows.sums + g.row * kLanes, g.keep, [&] { t.multiplier.step(); });
}

// All rows against one block. With three stages, products of the group after and of the group before are planned, and
// computed while this one is softened; with one, a plan is a product computed at once.
static void attend_groups(const AttentionCall& c, const AttentionWork& w, int64_t start, int64_t begin, int64_t end, TileBf16& t) {
  constexpr int late = kStages / 2;
  int64_t groups = (num_rows(c, w) + kSoftRows - 1) / kSoftRows;
  SoftGroup all[kStages];
  for (int64_t i = 0; i < groups + 2 * late; ++i) {
    if (i < groups) {
      all[i % kStages] = group_of(c, w, i, start, begin, end, t);
      plan_scores(c, all[i % kStages], t);
    }
    int64_t weighted = i - 2 * late, softened = i - late;
    if (late && weighted >= 0) plan_values(c, all[weighted % kStages], t);
    if (softened >= 0 && softened < groups) soften_group(c, w, all[softened % kStages], start, begin, end, t);
    if (!late) plan_values(c, all[0], t);
    t.multiplier.finish();
  }
}

template <class E> static void attend_rows_of_head_bf16(const AttentionCall& c, const AttentionWork& w) {
  TileBf16 t(c, w);
  int64_t rows = num_rows(c, w), readable = TileBf16::readable(rows), depth = padded_depth(c.head_dim), chunk = 0;
  load_queries_bf16(c, w, w.head_begin, t.query);
  memset(t.query + rows * depth, 0, static_cast<size_t>((readable - rows) * depth) * 2);
  memset(t.scores, 0, kStages * kSoftRows * kKeyBlock * 4);
  begin_chunk(c, readable, t.rows);
  if (w.key_begin >= w.key_end) return finish_chunk(c, w, w.head_begin, t.rows, 0, true);
  Places places[2];
  int now = 0;
  find_places(c, w, w.key_begin, lesser((w.key_begin / kKeyBlock + 1) * kKeyBlock, w.key_end), places[now]);
  for (int64_t start = w.key_begin & ~int64_t{kKeyBlock - 1}; start < w.key_end; start += kKeyBlock) {
    int64_t begin = greater(start, w.key_begin), end = lesser(start + kKeyBlock, w.key_end);
    int next = end < w.key_end ? 1 - now : now;
    if (next != now) find_places(c, w, end, lesser(end + kKeyBlock, w.key_end), places[next]);
    pack_block<E>(c, w, start, begin, places[now], places[next], t);
    now = next;
    attend_groups(c, w, start, begin, end, t);
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
