// attention, few query rows per KV head (decode), over products of bf16 pairs: for keys and values that lie there in bf16.
// Wins: where attention_decode.h does and several rows share a key: VDPBF16PS multiplies twice as much per instruction, and
// nothing is converted. Schedule: that of attention_decode.h; scores from 32 elements of a key at a time, as they lie in
// memory; values from two tokens at a time, interleaved in registers, by pairs of weights rounded to bf16.
// Bound: where memory is not, 53 cycles per key of 128 elements and its value for 4 rows, half of them multiply-adds: 1.7 times
// the float kernel (Zen 4, November 2026). Error: as in attention_bf16.h.
// From memory: 84-88 % of a plain read of 134 MB, 71-79 % when memory was fastest (the same machine).
#pragma once
#include "attention_bf16.h"

#if defined(HEADRACE_BF16_VECTORS)
namespace headrace {
namespace HEADRACE_ISA {

constexpr int kWeightStride = 2 * kKeyBlock;  // a row's weights take the first half of its scores

// The same lines once more, a little later, for processors drop prefetches: 3 to 7 % more from memory on Zen 4, 2 % less from
// the last-level cache.
static inline void ask_again(const uint16_t* const* due, int n, int64_t j, int lines = 1) {
  asm volatile("");  // NOTE: without an effect, gcc drops calls of functions that only prefetch
  for (int i = 0; i < n; ++i)
    for (int line = 0; line < lines; ++line) HEADRACE_PREFETCH(due[i] + j + line * 32);
}

// sums[r * stride + i]: lane sums of query row r times key i, not yet added up.
template <int rows, int keys>
static inline void dot_products_bf16(const uint16_t* query, int64_t query_stride, const uint16_t* const* key,
                                     const uint16_t* const* due, int64_t n, Floats* sums, int stride) {
  Floats acc[rows][keys], x[rows];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) acc[r][i] = zero();
  int64_t j = 0;
  for (; j + kDepthStep <= n; j += kDepthStep) {
    for (int r = 0; r < rows; ++r) x[r] = load_words(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      HEADRACE_PREFETCH(due[i] + j);
      Floats y = load_words(key[i] + j);
      if (i == keys - 1) ask_again(due, keys, j);
      for (int r = 0; r < rows; ++r) acc[r][i] = dot_pairs(acc[r][i], x[r], y);
    }
  }
  if (j < n) {
    for (int r = 0; r < rows; ++r) x[r] = load_words(query + r * query_stride + j);
    for (int i = 0; i < keys; ++i) {
      Floats y = load_as_words<AsBf16>(key[i] + j, n - j);
      for (int r = 0; r < rows; ++r) acc[r][i] = dot_pairs(acc[r][i], x[r], y);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < keys; ++i) sums[r * stride + i] = acc[r][i];
}

template <int rows>
static void score_rows_bf16(const AttentionCall& c, const uint16_t* query, const uint16_t* base, const Places& places,
                            const Due<AsBf16>& due, float* scores) {
  constexpr int tile = rows == 3 ? 4 : kLanes / rows, together = kKeysTogether<rows>;
  for (int64_t first = 0; first < places.count; first += tile) {
    const uint16_t *key[tile], *later[tile];
    for (int i = 0; i < tile; ++i) {
      key[i] = base + places.key[first + i];
      later[i] = due.key(first + i);
    }
    Floats dots[kLanes];
    for (int i = rows * tile; i < kLanes; ++i) dots[i] = zero();
    for (int i = 0; i < tile; i += together)
      dot_products_bf16<rows, together>(query, padded_depth(c.head_dim), key + i, later + i, c.head_dim, dots + i, tile);
    float plain[kLanes];
    store(plain, sums_of(dots));
    for (int r = 0; r < rows; ++r) memcpy(scores + r * kKeyBlock + first, plain + r * tile, tile * 4);
  }
}

// The same, each pair of products after the one before, as the tile kernel sums them: pairs of sixteen keys are transposed.
template <int rows>
static void score_rows_bf16_in_order(const AttentionCall& c, const uint16_t* query, const uint16_t* base, const Places& places,
                                     const Due<AsBf16>& due, float* scores) {
  int64_t stride = padded_depth(c.head_dim);
  for (int64_t first = 0; first < places.count; first += kLanes) {
    Floats acc[rows], square[kLanes];
    for (int r = 0; r < rows; ++r) acc[r] = zero();
    for (int64_t j = 0; j < c.head_dim; j += kDepthStep) {
      for (int i = 0; i < kLanes; ++i) {
        HEADRACE_PREFETCH(due.key(first + i) + j);
        square[i] = load_as_words<AsBf16>(base + places.key[first + i] + j, c.head_dim - j);
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i)
        for (int r = 0; r < rows; ++r) acc[r] = dot_pairs(acc[r], square[i], broadcast_pair(query + r * stride + j + 2 * i));
    }
    for (int r = 0; r < rows; ++r) store(scores + r * kKeyBlock + first, acc[r]);
  }
}

// acc [rows, 32 x columns] = acc * keep + weights values, two tokens at a time. `width`: of the last 32, how many exist.
template <int rows, int columns>
static inline void add_columns_bf16(const uint16_t* weights, const uint16_t* base, const Places& places, const Due<AsBf16>& due,
                                    int64_t column, int64_t width, float* acc, int64_t acc_stride, const float* keep) {
  constexpr int vectors = 2 * columns;
  Floats total[rows][vectors];  // NOTE: loops over it are unrolled by order, or else gcc keeps it in memory
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) total[r][i] = zero();
  for (int64_t k = 0; k < places.count; k += 2) {
    int64_t second = lesser(k + 1, places.count - 1);  // where there is none: any, its weight is 0
    const uint16_t *value = base + places.value[k] + column, *next = base + places.value[second] + column;
    const uint16_t *later = due.value(k) + column, *later_next = due.value(second) + column;
    Floats x[vectors];
    for (int i = 0; i < columns; ++i) {
      HEADRACE_PREFETCH(later + i * 32);
      HEADRACE_PREFETCH(later_next + i * 32);
      Floats one = load_as_words<AsBf16>(value + i * 32, width), other = load_as_words<AsBf16>(next + i * 32, width);
      interleave(one, other, x[2 * i], x[2 * i + 1]);
    }
    ask_again(&later, 1, 0, columns);
    ask_again(&later_next, 1, 0, columns);
    for (int r = 0; r < rows; ++r) {
      Floats weight = broadcast_pair(weights + r * kWeightStride + k);
      for (int i = 0; i < vectors; ++i) total[r][i] = dot_pairs(total[r][i], x[i], weight);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      if (i % 2 == 1 && width <= kLanes) continue;
      float* to = acc + r * acc_stride + i * kLanes;
      store(to, fma(load(to), broadcast(keep[r]), total[r][i]));
    }
}

template <int rows>
static void add_values_bf16(const AttentionCall& c, const uint16_t* weights, const uint16_t* base, const Places& places,
                            const Due<AsBf16>& due, float* acc, const float* keep) {
  int64_t stride = padded_lanes(c.value_dim), j = 0;
  for (; j + 64 <= c.value_dim; j += 64)
    add_columns_bf16<rows, 2>(weights, base, places, due, j, 32, acc + j, stride, keep);
  for (; j < c.value_dim; j += 32)
    add_columns_bf16<rows, 1>(weights, base, places, due, j, lesser(c.value_dim - j, 32), acc + j, stride, keep);
}

// One block of keys against the rows of one KV head.
static void attend_block_bf16(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, int64_t begin, const Places& places,
                              const Due<AsBf16>& later, const uint16_t* query, const Gathered& g, float* scores, float* keep) {
  int64_t rows = num_rows(c, w);
  const uint16_t *keys = keys_of<AsBf16>(c, kv_head), *values = values_of<AsBf16>(c, kv_head);
  const Due<AsBf16> own{keys, values, &places};  // for rows after the first four
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) {
      const uint16_t* from = query + r * padded_depth(c.head_dim);
      auto score = w.in_order ? score_rows_bf16_in_order<decltype(n)::value> : score_rows_bf16<decltype(n)::value>;
      score(c, from, keys, places, r ? own : later, scores + r * kKeyBlock);
    });
  bool adjusted = places.count < kKeyBlock || w.query_len > 1 || w.first_keys || w.mask || w.alibi || c.softcap > 0;
  float factor = static_cast<float>(c.scale);
  if (adjusted) factor = adjust_rows(c, w, kv_head, 0, rows, begin, begin, begin + places.count, scores);
  soften_bf16(scores, rows, factor, g.top, g.sums, keep, [] {});
  const auto* weights = reinterpret_cast<const uint16_t*>(scores);
  for (int64_t r = 0; r < rows;)
    r += take_rows(rows - r, [&](auto n) {
      float* acc = g.acc + r * padded_lanes(c.value_dim);
      add_values_bf16<decltype(n)::value>(c, weights + r * kWeightStride, values, places, r ? own : later, acc, keep + r);
    });
}

static void attend_few_bf16(const AttentionCall& c, const AttentionWork& w) {
  FewScratch s(c, w);
  auto query_of = [&](int64_t h) { return reinterpret_cast<uint16_t*>(s.query_of(c, h)); };
  for (int64_t h = 0; h < s.heads; ++h) {
    load_queries_bf16(c, w, w.head_begin + h, query_of(h));
    begin_chunk(c, s.rows, s.of_head(c, h));
  }
  auto block = [&](int64_t h, int64_t begin, const Places& now, const Due<AsBf16>& due) {
    attend_block_bf16(c, w, w.head_begin + h, begin, now, due, query_of(h), s.of_head(c, h), s.scores, s.keep);
  };
  walk_blocks<AsBf16>(c, w, block, [&](int64_t chunk, bool last) {
    for (int64_t h = 0; h < s.heads; ++h) {
      finished_tops(s.of_head(c, h).top, s.rows);
      finish_chunk(c, w, w.head_begin + h, s.of_head(c, h), chunk, last);
      if (!last) begin_chunk(c, s.rows, s.of_head(c, h));
    }
  });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
#endif
