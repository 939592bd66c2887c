// attention backward over float32 products: its matrices as outer products in registers (attention_prefill.h).
// Schedule: 6 rows x 64 columns in 24 registers of AVX-512, 6 x 16 in 12 pairs of AVX2; weights and slopes take the place of
// the products they are made of. Bound: fp32 multiply-adds.
// Error: float32 sums; the exponential is within 2.5e-7 of a difference of float32 scores and sums.
// Measured: 73-79 % of float32 FMA (2048 tokens, causal, 8/8 and 32/8 heads of 128, one core of Zen 4, November 2026).
#pragma once
#include "attention_backward.h"
#include "attention_prefill.h"

namespace headrace {
namespace HEADRACE_ISA {

// 64 rows, `width` wide, to columns.
static void turn_rows(const float* from, int64_t width, float* to) {
  for (int64_t j = 0; j < width; j += kLanes)
    for (int64_t i = 0; i < kKeyBlock; i += kLanes) {
      Floats square[kLanes];
      for (int k = 0; k < kLanes; ++k) square[k] = load(from + (i + k) * width + j);
      transpose(square);
      for (int k = 0; k < kLanes; ++k) store(to + (j + k) * kKeyBlock + i, square[k]);
    }
}

struct InFloats {
  using Item = float;
  static constexpr bool kInPlace = true;
  static constexpr int64_t kKeys = 128;  // what fits in L2 beside the rows, here and with bf16
  static constexpr float kUnit = 1.0f;
  static int64_t padded(int64_t n) { return padded_lanes(n); }
  static Floats power(Floats x) { return exponential(x); }

  // row(i): where row i of 64 begins; null: zeros.
  template <class E, class Row> static void pack_keys(int64_t dim, Row row, float* plain, float* turned, float*) {
    int64_t width = padded(dim);
    for (int64_t i = 0; i < kKeyBlock; ++i) {
      const typename E::type* from = row(i);
      for (int64_t j = 0; j < width; j += kLanes) store(plain + i * width + j, from ? load_first<E>(from + j, dim - j) : zero());
    }
    if (turned) turn_rows(plain, width, turned);
  }
  template <class E, class Row> static void pack_query(int64_t dim, Row row, float* by_element, float* by_row) {
    pack_keys<E>(dim, row, by_row, by_element, nullptr);
  }

  // Of what is left, 6 rows at a time, but never a few at the end: they would wait for each other's sums.
  void multiply(int64_t rows, int64_t columns, const Factors<float>& p) {
    for (int64_t r = 0, n; r < rows; r += n) {
      int64_t left = rows - r;
      n = left > kRowStep && left < 2 * kRowStep ? (left + 1) / 2 : lesser(left, kRowStep);
      multiply_rows(n, {p.a + r * p.a_stride, p.b, p.c + r * p.c_stride, p.a_stride, p.b_width, p.c_stride, p.depth,
                        p.keep ? p.keep + r : nullptr}, columns);
    }
  }

  template <bool adjusted>
  static void weigh_block(const WeighRule& rule, const GradientBuffers<InFloats>& b, int64_t from, int64_t to, int64_t columns) {
    for (int64_t key = from; key < to; ++key)
      for (int64_t row = 0; row < columns; row += kLanes) {
        Weighed x = weigh_products<InFloats, adjusted>(rule, b, key, row);
        store(b.weights + key * kGradientRows + row, x.weight);
        store(b.slopes + key * kGradientRows + row, x.slope);
      }
  }
};

static void attend_backward(const AttentionCall& c, const GradientCall& g, const GradientWork& w) { attend_backward_in<InFloats>(c, g, w); }

}  // namespace HEADRACE_ISA
}  // namespace headrace
