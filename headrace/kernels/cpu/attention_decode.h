// attention, few query rows per KV head (decode): each byte of the cache is read once, from memory, in order.
// Wins: up to 16 rows per KV head, where the prefill kernel would convert and transpose keys for too little arithmetic.
// Schedule: a work item is some chunks of keys of one request, for some KV heads; 64 keys at a time, head after head, while
// those due 128 KB later are prefetched; keys are turned in registers, 32 at a time, so that scores end in lanes and their
// products are added in the tile kernel's order; the sum over values in up to 4 x 4 accumulators. Codes are multiplied by
// their scales as scores and weights, once per key, and up to 3 rows times int8 keys by digits of the query
// (attention_codes.h).
// Bound: read bandwidth, as long as few enough query heads share a key: each adds two multiply-adds per key element and
// value element. Error: float32 sums; the exponential is within 2.5e-7.
// Measured: 94 % of a plain read of 134 MB, 40 GB/s from the last-level cache (32/8 heads of 128, bf16, 2 cores of Zen 4,
// November 2026). From L2, 3 rows, heads of 64, float16: 43 cycles per key and KV head, 24 of them multiply-adds.
#pragma once
#include "attention_codes.h"

namespace headrace {
namespace HEADRACE_ISA {

// In registers at a time: groups of sixteen keys, keys, columns of values.
#if defined(HEADRACE_AVX512)
constexpr int kGroupsTogether = 2;
template <int rows> constexpr int kKeysTogether = rows == 1 ? 16 : rows == 2 ? 8 : 4;
template <int rows> constexpr int kColumnsTogether = 4;
#else
constexpr int kGroupsTogether = 1;
template <int rows> constexpr int kKeysTogether = rows == 1 ? 4 : rows == 2 ? 2 : 1;
template <int rows> constexpr int kColumnsTogether = rows == 1 ? 4 : rows == 2 ? 2 : 1;
#endif
constexpr int64_t kLongestChain = 64;  // products that may be added one after the other where another order is allowed

// What will be needed a little later: one KV head of a block of keys. It is prefetched line by line, each at the moment
// its counterpart of now is read: processors drop prefetches that come in bursts.
template <class E> struct Due {
  const typename E::type* keys;
  const typename E::type* values;
  const Places* places;

  const typename E::type* key(int64_t i) const { return E::at(keys, places->key[i]); }
  const typename E::type* value(int64_t i) const { return E::at(values, places->value[i]); }
};
template <class E> constexpr int kLine = 64 * E::per_item / static_cast<int>(sizeof(typename E::type));  // elements
constexpr int64_t kDueBytes = 128 << 10;  // enough to cover memory's latency, little enough to stay in L2

// NOTE: a macro, because gcc takes a function that only prefetches for one without effect, and drops the call.
#define HEADRACE_PREFETCH(p) __builtin_prefetch(p, 0, 2)

// Calls f with a constant: how many of the `left` rows to take together.
template <int n> struct Count {
  static constexpr int value = n;
};
template <class F> static inline int64_t take_rows(int64_t left, F f) {
  if (left >= 4) return f(Count<4>{}), 4;
  if (left == 3) return f(Count<3>{}), 3;
  if (left == 2) return f(Count<2>{}), 2;
  return f(Count<1>{}), 1;
}

// Of the lines that sixteen times `groups` keys have here, those that are due at this step of the elements.
template <class E, int groups> static inline void prefetch_keys(const Due<E>& due, int64_t key, int64_t element) {
  constexpr int steps = kLine<E> / Turned<E>::depth, each = groups * kLanes / steps;
  int64_t step = element / Turned<E>::depth % steps, line = element - step * Turned<E>::depth;
#pragma GCC unroll 32
  for (int i = 0; i < each; ++i) HEADRACE_PREFETCH(E::at(due.keys, due.places->key[key + step * each + i] + line));
}

// acc[r][g] += products of row r of the query, from its first element here, and the sixteen keys of group g.
template <class E, int rows, int groups>
static inline void add_products(const float* query, int64_t stride, const Turned<E> keys[groups], Floats acc[rows][groups]) {
  const float* row[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = query + r * stride;
    asm("" : "+r"(row[r]));  // NOTE: gcc would find the address of every number before the loop, and keep them in memory
  }
#pragma GCC unroll 16
  for (int i = 0; i < Turned<E>::depth; ++i) {
    Floats y[groups];
    for (int g = 0; g < groups; ++g) y[g] = keys[g][i];
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < groups; ++g) acc[r][g] = fma_of(row[r] + i, y[g], acc[r][g]);
  }
}

// scores[r * 64 + i]: query row r times key i, each product added after the one before, as the tile kernel sums them.
template <class E, int rows>
static void score_rows(const AttentionCall& c, const float* query, const typename E::type* base, const Places& places,
                       const Due<E>* due, float* scores) {
  constexpr int groups = kGroupsTogether;
  int64_t stride = padded_lanes(c.head_dim);
  for (int64_t first = 0; first < places.count; first += groups * kLanes) {
    Floats acc[rows][groups];
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < groups; ++g) acc[r][g] = zero();
    for (int64_t j = 0; j < c.head_dim; j += Turned<E>::depth) {
      if (due) prefetch_keys<E, groups>(*due, first, j);
      Turned<E> keys[groups];
      for (int g = 0; g < groups; ++g) keys[g].load(E::at(base, j), places.key + first + g * kLanes, c.head_dim - j);
      add_products<E, rows, groups>(query + j, stride, keys, acc);
    }
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < groups; ++g) store(scores + r * kKeyBlock + first + g * kLanes, acc[r][g]);
  }
}

// For codes, whose bits need not be those of the tile kernel. sums[r * stride + i]: lane sums of query row r times key i, not yet added up.
template <class E, int rows, int keys>
static inline void dot_products(const float* query, int64_t query_stride, const typename E::type* const* key,
                                const typename E::type* const* due, int64_t n, Floats* sums, int stride) {
  Floats acc[rows][keys], x[rows];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) acc[r][i] = zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int r = 0; r < rows; ++r) x[r] = load(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      if (j % kLine<E> == 0) HEADRACE_PREFETCH(E::at(due[i], j));
      Floats y = E::load(E::at(key[i], j));
      for (int r = 0; r < rows; ++r) acc[r][i] = fma(x[r], y, acc[r][i]);
    }
  }
  if (j < n) {
    for (int r = 0; r < rows; ++r) x[r] = load(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      Floats y = load_first<E>(E::at(key[i], j), n - j);
      for (int r = 0; r < rows; ++r) acc[r][i] = fma(x[r], y, acc[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) sums[r * stride + i] = acc[r][i];
}

template <class E, int rows>
static void score_rows_in_lanes(const AttentionCall& c, const float* query, const typename E::type* base, const Places& places,
                       const Due<E>* due, float* scores) {
  constexpr int tile = rows == 3 ? 4 : kLanes / rows, together = kKeysTogether<rows>;
  for (int64_t first = 0; first < places.count; first += tile) {
    const typename E::type *key[tile], *later[tile];
    for (int i = 0; i < tile; ++i) {
      key[i] = E::at(base, places.key[first + i]);
      later[i] = due ? due->key(first + i) : key[i];
    }
    Floats dots[kLanes];
    for (int i = rows * tile; i < kLanes; ++i) dots[i] = zero();
    for (int i = 0; i < tile; i += together)
      dot_products<E, rows, together>(query, padded_lanes(c.head_dim), key + i, later + i, c.head_dim, dots + i, tile);
    float plain[kLanes];
    store(plain, sums_of(dots));
    for (int r = 0; r < rows; ++r) memcpy(scores + r * kKeyBlock + first, plain + r * tile, tile * 4);
  }
}

#if defined(HEADRACE_AVX512)

template <int rows>
static void score_codes(Count<rows>, const AttentionCall& c, const float* query, const int8_t* base, const Places& places, const Due<AsInt8>* due,
                        float* scores) {
  for (int64_t first = 0; first < places.count; first += kLanes) {
    for (int64_t j = 0; due && j < c.head_dim; j += kLine<AsInt8>)
      for (int i = 0; i < kLanes; ++i) HEADRACE_PREFETCH(due->key(first + i) + j);
    score_sixteen<rows>(query, padded_lanes(c.head_dim), base, places.key + first, c.head_dim, scores + first);
  }
}

#endif

// acc [rows, columns of 16 lanes] = acc * keep + weights values, the block summed by itself: sums of sums round less.
// `width`: lanes of the last column that exist.
template <class E, int rows, int columns>
static inline void add_columns(const float* weights, const typename E::type* base, const Places& places, const Due<E>* due,
                               int64_t column, int64_t width, float* acc, int64_t acc_stride, const float* keep) {
  Floats total[rows][columns], x[columns];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) total[r][i] = zero();
  for (int64_t k = 0; k < places.count; ++k) {
    const typename E::type* value = E::at(base, places.value[k] + column);
    if (due)
      for (int i = 0; i < columns * kLanes; i += kLine<E>) HEADRACE_PREFETCH(E::at(due->value(k), column + i));
    for (int i = 0; i < columns; ++i)
      x[i] = width >= kLanes ? E::load(E::at(value, i * kLanes)) : load_first<E>(value, width);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < columns; ++i) total[r][i] = fma_of(weights + r * kKeyBlock + k, x[i], total[r][i]);
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) {
      float* to = acc + r * acc_stride + i * kLanes;
      store(to, fma(load(to), broadcast(keep[r]), total[r][i]));
    }
}

template <class E, int rows>
static void add_values(const AttentionCall& c, const float* weights, const typename E::type* base, const Places& places,
                       const Due<E>* due, float* acc, const float* keep) {
  constexpr int together = kColumnsTogether<rows>;
  int64_t stride = padded_lanes(c.value_dim), j = 0;
  for (; j + together * kLanes <= c.value_dim; j += together * kLanes)
    add_columns<E, rows, together>(weights, base, places, due, j, kLanes, acc + j, stride, keep);
  for (; j < c.value_dim; j += kLanes)
    add_columns<E, rows, 1>(weights, base, places, due, j, c.value_dim - j, acc + j, stride, keep);
}

template <class E> static const typename E::type* keys_of(const AttentionCall& c, int64_t kv_head) {
  return E::at(reinterpret_cast<const typename E::type*>(c.keys), kv_head * c.key_strides.head);
}
template <class E> static const typename E::type* values_of(const AttentionCall& c, int64_t kv_head) {
  return E::at(reinterpret_cast<const typename E::type*>(c.values), kv_head * c.value_strides.head);
}

// One block of keys against the rows of one KV head. `factors`: 2 x 64 floats of scratch.
template <class E>
static void attend_block(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, int64_t begin, const Places& places,
                         const Due<E>& later, const float* query, const Gathered& g, float* scores, float* keep, float* factors) {
  int64_t rows = num_rows(c, w);
  const auto *keys = keys_of<E>(c, kv_head), *values = values_of<E>(c, kv_head);
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) {
      const float* from = query + r * padded_lanes(c.head_dim);
      const Due<E>* due = r ? nullptr : &later;
      if constexpr (kByDigits<E>)
        if (by_digits<E>(rows)) return score_codes(n, c, from, keys, places, due, scores + r * kKeyBlock);
      if (!w.in_order && (E::scaled || c.head_dim > kLongestChain))
        score_rows_in_lanes<E, decltype(n)::value>(c, from, keys, places, due, scores + r * kKeyBlock);
      else
        score_rows<E, decltype(n)::value>(c, from, keys, places, due, scores + r * kKeyBlock);
    });
  bool key_scales = E::scaled && c.key_scales, value_scales = E::scaled && c.value_scales;
  if (key_scales) load_scales(c.key_scales, places.key_scale, places.count, kv_head * c.key_scale_strides.head, factors);
  if (value_scales) load_scales(c.value_scales, places.value_scale, places.count, kv_head * c.value_scale_strides.head, factors + kKeyBlock);
  bool adjusted = places.count < kKeyBlock || w.query_len > 1 || w.first_keys || w.mask || w.alibi || c.softcap > 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (key_scales) multiply_by(scores + r * kKeyBlock, factors, kKeyBlock);
    int64_t token = w.token_begin + r / c.group, head = kv_head * c.group + r % c.group;
    if (adjusted) adjust_scores(c, w, token, head, begin, begin, begin + places.count, scores + r * kKeyBlock);
  }
  soften(scores, rows, g.top, g.sums, keep);
  for (int64_t r = 0; value_scales && r < rows; ++r) multiply_by(scores + r * kKeyBlock, factors + kKeyBlock, kKeyBlock);
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) {
      float* acc = g.acc + r * padded_lanes(c.value_dim);
      add_values<E, decltype(n)::value>(c, scores + r * kKeyBlock, values, places, r ? nullptr : &later, acc, keep + r);
    });
}

// The buffers of a work item, carved out of its scratch (few_scratch_floats).
struct FewScratch {
  float *query, *acc, *sums, *top, *whole, *scores, *keep, *factors;
  int64_t heads, rows;

  FewScratch(const AttentionCall& c, const AttentionWork& w) : heads(w.head_end - w.head_begin), rows(num_rows(c, w)) {
    query = w.scratch;
    acc = query + heads * rows * padded_lanes(c.head_dim);
    sums = acc + heads * rows * padded_lanes(c.value_dim);
    whole = sums + heads * rows * kLanes;
    top = whole + heads * rows * partial_stride(c);
    scores = top + heads * padded_lanes(rows);
    keep = scores + rows * kKeyBlock;
    factors = keep + padded_lanes(rows);
  }
  float* query_of(const AttentionCall& c, int64_t head) const { return query + head * rows * padded_lanes(c.head_dim); }
  Gathered of_head(const AttentionCall& c, int64_t head) const {
    return {acc + head * rows * padded_lanes(c.value_dim), sums + head * rows * kLanes, top + head * padded_lanes(rows),
            whole + head * rows * partial_stride(c)};
  }
};

template <class E> static int64_t due_heads(const AttentionCall& c, int64_t heads) {
  int64_t bytes = kKeyBlock * (c.head_dim + c.value_dim) * static_cast<int64_t>(sizeof(typename E::type));
  return lesser(greater(kDueBytes / bytes, 1), heads);
}

// The KV head that is due kDueBytes after number `head` of the item: of this block, or of the next one, whose item's heads
// begin at `next_begin`.
template <class E>
static Due<E> due_after(const AttentionCall& c, const AttentionWork& w, int64_t head, const Places* now, const Places* next, int64_t next_begin) {
  int64_t heads = w.head_end - w.head_begin, due = head + due_heads<E>(c, heads);
  bool later = due >= heads && next->count;
  int64_t kv_head = later ? next_begin + due - heads : w.head_begin + due % heads;
  return {keys_of<E>(c, kv_head), values_of<E>(c, kv_head), later ? next : now};
}

// What an item begins with is prefetched by the one before, if there is one, as far as that has keys in its last block.
// The rest is read in order, as here: then it comes several times faster than as it is used.
template <class E>
static void touch(const typename E::type* base, const int64_t* places, int64_t count, int64_t heads, int64_t head_stride, int64_t n) {
  if (head_stride == n) n *= heads, heads = 1;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      const volatile char* from = reinterpret_cast<const volatile char*>(E::at(base, places[i] + h * head_stride));
      for (size_t j = 0; j < items<E>(n) * sizeof(typename E::type); j += 64) static_cast<void>(from[j]);
    }
}
template <class E> static void touch_first(const AttentionCall& c, const AttentionWork& w, const Places& places) {
  int64_t heads = due_heads<E>(c, w.head_end - w.head_begin), first = w.fetched, count = places.count - first;
  touch<E>(keys_of<E>(c, w.head_begin), places.key + first, count, heads, c.key_strides.head, c.head_dim);
  touch<E>(values_of<E>(c, w.head_begin), places.value + first, count, heads, c.value_strides.head, c.value_dim);
}

// Blocks of keys in order, each against every KV head of the item. `block(head, begin, places, due)` is one of them.
template <class E, class Block, class Finish>
static void walk_blocks(const AttentionCall& c, const AttentionWork& w, Block block, Finish finish) {
  if (w.key_begin >= w.key_end) return finish(0, true);
  Places places[2], *now = &places[0], *next = &places[1];
  auto find = [&](const AttentionWork& of, int64_t begin, Places& places) {
    int64_t end = lesser((begin / kKeyBlock + 1) * kKeyBlock, of.key_end);
    find_places(c, of, begin, end, places);
    return end;
  };
  int64_t end = find(w, w.key_begin, *now), next_end = 0, chunk = 0;
  touch_first<E>(c, w, *now);
  for (int64_t begin = w.key_begin; begin < w.key_end; begin = end, end = next_end) {
    const AttentionWork* after = end < w.key_end ? &w : w.following;
    next->count = 0;
    if (after) next_end = find(*after, after == &w ? end : after->key_begin, *next);
    int64_t next_begin = after ? after->head_begin : 0;
    for (int64_t h = 0; h < w.head_end - w.head_begin; ++h) block(h, begin, *now, due_after<E>(c, w, h, now, next, next_begin));
    if (ends_chunk(w, end)) finish(chunk++, end == w.key_end);
    Places* done = now;
    now = next;
    next = done;
  }
}

template <class E> static void attend_chunks(const AttentionCall& c, const AttentionWork& w) {
  FewScratch s(c, w);
  for (int64_t h = 0; h < s.heads; ++h) {
    load_queries(c, w, w.head_begin + h, s.query_of(c, h));
#if defined(HEADRACE_AVX512)
    for (int64_t r = 0; by_digits<E>(s.rows) && r < s.rows; ++r)
      take_digits(s.query_of(c, h) + r * padded_lanes(c.head_dim), padded_lanes(c.head_dim));
#endif
    begin_chunk(c, s.rows, s.of_head(c, h));
  }
  auto block = [&](int64_t h, int64_t begin, const Places& now, const Due<E>& due) {
    attend_block<E>(c, w, w.head_begin + h, begin, now, due, s.query_of(c, h), s.of_head(c, h), s.scores, s.keep, s.factors);
  };
  walk_blocks<E>(c, w, block, [&](int64_t chunk, bool last) {
    for (int64_t h = 0; h < s.heads; ++h) {
      finish_chunk(c, w, w.head_begin + h, s.of_head(c, h), chunk, last);
      if (!last) begin_chunk(c, s.rows, s.of_head(c, h));
    }
  });
}

static void attend_few(const AttentionCall& c, const AttentionWork& w) {
  with_cached(c.kv_type, [&](auto element) { attend_chunks<decltype(element)>(c, w); });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
