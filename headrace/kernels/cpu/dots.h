// How each instruction set multiplies the codes of a block of 32 columns by activations, for linear.h: activations are
// one int8 a value (Coarse) or one 16-bit integer (Fine), 32 to a scale, and sums are exact.
// Each has: kBytes of a block; put(block, whole numbers of columns 0-15, of 16-31); Factor, the activations of one word
// of four columns, and load; Codes, a word of a panel's codes, and prepare; Sum<bits>: words in order, then total().
//   AVX-512   VPDPBUSD. A fine value is 256 * high + low, two int8: two sums, joined once per block.
//   AVX2      coarse: VPMADDUBSW into int16, for as many words as cannot overflow; fine: VPMADDWD of values and codes
//             as int16, pairs of columns (0 2)(1 3), because a word's even and odd bytes are one instruction each.
//   portable  the plain loops.
#pragma once
#include "simd.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr int kCoarseTop = 127;
constexpr int kFineTop = 127 * 256;  // its high part is at most 127, rounded to nearest

#if defined(HEADRACE_AVX512)

constexpr int kTilePanels = 2;  // an activation fetched for one panel serves both
constexpr int kCoarseTokens = 6, kFineTokens = 4;

static inline __m512i four_to_all(const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}

struct Coarse {
  static constexpr int kBytes = 32, kTop = kCoarseTop, kTokens = kCoarseTokens;
  struct Factor { __m512i v; };
  struct Codes { __m512i v; };
  static void put(int8_t* block, Floats low, Floats high) {
    store_int8(block, low);
    store_int8(block + 16, high);
  }
  static Factor load(const int8_t* block, int word) { return {four_to_all(block + 4 * word)}; }
  static constexpr int removed(int) { return 0; }
  template <int bits> static Codes prepare(Bytes codes) { return {codes.v}; }
  template <int bits> struct Sum {
    __m512i v;
    void begin(Ints first) { v = first.v; }
    template <int place, int words> void add(Codes c, Factor x) { v = _mm512_dpbusd_epi32(v, c.v, x.v); }
    Ints total() const { return {v}; }
  };
};

struct Fine {
  static constexpr int kBytes = 64, kTop = kFineTop, kTokens = kFineTokens;
  struct Factor { __m512i high, low; };
  using Codes = Coarse::Codes;
  static void put_half(int8_t* p, Floats whole) {
    __m512i v = _mm512_maskz_cvtps_epi32(kAllLanes, whole.v);
    __m512i high = _mm512_maskz_srai_epi32(kAllLanes, _mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAllLanes, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32), _mm512_maskz_cvtepi32_epi8(kAllLanes, v));  // modulo 256
  }
  static void put(int8_t* block, Floats low, Floats high) {
    put_half(block, low);
    put_half(block + 16, high);
  }
  static Factor load(const int8_t* block, int word) {
    return {four_to_all(block + 4 * word), four_to_all(block + 32 + 4 * word)};
  }
  static constexpr int removed(int) { return 0; }
  template <int bits> static Codes prepare(Bytes codes) { return {codes.v}; }
  template <int bits> struct Sum {
    __m512i high, low;
    void begin(Ints first) {
      high = _mm512_setzero_si512();
      low = first.v;
    }
    template <int place, int words> void add(Codes c, Factor x) {
      high = _mm512_dpbusd_epi32(high, c.v, x.high);
      low = _mm512_dpbusd_epi32(low, c.v, x.low);
    }
    Ints total() const { return {_mm512_add_epi32(_mm512_maskz_slli_epi32(kAllLanes, high, 8), low)}; }
  };
};

#elif defined(HEADRACE_AVX2)

constexpr int kTilePanels = 1;
constexpr int kCoarseTokens = 4, kFineTokens = 4;

static inline __m256i four_to_all(const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  return _mm256_set1_epi32(word);
}

struct Coarse {
  static constexpr int kBytes = 32, kTop = kCoarseTop, kTokens = kCoarseTokens;
  struct Factor { __m256i v; };
  struct Codes { __m256i low, high; };
  static void put(int8_t* block, Floats low, Floats high) {
    store_int8(block, low);
    store_int8(block + 16, high);
  }
  static Factor load(const int8_t* block, int word) { return {four_to_all(block + 4 * word)}; }
  // Codes of 8 bits lose half of their range and become signed.
  static constexpr int removed(int bits) { return bits == 8 ? 128 : 0; }
  template <int bits> static Codes prepare(Bytes codes) {
    if (bits < 8) return {codes.low, codes.high};
    const __m256i half = _mm256_set1_epi8(static_cast<char>(0x80));
    return {_mm256_xor_si256(codes.low, half), _mm256_xor_si256(codes.high, half)};
  }
  template <int bits> static __m256i products(__m256i c, __m256i x) {
    if (bits < 8) return _mm256_maddubs_epi16(c, x);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(x, c));  // x is never -128
  }
  template <int bits> struct Sum {
    // Words whose products fit int16 together, at 2 * 127 * the largest code each.
    static constexpr int kTogether = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
    __m256i low, high, low16, high16;
    void begin(Ints first) {
      low = first.low;
      high = first.high;
    }
    template <int place, int words> void add(Codes c, Factor x) {
      __m256i a = products<bits>(c.low, x.v), b = products<bits>(c.high, x.v);
      constexpr bool opens = place % kTogether == 0, closes = place % kTogether == kTogether - 1 || place == words - 1;
      low16 = opens ? a : _mm256_add_epi16(low16, a);
      high16 = opens ? b : _mm256_add_epi16(high16, b);
      if (closes) widen();
    }
    void widen() {
      const __m256i ones = _mm256_set1_epi16(1);
      low = _mm256_add_epi32(low, _mm256_madd_epi16(low16, ones));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(high16, ones));
    }
    Ints total() const { return {low, high}; }
  };
};

struct Fine {
  static constexpr int kBytes = 64, kTop = kFineTop, kTokens = kFineTokens;
  struct Factor { __m256i even, odd; };
  struct Codes { __m256i even_low, odd_low, even_high, odd_high; };
  static void put_half(int8_t* p, Floats whole) {
    auto pairs = [](__m256 v) { return _mm256_shuffle_epi32(_mm256_cvtps_epi32(v), 0xd8); };  // columns 0 2 1 3 of four
    __m256i words = _mm256_packs_epi32(pairs(whole.low), pairs(whole.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
  }
  static void put(int8_t* block, Floats low, Floats high) {
    put_half(block, low);
    put_half(block + 32, high);
  }
  static Factor load(const int8_t* block, int word) {
    return {four_to_all(block + 8 * word), four_to_all(block + 8 * word + 4)};
  }
  static constexpr int removed(int) { return 0; }
  template <int bits> static Codes prepare(Bytes codes) {
    const __m256i even = _mm256_set1_epi16(255);
    return {_mm256_and_si256(codes.low, even), _mm256_srli_epi16(codes.low, 8),
            _mm256_and_si256(codes.high, even), _mm256_srli_epi16(codes.high, 8)};
  }
  template <int bits> struct Sum {
    __m256i low, high;
    void begin(Ints first) {
      low = first.low;
      high = first.high;
    }
    template <int place, int words> void add(const Codes& c, Factor x) {
      low = _mm256_add_epi32(low, _mm256_madd_epi16(c.even_low, x.even));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(c.even_high, x.even));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(c.odd_low, x.odd));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(c.odd_high, x.odd));
    }
    Ints total() const { return {low, high}; }
  };
};

#else

constexpr int kTilePanels = 1;
constexpr int kCoarseTokens = 4, kFineTokens = 4;

// The values of a block, as T.
template <class T, int top> struct Plain {
  static constexpr int kBytes = 32 * sizeof(T), kTop = top, kTokens = kCoarseTokens;
  struct Factor { T v[4]; };
  using Codes = Bytes;
  static void put(int8_t* block, Floats low, Floats high) {
    T values[32];
    for (int i = 0; i < kLanes; ++i) {
      values[i] = static_cast<T>(low.v[i]);
      values[16 + i] = static_cast<T>(high.v[i]);
    }
    memcpy(block, values, sizeof values);
  }
  static Factor load(const int8_t* block, int word) {
    Factor x;
    memcpy(x.v, block + word * sizeof x.v, sizeof x.v);
    return x;
  }
  static constexpr int removed(int) { return 0; }
  template <int bits> static Codes prepare(Bytes codes) { return codes; }
  template <int bits> struct Sum {
    Ints v;
    void begin(Ints first) { v = first; }
    template <int place, int words> void add(const Codes& c, Factor x) {
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) v.v[i] += static_cast<int32_t>(c.v[4 * i + j]) * x.v[j];
    }
    Ints total() const { return v; }
  };
};
using Coarse = Plain<int8_t, kCoarseTop>;
using Fine = Plain<int16_t, kFineTop>;

#endif

}  // namespace HEADRACE_ISA
}  // namespace headrace
