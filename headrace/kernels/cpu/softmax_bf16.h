// Online softmax whose weights are rounded to bf16, for products of bf16.
// Scores are kept as powers of two: score * log2(e), so that the exponential is a floor, a polynomial of degree 5 (relative
// error 2e-7) and a shift of the exponent, and the largest score weighs exactly 1.
// The sums are of the weights before they are rounded: the log-sum-exp stays as good as float arithmetic makes it, and in
// the output the errors of rounding (2^-9 each, of either sign) average out just as those of the values do.
#pragma once
#include "attention.h"
#include "products_bf16.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A product rounded by itself: compilers would make one multiply-add of it and what follows.
static inline Floats rounded_product(Floats a, Floats b) {
  Floats product = mul(a, b);
#if defined(HEADRACE_AVX512)
  asm("" : "+v"(product.v));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// 2^x for x up to 127; 0 of -infinity, NaN of NaN.
static inline Floats power_of_two(Floats x) {
#if defined(HEADRACE_AVX512)
  constexpr int kMinusFloor = 0x09;
  Floats r = {_mm512_maskz_reduce_ps(kAllLanes, x.v, kMinusFloor)};  // of -infinity: 0
#else
  Floats r, floor;
  for (int i = 0; i < kLanes; ++i) {
    float finite = x.v[i] < -200.0f ? -200.0f : x.v[i];
    floor.v[i] = floorf(finite);
    r.v[i] = finite - floor.v[i];
  }
#endif
  Floats p = fma(r, broadcast(1.867130050e-03f), broadcast(9.017030708e-03f));
  p = fma(r, p, broadcast(5.579991266e-02f));
  p = fma(r, p, broadcast(2.401644439e-01f));
  p = fma(r, p, broadcast(6.931512952e-01f));
  p = fma(r, p, broadcast(1.0f));
#if defined(HEADRACE_AVX512)
  return times_power_of_two(p, x);  // the instruction takes the floor itself
#else
  for (int i = 0; i < kLanes; ++i) p.v[i] = p.v[i] == p.v[i] ? ldexpf(p.v[i], static_cast<int>(floor.v[i])) : p.v[i];
  return p;
#endif
}

static inline Floats largest_of_row(const float* row) {
  return maximum(maximum(load(row), load(row + 16)), maximum(load(row + 32), load(row + 48)));
}

// Lane i: the largest of v[i].
static inline Floats largest_of(const Floats v[kLanes]) {
#if defined(HEADRACE_AVX512)
  auto both = [](__m512 a, __m512 b) { return maximum({a}, {b}).v; };
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = both(low_pairs(v[2 * i].v, v[2 * i + 1].v), high_pairs(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; ++i)
    fours[i] = both(low_fours(pairs[2 * i], pairs[2 * i + 1]), high_fours(pairs[2 * i], pairs[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    halves[i] = both(quarters<0x88>(fours[2 * i], fours[2 * i + 1]), quarters<0xdd>(fours[2 * i], fours[2 * i + 1]));
  return {both(quarters<0x88>(halves[0], halves[1]), quarters<0xdd>(halves[0], halves[1]))};
#else
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = largest(v[i]);
  return r;
#endif
}

// Up to 16 rows: the largest score so far, what is kept of what was gathered before, and what to subtract from scores.
static inline void move_tops(const float* scores, int rows, Floats factor, float* top, float* keep, float* base) {
  Floats best[kLanes];
  for (int r = 0; r < kLanes; ++r) best[r] = largest_of_row(scores + (r < rows ? r : 0) * kKeyBlock);
  Floats before = load_some(top, rows);
  Floats now = maximum(rounded_product(largest_of(best), factor), before);  // of NaN: as before; its weights will tell
  Floats finite = select_less(now, broadcast(-3.4e38f), zero(), now);
  store_some(top, now, rows);
  store_some(keep, power_of_two(sub(before, finite)), rows);
  store(base, finite);
}

// Products [rows, 64], scores when multiplied by `factor` > 0, become weights in bf16 in the first half of their row. They
// are relative to the largest score so far, `top` (times log2(e), see finished_tops); `sums` [rows, 16] gather them lane by
// lane, and `keep` says how much of what was gathered before remains.
// `between` is called after every fourth row.
// NOTE: a block of which a row sees nothing leaves that row's bits as they were.
template <class Between>
static inline void soften_bf16(float* scores, int64_t rows, float factor, float* top, float* sums, float* keep, Between between) {
  Floats binary = broadcast(factor * kLog2E);
  for (int64_t first = 0; first < rows; first += kLanes) {
    float bases[kLanes];
    int some = static_cast<int>(lesser(kLanes, rows - first));
    move_tops(scores + first * kKeyBlock, some, binary, top + first, keep + first, bases);
    for (int64_t r = first; r < first + some; ++r) {
      float* row = scores + r * kKeyBlock;
      Floats base = broadcast(bases[r - first]), weight[4];
      for (int i = 0; i < 4; ++i) weight[i] = power_of_two(sub(rounded_product(load(row + 16 * i), binary), base));
      auto* words = reinterpret_cast<uint16_t*>(row);
      store_words(words, round_words(weight[0], weight[1]));
      store_words(words + 32, round_words(weight[2], weight[3]));
      Floats total = add(add(weight[0], weight[1]), add(weight[2], weight[3]));
      store(sums + r * kLanes, fma(load(sums + r * kLanes), broadcast(keep[r]), total));
      if (r % 4 == 3) between();
    }
  }
}

// The largest scores as others know them, at the end of a chunk.
static void finished_tops(float* top, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) top[r] *= kLn2;
}

// Products of some rows and a block become scores, but for a factor that is returned.
// `row`: the first, among the item's. NOTE: which way is taken depends on the call alone, so that a row's bits do too.
static float adjust_rows(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, int64_t row, int64_t rows,
                         int64_t start, int64_t begin, int64_t end, float* scores) {
  float scale = static_cast<float>(c.scale);
  bool changed = c.softcap > 0 || w.alibi || w.mask;
  if (changed)
    for (int64_t i = 0; i < rows * kKeyBlock; i += kLanes) store(scores + i, mul(load(scores + i), broadcast(scale)));
  for (int64_t r = row; r < row + rows; ++r)
    adjust_scores(c, w, w.token_begin + r / c.group, kv_head * c.group + r % c.group, start, begin, end, scores + (r - row) * kKeyBlock);
  return changed ? 1.0f : scale;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
