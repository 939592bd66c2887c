// Products of bf16 matrices with float sums, and the packing of what they multiply.
//   c [rows, columns] = a [rows, depth] b [depth, columns], or c * keep + that
// b lies in pairs of its rows, [depth / 2][columns][2]: the order in which VDPBF16PS and AMX tiles both take it.
// Two ways, one interface: vectors (6 rows x 64 columns in 24 registers), and tiles (32 x 32 in four), which are emulated
// where there are none. Error: a product is exact and is added with one rounding to float; hardware takes denormals for zero.
// NOTE: a row's bits depend on that row and on b alone, whatever is computed beside it.
#pragma once
#include "elements.h"
#include "kernels.h"
#include "simd_square.h"

#if defined(HEADRACE_AVX512_BF16) && !defined(HEADRACE_AMX)
#define HEADRACE_BF16_VECTORS 1
#else
#include "tiles.h"
#endif

namespace headrace {
namespace HEADRACE_ISA {

constexpr int kDepthStep = 32;   // depth is a multiple of it
constexpr int kPackedKeys = 64;  // tokens packed together

static inline int64_t padded_depth(int64_t n) { return (n + kDepthStep - 1) / kDepthStep * kDepthStep; }

// 32 bf16, as they lie in memory. Their lanes are pairs, moved but never computed with.
static inline Floats load_words(const uint16_t* p) {
  Floats words;
  memcpy(&words, p, sizeof words);
  return words;
}
static inline void store_words(uint16_t* p, Floats words) { memcpy(p, &words, sizeof words); }

// 32 floats as bf16, the first 16 from `low`.
static inline Floats round_words(Floats low, Floats high) {
#if defined(HEADRACE_AVX512_BF16)
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high.v, low.v))};
#else
  uint16_t words[2 * kLanes];
  store_bf16(words, low);
  store_bf16(words + kLanes, high);
  return load_words(words);
#endif
}

// Elements 0 to 31 as bf16; zeros from n on. bf16 stays what it is, NaN and denormals included.
template <class E> static inline Floats load_as_words(const typename E::type* p, int64_t n) {
  return round_words(load_first<E>(p, n), n > kLanes ? load_first<E>(E::at(p, kLanes), n - kLanes) : zero());
}
template <> inline Floats load_as_words<AsBf16>(const uint16_t* p, int64_t n) {
  if (n >= 2 * kLanes) return load_words(p);
#if defined(HEADRACE_AVX512)
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1, p))};
#else
  uint16_t some[2 * kLanes] = {};
  memcpy(some, p, static_cast<size_t>(n) * 2);
  return load_words(some);
#endif
}

// The pairs (first[i], second[i]) of two rows of 32.
static inline void interleave(Floats first, Floats second, Floats& low, Floats& high) {
#if defined(HEADRACE_AVX512)
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  __m512i a = _mm512_castps_si512(first.v), b = _mm512_castps_si512(second.v);
  low = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, lower, b))};
  high = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, upper, b))};
#else
  uint16_t one[2 * kLanes], other[2 * kLanes], both[4 * kLanes];
  store_words(one, first);
  store_words(other, second);
  for (int i = 0; i < 2 * kLanes; ++i) both[2 * i] = one[i], both[2 * i + 1] = other[i];
  low = load_words(both);
  high = load_words(both + 2 * kLanes);
#endif
}

// 64 keys in pairs of their elements, [padded_depth / 2][64][2]. load(key, element): 32 elements of a key from there on.
template <class Load> static void pack_keys(int64_t dim, uint16_t* to, Load load) {
  for (int64_t j = 0; j < dim; j += kDepthStep)
    for (int first = 0; first < kPackedKeys; first += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(first + i, j);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store_words(to + (j / 2 + i) * 2 * kPackedKeys + 2 * first, square[i]);
    }
}

// 64 values in pairs of tokens, [32][width][2] with width padded_depth(dim). load(token, element) as above.
template <class Load> static void pack_values(int64_t dim, uint16_t* to, Load load) {
  int64_t width = padded_depth(dim);
  for (int pair = 0; pair < kPackedKeys / 2; ++pair, to += 2 * width)
    for (int64_t j = 0; j < dim; j += kDepthStep) {
      Floats low, high;
      interleave(load(2 * pair, j), load(2 * pair + 1, j), low, high);
      store_words(to + 2 * j, low);
      store_words(to + 2 * j + 2 * kLanes, high);
    }
}

// Strides in elements: between rows of a and c, and between pairs of rows of b.
struct ProductBf16 {
  const uint16_t *a, *b;
  float* c;
  int64_t a_stride, b_stride, c_stride;
  int64_t depth;
  const float* keep;  // null: what was in c is dropped
};

#if defined(HEADRACE_BF16_VECTORS)

constexpr int kProductRows = 6;     // rows that share what is loaded of b
constexpr int kRowsReadable = 1;    // a and c have a multiple of so many rows

static inline Floats dot_pairs(Floats sum, Floats a, Floats b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
}
// Two neighbours in every lane.
static inline Floats broadcast_pair(const uint16_t* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}

// NOTE: unrolled by order, or else gcc keeps the sums in memory at both ends of the loop over the depth.
template <int rows, int vectors>
static inline void multiply_pairs(const ProductBf16& p, int64_t column) {
  Floats total[rows][vectors], x[vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) total[r][i] = zero();
  const uint16_t *a = p.a, *b = p.b + 2 * column;
  for (int64_t k = 0; k < p.depth; k += 2, b += p.b_stride, a += 2) {
    for (int i = 0; i < vectors; ++i) x[i] = load_words(b + 2 * i * kLanes);
    for (int r = 0; r < rows; ++r) {
      Floats factor = broadcast_pair(a + r * p.a_stride);
      for (int i = 0; i < vectors; ++i) total[r][i] = dot_pairs(total[r][i], x[i], factor);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      float* to = p.c + r * p.c_stride + column + i * kLanes;
      store(to, p.keep ? fma(load(to), broadcast(p.keep[r]), total[r][i]) : total[r][i]);
    }
}

template <int rows> static void multiply_columns(const ProductBf16& p, int64_t columns) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes) multiply_pairs<rows, 4>(p, j);
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) multiply_pairs<rows, 2>(p, j);
  for (; j < columns; j += kLanes) multiply_pairs<rows, 1>(p, j);
}

// The same interface as over tiles; a product planned is computed at once.
struct Multiplier {
  void plan(int64_t rows, int64_t columns, const ProductBf16& p) { multiply(rows, columns, p); }
  void step() {}
  void finish() {}

  void some_rows(int64_t rows, int64_t columns, const ProductBf16& p) {
    switch (rows) {
      case 1: return multiply_columns<1>(p, columns);
      case 2: return multiply_columns<2>(p, columns);
      case 3: return multiply_columns<3>(p, columns);
      case 4: return multiply_columns<4>(p, columns);
      case 5: return multiply_columns<5>(p, columns);
      default: return multiply_columns<kProductRows>(p, columns);
    }
  }

#else

constexpr int kProductRows = 32;
constexpr int kRowsReadable = 16;

// One or two tiles of rows times one or two of columns.
template <bool two_rows, bool two_columns> static inline void multiply_tiles(Tiles& tiles, const ProductBf16& p, int64_t column) {
  float *c = p.c + column, *lower = c + 16 * p.c_stride;
  int64_t c_bytes = p.c_stride * 4, a_bytes = p.a_stride * 2, b_bytes = p.b_stride * 2;
  if (p.keep) {
    tiles.load<0>(c, c_bytes);
    if (two_columns) tiles.load<1>(c + 16, c_bytes);
    if (two_rows) tiles.load<2>(lower, c_bytes);
    if (two_rows && two_columns) tiles.load<3>(lower + 16, c_bytes);
  } else {
    tiles.clear<0>();
    if (two_columns) tiles.clear<1>();
    if (two_rows) tiles.clear<2>();
    if (two_rows && two_columns) tiles.clear<3>();
  }
  for (int64_t k = 0; k < p.depth; k += kDepthStep) {
    const uint16_t *a = p.a + k, *b = p.b + k / 2 * p.b_stride + 2 * column;
    tiles.load<4>(a, a_bytes);
    tiles.load<6>(b, b_bytes);
    tiles.multiply<0, 4, 6>();
    if (two_columns) tiles.load<7>(b + 32, b_bytes), tiles.multiply<1, 4, 7>();
    if (two_rows) tiles.load<5>(a + 16 * p.a_stride, a_bytes), tiles.multiply<2, 5, 6>();
    if (two_rows && two_columns) tiles.multiply<3, 5, 7>();
  }
  tiles.store<0>(c, c_bytes);
  if (two_columns) tiles.store<1>(c + 16, c_bytes);
  if (two_rows) tiles.store<2>(lower, c_bytes);
  if (two_rows && two_columns) tiles.store<3>(lower + 16, c_bytes);
}

// Rows that keep all they had (by far the most, once the largest score was seen) are left alone.
static void keep_rows(const ProductBf16& p, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    if (p.keep[r] == 1.0f) continue;
    Floats share = broadcast(p.keep[r]);
    float* row = p.c + r * p.c_stride;
    for (int64_t j = 0; j < columns; j += kLanes) store(row + j, mul(load(row + j), share));
  }
}

// Configured as long as it lives: make one per work item. A product can be planned and then computed step by step, between
// other things: tiles are multiplied beside vector instructions, if only these are near enough in the program.
struct Multiplier {
  struct Planned {
    int64_t rows, columns;
    ProductBf16 p;
  };
  Tiles tiles;
  Planned planned[2];
  int first = 0, count = 0;
  int64_t column = 0;

  // Up to 32 rows; at most two at a time.
  void plan(int64_t rows, int64_t columns, const ProductBf16& p) {
    if (p.keep) keep_rows(p, rows, columns);
    planned[(first + count++) % 2] = {rows, columns, p};
  }
  // 32 columns of what was planned first.
  void step() {
    if (!count) return;
    const Planned& now = planned[first];
    bool two_rows = now.rows > 16;
    if (column + kLanes < now.columns)
      two_rows ? multiply_tiles<true, true>(tiles, now.p, column) : multiply_tiles<false, true>(tiles, now.p, column);
    else
      two_rows ? multiply_tiles<true, false>(tiles, now.p, column) : multiply_tiles<false, false>(tiles, now.p, column);
    column += 2 * kLanes;
    if (column >= now.columns) first = 1 - first, --count, column = 0;
  }
  void finish() {
    while (count) step();
  }

  void some_rows(int64_t rows, int64_t columns, const ProductBf16& p) {
    plan(rows, columns, p);
    finish();
  }

#endif

  // columns: a multiple of 16. a can be read, and c read and written, up to a multiple of kRowsReadable rows.
  void multiply(int64_t rows, int64_t columns, ProductBf16 p) {
    for (int64_t r = 0; r < rows; r += kProductRows) {
      some_rows(rows - r < kProductRows ? rows - r : kProductRows, columns, p);
      p.a += kProductRows * p.a_stride;
      p.c += kProductRows * p.c_stride;
      if (p.keep) p.keep += kProductRows;
    }
  }
};

// The whole chain on plain arrays, for tests: a [rows, depth] floats or bf16 against keys or values as they come.
static void product_bf16(const ProductProbe& probe) {
  with_element(probe.type, [&](auto element) {
    using E = decltype(element);
    const auto *a = reinterpret_cast<const typename E::type*>(probe.a), *b = reinterpret_cast<const typename E::type*>(probe.b);
    int64_t depth = padded_depth(probe.depth), width = probe.keys ? kPackedKeys : padded_depth(probe.columns);
    for (int64_t r = 0; r < probe.rows; ++r)
      for (int64_t j = 0; j < probe.depth; j += kDepthStep)
        store_words(probe.packed_a + r * depth + j, load_as_words<E>(a + r * probe.depth + j, probe.depth - j));
    int64_t row = probe.keys ? probe.depth : probe.columns;
    auto load = [&](int64_t i, int64_t j) { return load_as_words<E>(b + i * row + j, row - j); };
    probe.keys ? pack_keys(row, probe.packed_b, load) : pack_values(row, probe.packed_b, load);
    Multiplier{}.multiply(probe.rows, probe.keys ? kPackedKeys : padded_lanes(probe.columns),
                          {probe.packed_a, probe.packed_b, probe.c, depth, 2 * width, probe.c_stride, depth, probe.keep});
  });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
