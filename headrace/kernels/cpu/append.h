// append: heads of one token, optionally normalized and rotated by the token's cosines and sines, into what keeps them.
//   pair (a, b) -> (a cos - b sin, b cos + a sin);  pairs are (2i, 2i + 1) interleaved, else (i, i + rotary_dim / 2)
//   scaled types: code = round(x / scale), scale = largest |x| / the type's largest code where the row has its own
//   spread: what was rotated is also multiplied by a Hadamard matrix, which leaves scores and takes a key's outliers apart
// Wins always: it is the only one. Schedule: tokens are chunks; 16 elements at a time; the head stays in L1 between the
// passes: widen or normalize, rotate, spread, largest, convert. A quotient, not a product with 1 / scale: it has one rounding, so
// every instruction set and the reference come to the same code.
#pragma once
#include "append_work.h"
#include "cached.h"
#include "norm.h"

namespace headrace {
namespace HEADRACE_ISA {

static void widen(const char* x, DType type, float* y, int64_t n) {
  with_element(type, [&](auto in) {
    using In = decltype(in);
    auto* from = reinterpret_cast<const typename In::type*>(x);
    for (int64_t i = 0; i < n; i += kLanes) store_first<AsFloat>(y + i, load_first<In>(from + i, n - i), n - i);
  });
}

static void normalize_head(const char* x, DType type, const float* weight, float eps, float* y, int64_t n) {
  with_element(type, [&](auto in) {
    using In = decltype(in);
    rms_norm_row<In, AsFloat>(reinterpret_cast<const typename In::type*>(x), weight, y, n, eps);
  });
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

// x = x H, H the Hadamard matrix over the root of its size, on blocks of the largest power of two that divides n. Its own
// inverse. Sums before differences, distances 1, 2, 4...: the same bits in every instruction set.
static void spread_head(float* x, int64_t n) {
  int64_t block = n & -n;
  for (int64_t step = 1; step < block; step *= 2)
    for (int64_t i = 0; i < n; i += 2 * step)
      if (step < kLanes) {
        for (int64_t j = i; j < i + step; ++j) {
          float a = x[j], b = x[j + step];
          x[j] = a + b;
          x[j + step] = a - b;
        }
      } else {
        for (int64_t j = i; j < i + step; j += kLanes) {
          Floats a = load(x + j), b = load(x + j + step);
          store(x + j, add(a, b));
          store(x + j + step, sub(a, b));
        }
      }
  Floats unit = broadcast(1.0f / sqrtf(static_cast<float>(block)));
  for (int64_t i = 0; i < n; i += kLanes) store_first<AsFloat>(x + i, mul(load_first<AsFloat>(x + i, n - i), unit), n - i);
}

static void convert_row(const float* x, void* y, DType type, int64_t n) {
  with_cached(type, [&](auto out) {
    using Out = decltype(out);
    auto* to = static_cast<typename Out::type*>(y);
    for (int64_t i = 0; i < n; i += kLanes) store_first<Out>(Out::at(to, i), load_first<AsFloat>(x + i, n - i), n - i);
  });
}

static bool all_finite(const float* x, int64_t n) {
  Floats total = zero();  // 0 times a number is 0, times infinity or NaN is NaN
  for (int64_t i = 0; i < n; i += kLanes) total = fma(load_first<AsFloat>(x + i, n - i), zero(), total);
  return sum(total) == 0.0f;
}

static bool has_nan(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] != x[i]) return true;
  return false;
}

static float largest_size(const float* x, int64_t n) {
  Floats m = zero();
  for (int64_t i = 0; i < n; i += kLanes) m = maximum(absolute(load_first<AsFloat>(x + i, n - i)), m);
  return largest(m);
}

// A scale that is 0 (of a row of zeros, or nearly) or NaN (of one that is not all finite) makes all codes 0: such a row
// reads as zeros, or as NaN.
template <class E> static void store_codes(const float* x, typename E::type* y, int64_t n, float scale) {
  bool some = scale > 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    Floats a = some ? div(load_first<AsFloat>(x + i, n - i), broadcast(scale)) : zero();
    store_first<E>(E::at(y, i), a, n - i);
  }
}

// False where a number that the caller's scale belongs to is none, and the type has no code for it.
template <class E> static bool store_scaled(const float* x, char* y, int64_t n, char* scale, Scaling scaling) {
  float step;
  if (scaling == Scaling::computed) {
    step = all_finite(x, n) ? largest_size(x, n) / E::largest_code : NAN;
    memcpy(scale, &step, sizeof step);
  } else {
    memcpy(&step, scale, sizeof step);
    if (!E::keeps_nan && !all_finite(x, n) && has_nan(x, n)) return false;
  }
  store_codes<E>(x, reinterpret_cast<typename E::type*>(y), n, step);
  return true;
}

static bool store_row(const AppendArgs& a, const float* row, int64_t head) {
  char *to = a.out + head * a.out_step, *scale = a.scales + (a.scales ? head * a.scale_step : 0);
  int64_t n = a.prefix_dim + a.dim;
  if (a.scaling == Scaling::none) return convert_row(row, to, a.out_type, n), true;
  if (a.out_type == DType::f8) return store_scaled<AsE4m3>(row, to, n, scale, a.scaling);
  if (a.out_type == DType::i8) return store_scaled<AsInt8>(row, to, n, scale, a.scaling);
  return store_scaled<AsInt4>(row, to, n, scale, a.scaling);
}

// False as store_scaled: then this head and those after it have not been written.
static bool append_heads(const AppendArgs& a) {
  int64_t pairs = a.rotary_dim / 2;
  bool as_it_is = !a.norm_weight && !a.table && !a.prefix && !a.spread && a.x_type == DType::f32;
  for (int64_t h = 0; h < a.heads; ++h) {
    const char* from = a.x + h * a.x_step;
    float* x = a.scratch + a.prefix_dim;
    if (a.prefix) widen(a.prefix + h * a.prefix_step, a.prefix_type, a.scratch, a.prefix_dim);
    if (a.norm_weight)
      normalize_head(from, a.x_type, a.norm_weight, a.eps, x, a.dim);
    else if (!as_it_is)
      widen(from, a.x_type, x, a.dim);
    if (a.table) (a.interleaved ? rotate_pairs : rotate_halves)(x, a.table, a.table + pairs, pairs);
    if (a.spread) spread_head(x, a.dim);
    if (!store_row(a, as_it_is ? reinterpret_cast<const float*>(from) : a.scratch, h)) return false;
  }
  return true;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
