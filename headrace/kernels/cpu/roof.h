// The probes of the machine's roofs: read as fast as loads go, multiply as fast as registers allow.
// They compute nothing of use. What they return depends on every load and product, so that none can be left out.
#pragma once
#include "simd.h"

namespace headrace {
namespace HEADRACE_ISA {

// Enough chains to cover the latency of a multiply-add, few enough to stay in registers.
#if defined(HEADRACE_AVX512)
constexpr int kChains = 12;
#elif defined(HEADRACE_AVX2)
constexpr int kChains = 6;
#else
constexpr int kChains = 3;
#endif
constexpr int kProbeUnroll = 16;

// Tells the compiler that these bytes may have changed: each product is computed anew, as with real operands.
static inline void renew(Bytes& bytes) {
#if defined(HEADRACE_AVX512)
  asm volatile("" : "+v"(bytes.v));
#elif defined(HEADRACE_AVX2)
  asm volatile("" : "+x"(bytes.low), "+x"(bytes.high));
#else
  asm volatile("" : "+m"(bytes));
#endif
}

// The bitwise or of n bytes; what is left over after whole blocks of 256 is not read.
static uint8_t read_bytes(const uint8_t* p, int64_t n) {
  Bytes a = broadcast_byte(0), b = a, c = a, d = a;
  for (const uint8_t* end = p + (n & ~int64_t{255}); p != end; p += 256) {
    a = bits_or(a, load_bytes(p));
    b = bits_or(b, load_bytes(p + 64));
    c = bits_or(c, load_bytes(p + 128));
    d = bits_or(d, load_bytes(p + 192));
  }
  uint8_t all[64], result = 0;
  store_bytes(all, bits_or(bits_or(a, b), bits_or(c, d)));
  for (int i = 0; i < 64; ++i) result |= all[i];
  return result;
}

// Operations done: two per lane and multiply-add.
static int64_t multiply_floats(int64_t rounds, float* result) {
  Floats chain[kChains];
  Floats factor = broadcast(result[0]), step = broadcast(result[1]);
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast(static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kProbeUnroll; ++u)
      for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], factor, step);
  for (int c = 1; c < kChains; ++c) chain[0] = add(chain[0], chain[c]);
  result[2] = sum(chain[0]);
  return 2 * rounds * kProbeUnroll * kChains * kLanes;
}

// uint8 x int8 summed in int32, four products to a lane.
static int64_t multiply_bytes(int64_t rounds, float* result) {
  Ints chain[kChains];
  Bytes values = broadcast_byte(static_cast<uint8_t>(result[0]));
  int8_t four[4] = {1, 0, -1, static_cast<int8_t>(result[1])};
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast_int(c);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kProbeUnroll; ++u)
      for (int c = 0; c < kChains; ++c) {
        chain[c] = dot4(chain[c], values, four);
        renew(values);
      }
  Floats total = zero();
  for (int c = 0; c < kChains; ++c) total = add(total, to_floats(chain[c]));
  result[2] = sum(total);
  return 2 * rounds * kProbeUnroll * kChains * kLanes * 4;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
