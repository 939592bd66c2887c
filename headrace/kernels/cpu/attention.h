// paged attention: what both kernels share. Queries to scaled float rows, keys found by page, online softmax, finished rows.
//   out = softmax(scale q k^T, keys up to the query's own and no further back than the window) v
// A row of one KV head is (token, query head of its group), the group's heads together, so that each key is read for all.
#pragma once
#include "attention_work.h"
#include "elements.h"
#include "simd_square.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr float kNoScore = -__builtin_inff();

// Where the keys [begin, end) and their values lie, in elements from the first page.
struct Places {
  int64_t key[kKeyBlock], value[kKeyBlock];
  int64_t count;
};

static void find_places(const AttentionCall& c, const int32_t* pages, int64_t begin, int64_t end, Places& places) {
  int64_t page = begin / c.page_size, slot = begin % c.page_size;
  int64_t key_row = c.kv_heads * c.head_dim, value_row = c.kv_heads * c.value_dim;
  places.count = end - begin;
  for (int64_t i = 0; i < end - begin; ++i) {
    places.key[i] = pages[page] * c.key_page_stride + slot * key_row;
    places.value[i] = pages[page] * c.value_page_stride + slot * value_row;
    if (++slot == c.page_size) slot = 0, ++page;
  }
}

static void load_query(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, float* to) {
  int64_t at = (w.first_row + token) * c.query_stride + head * c.head_dim;
  with_element(c.query_type, [&](auto element) {
    using E = decltype(element);
    const auto* from = reinterpret_cast<const typename E::type*>(c.query) + at;
    for (int64_t i = 0; i < c.head_dim; i += kLanes)
      store(to + i, mul(load_first<E>(from + i, c.head_dim - i), broadcast(c.scale)));
  });
}

// All rows of one KV head: [token][head of the group][padded head_dim].
static void load_queries(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, float* to) {
  for (int64_t token = w.token_begin; token < w.token_end; ++token)
    for (int64_t g = 0; g < c.group; ++g, to += padded_lanes(c.head_dim)) load_query(c, w, token, kv_head * c.group + g, to);
}

// tanh by its Taylor-like odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
static inline Floats hyperbolic_tangent(Floats x) {
  Floats z = mul(x, x);
  Floats near = broadcast(-5.70498872745e-3f);
  near = fma(near, z, broadcast(2.06390887954e-2f));
  near = fma(near, z, broadcast(-5.37397155531e-2f));
  near = fma(near, z, broadcast(1.33314422036e-1f));
  near = fma(near, z, broadcast(-3.33332819422e-1f));
  near = fma(mul(near, z), x, x);
  Floats grown = exponential(add(x, x));
  Floats far = sub(broadcast(1.0f), div(broadcast(2.0f), add(grown, broadcast(1.0f))));
  return select_less(absolute(x), broadcast(0.625f), near, far);
}

static void cap_scores(float* scores, int64_t n, float cap) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(scores + i, mul(hyperbolic_tangent(mul(load(scores + i), broadcast(1.0f / cap))), broadcast(cap)));
}

// A row's scores outside [begin, end) of the block do not count.
static void hide_outside(float* scores, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < lesser(begin, kKeyBlock); ++i) scores[i] = kNoScore;
  for (int64_t i = greater(end, 0); i < kKeyBlock; ++i) scores[i] = kNoScore;
}

// Online softmax of one block: scores [rows, 64] become weights relative to the largest score so far (`top`), `sums`
// [rows, 16] keep their sum lane by lane, and `keep` says how much of what was accumulated before remains.
// NOTE: a block of which a row sees nothing leaves that row's bits as they were.
static void soften(float* scores, int64_t rows, float* top, float* sums, float* keep) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores + r * kKeyBlock;
    float best = largest(maximum(maximum(load(row), load(row + 16)), maximum(load(row + 32), load(row + 48))));
    float before = top[r];
    top[r] = best > before ? best : before;
    keep[r] = before - (top[r] == kNoScore ? 0.0f : top[r]);
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    float some[kLanes] = {};
    int n = static_cast<int>(lesser(kLanes, rows - r));
    memcpy(some, keep + r, static_cast<size_t>(n) * 4);
    store_some(keep + r, exponential(load(some)), n);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyBlock;
    Floats base = broadcast(top[r] == kNoScore ? 0.0f : top[r]), weight[4];
    for (int i = 0; i < 4; ++i) {
      weight[i] = exponential(sub(load(row + 16 * i), base));
      store(row + 16 * i, weight[i]);
    }
    Floats total = add(add(weight[0], weight[1]), add(weight[2], weight[3]));
    store(sums + r * kLanes, fma(load(sums + r * kLanes), broadcast(keep[r]), total));
  }
}

static void clear_rows(int64_t rows, int64_t value_stride, float* acc, float* top, float* sums) {
  memset(acc, 0, static_cast<size_t>(rows * value_stride) * 4);
  memset(sums, 0, static_cast<size_t>(rows * kLanes) * 4);
  for (int64_t r = 0; r < rows; ++r) top[r] = kNoScore;
}

// acc / total to the row of out that belongs to it; nothing seen is zero.
static void write_row(const AttentionCall& c, int64_t token_row, int64_t head, const float* acc, float total) {
  Floats divisor = broadcast(total);
  with_element(c.out_type, [&](auto element) {
    using E = decltype(element);
    auto* to = reinterpret_cast<typename E::type*>(c.out) + token_row * c.out_stride + head * c.value_dim;
    for (int64_t i = 0; i < c.value_dim; i += kLanes)
      store_first<E>(to + i, total == 0.0f ? zero() : div(load(acc + i), divisor), c.value_dim - i);
  });
}

// The rows of one KV head: to out, or, where there is `partial`, there with what a merge needs to know.
static void finish_rows(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, const float* acc, const float* top,
                        const float* sums, float* partial) {
  int64_t rows = (w.token_end - w.token_begin) * c.group, width = padded_lanes(c.value_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float total = sum(load(sums + r * kLanes));
    if (partial) {
      float* to = partial + (kv_head * rows + r) * partial_stride(c);
      memcpy(to, acc + r * width, static_cast<size_t>(width) * 4);
      to[width] = top[r];
      to[width + 1] = total;
    } else {
      int64_t token = w.token_begin + r / c.group;
      write_row(c, w.first_row + token, kv_head * c.group + r % c.group, acc + r * width, total);
    }
  }
}

// Pieces of one row in the order of their keys, each weighted by what its largest score is worth against the largest of all.
static void merge_row(const AttentionCall& c, const AttentionMerge& m, int64_t row, float* acc) {
  int64_t width = padded_lanes(c.value_dim);
  const float* first = m.partial + row * partial_stride(c);
  float top = kNoScore, weight[kMaxChunks + kLanes] = {}, total = 0;
  for (int64_t i = 0; i < m.chunks; ++i) top = first[i * m.step + width] > top ? first[i * m.step + width] : top;
  for (int64_t i = 0; i < m.chunks; ++i) weight[i] = first[i * m.step + width] - (top == kNoScore ? 0.0f : top);
  for (int64_t i = 0; i < m.chunks; i += kLanes) store(weight + i, exponential(load(weight + i)));
  for (int64_t i = 0; i < m.chunks; ++i) total += weight[i] * first[i * m.step + width + 1];
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats mixed = zero();
    for (int64_t i = 0; i < m.chunks; ++i) mixed = fma(load(first + i * m.step + j), broadcast(weight[i]), mixed);
    store(acc + j, mixed);
  }
  write_row(c, m.first_row + row / c.group, m.head * c.group + row % c.group, acc, total);
}

static void merge_attention(const AttentionCall& c, const AttentionMerge& m, float* scratch) {
  for (int64_t row = 0; row < m.rows; ++row) merge_row(c, m, row, scratch);
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
