// attention backward over products of bf16: VDPBF16PS or AMX tiles (products_bf16.h), sums in float.
// Wins: where queries, keys and gradients are bf16, or may be rounded to it. Schedule: that of attention_backward.h; rows are
// packed once per four blocks of keys in pairs of elements and in pairs of rows, keys as they are and transposed; weights and
// slopes are rounded to bf16 as they are computed, pairs of keys of the slopes laid side by side. Bound: bf16 products.
// Error: weights, slopes and what is multiplied with them are rounded to bf16, 2^-9 each; all sums are float.
// Measured: 71-76 % of VDPBF16PS (2048 tokens, causal, 8/8 and 32/8 heads of 128, one core of Zen 4, November 2026). Over tiles:
// not measured, tested on emulated ones.
#pragma once
#include "attention_backward.h"
#include "softmax_bf16.h"

namespace headrace {
namespace HEADRACE_ISA {

// The even and the odd of 64 words: what interleave makes two vectors of.
static inline void separate(Floats low, Floats high, Floats& even, Floats& odd) {
#if defined(HEADRACE_AVX512)
  const __m512i evens = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20,
                                         18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  __m512i a = _mm512_castps_si512(low.v), b = _mm512_castps_si512(high.v);
  even = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, evens, b))};
  odd = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, odds, b))};
#else
  uint16_t both[4 * kLanes], one[2 * kLanes], other[2 * kLanes];
  store_words(both, low);
  store_words(both + 2 * kLanes, high);
  for (int i = 0; i < 2 * kLanes; ++i) one[i] = both[2 * i], other[i] = both[2 * i + 1];
  even = load_words(one);
  odd = load_words(other);
#endif
}

struct InBf16 {
  using Item = uint16_t;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kKeys = 256;
  static constexpr float kUnit = kLog2E;
  static constexpr int64_t kWords = 2 * kLanes;
  static int64_t padded(int64_t n) { return padded_depth(n); }
  static Floats power(Floats x) { return power_of_two(x); }
  Multiplier multiplier;

  // row(i): where row i of 64 begins; null: zeros. spare: 64 rows.
  template <class E, class Row>
  static void pack_keys(int64_t dim, Row row, uint16_t* plain, uint16_t* turned, uint16_t* spare) {
    int64_t width = padded(dim);
    auto words = [&](int64_t i, int64_t j) {
      const typename E::type* from = row(i);
      return from ? load_as_words<E>(from + j, dim - j) : zero();
    };
    for (int64_t i = 0; i < kKeyBlock; ++i)
      for (int64_t j = 0; j < width; j += kWords) store_words(plain + i * width + j, words(i, j));
    if (!turned) return;
    HEADRACE_ISA::pack_keys(dim, spare, words);
    for (int64_t pair = 0; pair < width / 2; ++pair)
      for (int64_t i = 0; i < kKeyBlock; i += kWords) {
        const uint16_t* both = spare + pair * 2 * kKeyBlock + 2 * i;
        uint16_t* to = turned + pair * 2 * kKeyBlock + i;
        Floats even, odd;
        separate(load_words(both), load_words(both + kWords), even, odd);
        store_words(to, even);
        store_words(to + kKeyBlock, odd);
      }
  }
  template <class E, class Row> static void pack_query(int64_t dim, Row row, uint16_t* by_element, uint16_t* by_row) {
    auto words = [&](int64_t i, int64_t j) {
      const typename E::type* from = row(i);
      return from ? load_as_words<E>(from + j, dim - j) : zero();
    };
    HEADRACE_ISA::pack_keys(dim, by_element, words);
    pack_values(dim, by_row, words);
  }

  void multiply(int64_t rows, int64_t columns, const Factors<uint16_t>& p) {
    multiplier.multiply(rows, columns, {p.a, p.b, p.c, p.a_stride, 2 * p.b_width, p.c_stride, p.depth, p.keep});
  }

  template <bool adjusted>
  static void weigh_block(const WeighRule& rule, const GradientBuffers<InBf16>& b, int64_t from, int64_t to, int64_t columns) {
    for (int64_t key = from; key < to; key += 2)
      for (int64_t row = 0; row < columns; row += kWords) {
        Floats slopes[2], low, high;
        for (int k = 0; k < 2; ++k) {
          Weighed x = weigh_products<InBf16, adjusted>(rule, b, key + k, row), y = weigh_products<InBf16, adjusted>(rule, b, key + k, row + kLanes);
          slopes[k] = round_words(x.slope, y.slope);
          store_words(b.weights + (key + k) * kGradientRows + row, round_words(x.weight, y.weight));
          store_words(b.slopes + (key + k) * kGradientRows + row, slopes[k]);
        }
        interleave(slopes[0], slopes[1], low, high);
        store_words(b.slope_rows + key * kGradientRows + 2 * row, low);
        store_words(b.slope_rows + key * kGradientRows + 2 * row + kWords, high);
      }
  }
};

static void attend_backward_bf16(const AttentionCall& c, const GradientCall& g, const GradientWork& w) { attend_backward_in<InBf16>(c, g, w); }

}  // namespace HEADRACE_ISA
}  // namespace headrace
