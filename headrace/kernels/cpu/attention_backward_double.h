// attention backward in float64: the plain loop, for arrays of that type. Wins never; it is the only one for float64.
// Schedule: row by row, weights and slopes of all keys, then what they add to each gradient. Error: that of float64 sums.
#pragma once
#include "attention_double.h"
#include "backward_work.h"

namespace headrace {
namespace HEADRACE_ISA {

static double dot_doubles(const double* a, const double* b, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

static double* gradient_of(const GradientWork& w, char* base, const CacheStrides& s, int64_t key) {
  return reinterpret_cast<double*>(base) + w.rows.page * s.page + (w.rows.first_slot + key) * s.token + w.head * s.head;
}

// How much a score grows with the product of its query and key.
static double double_growth(const AttentionCall& c, const double* query, const double* key) {
  if (!(c.softcap > 0)) return c.scale;
  double bent = tanh(c.scale * dot_doubles(query, key, c.head_dim) / c.softcap);
  return c.scale * (1 - bent * bent);
}

static void double_row_backward(const AttentionCall& c, const GradientCall& g, const GradientWork& w, int64_t token, int64_t head) {
  const AttentionWork& r = w.rows;
  int64_t first = first_key(c, r, token), n = greater(last_key(c, r, token) + 1 - first, 0);
  const auto* query = reinterpret_cast<const double*>(r.query) + token * c.query_strides.token + head * c.query_strides.head;
  const auto* out = reinterpret_cast<const double*>(r.out) + token * c.out_strides.token + head * c.out_strides.head;
  const auto* d_out = reinterpret_cast<const double*>(w.d_out) + token * g.d_out_strides.token + head * g.d_out_strides.head;
  auto* d_query = reinterpret_cast<double*>(w.d_query) + token * g.d_query_strides.token + head * g.d_query_strides.head;
  double lse = reinterpret_cast<const double*>(r.lse)[token * c.lse_strides.token + head * c.lse_strides.head], total = lse;
  for (int64_t i = 0; i < c.head_dim; ++i) d_query[i] = 0;
  if (lse == -HUGE_VAL) return;
  double delta = dot_doubles(d_out, out, c.value_dim);
  if (c.sinks) {
    double sink = static_cast<double>(c.sinks[head]), high = sink > lse ? sink : lse;
    total = high + log(exp(lse - high) + exp(sink - high));
    if (w.d_sinks) w.d_sinks[head] -= exp(sink - total) * delta;
  }
  if (w.d_lse) delta -= reinterpret_cast<const double*>(w.d_lse)[token * g.d_lse_strides.token + head * g.d_lse_strides.head] * exp(total - lse);
  for (int64_t key = first; key < first + n; ++key) {
    double weight = exp(double_score(c, r, token, head, key) - total);
    if (weight == 0) continue;
    const double* row = cached_double(r, c.keys, c.key_strides, c.page_size, key, w.head);
    const double* value = cached_double(r, c.values, c.value_strides, c.page_size, key, w.head);
    double slope = weight * (dot_doubles(d_out, value, c.value_dim) - delta) * double_growth(c, query, row);
    double *d_key = gradient_of(w, g.d_keys, g.d_key_strides, key), *d_value = gradient_of(w, g.d_values, g.d_value_strides, key);
    for (int64_t i = 0; i < c.head_dim; ++i) d_query[i] += slope * row[i], d_key[i] += slope * query[i];
    for (int64_t i = 0; i < c.value_dim; ++i) d_value[i] += weight * d_out[i];
  }
}

// All rows of one KV head of a request. Gradients of keys and values are added to.
static void attend_backward_double(const AttentionCall& c, const GradientCall& g, const GradientWork& w) {
  for (int64_t row = w.row_begin; row < w.row_end; ++row) double_row_backward(c, g, w, row / c.group, w.head * c.group + row % c.group);
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
