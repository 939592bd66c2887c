// Scores of a cache of int8 with products of int8 (VPDPBUSD): keys are never widened.
// A query row becomes numbers of 24 bits, a sign among them, times a unit, which is what float32 keeps of its largest number;
// each is three digits in base 256 from -128 on, and a digit times a code is exact, as are their sums. Keys take part as code + 128.
// Bound: three multiplications of 64 bytes per row and 64 elements in place of four of 16 floats. Error: half a unit per number.
#pragma once
#include "attention.h"

namespace headrace {
namespace HEADRACE_ISA {

template <class E> constexpr bool kByDigits = false;
// NOTE: with more rows the sums and sixteen keys do not fit the registers, and floats are faster.
template <class E> static bool by_digits(int64_t rows) { return kByDigits<E> && rows <= 3; }

#if defined(HEADRACE_AVX512)

template <> constexpr bool kByDigits<AsInt8> = true;
constexpr int kDigits = 3;
constexpr float kLargestDigits = 127.0f * 65536.0f;
constexpr float kSmallestQuery = 1e-30f;  // less than that is nothing: its unit would be no normal number

// Four numbers of a row of queries, as they take the place of four floats. The first four of a row keep in `extra` its unit and,
// of each digit, -128 times the sum.
struct DigitsOfFour {
  int8_t digit[kDigits][4];
  int32_t extra;
};
static_assert(sizeof(DigitsOfFour) == 4 * sizeof(float), "digits replace the floats they come from");

static float largest_number(const float* x, int64_t n) {
  float most = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float size = fabsf(x[i]);
    if (!(size <= most)) most = size;
    if (size != size) return size;
  }
  return most;
}

// Takes apart n floats, a multiple of 16. NOTE: a row with an infinite number or a NaN has only NaN for scores.
static void take_digits(float* row, int64_t n) {
  float size = largest_number(row, n), unit = size < kSmallestQuery ? 0.0f : size / kLargestDigits;
  float factor = size >= kSmallestQuery && size <= 3.4028235e38f ? 1.0f / unit : 0.0f;
  int32_t sums[kDigits] = {};
  for (int64_t i = 0; i < n; i += 4) {
    DigitsOfFour four;
    for (int k = 0; k < 4; ++k) {
      int32_t left = factor == 0.0f ? 0 : static_cast<int32_t>(nearbyintf(row[i + k] * factor));
      for (int digit = kDigits - 1; digit >= 0; --digit) {
        int32_t low = digit ? static_cast<int8_t>(left & 255) : left;
        four.digit[digit][k] = static_cast<int8_t>(low);
        sums[digit] += low;
        left = (left - low) / 256;
      }
    }
    memcpy(row + i, &four, sizeof four);
  }
  auto set_extra = [&](int i, const void* from) { memcpy(row + 4 * i + kDigits, from, 4); };
  set_extra(0, &unit);
  for (int digit = 0; digit < kDigits; ++digit) {
    int32_t offset = -128 * sums[digit];
    set_extra(1 + digit, &offset);
  }
}

// Sixteen keys, up to 64 elements of each: lane i of vector j has elements 4j .. 4j + 3 of key i, as code + 128.
static inline void load_codes(const int8_t* base, const int64_t places[kLanes], int64_t left, Floats four[kLanes]) {
  __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(128));
  for (int i = 0; i < kLanes; ++i)
    four[i].v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_maskz_loadu_epi8(there, base + places[i]), middle));
  transpose(four);
}

// acc[r][digit] += products of a row's digits and `count` vectors of four codes.
template <int rows>
static inline void add_code_products(const float* query, int64_t stride, const Floats* four, int count, Ints acc[rows][kDigits]) {
  const float* row[rows];
  for (int r = 0; r < rows; ++r) row[r] = query + r * stride;
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < rows; ++r) {
      const auto* digits = reinterpret_cast<const int8_t*>(row[r] + 4 * i);
      for (int digit = 0; digit < kDigits; ++digit)
        acc[r][digit] = dot4(acc[r][digit], {_mm512_castps_si512(four[i].v)}, digits + 4 * digit);
    }
}

// scores[r * 64 + i]: query row r times key i of sixteen, but for the keys' scales.
template <int rows>
static inline void score_sixteen(const float* query, int64_t stride, const int8_t* base, const int64_t* places, int64_t n, float* scores) {
  Ints acc[rows][kDigits];
  auto extra = [&](int r, int i) { return query + r * stride + 4 * i + kDigits; };
  for (int r = 0; r < rows; ++r)
    for (int digit = 0; digit < kDigits; ++digit) {
      int32_t offset;
      memcpy(&offset, extra(r, 1 + digit), 4);
      acc[r][digit] = broadcast_int(offset);
    }
  int64_t j = 0;
  for (Floats four[kLanes]; j + 64 <= n; j += 64) {
    load_codes(base + j, places, 64, four);
    add_code_products<rows>(query + j, stride, four, kLanes, acc);
  }
  if (j < n) {
    Floats four[kLanes];
    load_codes(base + j, places, n - j, four);
    add_code_products<rows>(query + j, stride, four, static_cast<int>((n - j + 3) / 4), acc);
  }
  for (int r = 0; r < rows; ++r) {
    Floats total = to_floats(acc[r][0]);
    for (int digit = 1; digit < kDigits; ++digit) total = fma(total, broadcast(256.0f), to_floats(acc[r][digit]));
    store(scores + r * kKeyBlock, mul(total, broadcast(*extra(r, 0))));
  }
}

#endif

}  // namespace HEADRACE_ISA
}  // namespace headrace
