// attention in float64: the plain loop, for queries, keys and values of that type. Also what the fast kernels look like
// without being fast. Wins never; it is the only one for float64. Schedule: row by row, the scores of all keys, then the
// largest, then weights and values. Error: that of float64 sums. Bound: arithmetic.
#pragma once
#include <math.h>

#include "attention_work.h"
#include "simd.h"

namespace headrace {
namespace HEADRACE_ISA {

static inline double mask_at(const AttentionCall& c, const char* mask, int64_t at) {
  switch (c.mask_type) {
    case DType::u8: return mask[at] ? 0.0 : -HUGE_VAL;
    case DType::f64: return reinterpret_cast<const double*>(mask)[at];
    case DType::f32: return static_cast<double>(reinterpret_cast<const float*>(mask)[at]);
    case DType::f16: return static_cast<double>(half_to_float(reinterpret_cast<const uint16_t*>(mask)[at]));
    default: return static_cast<double>(bf16_to_float(reinterpret_cast<const uint16_t*>(mask)[at]));
  }
}

static const double* cached_double(const AttentionWork& w, const char* base, const CacheStrides& s, int64_t page_size,
                                   int64_t key, int64_t head) {
  int64_t page = w.pages ? w.pages[key / page_size] : w.page, slot = w.pages ? key % page_size : w.first_slot + key;
  return reinterpret_cast<const double*>(base) + page * s.page + slot * s.token + head * s.head;
}

static double double_score(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, int64_t key) {
  const auto* query = reinterpret_cast<const double*>(w.query) + token * c.query_strides.token + head * c.query_strides.head;
  const double* row = cached_double(w, c.keys, c.key_strides, c.page_size, key, head / c.group);
  double score = 0;
  for (int64_t i = 0; i < c.head_dim; ++i) score += query[i] * row[i];
  score *= c.scale;
  if (c.softcap > 0) score = c.softcap * tanh(score / c.softcap);
  if (w.alibi) score -= static_cast<double>(w.alibi[head]) * fabs(static_cast<double>(own_key(c, w, token) - key));
  int64_t column = key - (w.key_len - c.mask_columns);
  if (!w.mask || column < 0) return score;
  return score + mask_at(c, w.mask, token * c.mask_strides.token + head * c.mask_strides.head + column * c.mask_column_stride);
}

// The scores of keys [first, first + n) become weights; returns their sum.
static double double_weights(double* scores, int64_t n, double* top) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i)
    if (scores[i] > *top || scores[i] != scores[i]) *top = scores[i];
  for (int64_t i = 0; i < n; ++i) total += scores[i] = *top == -HUGE_VAL ? 0.0 : exp(scores[i] - *top);
  return total;
}

static void double_row(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head) {
  int64_t first = first_key(c, w, token), n = greater(last_key(c, w, token) + 1 - first, 0);
  double* scores = reinterpret_cast<double*>(w.scratch);
  for (int64_t i = 0; i < n; ++i) scores[i] = double_score(c, w, token, head, first + i);
  double top = -HUGE_VAL, total = double_weights(scores, n, &top);
  double divisor = c.sinks ? total + exp(static_cast<double>(c.sinks[head]) - top) : total;
  double* out = reinterpret_cast<double*>(w.out) + token * c.out_strides.token + head * c.out_strides.head;
  for (int64_t j = 0; j < c.value_dim; ++j) out[j] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double* value = cached_double(w, c.values, c.value_strides, c.page_size, first + i, head / c.group);
    for (int64_t j = 0; scores[i] != 0 && j < c.value_dim; ++j) out[j] += scores[i] * value[j];
  }
  for (int64_t j = 0; total != 0 && j < c.value_dim; ++j) out[j] /= divisor;
  if (w.lse)
    reinterpret_cast<double*>(w.lse)[token * c.lse_strides.token + head * c.lse_strides.head] = total == 0 ? -HUGE_VAL : top + log(total);
}

static void attend_double(const AttentionCall& c, const AttentionWork& w) {
  for (int64_t token = w.token_begin; token < w.token_end; ++token)
    for (int64_t g = 0; g < c.group; ++g) double_row(c, w, token, w.head_begin * c.group + g);
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
