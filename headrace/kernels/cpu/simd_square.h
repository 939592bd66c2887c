// Sixteen vectors at once: their sums, and their transpose.
#pragma once
#include "simd.h"

namespace headrace {
namespace HEADRACE_ISA {

#if defined(HEADRACE_AVX512)

static inline __m512 low_pairs(__m512 a, __m512 b) { return _mm512_maskz_unpacklo_ps(kAllLanes, a, b); }
static inline __m512 high_pairs(__m512 a, __m512 b) { return _mm512_maskz_unpackhi_ps(kAllLanes, a, b); }
static inline __m512 low_fours(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
}
static inline __m512 high_fours(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
}
template <int which> static inline __m512 quarters(__m512 a, __m512 b) {
  return _mm512_maskz_shuffle_f32x4(kAllLanes, a, b, which);
}

// Lane i: the sum of v[i].
static inline Floats sums_of(const Floats v[kLanes]) {
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(low_pairs(v[2 * i].v, v[2 * i + 1].v), high_pairs(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; ++i)
    fours[i] = _mm512_add_ps(low_fours(pairs[2 * i], pairs[2 * i + 1]), high_fours(pairs[2 * i], pairs[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm512_add_ps(quarters<0x88>(fours[2 * i], fours[2 * i + 1]), quarters<0xdd>(fours[2 * i], fours[2 * i + 1]));
  return {_mm512_add_ps(quarters<0x88>(halves[0], halves[1]), quarters<0xdd>(halves[0], halves[1]))};
}

static inline void transpose(Floats v[kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = low_pairs(v[2 * i].v, v[2 * i + 1].v);
    a[2 * i + 1] = high_pairs(v[2 * i].v, v[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = low_fours(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = high_fours(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = low_fours(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = high_fours(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = quarters<0x88>(b[i], b[i + 4]);
    a[i + 4] = quarters<0xdd>(b[i], b[i + 4]);
    a[i + 8] = quarters<0x88>(b[i + 8], b[i + 12]);
    a[i + 12] = quarters<0xdd>(b[i + 8], b[i + 12]);
  }
  for (int i = 0; i < 8; ++i) {
    v[i].v = quarters<0x88>(a[i], a[i + 8]);
    v[i + 8].v = quarters<0xdd>(a[i], a[i + 8]);
  }
}

#elif defined(HEADRACE_AVX2)

static inline __m256 halves_sum(Floats a) { return _mm256_add_ps(a.low, a.high); }
static inline __m256 sums_of_eight(const Floats v[8]) {
  __m256 four[2];
  for (int i = 0; i < 2; ++i) {
    __m256 low = _mm256_hadd_ps(halves_sum(v[4 * i]), halves_sum(v[4 * i + 1]));
    __m256 high = _mm256_hadd_ps(halves_sum(v[4 * i + 2]), halves_sum(v[4 * i + 3]));
    four[i] = _mm256_hadd_ps(low, high);
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}
static inline Floats sums_of(const Floats v[kLanes]) { return {sums_of_eight(v), sums_of_eight(v + 8)}; }

static inline void transpose_eight(__m256 v[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
static inline void transpose(Floats v[kLanes]) {
  __m256 quarter[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = v[i].low;
    quarter[1][i] = v[i].high;
    quarter[2][i] = v[i + 8].low;
    quarter[3][i] = v[i + 8].high;
  }
  for (int i = 0; i < 4; ++i) transpose_eight(quarter[i]);
  for (int i = 0; i < 8; ++i) {
    v[i] = {quarter[0][i], quarter[2][i]};
    v[i + 8] = {quarter[1][i], quarter[3][i]};
  }
}

#else

static inline Floats sums_of(const Floats v[kLanes]) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) {
    float half[kLanes];
    memcpy(half, v[i].v, sizeof half);
    for (int n = kLanes / 2; n > 0; n /= 2)
      for (int j = 0; j < n; ++j) half[j] += half[j + n];
    r.v[i] = half[0];
  }
  return r;
}
static inline void transpose(Floats v[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      float kept = v[i].v[j];
      v[i].v[j] = v[j].v[i];
      v[j].v[i] = kept;
    }
}

#endif

}  // namespace HEADRACE_ISA
}  // namespace headrace
