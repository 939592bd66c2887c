// paged attention, many query rows per KV head (prefill): two matrix products per tile, in registers.
// Wins: more than 16 rows per KV head. Schedule: a work item is up to 192 rows (all heads of the group) of one KV head; it
// walks its keys 64 at a time: keys transposed and values converted to float once, then 6 rows at a time scores, online
// softmax, weighted values, as sums of outer products (6 x 64 in 24 registers with AVX-512, 6 x 16 in 12 pairs with AVX2).
// Blocks nobody sees are skipped, columns nobody of the 6 sees too. Bound: fp32 multiply-adds.
// NOTE: a row's bits depend on its keys only, not on the rows beside it: blocks begin at multiples of 64 and hidden keys
// add exact zeros. So any chunking of a prompt gives the same result.
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
template <int rows, int vectors>
static inline void outer_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                  int64_t c_stride, int64_t depth, const float* keep) {
  Floats total[rows][vectors], x[vectors];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < vectors; ++i) total[r][i] = zero();
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    for (int i = 0; i < vectors; ++i) x[i] = load(b + i * kLanes);
    for (int r = 0; r < rows; ++r) {
      Floats factor = broadcast(a[r * a_stride + k]);
      for (int i = 0; i < vectors; ++i) total[r][i] = fma(factor, x[i], total[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
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
static void load_keys(const AttentionCall& c, const typename E::type* base, const Places& places, int64_t first, float* to) {
  for (int64_t j = 0; j < c.head_dim; j += kLanes) {
    Floats square[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      int64_t at = first + i;
      square[i] = at >= 0 && at < places.count ? load_first<E>(base + places.key[at] + j, c.head_dim - j) : zero();
    }
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(to + (j + i) * kKeyBlock, square[i]);
  }
}

template <class E>
static void load_value(const AttentionCall& c, const typename E::type* from, float* to) {
  for (int64_t j = 0; j < c.value_dim; j += kLanes) store(to + j, load_first<E>(from + j, c.value_dim - j));
}

// The buffers of a work item (tile_scratch_floats).
struct Tile64 {
  float *query, *keys, *values, *acc, *sums, *top, *scores, *keep;

  Tile64(const AttentionCall& c, float* memory, int64_t rows) {
    query = memory;
    keys = query + rows * padded_lanes(c.head_dim);
    values = keys + kKeyBlock * padded_lanes(c.head_dim);
    acc = values + kKeyBlock * padded_lanes(c.value_dim);
    sums = acc + rows * padded_lanes(c.value_dim);
    scores = sums + rows * kLanes;
    keep = scores + kRowStep * kKeyBlock;
    top = keep + kLanes;
  }
};

// Keys [begin, end) of the block that starts at `start`, zeros around them.
template <class E>
static void load_block(const AttentionCall& c, const AttentionWork& w, int64_t start, int64_t begin, int64_t end, const Tile64& t) {
  Places places;
  find_places(c, w.pages, begin, end, places);
  const auto* keys = reinterpret_cast<const typename E::type*>(c.key_pages) + w.head_begin * c.head_dim;
  const auto* values = reinterpret_cast<const typename E::type*>(c.value_pages) + w.head_begin * c.value_dim;
  int64_t skipped = begin - start, width = padded_lanes(c.value_dim);
  for (int64_t first = 0; first < kKeyBlock; first += kLanes) load_keys<E>(c, keys, places, first - skipped, t.keys + first);
  memset(t.values, 0, static_cast<size_t>(kKeyBlock * width) * 4);
  for (int64_t i = 0; i < places.count; ++i) load_value<E>(c, values + places.value[i], t.values + (skipped + i) * width);
}

// Up to 6 rows against one block of keys.
static void attend_rows(const AttentionCall& c, const AttentionWork& w, int64_t row, int64_t rows, int64_t start, int64_t begin,
                        int64_t end, const Tile64& t) {
  int64_t first_last = last_key(w, w.token_begin + row / c.group), last = last_key(w, w.token_begin + (row + rows - 1) / c.group);
  int64_t from = greater(first_key(c, first_last), begin) - start, to = lesser(last + 1, end) - start;
  if (from >= to) return;
  int64_t column = from & ~int64_t{kLanes - 1}, columns = padded_lanes(to) - column;
  int64_t width = padded_lanes(c.value_dim), depth = padded_lanes(c.head_dim);
  multiply_rows(rows, {t.query + row * depth, t.keys + column, t.scores + column, depth, kKeyBlock, kKeyBlock, c.head_dim, nullptr},
                columns);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t own_last = last_key(w, w.token_begin + (row + r) / c.group);
    int64_t own_first = greater(first_key(c, own_last) - start, begin - start), own_end = lesser(own_last + 1 - start, end - start);
    if (c.softcap > 0) cap_scores(t.scores + r * kKeyBlock + column, columns, c.softcap);
    if (own_first > 0 || own_end < kKeyBlock) hide_outside(t.scores + r * kKeyBlock, own_first, own_end);
  }
  soften(t.scores, rows, t.top + row, t.sums + row * kLanes, t.keep);
  multiply_rows(rows, {t.scores + from, t.values + from * width, t.acc + row * width, kKeyBlock, width, width, to - from, t.keep},
                width);
}

template <class E> static void attend_rows_of_head(const AttentionCall& c, const AttentionWork& w) {
  int64_t rows = (w.token_end - w.token_begin) * c.group;
  Tile64 t(c, w.scratch, rows);
  load_queries(c, w, w.head_begin, t.query);
  clear_rows(rows, padded_lanes(c.value_dim), t.acc, t.top, t.sums);
  for (int64_t start = w.key_begin & ~int64_t{kKeyBlock - 1}; start < w.key_end; start += kKeyBlock) {
    int64_t begin = greater(start, w.key_begin), end = lesser(start + kKeyBlock, w.key_end);
    load_block<E>(c, w, start, begin, end, t);
    for (int64_t r = 0; r < rows; r += kRowStep) attend_rows(c, w, r, lesser(kRowStep, rows - r), start, begin, end, t);
  }
  finish_rows(c, w, w.head_begin, t.acc, t.top, t.sums, nullptr);
}

static void attend_tile(const AttentionCall& c, const AttentionWork& w) {
  with_element(c.kv_type, [&](auto element) { attend_rows_of_head<decltype(element)>(c, w); });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
