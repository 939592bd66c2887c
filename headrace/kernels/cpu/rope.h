// rope: heads of one token, optionally normalized, rotated by the token's cosines and sines, converted to what keeps them.
//   pair (a, b) -> (a cos - b sin, b cos + a sin);  pairs are (2i, 2i + 1) interleaved, else (i, i + rotary_dim / 2)
// Wins always: it is the only one. Schedule: tokens are chunks; 16 pairs at a time; one pass, the head stays in L1.
#pragma once
#include "cached.h"
#include "norm.h"
#include "rope_work.h"

namespace headrace {
namespace HEADRACE_ISA {

static void normalize_head(const float* x, const float* weight, float eps, float* y, int64_t n) {
  if (weight) return rms_norm_row<AsFloat, AsFloat>(x, weight, y, n, eps);
  memcpy(y, x, static_cast<size_t>(n) * 4);
}

static void rotate_halves(float* x, const float* cosines, const float* sines, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i += kLanes) {
    int64_t n = pairs - i;
    Floats a = load_first<AsFloat>(x + i, n), b = load_first<AsFloat>(x + pairs + i, n);
    Floats c = load_first<AsFloat>(cosines + i, n), s = load_first<AsFloat>(sines + i, n);
    store_first<AsFloat>(x + i, sub(mul(a, c), mul(b, s)), n);
    store_first<AsFloat>(x + pairs + i, fma(b, c, mul(a, s)), n);
  }
}

static void rotate_pairs(float* x, const float* cosines, const float* sines, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosines[i] - b * sines[i];
    x[2 * i + 1] = b * cosines[i] + a * sines[i];
  }
}

static void convert_row(const float* x, void* y, DType type, int64_t n) {
  with_cached(type, [&](auto out) {
    using Out = decltype(out);
    auto* to = static_cast<typename Out::type*>(y);
    for (int64_t i = 0; i < n; i += kLanes) store_first<Out>(Out::at(to, i), load_first<AsFloat>(x + i, n - i), n - i);
  });
}

static void rotate_heads(const RotateArgs& a) {
  int64_t pairs = a.rotary_dim / 2;
  for (int64_t h = 0; h < a.heads; ++h) {
    normalize_head(a.x + h * a.head_dim, a.norm_weight, a.eps, a.scratch, a.head_dim);
    if (a.interleaved)
      rotate_pairs(a.scratch, a.table, a.table + pairs, pairs);
    else
      rotate_halves(a.scratch, a.table, a.table + pairs, pairs);
    convert_row(a.scratch, a.out + h * a.out_head_bytes, a.out_type, a.head_dim);
  }
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
