// Element types at the border of a kernel: everything is a float inside.
#pragma once
#include "simd.h"
#include "tensor.h"

namespace headrace {
namespace HEADRACE_ISA {

struct AsFloat {
  using type = float;
  static Floats load(const type* p) { return HEADRACE_ISA::load(p); }
  static void store(type* p, Floats a) { HEADRACE_ISA::store(p, a); }
  static float load_one(const type* p) { return *p; }
  static type from_float(float f) { return f; }
};
struct AsHalf {
  using type = uint16_t;
  static Floats load(const type* p) { return load_half(p); }
  static void store(type* p, Floats a) { store_half(p, a); }
  static float load_one(const type* p) { return half_to_float(*p); }
  static type from_float(float f) { return float_to_half(f); }
};
struct AsBf16 {
  using type = uint16_t;
  static Floats load(const type* p) { return load_bf16(p); }
  static void store(type* p, Floats a) { store_bf16(p, a); }
  static float load_one(const type* p) { return bf16_to_float(*p); }
  static type from_float(float f) { return float_to_bf16(f); }
};

// The first n lanes; the others are zero.
template <class E> static inline Floats load_first(const typename E::type* p, int64_t n) {
  if (n >= kLanes) return E::load(p);
  typename E::type padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(n) * sizeof padded[0]);
  return E::load(padded);
}

template <class E> static inline void store_first(typename E::type* p, Floats a, int64_t n) {
  if (n >= kLanes) return E::store(p, a);
  typename E::type padded[kLanes];
  E::store(padded, a);
  memcpy(p, padded, static_cast<size_t>(n) * sizeof padded[0]);
}

// Calls f with the tag of the element type (f32, f16 or bf16).
template <class F> static inline void with_element(DType type, F f) {
  if (type == DType::f32) f(AsFloat{});
  if (type == DType::f16) f(AsHalf{});
  if (type == DType::bf16) f(AsBf16{});
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
