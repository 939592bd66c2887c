// Element types at the border of a kernel: everything is a float inside. (What only a cache holds: cached.h.)
//   at(p, i)    where element i lies, i a multiple of per_item    load_one(p, i)    element i
//   scaled      a scale may belong to it, per token and head or per page
#pragma once
#include "simd.h"
#include "tensor.h"

namespace headrace {
namespace HEADRACE_ISA {

template <class Item> struct OneEach {
  using type = Item;
  static constexpr bool scaled = false;
  static constexpr int64_t per_item = 1;
  static const type* at(const type* p, int64_t element) { return p + element; }
  static type* at(type* p, int64_t element) { return p + element; }
};

struct AsFloat : OneEach<float> {
  static Floats load(const type* p) { return HEADRACE_ISA::load(p); }
  static void store(type* p, Floats a) { HEADRACE_ISA::store(p, a); }
  static float load_one(const type* p, int64_t i = 0) { return p[i]; }
  static type from_float(float f) { return f; }
};
struct AsHalf : OneEach<uint16_t> {
  static Floats load(const type* p) { return load_half(p); }
  static void store(type* p, Floats a) { store_half(p, a); }
  static float load_one(const type* p, int64_t i = 0) { return half_to_float(p[i]); }
  static type from_float(float f) { return float_to_half(f); }
};
struct AsBf16 : OneEach<uint16_t> {
  static Floats load(const type* p) { return load_bf16(p); }
  static void store(type* p, Floats a) { store_bf16(p, a); }
  static float load_one(const type* p, int64_t i = 0) { return bf16_to_float(p[i]); }
  static type from_float(float f) { return float_to_bf16(f); }
};

// How many items hold n elements.
template <class E> static inline size_t items(int64_t n) { return static_cast<size_t>((n + E::per_item - 1) / E::per_item); }

// The first n lanes; the others are zero. Nothing beyond the items of n elements is touched, here and below.
template <class E> static inline Floats load_first(const typename E::type* p, int64_t n) {
  if (n >= kLanes) return E::load(p);
  typename E::type padded[kLanes] = {};
  memcpy(padded, p, items<E>(n) * sizeof padded[0]);
  if constexpr (E::per_item == 2)
    if (n % 2) padded[n / 2] &= 0x0f;
  return E::load(padded);
}

template <class E> static inline void store_first(typename E::type* p, Floats a, int64_t n) {
  if (n >= kLanes) return E::store(p, a);
  typename E::type padded[kLanes];
  E::store(padded, a);
  if constexpr (E::per_item == 2)
    if (n % 2) padded[n / 2] &= 0x0f;
  memcpy(p, padded, items<E>(n) * sizeof padded[0]);
}

// Calls f with the tag of the element type (f32, f16 or bf16).
template <class F> static inline void with_element(DType type, F f) {
  if (type == DType::f32) f(AsFloat{});
  if (type == DType::f16) f(AsHalf{});
  if (type == DType::bf16) f(AsBf16{});
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
