// Element types of a KV cache besides those of elements.h: one byte or half of one.
//   e4m3   sign, 4 bits exponent (bias 7), 3 bits mantissa; largest 448, no infinity, NaN is 0x7f and 0xff
//   int8   two's complement
//   int4   two codes in a byte, -8 .. 7 in two's complement: element 2i in the low half, 2i + 1 in the high one
// Storing rounds to nearest even and saturates. NaN stays one in e4m3; the other two cannot hold it.
#pragma once
#include "elements.h"

namespace headrace {
namespace HEADRACE_ISA {

static inline float e4m3_to_float(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return NAN;
  return 256.0f * half_to_float(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
}

static inline uint8_t float_to_e4m3(float f) {
  uint32_t bits, sign, code;
  memcpy(&bits, &f, 4);
  sign = (bits >> 24) & 0x80;
  float size = fabsf(f);
  if (size != size) return static_cast<uint8_t>(sign | 0x7f);
  if (size > 448.0f) size = 448.0f;
  if (size < 0.015625f) {  // subnormal: let the float adder do the rounding, 2^14 has steps of 2^-9
    size += 16384.0f;
    memcpy(&code, &size, 4);
    return static_cast<uint8_t>(sign | (code - 0x46800000));
  }
  memcpy(&bits, &size, 4);
  code = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  return static_cast<uint8_t>(sign | code);
}

#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)

static inline __m128i load_sixteen(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// The bits of e4m3 in their places of a half: 2^-8 times the value, but for NaN.
static inline __m256i e4m3_as_half(__m128i codes) {
  return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
}
static inline __m128i nibbles_to_bytes(const uint8_t* p) {
  __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), four = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  __m128i nibbles = _mm_unpacklo_epi8(_mm_and_si128(packed, four), _mm_and_si128(_mm_srli_epi16(packed, 4), four));
  return _mm_sub_epi8(_mm_xor_si128(nibbles, eight), eight);
}
static inline void store_nibbles(uint8_t* p, __m128i bytes) {  // bytes: -8 .. 7
  __m128i pairs = _mm_maddubs_epi16(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi16(0x1001));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

#endif
#if defined(HEADRACE_AVX512)

static inline Floats load_e4m3(const uint8_t* p) {
  __m128i codes = load_sixteen(p), largest_code = _mm_set1_epi8(0x7f);
  __m512 scaled = _mm512_mul_ps(_mm512_maskz_cvtph_ps(kAllLanes, e4m3_as_half(codes)), _mm512_set1_ps(256.0f));
  __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(codes, largest_code), largest_code);
  return {_mm512_mask_blend_ps(nan, scaled, _mm512_set1_ps(NAN))};
}
static inline void store_e4m3(uint8_t* p, Floats a) {
  Floats size = minimum(broadcast(448.0f), absolute(a));  // a NaN stays: it is the second operand
  __m512i bits = _mm512_castps_si512(size.v), sign = _mm512_maskz_srli_epi32(kAllLanes, _mm512_castps_si512(a.v), 24);
  __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAllLanes, bits, 20), _mm512_set1_epi32(1));
  __m512i carried = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd);
  __m512i code = _mm512_sub_epi32(_mm512_maskz_srli_epi32(kAllLanes, carried, 20), _mm512_set1_epi32(120 << 3));
  __m512i tiny = _mm512_sub_epi32(_mm512_castps_si512(add(size, broadcast(16384.0f)).v), _mm512_set1_epi32(0x46800000));
  code = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(size.v, _mm512_set1_ps(0.015625f), _CMP_LT_OQ), code, tiny);
  code = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), code, _mm512_set1_epi32(0x7f));
  code = _mm512_or_si512(code, _mm512_and_si512(sign, _mm512_set1_epi32(0x80)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAllLanes, code));
}
static inline Floats load_int4(const uint8_t* p) {
  return {_mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, nibbles_to_bytes(p)))};
}

#elif defined(HEADRACE_AVX2)

static inline __m256 e4m3_of_half(__m128i halves) {
  __m256 scaled = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f));
  __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), scaled);
  return _mm256_or_ps(scaled, _mm256_cmp_ps(size, _mm256_set1_ps(480.0f), _CMP_EQ_OQ));  // all ones is a NaN
}
static inline Floats load_e4m3(const uint8_t* p) {
  __m256i halves = e4m3_as_half(load_sixteen(p));
  return {e4m3_of_half(_mm256_castsi256_si128(halves)), e4m3_of_half(_mm256_extracti128_si256(halves, 1))};
}
static inline __m256i e4m3_codes(__m256 a) {
  __m256 size = _mm256_min_ps(_mm256_set1_ps(448.0f), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a));  // a NaN stays
  __m256i bits = _mm256_castps_si256(size), sign = _mm256_srli_epi32(_mm256_castps_si256(a), 24);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  __m256i carried = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd);
  __m256i code = _mm256_sub_epi32(_mm256_srli_epi32(carried, 20), _mm256_set1_epi32(120 << 3));
  __m256i shifted = _mm256_castps_si256(_mm256_add_ps(size, _mm256_set1_ps(16384.0f)));
  __m256i tiny = _mm256_sub_epi32(shifted, _mm256_set1_epi32(0x46800000));
  __m256i is_tiny = _mm256_castps_si256(_mm256_cmp_ps(size, _mm256_set1_ps(0.015625f), _CMP_LT_OQ));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  code = _mm256_blendv_epi8(_mm256_blendv_epi8(code, tiny, is_tiny), _mm256_set1_epi32(0x7f), is_nan);
  return _mm256_or_si256(code, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)));
}
static inline void store_e4m3(uint8_t* p, Floats a) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(e4m3_codes(a.low), e4m3_codes(a.high)), 0xd8);
  __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
static inline Floats load_int4(const uint8_t* p) {
  __m128i bytes = nibbles_to_bytes(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

#else  // portable: the plain loops

static inline Floats load_e4m3(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = e4m3_to_float(p[i]);
  return r;
}
static inline void store_e4m3(uint8_t* p, Floats a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_e4m3(a.v[i]);
}
static inline Floats load_int4(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(((p[i / 2] >> (i % 2 * 4) & 15) ^ 8) - 8);
  return r;
}

#endif

// NaN becomes the lowest: of a NaN and a number, maximum gives the second.
static inline Floats within(Floats a, float lowest, float highest) {
  return minimum(maximum(a, broadcast(lowest)), broadcast(highest));
}

static inline void store_int4(uint8_t* p, Floats a) {
  int8_t codes[kLanes];
  store_int8(codes, within(a, -8.0f, 7.0f));
#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)
  store_nibbles(p, load_sixteen(codes));
#else
  for (int i = 0; i < kLanes; i += 2) p[i / 2] = static_cast<uint8_t>((codes[i] & 15) | (codes[i + 1] & 15) << 4);
#endif
}

// largest_code: what a row's largest number becomes where its scale is computed.
struct AsE4m3 : OneEach<uint8_t> {
  static constexpr bool scaled = true, keeps_nan = true;
  static constexpr float largest_code = 448.0f;
  static Floats load(const type* p) { return load_e4m3(p); }
  static void store(type* p, Floats a) { store_e4m3(p, a); }
  static float load_one(const type* p, int64_t i = 0) { return e4m3_to_float(p[i]); }
};
struct AsInt8 : OneEach<int8_t> {
  static constexpr bool scaled = true, keeps_nan = false;
  static constexpr float largest_code = 127.0f;
  static Floats load(const type* p) { return load_int8(p); }
  static void store(type* p, Floats a) { store_int8(p, within(a, -128.0f, 127.0f)); }
  static float load_one(const type* p, int64_t i = 0) { return static_cast<float>(p[i]); }
};
struct AsInt4 {
  using type = uint8_t;
  static constexpr bool scaled = true, keeps_nan = false;
  static constexpr float largest_code = 7.0f;
  static constexpr int64_t per_item = 2;
  static const type* at(const type* p, int64_t element) { return p + element / 2; }
  static type* at(type* p, int64_t element) { return p + element / 2; }
  static Floats load(const type* p) { return load_int4(p); }
  static void store(type* p, Floats a) { store_int4(p, a); }
  static float load_one(const type* p, int64_t i = 0) {
    return static_cast<float>(((p[i / 2] >> (i % 2 * 4) & 15) ^ 8) - 8);
  }
};

// Calls f with the tag of any type that a cache may hold.
template <class F> static inline void with_cached(DType type, F f) {
  with_element(type, f);
  if (type == DType::f8) f(AsE4m3{});
  if (type == DType::i8) f(AsInt8{});
  if (type == DType::i4) f(AsInt4{});
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
