// rms_norm: y = x * weight / sqrt(mean(x^2) + eps), one row.
// Wins: memory-bound, one read of x from L1 after the first. Schedule: rows are chunks; 16 lanes across a row, two passes.
#pragma once
#include "elements.h"

namespace headrace {
namespace HEADRACE_ISA {

template <class E> static float sum_of_squares(const typename E::type* x, int64_t n) {
  Floats even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Floats a = E::load(x + i), b = E::load(x + i + kLanes);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; i < n; i += kLanes) {
    Floats a = load_first<E>(x + i, n - i);
    even = fma(a, a, even);
  }
  return sum(add(even, odd));
}

template <class In, class Out>
static void rms_norm_row(const typename In::type* x, const float* weight, typename Out::type* y, int64_t n, float eps) {
  float scale = 1.0f / sqrtf(sum_of_squares<In>(x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; i += kLanes) {
    Floats normed = mul(load_first<In>(x + i, n - i), broadcast(scale));
    store_first<Out>(y + i, mul(normed, load_first<AsFloat>(weight + i, n - i)), n - i);
  }
}

static void rms_norm(const void* x, DType x_type, const float* weight, void* y, DType y_type, int64_t n, float eps) {
  with_element(x_type, [&](auto in) {
    with_element(y_type, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      rms_norm_row<In, Out>(static_cast<const typename In::type*>(x), weight, static_cast<typename Out::type*>(y), n, eps);
    });
  });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
