// merge_attention: out = sum_p exp(lse_p - lse) out_p, lse = log sum_p exp(lse_p), one row (one head of one token).
// Wins: memory-bound, each part is read once. Schedule: weights of all parts first, relative to the largest lse; then 16
// lanes across the row, parts in their order, divided by the weights' sum (and the sink's weight) at the end.
#pragma once
#include "elements.h"
#include "merge_work.h"

namespace headrace {
namespace HEADRACE_ISA {

static inline bool is_empty(const MergePart& part) { return part.lse == -__builtin_inff(); }

// The largest lse. A NaN is passed over here: its weight is NaN, and so is all that it takes part in.
static float largest_lse(const MergeArgs& a) {
  float top = -__builtin_inff();
  for (int64_t i = 0; i < a.num_parts; ++i) top = a.parts[i].lse > top ? a.parts[i].lse : top;
  return top;
}

// exp(lse - top) for each part, and behind them for the sink; their sum without the sink's.
static float weigh_parts(const MergeArgs& a, float top) {
  int64_t n = a.num_parts;
  for (int64_t i = 0; i < n; ++i) a.weights[i] = a.parts[i].lse - top;
  a.weights[n] = a.sink - top;
  for (int64_t i = 0; i <= n; i += kLanes) store(a.weights + i, exponential(load(a.weights + i)));
  float total = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!is_empty(a.parts[i])) total += a.weights[i];
  return total;
}

static Floats mix_lanes(const MergeArgs& a, int64_t at) {
  Floats mixed = zero();
  for (int64_t i = 0; i < a.num_parts; ++i) {
    if (is_empty(a.parts[i])) continue;
    with_element(a.parts[i].type, [&](auto element) {
      using E = decltype(element);
      const auto* from = reinterpret_cast<const typename E::type*>(a.parts[i].out);
      mixed = fma(load_first<E>(from + at, a.value_dim - at), broadcast(a.weights[i]), mixed);
    });
  }
  return mixed;
}

static void merge_parts(const MergeArgs& a) {
  bool seen = false;
  for (int64_t i = 0; i < a.num_parts; ++i) seen |= !is_empty(a.parts[i]);
  float top = seen ? largest_lse(a) : 0.0f, total = seen ? weigh_parts(a, top) : 0.0f;
  *a.lse = seen ? top + logf(total) : -__builtin_inff();
  Floats divisor = broadcast(total + (seen && a.sink != -__builtin_inff() ? a.weights[a.num_parts] : 0.0f));
  with_element(a.out_type, [&](auto element) {
    using E = decltype(element);
    auto* to = reinterpret_cast<typename E::type*>(a.out);
    for (int64_t i = 0; i < a.value_dim; i += kLanes)
      store_first<E>(to + i, seen ? div(mix_lanes(a, i), divisor) : zero(), a.value_dim - i);
  });
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
