// Sixteen lanes, three ways: one zmm, two ymm, or an array with plain loops. Kernels are written once over these and
// compiled once per instruction set, inside the namespace HEADRACE_ISA names.
//   Floats  16 x float      Ints  16 x int32      Bytes  64 x uint8 (16 lanes of 4)
// NOTE: nothing here or in the kernels may be an inline function outside that namespace (std containers included): the
// linker keeps one copy of such a function, and it might be the one with instructions the CPU lacks.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)
#include <immintrin.h>
#endif

namespace headrace {
namespace HEADRACE_ISA {

constexpr int kLanes = 16;

static inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even.
static inline uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal half: let the float adder do the rounding
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

static inline float bf16_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(HEADRACE_AVX512)

// NOTE: gcc 12 gives the unmasked intrinsics an uninitialized operand and then, in some loops, takes the whole result
// for undefined and deletes the code that computes it. The masked forms with all lanes on are the same instructions.
constexpr __mmask16 kAllLanes = 0xffff;

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };

static inline Floats zero() { return {_mm512_setzero_ps()}; }
static inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
static inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
static inline Floats load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
static inline void store_some(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
static inline Floats widen_half(__m256i h) { return {_mm512_maskz_cvtph_ps(kAllLanes, h)}; }
static inline Floats load_half(const uint16_t* p) { return widen_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kAllLanes, a.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, _mm512_maskz_cvtepu16_epi32(kAllLanes, h), 16))};
}
static inline Floats load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline void store_bf16(uint16_t* p, Floats a) {
  __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAllLanes, bits, 16), one);
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAllLanes, _mm512_maskz_srli_epi32(kAllLanes, rounded, 16)));
}
static inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// *x a + b. NOTE: in words, because gcc spreads a number that is used twice into a register, which takes a slot of the units
// that multiply (Zen 4: 0.45 of one) where reading it again takes none.
static inline Floats fma_of(const float* x, Floats a, Floats b) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(b.v) : "v"(a.v), "m"(*x));
  return b;
}
static inline Floats maximum(Floats a, Floats b) { return {_mm512_maskz_max_ps(kAllLanes, a.v, b.v)}; }
static inline Floats minimum(Floats a, Floats b) { return {_mm512_maskz_min_ps(kAllLanes, a.v, b.v)}; }
static inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
static inline Floats round_even(Floats a) { return {_mm512_maskz_roundscale_ps(kAllLanes, a.v, 0)}; }
// a where x < limit, else b
static inline Floats select_less(Floats x, Floats limit, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), b.v, a.v)};
}
static inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_maskz_scalef_ps(kAllLanes, a.v, n.v)}; }
static inline __m256 upper_half(Floats a) { return _mm512_maskz_extractf32x8_ps(0xff, a.v, 1); }
static inline float sum(Floats a) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper_half(a));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static inline float largest(Floats a) {
  __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper_half(a));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
static inline void store_int8(int8_t* p, Floats a) {  // rounded, saturated
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtsepi32_epi8(kAllLanes, _mm512_maskz_cvtps_epi32(kAllLanes, a.v)));
}
static inline Floats load_int8(const int8_t* p) {
  return {_mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline Floats load_uint8(const uint8_t* p) {
  return {_mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepu8_epi32(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

static inline Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int n> static inline Ints times_two_to(Ints a) { return {_mm512_maskz_slli_epi32(kAllLanes, a.v, n)}; }
static inline Floats to_floats(Ints a) { return {_mm512_maskz_cvtepi32_ps(kAllLanes, a.v)}; }

static inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
static inline Bytes broadcast_byte(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
// Byte b of every lane, as numbers.
static inline Floats byte_of_lanes(Bytes a, int b) {
  __m512i bytes = _mm512_and_si512(_mm512_maskz_srlv_epi32(kAllLanes, a.v, _mm512_set1_epi32(8 * b)), _mm512_set1_epi32(255));
  return {_mm512_maskz_cvtepi32_ps(kAllLanes, bytes)};
}
// Two bf16 in every lane.
static inline Floats low_bf16(Bytes a) { return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, a.v, 16))}; }
static inline Floats high_bf16(Bytes a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
static inline Bytes bits_and(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Bytes bits_or(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// NOTE: shifts move 16-bit words; mask the bits that cross from the neighbouring byte.
template <int n> static inline Bytes shift_right(Bytes a) { return {_mm512_srli_epi16(a.v, n)}; }
template <int n> static inline Bytes shift_left(Bytes a) { return {_mm512_slli_epi16(a.v, n)}; }
static inline Bytes lookup(const uint8_t table[16], Bytes nibbles) {
  __m512i t = _mm512_maskz_broadcast_i32x4(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm512_shuffle_epi8(t, nibbles.v)};
}
// acc[lane] += sum over the lane's four bytes of u * four; u any uint8.
static inline Ints dot4(Ints acc, Bytes u, const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  return {_mm512_dpbusd_epi32(acc.v, u.v, _mm512_set1_epi32(word))};
}

#elif defined(HEADRACE_AVX2)

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
struct Bytes { __m256i low, high; };

static inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a.low); _mm256_storeu_ps(p + 8, a.high); }
static inline Floats load_some(const float* p, int n) {
  float padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(n) * 4);
  return load(padded);
}
static inline void store_some(float* p, Floats a, int n) {
  float padded[kLanes];
  store(padded, a);
  memcpy(p, padded, static_cast<size_t>(n) * 4);
}
static inline __m128i load_eight(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline Floats widen_half(__m256i h) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
static inline Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))};
}
static inline void store_half(uint16_t* p, Floats a) {
  auto* out = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m256 widen_eight(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline Floats widen_bf16(__m256i h) {
  return {widen_eight(_mm256_castsi256_si128(h)), widen_eight(_mm256_extracti128_si256(h, 1))};
}
static inline Floats load_bf16(const uint16_t* p) { return {widen_eight(load_eight(p)), widen_eight(load_eight(p + 8))}; }
static inline void store_bf16(uint16_t* p, Floats a) {
  float plain[kLanes];
  store(plain, a);
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(plain[i]);
}
#define HEADRACE_BOTH(name, args, low_expression, high_expression) \
  static inline Floats name args { return {low_expression, high_expression}; }
HEADRACE_BOTH(add, (Floats a, Floats b), _mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high))
HEADRACE_BOTH(sub, (Floats a, Floats b), _mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high))
HEADRACE_BOTH(mul, (Floats a, Floats b), _mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high))
HEADRACE_BOTH(div, (Floats a, Floats b), _mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high))
HEADRACE_BOTH(fma, (Floats a, Floats b, Floats c), _mm256_fmadd_ps(a.low, b.low, c.low),
              _mm256_fmadd_ps(a.high, b.high, c.high))
HEADRACE_BOTH(maximum, (Floats a, Floats b), _mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high))
HEADRACE_BOTH(minimum, (Floats a, Floats b), _mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high))
HEADRACE_BOTH(absolute, (Floats a), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.low),
              _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.high))
HEADRACE_BOTH(round_even, (Floats a), _mm256_round_ps(a.low, 0), _mm256_round_ps(a.high, 0))
HEADRACE_BOTH(select_less, (Floats x, Floats limit, Floats a, Floats b),
              _mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, limit.low, _CMP_LT_OQ)),
              _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, limit.high, _CMP_LT_OQ)))
#undef HEADRACE_BOTH
static inline Floats fma_of(const float* x, Floats a, Floats b) { return fma(broadcast(*x), a, b); }
static inline __m256 scale_eight(__m256 a, __m256 n) {  // n whole, within -126..127
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
static inline Floats times_power_of_two(Floats a, Floats n) { return {scale_eight(a.low, n.low), scale_eight(a.high, n.high)}; }
static inline float sum(Floats a) {
  __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static inline float largest(Floats a) {
  __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
static inline void store_int8(int8_t* p, Floats a) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
static inline Floats load_int8(const int8_t* p) {
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
static inline Floats load_uint8(const uint8_t* p) {
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}

static inline Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int n> static inline Ints times_two_to(Ints a) { return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)}; }
static inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

static inline Bytes load_bytes(const uint8_t* p) {
  auto* in = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(in), _mm256_loadu_si256(in + 1)};
}
static inline void store_bytes(uint8_t* p, Bytes a) {
  auto* out = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(out, a.low);
  _mm256_storeu_si256(out + 1, a.high);
}
static inline Bytes broadcast_byte(uint8_t x) {
  __m256i v = _mm256_set1_epi8(static_cast<char>(x));
  return {v, v};
}
static inline __m256 byte_of_eight(__m256i a, int b) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(a, _mm256_set1_epi32(8 * b)), _mm256_set1_epi32(255)));
}
static inline Floats byte_of_lanes(Bytes a, int b) { return {byte_of_eight(a.low, b), byte_of_eight(a.high, b)}; }
static inline Floats low_bf16(Bytes a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16))};
}
static inline Floats high_bf16(Bytes a) {
  __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.low, mask)), _mm256_castsi256_ps(_mm256_and_si256(a.high, mask))};
}
static inline Bytes bits_and(Bytes a, Bytes b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
static inline Bytes bits_or(Bytes a, Bytes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
template <int n> static inline Bytes shift_right(Bytes a) { return {_mm256_srli_epi16(a.low, n), _mm256_srli_epi16(a.high, n)}; }
template <int n> static inline Bytes shift_left(Bytes a) { return {_mm256_slli_epi16(a.low, n), _mm256_slli_epi16(a.high, n)}; }
static inline Bytes lookup(const uint8_t table[16], Bytes nibbles) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, nibbles.low), _mm256_shuffle_epi8(t, nibbles.high)};
}
// NOTE: maddubs saturates at int16, so here u must stay below 128: 2 * 127 * 128 fits.
static inline Ints dot4(Ints acc, Bytes u, const int8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  __m256i x = _mm256_set1_epi32(word), ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.low, _mm256_madd_epi16(_mm256_maddubs_epi16(u.low, x), ones)),
          _mm256_add_epi32(acc.high, _mm256_madd_epi16(_mm256_maddubs_epi16(u.high, x), ones))};
}

#else  // portable: the plain loops

struct Floats { float v[kLanes]; };
struct Ints { int32_t v[kLanes]; };
struct Bytes { uint8_t v[4 * kLanes]; };

#define HEADRACE_LANES(type, name, args, expression) \
  static inline type name args {                     \
    type r;                                          \
    for (int i = 0; i < kLanes; ++i) r.v[i] = expression; \
    return r;                                        \
  }
HEADRACE_LANES(Floats, zero, (), 0.0f)
HEADRACE_LANES(Floats, broadcast, (float x), x)
HEADRACE_LANES(Floats, load, (const float* p), p[i])
HEADRACE_LANES(Floats, load_some, (const float* p, int n), i < n ? p[i] : 0.0f)
HEADRACE_LANES(Floats, load_half, (const uint16_t* p), half_to_float(p[i]))
HEADRACE_LANES(Floats, load_bf16, (const uint16_t* p), bf16_to_float(p[i]))
HEADRACE_LANES(Floats, load_int8, (const int8_t* p), static_cast<float>(p[i]))
HEADRACE_LANES(Floats, load_uint8, (const uint8_t* p), static_cast<float>(p[i]))
HEADRACE_LANES(Floats, add, (Floats a, Floats b), a.v[i] + b.v[i])
HEADRACE_LANES(Floats, sub, (Floats a, Floats b), a.v[i] - b.v[i])
HEADRACE_LANES(Floats, mul, (Floats a, Floats b), a.v[i] * b.v[i])
HEADRACE_LANES(Floats, div, (Floats a, Floats b), a.v[i] / b.v[i])
HEADRACE_LANES(Floats, fma, (Floats a, Floats b, Floats c), a.v[i] * b.v[i] + c.v[i])
HEADRACE_LANES(Floats, maximum, (Floats a, Floats b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
HEADRACE_LANES(Floats, minimum, (Floats a, Floats b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
HEADRACE_LANES(Floats, absolute, (Floats a), fabsf(a.v[i]))
HEADRACE_LANES(Floats, round_even, (Floats a), nearbyintf(a.v[i]))
HEADRACE_LANES(Floats, select_less, (Floats x, Floats limit, Floats a, Floats b), x.v[i] < limit.v[i] ? a.v[i] : b.v[i])
HEADRACE_LANES(Floats, times_power_of_two, (Floats a, Floats n), ldexpf(a.v[i], static_cast<int>(n.v[i])))
HEADRACE_LANES(Floats, to_floats, (Ints a), static_cast<float>(a.v[i]))
HEADRACE_LANES(Ints, broadcast_int, (int32_t x), x)
#undef HEADRACE_LANES
static inline Floats fma_of(const float* x, Floats a, Floats b) { return fma(broadcast(*x), a, b); }
static inline void store(float* p, Floats a) { memcpy(p, a.v, sizeof a.v); }
static inline void store_some(float* p, Floats a, int n) { memcpy(p, a.v, static_cast<size_t>(n) * 4); }
static inline void store_half(uint16_t* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
static inline void store_bf16(uint16_t* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(a.v[i]);
}
static inline float sum(Floats a) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += a.v[i];
  return total;
}
static inline float largest(Floats a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
static inline void store_int8(int8_t* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) {
    float r = nearbyintf(a.v[i]);
    p[i] = static_cast<int8_t>(r > 127 ? 127 : r < -128 ? -128 : r);
  }
}
static inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline void store_bytes(uint8_t* p, Bytes a) { memcpy(p, a.v, sizeof a.v); }
static inline Bytes broadcast_byte(uint8_t x) {
  Bytes r;
  memset(r.v, x, sizeof r.v);
  return r;
}
static inline Floats byte_of_lanes(Bytes a, int b) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[4 * i + b];
  return r;
}
static inline uint16_t half_word(Bytes a, int i) { return static_cast<uint16_t>(a.v[2 * i] | (a.v[2 * i + 1] << 8)); }
static inline Floats low_bf16(Bytes a) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = bf16_to_float(half_word(a, 2 * i));
  return r;
}
static inline Floats high_bf16(Bytes a) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = bf16_to_float(half_word(a, 2 * i + 1));
  return r;
}
static inline Bytes bits_and(Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.v[i] &= b.v[i];
  return a;
}
static inline Bytes bits_or(Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
template <int n> static inline Bytes shift_right(Bytes a) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] >> n);
  return a;
}
template <int n> static inline Bytes shift_left(Bytes a) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] << n);
  return a;
}
static inline Bytes lookup(const uint8_t table[16], Bytes nibbles) {
  for (int i = 0; i < 64; ++i) nibbles.v[i] = table[nibbles.v[i] & 15];
  return nibbles;
}
template <int n> static inline Ints times_two_to(Ints a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= 1 << n;
  return a;
}
static inline Ints dot4(Ints acc, Bytes u, const int8_t* four) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int32_t>(u.v[4 * i + j]) * four[j];
  return acc;
}

#endif

// e^x. Relative error below 2.5e-7 for x in [-87.3, 88.3]; 0 below that, and the largest value above; NaN of NaN (the
// order of operands matters: of a NaN and a number, minimum and maximum give the second).
static inline Floats exponential(Floats x) {
  const Floats lowest = broadcast(-87.33654f);
  Floats clamped = minimum(broadcast(88.3762f), maximum(lowest, x));
  Floats n = round_even(mul(clamped, broadcast(1.44269504f)));
  Floats r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
  return select_less(x, lowest, zero(), times_power_of_two(p, n));
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
