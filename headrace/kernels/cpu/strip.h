// linear over AMX tiles: a strip of 32 weight rows, as bf16 tiles in L2, times all tokens.
// Wins: prefill (16 tokens or more) of every format but F32. The strip is expanded once, whatever its format, and then
//   costs nothing more; sums over all columns stay in the tiles, so no scale is applied between blocks.
// Schedule: 32 tokens x 32 rows are four accumulator tiles; per 32 columns two tiles of each side are loaded, four multiplied.
// Exactness: a value split in two bf16 (high + low) keeps 16 bits. Quantized weights: high * high (better than int8
//   activations). BF16 weights: (high + low) * weight. F16: three products, float32-like.
#pragma once
#include "elements.h"
#include "kernels.h"
#include "tiles.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr int kTileColumns = 32;

// A row of activations as bf16, and what bf16 lost as another, padded with zeros to whole tiles.
static void split_row(const float* x, int64_t n, uint16_t* high, uint16_t* low) {
  int64_t padded = (n + kTileColumns - 1) / kTileColumns * kTileColumns;
  for (int64_t i = 0; i < padded; i += kLanes) {
    Floats v = i < n ? load_first<AsFloat>(x + i, n - i) : zero();
    store_bf16(high + i, v);
    if (low) store_bf16(low + i, sub(v, load_bf16(high + i)));
  }
}

// Sixteen pairs (even, odd) as bf16. Finite values only.
static inline void store_pairs(uint16_t* out, Floats even, Floats odd) {
#if defined(HEADRACE_AVX512)
  auto rounded = [](Floats a) {  // bf16 in the upper half of each lane
    __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    __m512i last = _mm512_and_si512(_mm512_maskz_srli_epi32(kAllLanes, bits, 16), one);
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  };
  __m512i low = _mm512_maskz_srli_epi32(kAllLanes, rounded(even), 16);
  __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm512_storeu_si512(out, _mm512_or_si512(low, high));
#else
  float e[kLanes], o[kLanes];
  store(e, even);
  store(o, odd);
  for (int i = 0; i < kLanes; ++i) {
    out[2 * i] = float_to_bf16(e[i]);
    out[2 * i + 1] = float_to_bf16(o[i]);
  }
#endif
}

// [cols][16] floats to tiles [cols/32][16 pairs][16][2], high and (when wanted) low parts.
static void pack_tiles(const float* panel, int64_t cols, uint16_t* high, uint16_t* low) {
  int64_t padded = (cols + kTileColumns - 1) / kTileColumns * kTileColumns;
  for (int64_t k = 0; k < padded; k += 2, high += 2 * kPanelRows) {
    Floats even = k < cols ? load(panel + k * kPanelRows) : zero();
    Floats odd = k + 1 < cols ? load(panel + (k + 1) * kPanelRows) : zero();
    store_pairs(high, even, odd);
    if (!low) continue;
    Bytes kept = load_bytes(reinterpret_cast<const uint8_t*>(high));
    store_pairs(low, sub(even, low_bf16(kept)), sub(odd, high_bf16(kept)));
    low += 2 * kPanelRows;
  }
}

// Where tile `step` of one side lies.
struct Operand {
  const uint16_t* first;
  const uint16_t* second;
  int64_t stride;  // bytes between rows of a tile
  int64_t step;    // elements between tiles along the columns
};

static void multiply_add(Tiles& tiles, const Operand& x, const Operand& w, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    tiles.load<4>(x.first + s * x.step, x.stride);
    tiles.load<6>(w.first + s * w.step, w.stride);
    tiles.load<7>(w.second + s * w.step, w.stride);
    tiles.multiply<0, 4, 6>();
    tiles.load<5>(x.second + s * x.step, x.stride);
    tiles.multiply<1, 4, 7>();
    tiles.multiply<2, 5, 6>();
    tiles.multiply<3, 5, 7>();
  }
}

// 32 tokens (rows past the last repeat it) times one strip: result [32][32].
static void strip_block(const StripArgs& a) {
  Tiles tiles;
  int64_t steps = (a.cols + kTileColumns - 1) / kTileColumns;
  int64_t panel = steps * kTileColumns * kPanelRows;
  tiles.clear<0>();
  tiles.clear<1>();
  tiles.clear<2>();
  tiles.clear<3>();
  auto tokens = [&](const uint16_t* x) { return Operand{x, x + 16 * a.x_stride, a.x_stride * 2, kTileColumns}; };
  auto rows = [&](const uint16_t* w) { return Operand{w, w + panel, 64, kTileColumns * kPanelRows}; };
  multiply_add(tiles, tokens(a.x_high), rows(a.w_high), steps);
  if (a.x_low) multiply_add(tiles, tokens(a.x_low), rows(a.w_high), steps);
  if (a.w_low) multiply_add(tiles, tokens(a.x_high), rows(a.w_low), steps);
  tiles.store<0>(a.result, 128);
  tiles.store<1>(a.result + 16, 128);
  tiles.store<2>(a.result + 16 * 32, 128);
  tiles.store<3>(a.result + 16 * 32 + 16, 128);
}

static Kernels with_strips(Kernels base) {
  base.split_row = split_row;
  base.pack_tiles = pack_tiles;
  base.strip_block = strip_block;
  return base;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
