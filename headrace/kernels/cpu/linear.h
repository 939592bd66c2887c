// linear: rows of activations times two panels of 16 weight rows, for every weight format.
// Wins: everywhere a matrix is read once (decode) and, tile by tile, in prefill without AMX.
// Schedule: lanes are weight rows, so no sum across lanes. A tile is a few tokens x one panel or two: word by word of
//   32 columns, codes are expanded once and meet all its tokens, an activation once fetched meets all its panels (dots.h);
//   the exact sums of 32 columns are then scaled into fp32 accumulators. Panels stay in cache while all tokens pass.
// Zero points cost one shift: an integer sum starts at -zero * (sum of the activations).
#pragma once
#include "cached.h"
#include "dots.h"
#include "kernels.h"

namespace headrace {
namespace HEADRACE_ISA {

#if defined(__SANITIZE_ADDRESS__)
#define HEADRACE_INLINE inline  // checked, so many tiles inlined would take minutes to compile
#else
#define HEADRACE_INLINE inline __attribute__((always_inline))
#endif

constexpr int kWords = 8;  // 8 words of 4 columns are a step of 32

// ---- activations to integers

template <class A> static void quantize(const float* x, int64_t n, int8_t* values, BlockRecord* records) {
  constexpr float kLargest = A::kTop, kSmallest = 1e-33f;  // below it the inverse would be infinite
  for (int64_t b = 0; b < n / kBlock; ++b, x += kBlock, values += A::kBytes) {
    Floats low = load(x), high = load(x + kLanes);
    float top = largest(maximum(absolute(low), absolute(high)));
    float scale = top / kLargest;
    Floats inverse = broadcast(top > kSmallest ? kLargest / top : 0.0f);
    low = round_even(mul(low, inverse));
    high = round_even(mul(high, inverse));
    float low_total = sum(low), total = low_total + sum(high);
    if (total != total) {
      // NOTE: integers have no NaN: without this a NaN or an infinity would become a plausible number.
      records[b] = {NAN, NAN, 0, 0};
      continue;
    }
    A::put(values, low, high);
    records[b] = {scale, scale * total, -static_cast<int32_t>(total), -static_cast<int32_t>(low_total)};
  }
}

static void quantize_coarse(const float* x, int64_t n, int8_t* values, BlockRecord* records) {
  quantize<Coarse>(x, n, values, records);
}
static void quantize_fine(const float* x, int64_t n, int8_t* values, BlockRecord* records) {
  quantize<Fine>(x, n, values, records);
}

// ---- codes

// Left by n bits, or right by -n.
template <int n> static inline Bytes moved(Bytes a) {
  if constexpr (n > 0) return shift_left<n>(a);
  if constexpr (n < 0) return shift_right<-n>(a);
  return a;
}

// Word i of a step: the codes of columns 4 * i to 4 * i + 3 in every lane.
template <int bits, int i> static inline Bytes expand(const uint8_t* p) {
  if constexpr (bits == 8) {
    return load_bytes(p + 64 * i);
  } else {
    Bytes code{};
    if constexpr (bits >= 4) code = bits_and(moved<i < 4 ? 0 : -4>(load_bytes(p + i % 4 * 64)), broadcast_byte(15));
    constexpr int rest_at = bits >= 4 ? 256 : 0;
    if constexpr (bits == 6) {
      Bytes twos = moved<4 - i % 4 * 2>(load_bytes(p + rest_at + i / 4 * 64));
      code = bits_or(code, bits_and(twos, broadcast_byte(0x30)));
    }
    if constexpr (bits < 4) code = bits_and(moved<-(i % 4 * 2)>(load_bytes(p + i / 4 * 64)), broadcast_byte(3));
    if constexpr (bits == 3 || bits == 5) {
      constexpr int place = bits - 1;
      Bytes ones = moved<place - i>(load_bytes(p + (bits == 3 ? 128 : rest_at)));
      code = bits_or(code, bits_and(ones, broadcast_byte(1 << place)));
    }
    return code;
  }
}

// ---- formats as types: what is known when the kernel is compiled

template <int bits_, int zero_, bool table_, int group_, int sub_, bool has_min_> struct Quantized {
  static constexpr int bits = bits_, zero = zero_, group = group_, sub = sub_;
  static constexpr bool table = table_, has_min = has_min_;
  static constexpr int width = table ? 8 : bits;  // of a code as it is multiplied
  static constexpr int subs = group == 256 ? group / sub * 16 : 0;
  static constexpr int sub_at = has_min ? 64 : 32;
  static constexpr int sub_min_at = sub_at + subs;
  static constexpr int codes_at = sub_min_at + (has_min ? subs : 0);
  static constexpr int steps = group / kBlock;
  static constexpr int parts = sub == 16 ? 2 : 1;  // of a step, with a scale each
  static constexpr int bytes = codes_at + steps * step_bytes(bits);
};

template <class Q, int i> static inline Bytes expand_word(const uint8_t* p) {
  Bytes code = expand<Q::bits, i>(p);
  if constexpr (Q::table) code = lookup(kIq4Table, code);
  return code;
}

// Scale (and min) of one part of a step: the fp16 one times the sub-scale.
template <class Q> struct Scales {
  Floats scale, min;

  Scales(const uint8_t* group, int step, int part) {
    scale = load_half(reinterpret_cast<const uint16_t*>(group));
    min = Q::has_min ? load_half(reinterpret_cast<const uint16_t*>(group + 32)) : zero();
    if constexpr (Q::group == 256) {
      int place = (step * Q::parts + part) * 16;
      scale = mul(scale, load_int8(reinterpret_cast<const int8_t*>(group + Q::sub_at + place)));
      if constexpr (Q::has_min)
        min = mul(sub(zero(), min), load_int8(reinterpret_cast<const int8_t*>(group + Q::sub_min_at + place)));
    }
  }
};

// ---- the tile

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// What the sums of a part start at: -zero * (sum of its activations).
template <class Q, class A> static inline Ints first_of(const BlockRecord& r, int part) {
  constexpr int start = Q::zero - A::removed(Q::width);
  if constexpr (start == 0) return broadcast_int(0);
  int32_t sum = Q::parts == 1 ? r.minus_sum : part == 0 ? r.minus_low_sum : r.minus_sum - r.minus_low_sum;
  return times_two_to<log2_of(start)>(broadcast_int(sum));
}

template <class Q> static inline Floats weighted_sum(const BlockRecord& r, int part) {
  if (Q::parts == 1) return broadcast(r.weighted_sum);
  return broadcast(-r.scale * static_cast<float>(part == 0 ? r.minus_low_sum : r.minus_sum - r.minus_low_sum));
}

template <int bytes> static HEADRACE_INLINE void fetch(const uint8_t* p) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + line);
}

// Where a tile stands: a step of its panels and a block of its tokens.
struct Place {
  const uint8_t *group, *codes;
  int step;
  const int8_t* values;
  const BlockRecord* records;
};

// Words i to last of a part. The codes of one word at a time: more would not fit the registers.
template <class Q, class A, int i, int last, int tokens, int panels, class Sum>
static HEADRACE_INLINE void add_words(Sum (&sums)[tokens][panels], const TileArgs& a, const Place& at) {
  constexpr int part_words = kWords / Q::parts;
  typename A::Codes code[panels];
  for (int p = 0; p < panels; ++p)
    code[p] = A::template prepare<Q::width>(expand_word<Q, i>(at.codes + p * a.panel_stride));
  for (int t = 0; t < tokens; ++t) {
    typename A::Factor x = A::load(at.values + t * a.values_stride, i);
    for (int p = 0; p < panels; ++p) sums[t][p].template add<i % part_words, part_words>(code[p], x);
  }
  if constexpr (i < last) add_words<Q, A, i + 1, last>(sums, a, at);
}

template <class Q, class A, int part, int tokens, int panels>
static HEADRACE_INLINE void add_part(Floats (&acc)[tokens][panels], const TileArgs& a, const Place& at) {
  constexpr int part_words = kWords / Q::parts, first = part * part_words;
  typename A::template Sum<Q::width> sums[tokens][panels];
  for (int t = 0; t < tokens; ++t) {
    Ints start = first_of<Q, A>(at.records[t * a.records_stride], part);
    for (int p = 0; p < panels; ++p) sums[t][p].begin(start);
  }
  add_words<Q, A, first, first + part_words - 1>(sums, a, at);
  for (int p = 0; p < panels; ++p) {
    Scales<Q> w(at.group + p * a.panel_stride, at.step, part);
    for (int t = 0; t < tokens; ++t) {
      const BlockRecord& r = at.records[t * a.records_stride];
      acc[t][p] = fma(to_floats(sums[t][p].total()), mul(w.scale, broadcast(r.scale)), acc[t][p]);
      if constexpr (Q::has_min) acc[t][p] = fma(w.min, weighted_sum<Q>(r, part), acc[t][p]);
    }
  }
}

// NOTE: all numbers of tokens add in the same order, so a token's result does not depend on its neighbours.
template <class Q, class A, int tokens, int panels> static void quantized_tile(const TileArgs& a) {
  constexpr int step_size = step_bytes(Q::bits);
  Floats acc[tokens][panels];
  for (int t = 0; t < tokens; ++t)
    for (int p = 0; p < panels; ++p) acc[t][p] = zero();
  Place at{a.panel, a.panel + Q::codes_at, 0, a.values, a.records};
  for (int64_t g = 0; g < a.cols / Q::group; ++g, at.group += Q::bytes, at.codes = at.group + Q::codes_at)
    for (at.step = 0; at.step < Q::steps; ++at.step, at.codes += step_size, at.values += A::kBytes, ++at.records) {
      if (a.ahead)
        for (int p = 0; p < panels; ++p)
          fetch<Q::bytes / Q::steps>(at.group + at.step * (Q::bytes / Q::steps) + p * a.panel_stride + a.ahead);
      add_part<Q, A, 0>(acc, a, at);
      if constexpr (Q::parts == 2) add_part<Q, A, 1>(acc, a, at);
    }
  for (int t = 0; t < tokens; ++t)
    for (int p = 0; p < panels; ++p) store(a.result + t * kStripRows + p * kPanelRows, acc[t][p]);
}

static inline TileArgs skip_tokens(TileArgs a, int n) {
  a.x += n * a.x_stride;
  a.values += n * a.values_stride;
  a.records += n * a.records_stride;
  a.result += n * kStripRows;
  a.tokens -= n;
  a.ahead = 0;
  return a;
}

static inline TileArgs skip_panels(TileArgs a, int n) {
  a.panel += n * a.panel_stride;
  a.result += n * kPanelRows;
  a.panels -= n;
  return a;
}

// What is left after whole tiles, in one of 1 .. most tokens.
template <class Q, class A, int panels, int most> static void last_tile(const TileArgs& a) {
  if (a.tokens == most) return quantized_tile<Q, A, most, panels>(a);
  if constexpr (most > 1) last_tile<Q, A, panels, most - 1>(a);
}

template <class Q, class A, int panels> static void quantized_panels(TileArgs a) {
  for (; a.tokens > A::kTokens; a = skip_tokens(a, A::kTokens)) quantized_tile<Q, A, A::kTokens, panels>(a);
  last_tile<Q, A, panels, A::kTokens>(a);
}

template <class Q, class A> static void quantized_strip(TileArgs a) {
  for (; a.panels >= kTilePanels; a = skip_panels(a, kTilePanels)) quantized_panels<Q, A, kTilePanels>(a);
  if (a.panels) a.panel_stride = 0, quantized_panels<Q, A, kTilePanels>(a);
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
  for (int t = 0; t < tokens; ++t) store(a.result + t * kStripRows, add(even[t], odd[t]));
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
  for (int t = 0; t < tokens; ++t) store(a.result + t * kStripRows, add(acc[t][0], acc[t][1]));
}

struct AsBf16Panel {};
struct Float32Panel {};
struct Float16Panel {};

template <class F, int tokens> struct FloatTile;
template <int tokens> struct FloatTile<Float32Panel, tokens> {
  static void run(const TileArgs& a) { float_tile<Panel32, tokens>(a); }
};
template <int tokens> struct FloatTile<Float16Panel, tokens> {
  static void run(const TileArgs& a) { float_tile<Panel16, tokens>(a); }
};
template <int tokens> struct FloatTile<AsBf16Panel, tokens> {
  static void run(const TileArgs& a) { bf16_tile<tokens>(a); }
};

template <class F> static void float_panel(TileArgs a) {
  for (; a.tokens >= 8; a = skip_tokens(a, 8)) FloatTile<F, 8>::run(a);
  if (a.tokens >= 4) FloatTile<F, 4>::run(a), a = skip_tokens(a, 4);
  if (a.tokens >= 2) FloatTile<F, 2>::run(a), a = skip_tokens(a, 2);
  if (a.tokens) FloatTile<F, 1>::run(a);
}

template <class F> struct Strip {
  static void run(TileArgs a) {
    for (; a.panels; a = skip_panels(a, 1)) float_panel<F>(a);
  }
};
template <int bits, int zero, bool table, int group, int sub, bool has_min>
struct Strip<Quantized<bits, zero, table, group, sub, has_min>> {
  using Q = Quantized<bits, zero, table, group, sub, has_min>;
  static void run(const TileArgs& a) { a.fine ? quantized_strip<Q, Fine>(a) : quantized_strip<Q, Coarse>(a); }
};

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
  with_format(format, [&](auto tag) { Strip<decltype(tag)>::run(a); });
}

// ---- panels to floats, for exact precision and for wide tiles

template <class Q> static HEADRACE_INLINE void unpack_word(Bytes code, const Scales<Q>& w, float* out) {
  for (int b = 0; b < 4; ++b) {
    Floats v = mul(w.scale, sub(byte_of_lanes(code, b), broadcast(static_cast<float>(Q::zero))));
    store(out + b * kPanelRows, Q::has_min ? add(v, w.min) : v);
  }
}

template <class Q, int i> static HEADRACE_INLINE void unpack_words(const uint8_t* group, int step, float* out) {
  constexpr int part_words = kWords / Q::parts;
  Bytes code = expand_word<Q, i>(group + Q::codes_at + step * step_bytes(Q::bits));
  unpack_word<Q>(code, Scales<Q>(group, step, i / part_words), out + i * 4 * kPanelRows);
  if constexpr (i + 1 < kWords) unpack_words<Q, i + 1>(group, step, out);
}

template <class Q> static void unpack_quantized(const uint8_t* group, int64_t cols, float* out) {
  for (int64_t g = 0; g < cols / Q::group; ++g, group += Q::bytes)
    for (int s = 0; s < Q::steps; ++s, out += kBlock * kPanelRows) unpack_words<Q, 0>(group, s, out);
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

// Results to where they belong: + bias + residual.
static void finish(const FinishArgs& a) {
  with_element(a.type, [&](auto tag) {
    using E = decltype(tag);
    for (int p = 0; p < a.rows; p += kPanelRows) {
      int n = a.rows - p;  // 16 or more: all
      Floats bias = a.bias ? load_first<AsFloat>(a.bias + p, n) : zero();
      for (int t = 0; t < a.tokens; ++t) {
        Floats y = load(a.result + t * kStripRows + p);
        if (a.bias) y = add(y, bias);
        if (a.residual) y = add(y, load_first<AsFloat>(a.residual + t * a.residual_stride + p, n));
        store_first<E>(static_cast<typename E::type*>(a.out) + t * a.out_stride + p, y, n);
      }
    }
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
