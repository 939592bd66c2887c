// linear: a tile of activations times a panel of 16 weight rows, for every weight format.
// Wins: everywhere a matrix is read once (decode) and, tile by tile, in prefill without AMX.
// Schedule: a panel streams once, in order; lanes are weight rows, so no sum across lanes; the codes of 32 columns are
//   expanded once and meet 1..8 activation rows; int32 dots are scaled into fp32 accumulators per 32 columns.
// Zero points cost nothing: the int32 accumulator starts at -zero * (sum of the activations).
#pragma once
#include "cached.h"
#include "kernels.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr int kWords = 8;  // 8 words of 4 columns are a step of 32

// ---- activations to int8

static void quantize_row(const float* x, int64_t n, int8_t* values, BlockRecord* records) {
  for (int64_t b = 0; b < n / kBlock; ++b, x += kBlock, values += kBlock) {
    Floats low = load(x), high = load(x + kLanes);
    float top = largest(maximum(absolute(low), absolute(high)));
    float scale = top / 127.0f;
    Floats inverse = broadcast(top > 0 ? 127.0f / top : 0.0f);
    low = round_even(mul(low, inverse));
    high = round_even(mul(high, inverse));
    float low_total = sum(low), high_total = sum(high);
    if (low_total + high_total != low_total + high_total) {
      // NOTE: int8 has no NaN: without this a NaN or an infinity would become a plausible number.
      records[b] = {NAN, NAN, 0, 0};
      continue;
    }
    store_int8(values, low);
    store_int8(values + kLanes, high);
    auto low_sum = static_cast<int32_t>(low_total), high_sum = static_cast<int32_t>(high_total);
    records[b] = {scale, scale * static_cast<float>(low_sum + high_sum), low_sum, high_sum};
  }
}

static void quantize_twice(const float* x, int64_t n, int8_t* values, BlockRecord* records) {
  quantize_row(x, n, values, records);
  for (int64_t b = 0; b < n / kBlock; ++b) {
    alignas(64) float lost[kBlock];
    Floats scale = broadcast(-records[b].scale);
    for (int i = 0; i < kBlock; i += kLanes)
      store(lost + i, fma(load_int8(values + b * kBlock + i), scale, load(x + b * kBlock + i)));
    quantize_row(lost, kBlock, values + n + b * kBlock, records + n / kBlock + b);
  }
}

// ---- codes

template <int bits> static inline void expand(const uint8_t* p, Bytes code[kWords]) {
  if constexpr (bits == 8) {
    for (int i = 0; i < kWords; ++i) code[i] = load_bytes(p + 64 * i);
    return;
  }
  if constexpr (bits >= 4) {
    const Bytes nibble = broadcast_byte(15);
    for (int i = 0; i < 4; ++i) {
      Bytes both = load_bytes(p + 64 * i);
      code[i] = bits_and(both, nibble);
      code[i + 4] = bits_and(shift_right<4>(both), nibble);
    }
  }
  constexpr int twos_at = bits >= 4 ? 256 : 0;
  if constexpr (bits == 2 || bits == 3 || bits == 6) {
    const Bytes two = broadcast_byte(bits == 6 ? 0x30 : 3);
    for (int j = 0; j < 2; ++j) {
      Bytes four = load_bytes(p + twos_at + 64 * j);
      if constexpr (bits == 6) {
        code[4 * j] = bits_or(code[4 * j], bits_and(shift_left<4>(four), two));
        code[4 * j + 1] = bits_or(code[4 * j + 1], bits_and(shift_left<2>(four), two));
        code[4 * j + 2] = bits_or(code[4 * j + 2], bits_and(four, two));
        code[4 * j + 3] = bits_or(code[4 * j + 3], bits_and(shift_right<2>(four), two));
      } else {
        code[4 * j] = bits_and(four, two);
        code[4 * j + 1] = bits_and(shift_right<2>(four), two);
        code[4 * j + 2] = bits_and(shift_right<4>(four), two);
        code[4 * j + 3] = bits_and(shift_right<6>(four), two);
      }
    }
  }
  if constexpr (bits == 3 || bits == 5) {
    constexpr int place = bits == 3 ? 2 : 4;
    const Bytes one = broadcast_byte(1 << place);
    Bytes eight = load_bytes(p + (bits == 3 ? 128 : 256));
    if constexpr (place == 2) {
      code[0] = bits_or(code[0], bits_and(shift_left<2>(eight), one));
      code[1] = bits_or(code[1], bits_and(shift_left<1>(eight), one));
      code[2] = bits_or(code[2], bits_and(eight, one));
      code[3] = bits_or(code[3], bits_and(shift_right<1>(eight), one));
      code[4] = bits_or(code[4], bits_and(shift_right<2>(eight), one));
      code[5] = bits_or(code[5], bits_and(shift_right<3>(eight), one));
      code[6] = bits_or(code[6], bits_and(shift_right<4>(eight), one));
      code[7] = bits_or(code[7], bits_and(shift_right<5>(eight), one));
    } else {
      code[0] = bits_or(code[0], bits_and(shift_left<4>(eight), one));
      code[1] = bits_or(code[1], bits_and(shift_left<3>(eight), one));
      code[2] = bits_or(code[2], bits_and(shift_left<2>(eight), one));
      code[3] = bits_or(code[3], bits_and(shift_left<1>(eight), one));
      code[4] = bits_or(code[4], bits_and(eight, one));
      code[5] = bits_or(code[5], bits_and(shift_right<1>(eight), one));
      code[6] = bits_or(code[6], bits_and(shift_right<2>(eight), one));
      code[7] = bits_or(code[7], bits_and(shift_right<3>(eight), one));
    }
  }
}

// ---- formats as types: what is known when the kernel is compiled

template <int bits_, int zero_, bool table_, int group_, int sub_, bool has_min_> struct Quantized {
  static constexpr int bits = bits_, zero = zero_, group = group_, sub = sub_;
  static constexpr bool table = table_, has_min = has_min_;
  static constexpr bool wide = bits == 8 || table;                 // codes above 127
  static constexpr int start = wide ? zero - kWideZero : zero;     // what is left to subtract
  static constexpr int subs = group == 256 ? group / sub * 16 : 0;
  static constexpr int sub_at = has_min ? 64 : 32;
  static constexpr int sub_min_at = sub_at + subs;
  static constexpr int codes_at = sub_min_at + (has_min ? subs : 0);
  static constexpr int steps = group / kBlock;
  static constexpr int bytes = codes_at + steps * step_bytes(bits);
};

template <class Q> static inline void expand_codes(const uint8_t* p, Bytes code[kWords]) {
  expand<Q::bits>(p, code);
  if constexpr (Q::table)
    for (int i = 0; i < kWords; ++i) code[i] = lookup(kIq4Table, code[i]);
}

template <class Q> static inline Ints dot_words(Ints acc, const Bytes* code, const int8_t* x, int words) {
  for (int i = 0; i < words; ++i) acc = Q::wide ? dot4_wide(acc, code[i], x + 4 * i) : dot4(acc, code[i], x + 4 * i);
  return acc;
}

// Scales (and mins) of one step: the fp16 one times the step's sub-scale.
template <class Q> struct StepScales {
  Floats low, high, min_low, min_high;  // high only where a scale spans 16 columns

  StepScales(const uint8_t* group, Floats scale, Floats min, int step) : low(scale), high(scale), min_low(min), min_high(min) {
    if constexpr (Q::group == 256) {
      constexpr int per_step = kBlock / Q::sub;
      const auto* sub = reinterpret_cast<const int8_t*>(group + Q::sub_at) + step * per_step * 16;
      low = mul(scale, load_int8(sub));
      if constexpr (per_step == 2) high = mul(scale, load_int8(sub + 16));
      if constexpr (Q::has_min) {
        const auto* sub_min = reinterpret_cast<const int8_t*>(group + Q::sub_min_at) + step * per_step * 16;
        Floats minus = sub_negative(min);
        min_low = mul(minus, load_int8(sub_min));
        if constexpr (per_step == 2) min_high = mul(minus, load_int8(sub_min + 16));
      }
    }
  }
  static Floats sub_negative(Floats a) { return sub(zero(), a); }
};

template <class Q> static inline Floats add_step(Floats acc, const Bytes* code, const StepScales<Q>& s, const int8_t* x,
                                                 const BlockRecord& r) {
  if constexpr (Q::sub == 16) {
    Ints low = dot_words<Q>(broadcast_int(-Q::start * r.low_sum), code, x, 4);
    Ints high = dot_words<Q>(broadcast_int(-Q::start * r.high_sum), code + 4, x + 16, 4);
    acc = fma(to_floats(low), mul(s.low, broadcast(r.scale)), acc);
    acc = fma(to_floats(high), mul(s.high, broadcast(r.scale)), acc);
    if constexpr (Q::has_min) {
      acc = fma(s.min_low, broadcast(r.scale * static_cast<float>(r.low_sum)), acc);
      acc = fma(s.min_high, broadcast(r.scale * static_cast<float>(r.high_sum)), acc);
    }
  } else {
    Ints dot = dot_words<Q>(broadcast_int(Q::start ? -Q::start * (r.low_sum + r.high_sum) : 0), code, x, kWords);
    acc = fma(to_floats(dot), mul(s.low, broadcast(r.scale)), acc);
    if constexpr (Q::has_min) acc = fma(s.min_low, broadcast(r.weighted_sum), acc);
  }
  return acc;
}

// The hardware follows a stream only to the end of its 4 KiB page; what comes after is asked for here, early enough to
// cross memory while the steps between are computed.
constexpr int64_t kAheadBytes = 4096;
template <int bytes> static inline void fetch_ahead(const uint8_t* p) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + kAheadBytes + line);
}

// NOTE: one format's numbers of tokens all add in the same order, so a token's result does not depend on its neighbours.
template <class Q, int tokens> static void quantized_tile(const TileArgs& a) {
  Floats acc[tokens];
  for (int t = 0; t < tokens; ++t) acc[t] = zero();
  const uint8_t* group = a.panel;
  int64_t block = 0;
  for (int64_t g = 0; g < a.cols / Q::group; ++g, group += Q::bytes) {
    Floats scale = load_half(reinterpret_cast<const uint16_t*>(group));
    Floats min = Q::has_min ? load_half(reinterpret_cast<const uint16_t*>(group + 32)) : zero();
    for (int s = 0; s < Q::steps; ++s, ++block) {
      Bytes code[kWords];
      if constexpr (tokens <= 2) fetch_ahead<Q::bytes / Q::steps>(group + s * (Q::bytes / Q::steps));
      expand_codes<Q>(group + Q::codes_at + s * step_bytes(Q::bits), code);
      StepScales<Q> scales(group, scale, min, s);
      for (int t = 0; t < tokens; ++t)
        acc[t] = add_step<Q>(acc[t], code, scales, a.values + t * a.values_stride + block * kBlock,
                             a.records[t * a.records_stride + block]);
    }
  }
  for (int t = 0; t < tokens; ++t) store(a.result + t * kPanelRows, acc[t]);
}

// ---- float panels

struct Panel32 {
  static Floats at(const uint8_t* p, int64_t k) { return load(reinterpret_cast<const float*>(p) + k * 16); }
};
struct Panel16 {
  static Floats at(const uint8_t* p, int64_t k) { return load_half(reinterpret_cast<const uint16_t*>(p) + k * 16); }
};

// Two sums per row, even and odd columns, to hide the latency of the adder.
template <class P, int tokens> static void float_tile(const TileArgs& a) {
  Floats even[tokens], odd[tokens];
  for (int t = 0; t < tokens; ++t) even[t] = odd[t] = zero();
  int64_t k = 0;
  for (; k + 2 <= a.cols; k += 2) {
    Floats w = P::at(a.panel, k), next = P::at(a.panel, k + 1);
    for (int t = 0; t < tokens; ++t) {
      even[t] = fma(w, broadcast(a.x[t * a.x_stride + k]), even[t]);
      odd[t] = fma(next, broadcast(a.x[t * a.x_stride + k + 1]), odd[t]);
    }
  }
  if (k < a.cols)
    for (int t = 0; t < tokens; ++t) even[t] = fma(P::at(a.panel, k), broadcast(a.x[t * a.x_stride + k]), even[t]);
  for (int t = 0; t < tokens; ++t) store(a.result + t * kPanelRows, add(even[t], odd[t]));
}

// Pairs of columns lie together: even ones are the low half of each 32-bit lane.
template <int tokens> static void bf16_tile(const TileArgs& a) {
  Floats acc[tokens][2];
  for (int t = 0; t < tokens; ++t) acc[t][0] = acc[t][1] = zero();
  for (int64_t k = 0; k < a.cols; k += 2) {
    Bytes pair = load_bytes(a.panel + k * 32);
    Floats even = low_bf16(pair), odd = high_bf16(pair);
    for (int t = 0; t < tokens; ++t) {
      const float* x = a.x + t * a.x_stride + k;
      acc[t][0] = fma(even, broadcast(x[0]), acc[t][0]);
      acc[t][1] = fma(odd, broadcast(k + 1 < a.cols ? x[1] : 0.0f), acc[t][1]);
    }
  }
  for (int t = 0; t < tokens; ++t) store(a.result + t * kPanelRows, add(acc[t][0], acc[t][1]));
}

struct AsBf16Panel {};
struct Float32Panel {};
struct Float16Panel {};

template <class F, int tokens> struct Tile {
  static void run(const TileArgs& a) { quantized_tile<F, tokens>(a); }
};
template <int tokens> struct Tile<Float32Panel, tokens> {
  static void run(const TileArgs& a) { float_tile<Panel32, tokens>(a); }
};
template <int tokens> struct Tile<Float16Panel, tokens> {
  static void run(const TileArgs& a) { float_tile<Panel16, tokens>(a); }
};
template <int tokens> struct Tile<AsBf16Panel, tokens> {
  static void run(const TileArgs& a) { bf16_tile<tokens>(a); }
};

static inline TileArgs skip_tokens(TileArgs a, int n) {
  a.x += n * a.x_stride;
  a.values += n * a.values_stride;
  a.records += n * a.records_stride;
  a.result += n * kPanelRows;
  a.tokens -= n;
  return a;
}

template <class F> static void tile_of(TileArgs a) {
  for (; a.tokens >= 8; a = skip_tokens(a, 8)) Tile<F, 8>::run(a);
  if (a.tokens >= 4) Tile<F, 4>::run(a), a = skip_tokens(a, 4);
  if (a.tokens >= 2) Tile<F, 2>::run(a), a = skip_tokens(a, 2);
  if (a.tokens) Tile<F, 1>::run(a);
}

// Calls f with the tag of the format.
template <class F> static inline void with_format(WeightFormat format, F f) {
  switch (format) {
    case WeightFormat::F32: return f(Float32Panel{});
    case WeightFormat::F16: return f(Float16Panel{});
    case WeightFormat::BF16: return f(AsBf16Panel{});
    case WeightFormat::Q4_0: return f(Quantized<4, 8, false, 32, 32, false>{});
    case WeightFormat::Q4_1: return f(Quantized<4, 0, false, 32, 32, true>{});
    case WeightFormat::Q5_0: return f(Quantized<5, 16, false, 32, 32, false>{});
    case WeightFormat::Q5_1: return f(Quantized<5, 0, false, 32, 32, true>{});
    case WeightFormat::Q8_0: return f(Quantized<8, 128, false, 32, 32, false>{});
    case WeightFormat::Q2_K: return f(Quantized<2, 0, false, 256, 16, true>{});
    case WeightFormat::Q3_K: return f(Quantized<3, 4, false, 256, 16, false>{});
    case WeightFormat::Q4_K: return f(Quantized<4, 0, false, 256, 32, true>{});
    case WeightFormat::Q5_K: return f(Quantized<5, 0, false, 256, 32, true>{});
    case WeightFormat::Q6_K: return f(Quantized<6, 32, false, 256, 16, false>{});
    case WeightFormat::IQ4_NL: return f(Quantized<4, 128, true, 32, 32, false>{});
    case WeightFormat::IQ4_XS: return f(Quantized<4, 128, true, 256, 32, false>{});
  }
}

static void tile(WeightFormat format, const TileArgs& a) {
  with_format(format, [&](auto tag) { tile_of<decltype(tag)>(a); });
}

// ---- panels to floats, for exact precision and for wide tiles

// NOTE: inlined, gcc 12 at -O3 takes the whole of unpack_quantized for a function without effect (Q2_K, AVX-512) and
// deletes it.
template <class Q> __attribute__((noinline)) static void unpack_words(const Bytes* code, Floats scale, Floats min, float* out) {
  for (int i = 0; i < 4; ++i)
    for (int b = 0; b < 4; ++b, out += kPanelRows) {
      Floats w = mul(scale, sub(byte_of_lanes(code[i], b), broadcast(static_cast<float>(Q::zero))));
      if constexpr (Q::has_min) w = add(w, min);
      store(out, w);
    }
}

template <class Q> static void unpack_quantized(const uint8_t* group, int64_t cols, float* out) {
  for (int64_t g = 0; g < cols / Q::group; ++g, group += Q::bytes) {
    Floats scale = load_half(reinterpret_cast<const uint16_t*>(group));
    Floats min = Q::has_min ? load_half(reinterpret_cast<const uint16_t*>(group + 32)) : zero();
    for (int s = 0; s < Q::steps; ++s, out += kBlock * kPanelRows) {
      Bytes code[kWords];
      expand_codes<Q>(group + Q::codes_at + s * step_bytes(Q::bits), code);
      StepScales<Q> scales(group, scale, min, s);
      unpack_words<Q>(code, scales.low, scales.min_low, out);
      if constexpr (Q::sub == 16)
        unpack_words<Q>(code + 4, scales.high, scales.min_high, out + 16 * kPanelRows);
      else
        unpack_words<Q>(code + 4, scales.low, scales.min_low, out + 16 * kPanelRows);
    }
  }
}

template <class F> struct Unpack {
  static void run(const uint8_t* p, int64_t cols, float* out) { unpack_quantized<F>(p, cols, out); }
};
template <> struct Unpack<Float32Panel> {
  static void run(const uint8_t* p, int64_t cols, float* out) { memcpy(out, p, static_cast<size_t>(cols) * 64); }
};
template <> struct Unpack<Float16Panel> {
  static void run(const uint8_t* p, int64_t cols, float* out) {
    for (int64_t k = 0; k < cols; ++k) store(out + k * 16, Panel16::at(p, k));
  }
};
template <> struct Unpack<AsBf16Panel> {
  static void run(const uint8_t* p, int64_t cols, float* out) {
    for (int64_t k = 0; k < cols; ++k) {
      Bytes pair = load_bytes(p + k / 2 * 64);
      store(out + k * 16, k % 2 ? high_bf16(pair) : low_bf16(pair));
    }
  }
};

static void unpack_panel(WeightFormat format, const uint8_t* panel, int64_t cols, float* out) {
  with_format(format, [&](auto tag) { Unpack<decltype(tag)>::run(panel, cols, out); });
}

// One token's 16 results to where they belong: + bias + residual, n of them valid.
static void finish_row(const float* result, const float* bias, const float* residual, void* out, DType type, int n) {
  Floats y = load(result);
  if (bias) y = add(y, load_first<AsFloat>(bias, n));
  if (residual) y = add(y, load_first<AsFloat>(residual, n));
  with_element(type, [&](auto tag) {
    using E = decltype(tag);
    store_first<E>(static_cast<typename E::type*>(out), y, n);
  });
}

// A row of any element type as floats.
static void widen_row(const void* x, DType type, int64_t n, float* out) {
  with_cached(type, [&](auto tag) {
    using E = decltype(tag);
    const auto* in = static_cast<const typename E::type*>(x);
    for (int64_t i = 0; i < n; i += kLanes) store_first<AsFloat>(out + i, load_first<E>(E::at(in, i), n - i), n - i);
  });
}

// silu(gate) * up
static void silu_gate(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Floats g = load_first<AsFloat>(gate + i, n - i), u = load_first<AsFloat>(up + i, n - i);
    Floats sigmoid = div(broadcast(1.0f), add(broadcast(1.0f), exponential(sub(zero(), g))));
    store_first<AsFloat>(y + i, mul(mul(g, sigmoid), u), n - i);
  }
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
