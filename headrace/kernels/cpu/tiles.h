// AMX tiles: eight registers of 16 rows x 64 bytes. Hardware ones, and emulated ones so that the kernels over them are
// tested on every machine.
// NOTE: gcc 12's own intrinsics for these lack memory clobbers (and it drops most of the configuration): hence the asm.
#pragma once
#include "simd.h"

namespace headrace {
namespace HEADRACE_ISA {

// The sums of products of bf16 pairs: C[16][16] f32 += A[16 rows][32] * B[16 pairs][16][2].
// Registers: 0-3 C (two by two), 4-5 A, 6-7 B.
#if defined(HEADRACE_AMX)

struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  template <int t> void clear() { asm volatile("tilezero %%tmm%c0" : : "i"(t) : "memory"); }
  template <int t> void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t> void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b> void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b) : "memory");
  }
};

#else

struct Tiles {
  alignas(64) uint8_t data[8][16][64];
  template <int t> void clear() { memset(data[t], 0, sizeof data[t]); }
  template <int t> void load(const void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(data[t][r], static_cast<const uint8_t*>(p) + r * stride, 64);
  }
  template <int t> void store(void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<uint8_t*>(p) + r * stride, data[t][r], 64);
  }
  static float bf16_at(const uint8_t* row, int i) {
    uint16_t h;
    memcpy(&h, row + 2 * i, 2);
    return bf16_to_float(h);
  }
  template <int c, int a, int b> void multiply() {
    for (int m = 0; m < 16; ++m) {
      float out[16];
      memcpy(out, data[c][m], 64);
      for (int n = 0; n < 16; ++n)
        for (int k = 0; k < 32; ++k) out[n] += bf16_at(data[a][m], k) * bf16_at(data[b][k / 2], 2 * n + k % 2);
      memcpy(data[c][m], out, 64);
    }
  }
};

#endif

}  // namespace HEADRACE_ISA
}  // namespace headrace
