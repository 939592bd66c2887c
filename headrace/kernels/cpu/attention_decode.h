// paged attention, few query rows per KV head (decode): each byte of the cache is read once, from memory, in order.
// Wins: up to 16 rows per KV head, where the prefill kernel would convert and transpose keys for too little arithmetic.
// Schedule: a work item is a chunk of keys of one request and some KV heads; 64 keys at a time, head after head, while the
// next 64 x head is prefetched; scores as 16 dot products in 16 accumulators, reduced together by a transpose; the sum
// over values in up to 4 x 4 accumulators. Chunks are merged in a second phase. Bound: read bandwidth.
#pragma once
#include "attention.h"

namespace headrace {
namespace HEADRACE_ISA {

// Rows x keys of dot products in registers at a time, and columns of values.
#if defined(HEADRACE_AVX512)
template <int rows> constexpr int kKeysTogether = rows == 1 ? 16 : rows == 2 ? 8 : 4;
template <int rows> constexpr int kColumnsTogether = 4;
#else
template <int rows> constexpr int kKeysTogether = rows == 1 ? 4 : rows == 2 ? 2 : 1;
template <int rows> constexpr int kColumnsTogether = rows == 1 ? 4 : rows == 2 ? 2 : 1;
#endif
constexpr int kRowsTogether = 4;

// What to bring closer while something else is computed: some keys of the next block, all KV heads of the work item.
struct Ahead {
  const char* keys;
  const char* values;
  const Places* places;
  int64_t key_bytes, value_bytes, item_bytes, begin, end;
};

// NOTE: gcc takes a function that only prefetches for one without effect and drops the call, unless it is inlined first.
__attribute__((always_inline)) static inline void prefetch_bytes(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Part `step` of `steps`.
__attribute__((always_inline)) static inline void prefetch_part(const Ahead& a, int64_t step, int64_t steps) {
  int64_t n = a.end - a.begin;
  for (int64_t i = a.begin + n * step / steps; i < a.begin + n * (step + 1) / steps; ++i) {
    prefetch_bytes(a.keys + a.places->key[i] * a.item_bytes, a.key_bytes);
    prefetch_bytes(a.values + a.places->value[i] * a.item_bytes, a.value_bytes);
  }
}

// sums[r * stride + i]: lane sums of query row r times key i, not yet added up.
template <class E, int rows, int keys>
static inline void dot_products(const float* query, int64_t query_stride, const typename E::type* const* key, int64_t n,
                                Floats* sums, int stride) {
  Floats acc[rows][keys], x[rows];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) acc[r][i] = zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int r = 0; r < rows; ++r) x[r] = load(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      Floats y = E::load(key[i] + j);
      for (int r = 0; r < rows; ++r) acc[r][i] = fma(x[r], y, acc[r][i]);
    }
  }
  if (j < n) {
    for (int r = 0; r < rows; ++r) x[r] = load(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      Floats y = load_first<E>(key[i] + j, n - j);
      for (int r = 0; r < rows; ++r) acc[r][i] = fma(x[r], y, acc[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) sums[r * stride + i] = acc[r][i];
}

template <class E, int rows>
static void score_rows(const AttentionCall& c, const float* query, const typename E::type* base, const Places& places,
                       const Ahead& ahead, float* scores) {
  constexpr int tile = rows == 3 ? 4 : kLanes / rows, together = kKeysTogether<rows>;
  for (int64_t first = 0; first < places.count; first += tile) {
    prefetch_part(ahead, first / tile, kKeyBlock / tile);
    const typename E::type* key[tile];
    for (int i = 0; i < tile; ++i) key[i] = base + places.key[lesser(first + i, places.count - 1)];
    Floats dots[kLanes];
    for (int i = rows * tile; i < kLanes; ++i) dots[i] = zero();
    for (int i = 0; i < tile; i += together)
      dot_products<E, rows, together>(query, padded_lanes(c.head_dim), key + i, c.head_dim, dots + i, tile);
    float plain[kLanes];
    store(plain, sums_of(dots));
    for (int r = 0; r < rows; ++r) memcpy(scores + r * kKeyBlock + first, plain + r * tile, tile * 4);
  }
}

// acc [rows, columns of 16 lanes] = acc * keep + weights values, the block summed by itself: sums of sums round less.
// `width`: lanes of the last column that exist.
template <class E, int rows, int columns>
static inline void add_columns(const float* weights, const typename E::type* base, const Places& places, int64_t width,
                               float* acc, int64_t acc_stride, const float* keep) {
  Floats total[rows][columns], x[columns];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) total[r][i] = zero();
  for (int64_t k = 0; k < places.count; ++k) {
    const typename E::type* value = base + places.value[k];
    for (int i = 0; i < columns; ++i) x[i] = width >= kLanes ? E::load(value + i * kLanes) : load_first<E>(value, width);
    for (int r = 0; r < rows; ++r) {
      Floats weight = broadcast(weights[r * kKeyBlock + k]);
      for (int i = 0; i < columns; ++i) total[r][i] = fma(weight, x[i], total[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) {
      float* to = acc + r * acc_stride + i * kLanes;
      store(to, fma(load(to), broadcast(keep[r]), total[r][i]));
    }
}

template <class E, int rows>
static void add_values(const AttentionCall& c, const float* weights, const typename E::type* base, const Places& places,
                       float* acc, const float* keep) {
  constexpr int together = kColumnsTogether<rows>;
  int64_t stride = padded_lanes(c.value_dim), j = 0;
  for (; j + together * kLanes <= c.value_dim; j += together * kLanes)
    add_columns<E, rows, together>(weights, base + j, places, kLanes, acc + j, stride, keep);
  for (; j < c.value_dim; j += kLanes)
    add_columns<E, rows, 1>(weights, base + j, places, c.value_dim - j, acc + j, stride, keep);
}

// Rows of one KV head and what has been accumulated for them.
struct FewRows {
  float* query;  // [rows, padded head_dim], scaled
  float* acc;    // [rows, padded value_dim]
  float* sums;   // [rows, 16]
  float* top;    // [rows]
};

template <class E, int rows>
static void score_group(const AttentionCall& c, const FewRows& f, int64_t row, const typename E::type* keys,
                        const Places& places, const Ahead& ahead, float* scores) {
  score_rows<E, rows>(c, f.query + row * padded_lanes(c.head_dim), keys, places, row ? Ahead{} : ahead, scores + row * kKeyBlock);
}

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

// One block of keys against the rows of one KV head.
template <class E>
static void attend_block(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, int64_t begin, const Places& places,
                         const Ahead& ahead, const FewRows& f, float* scores, float* keep) {
  int64_t rows = (w.token_end - w.token_begin) * c.group;
  const auto* keys = reinterpret_cast<const typename E::type*>(c.key_pages) + kv_head * c.head_dim;
  const auto* values = reinterpret_cast<const typename E::type*>(c.value_pages) + kv_head * c.value_dim;
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) { score_group<E, decltype(n)::value>(c, f, r, keys, places, ahead, scores); });
  if (c.softcap > 0) cap_scores(scores, rows * kKeyBlock, c.softcap);
  if (places.count < kKeyBlock || w.query_len > 1)
    for (int64_t r = 0; r < rows; ++r) {
      int64_t last = last_key(w, w.token_begin + r / c.group);
      hide_outside(scores + r * kKeyBlock, first_key(c, last) - begin, lesser(last + 1 - begin, places.count));
    }
  soften(scores, rows, f.top, f.sums, keep);
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) {
      add_values<E, decltype(n)::value>(c, scores + r * kKeyBlock, values, places, f.acc + r * padded_lanes(c.value_dim), keep + r);
    });
}

// The buffers of a work item, carved out of its scratch (few_scratch_floats).
struct FewScratch {
  float *query, *acc, *sums, *top, *scores, *keep;

  FewScratch(const AttentionCall& c, float* memory, int64_t heads, int64_t rows) {
    query = memory;
    acc = query + heads * rows * padded_lanes(c.head_dim);
    sums = acc + heads * rows * padded_lanes(c.value_dim);
    top = sums + heads * rows * kLanes;
    scores = top + heads * padded_lanes(rows);
    keep = scores + rows * kKeyBlock;
  }
  FewRows of_head(const AttentionCall& c, int64_t head, int64_t rows) const {
    return {query + head * rows * padded_lanes(c.head_dim), acc + head * rows * padded_lanes(c.value_dim),
            sums + head * rows * kLanes, top + head * padded_lanes(rows)};
  }
};

// The share of the next block that is prefetched while KV head number `head` of the item is computed.
template <class E>
static Ahead ahead_of(const AttentionCall& c, const AttentionWork& w, int64_t head, const Places& next) {
  constexpr int64_t item = sizeof(typename E::type);
  int64_t heads = w.head_end - w.head_begin;
  return {c.key_pages + w.head_begin * c.head_dim * item, c.value_pages + w.head_begin * c.value_dim * item, &next,
          heads * c.head_dim * item, heads * c.value_dim * item, item, next.count * head / heads,
          next.count * (head + 1) / heads};
}

template <class E> static void attend_chunk(const AttentionCall& c, const AttentionWork& w) {
  int64_t heads = w.head_end - w.head_begin, rows = (w.token_end - w.token_begin) * c.group;
  FewScratch s(c, w.scratch, heads, rows);
  Places places[2];
  for (int64_t h = 0; h < heads; ++h) load_queries(c, w, w.head_begin + h, s.of_head(c, h, rows).query);
  for (int64_t h = 0; h < heads; ++h) {
    FewRows f = s.of_head(c, h, rows);
    clear_rows(rows, padded_lanes(c.value_dim), f.acc, f.top, f.sums);
  }
  auto block_end = [&](int64_t begin) { return lesser((begin / kKeyBlock + 1) * kKeyBlock, w.key_end); };
  Places *now = &places[0], *next = &places[1];
  if (w.key_begin < w.key_end) find_places(c, w.pages, w.key_begin, block_end(w.key_begin), *now);
  for (int64_t begin = w.key_begin; begin < w.key_end;) {
    int64_t end = block_end(begin);
    next->count = 0;
    if (end < w.key_end) find_places(c, w.pages, end, block_end(end), *next);
    for (int64_t h = 0; h < heads; ++h) {
      Ahead ahead = ahead_of<E>(c, w, h, *next);
      attend_block<E>(c, w, w.head_begin + h, begin, *now, ahead, s.of_head(c, h, rows), s.scores, s.keep);
    }
    Places* done = now;
    now = next;
    next = done;
    begin = end;
  }
  for (int64_t h = 0; h < heads; ++h) {
    FewRows f = s.of_head(c, h, rows);
    finish_rows(c, w, w.head_begin + h, f.acc, f.top, f.sums);
  }
}

static void attend_few(const AttentionCall& c, const AttentionWork& w) {
  with_element(c.kv_type, [&](auto element) { attend_chunk<decltype(element)>(c, w); });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
