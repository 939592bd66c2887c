// Rows of elements, turned: a vector holds one element of each of sixteen rows, as a float.
#pragma once
#include "elements.h"
#include "simd_square.h"

namespace headrace {
namespace HEADRACE_ISA {

// The first `depth` elements of sixteen rows, which begin places[i] elements after `base`; those at `left` and after are zero,
// and not touched.
template <class E> struct Turned {
  static constexpr int depth = kLanes;
  Floats square[kLanes];

  void load(const typename E::type* base, const int64_t places[kLanes], int64_t left) {
    for (int i = 0; i < kLanes; ++i) square[i] = load_first<E>(E::at(base, places[i]), left);
    transpose(square);
  }
  Floats operator[](int i) const { return square[i]; }
};

#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)

// Words are turned before they are widened: in either half of eight vectors 8 x 8 of them, by three perfect shuffles.
struct TurnedWords {
  static constexpr int depth = 8;
  __m256i words[depth];

  void load(const uint16_t* base, const int64_t places[kLanes], int64_t left) {
    Padded padded;
    if (left < depth) {
      padded.fill(base, places, left);
      base = padded.words, places = padded.places;
    }
    auto eight = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(base + places[row])); };
    for (int i = 0; i < depth; ++i) words[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(i)), eight(i + 8), 1);
    shuffle(), shuffle(), shuffle();
  }
  struct Padded {
    uint16_t words[kLanes * depth];
    int64_t places[kLanes];
    __attribute__((noinline)) void fill(const uint16_t* base, const int64_t* from, int64_t left) {
      memset(words, 0, sizeof words);
      for (int row = 0; row < kLanes; ++row) {
        places[row] = row * depth;
        memcpy(words + places[row], base + from[row], static_cast<size_t>(left) * sizeof(uint16_t));
      }
    }
  };
  void shuffle() {
    __m256i before[depth];
    for (int i = 0; i < depth; ++i) before[i] = words[i];
    for (int i = 0; i < depth / 2; ++i) {
      words[2 * i] = _mm256_unpacklo_epi16(before[i], before[i + depth / 2]);
      words[2 * i + 1] = _mm256_unpackhi_epi16(before[i], before[i + depth / 2]);
    }
  }
};
template <> struct Turned<AsHalf> : TurnedWords {
  Floats operator[](int i) const { return widen_half(words[i]); }
};
template <> struct Turned<AsBf16> : TurnedWords {
  Floats operator[](int i) const { return widen_bf16(words[i]); }
};

#endif

}  // namespace HEADRACE_ISA
}  // namespace headrace
