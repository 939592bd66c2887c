// attention: what its kernels share. Queries to float rows, keys found by page, scores adjusted, online softmax, finished rows.
//   out = softmax(scale q k^T + what masks and distance add, over the keys seen) v
// A row of one KV head is (token, query head of its group), the group's heads together, so that each key is read for all.
#pragma once
#include "attention_work.h"
#include "cached.h"
#include "elements.h"
#include "turned.h"

namespace headrace {
namespace HEADRACE_ISA {

constexpr float kNoScore = -__builtin_inff();

// Where the keys [begin, end), their values and the scales of both lie, in elements from the first page.
struct Places {
  int64_t key[kKeyBlock], value[kKeyBlock], key_scale[kKeyBlock], value_scale[kKeyBlock];
  int64_t count;
};

static inline int64_t place(const CacheStrides& s, int64_t page, int64_t slot) { return page * s.page + slot * s.token; }

// Keys that follow one another in a page, from number i of the block to number `end`.
static void places_in_page(const AttentionCall& c, int64_t i, int64_t end, int64_t page, int64_t slot, Places& places) {
  int64_t key = place(c.key_strides, page, slot - i), value = place(c.value_strides, page, slot - i);
  for (int64_t k = i; k < end; ++k) {
    places.key[k] = key + k * c.key_strides.token;
    places.value[k] = value + k * c.value_strides.token;
  }
  if (c.key_scales)
    for (int64_t k = i; k < end; ++k) places.key_scale[k] = place(c.key_scale_strides, page, slot + k - i);
  if (c.value_scales)
    for (int64_t k = i; k < end; ++k) places.value_scale[k] = place(c.value_scale_strides, page, slot + k - i);
}

// NOTE: after the last key its place is repeated, up to a whole block.
static void find_places(const AttentionCall& c, const AttentionWork& w, int64_t begin, int64_t end, Places& places) {
  int64_t count = end - begin;
  if (!w.pages) {
    places_in_page(c, 0, count, w.page, w.first_slot + begin, places);
  } else {
    int64_t number = begin / c.page_size, slot = begin % c.page_size;
    for (int64_t i = 0, next; i < count; i = next, slot = 0, ++number) {
      next = lesser(count, i + c.page_size - slot);
      places_in_page(c, i, next, w.pages[number], slot, places);
    }
  }
  for (int64_t i = count; i < kKeyBlock; ++i) {
    places.key[i] = places.key[count - 1];
    places.value[i] = places.value[count - 1];
  }
  places.count = count;
}

// A KV head's scales of a block; what is not there is 0.
static void load_scales(const float* scales, const int64_t* places, int64_t count, int64_t head_offset, float* to) {
  scales += head_offset;
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) to[i] = scales[places[i]];
  for (int64_t i = count; i < kKeyBlock; ++i) to[i] = 0.0f;
}

static void load_query(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, float factor, float* to) {
  int64_t at = token * c.query_strides.token + head * c.query_strides.head;
  with_element(c.query_type, [&](auto element) {
    using E = decltype(element);
    const auto* from = reinterpret_cast<const typename E::type*>(w.query) + at;
    for (int64_t i = 0; i < c.head_dim; i += kLanes)
      store(to + i, mul(load_first<E>(from + i, c.head_dim - i), broadcast(factor)));
  });
}

// All rows of one KV head times the scale: [token][head of the group][padded head_dim].
static void load_queries(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, float* to) {
  for (int64_t token = w.token_begin; token < w.token_end; ++token)
    for (int64_t g = 0; g < c.group; ++g, to += padded_lanes(c.head_dim))
      load_query(c, w, token, kv_head * c.group + g, static_cast<float>(c.scale), to);
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

static void multiply_by(float* x, const float* factors, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, mul(load(x + i), load(factors + i)));
}

// -slope |own - key|
static void add_distance(float* scores, int64_t own, int64_t begin, float slope) {
  for (int64_t i = 0; i < kKeyBlock; ++i) {
    int64_t distance = own - begin - i;
    scores[i] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
  }
}

// NOTE: the mask's last column is the last key's; keys before its first column are not masked.
static void add_mask(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, int64_t begin, float* scores) {
  int64_t first = begin - (w.key_len - c.mask_columns);  // the block's first key as a column
  int64_t from = greater(-first, 0), to = lesser(kKeyBlock, c.mask_columns - first), stride = c.mask_column_stride;
  int64_t at = token * c.mask_strides.token + head * c.mask_strides.head + first * stride;
  if (c.mask_type == DType::u8) {
    const char* row = w.mask + at;
    for (int64_t i = from; i < to; ++i)
      if (!row[i * stride]) scores[i] = kNoScore;
    return;
  }
  with_element(c.mask_type, [&](auto element) {
    using E = decltype(element);
    const auto* row = reinterpret_cast<const typename E::type*>(w.mask) + at;
    for (int64_t i = from; i < to; ++i) scores[i] += E::load_one(row + i * stride);
  });
}

// A row's scores outside [begin, end) of the block do not count.
static void hide_outside(float* scores, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < lesser(begin, kKeyBlock); ++i) scores[i] = kNoScore;
  for (int64_t i = greater(end, 0); i < kKeyBlock; ++i) scores[i] = kNoScore;
}

// Scaled products of one row and the block that starts at `start`, of which [begin, end) exist, become its scores.
static void adjust_scores(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, int64_t start,
                          int64_t begin, int64_t end, float* scores) {
  if (c.softcap > 0) cap_scores(scores, kKeyBlock, static_cast<float>(c.softcap));
  if (w.alibi) add_distance(scores, own_key(c, w, token), start, w.alibi[head]);
  if (w.mask) add_mask(c, w, token, head, start, scores);
  int64_t first = greater(first_key(c, w, token), begin) - start, last = lesser(last_key(c, w, token) + 1, end) - start;
  if (first > 0 || last < kKeyBlock) hide_outside(scores, first, last);
}

// Online softmax of one block: scores [rows, 64] become weights relative to the largest score so far (`top`), `sums`
// [rows, 16] keep their sum lane by lane, and `keep` says how much of what was accumulated before remains.
// NOTE: a block of which a row sees nothing leaves that row's bits as they were.
static void soften(float* scores, int64_t rows, float* top, float* sums, float* keep) {
  bool higher = false;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores + r * kKeyBlock;
    float best = largest(maximum(maximum(load(row), load(row + 16)), maximum(load(row + 32), load(row + 48))));
    float before = top[r];
    higher = higher || best > before;
    top[r] = best > before ? best : before;
    keep[r] = before - (top[r] == kNoScore ? 0.0f : top[r]);
  }
  if (!higher)
    for (int64_t r = 0; r < rows; ++r) keep[r] = 1.0f;
  for (int64_t r = 0; higher && r < rows; r += kLanes) {
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

// What has been gathered for the rows of one KV head: in this chunk of keys, and in the chunks before it.
struct Gathered {
  float* acc;    // [rows, padded value_dim]
  float* sums;   // [rows, 16]
  float* top;    // [rows]
  float* whole;  // [rows, partial_stride]: values, largest score, sum
};

static void begin_chunk(const AttentionCall& c, int64_t rows, const Gathered& g) {
  memset(g.acc, 0, static_cast<size_t>(rows * padded_lanes(c.value_dim)) * 4);
  memset(g.sums, 0, static_cast<size_t>(rows * kLanes) * 4);
  for (int64_t r = 0; r < rows; ++r) g.top[r] = kNoScore;
}

// acc / total to the row of out that belongs to it, log of the sum to lse; nothing seen is zero.
static void write_row(const AttentionCall& c, const AttentionWork& w, int64_t token, int64_t head, const float* acc, float top,
                      float total) {
  float base = top == kNoScore ? 0.0f : top;
  float divisor = total;
  if (c.sinks) {
    float extra[kLanes] = {c.sinks[head] - base};
    store(extra, exponential(load(extra)));
    divisor += extra[0];
  }
  bool nothing = total == 0.0f;
  with_element(c.out_type, [&](auto element) {
    using E = decltype(element);
    auto* to = reinterpret_cast<typename E::type*>(w.out) + token * c.out_strides.token + head * c.out_strides.head;
    for (int64_t i = 0; i < c.value_dim; i += kLanes)
      store_first<E>(to + i, nothing ? zero() : div(load(acc + i), broadcast(divisor)), c.value_dim - i);
  });
  if (w.lse)
    reinterpret_cast<float*>(w.lse)[token * c.lse_strides.token + head * c.lse_strides.head] = nothing ? kNoScore : base + logf(total);
}

// whole [values, top, total] and one more piece of the same row's keys, together.
static void fold_row(int64_t width, float* whole, const float* acc, float top, float total) {
  float high = whole[width] > top ? whole[width] : top, base = high == kNoScore ? 0.0f : high;
  float weight[kLanes] = {whole[width] - base, top - base};
  store(weight, exponential(load(weight)));
  for (int64_t i = 0; i < width; i += kLanes)
    store(whole + i, fma(load(whole + i), broadcast(weight[0]), mul(load(acc + i), broadcast(weight[1]))));
  whole[width] = high;
  whole[width + 1] = weight[0] * whole[width + 1] + weight[1] * total;
}

static void clear_whole(int64_t width, float* whole) {
  memset(whole, 0, static_cast<size_t>(width + 2) * 4);
  whole[width] = kNoScore;
}

// The rows of one KV head at the end of chunk `number`: written down for a merge; folded into what is there; or finished.
static void finish_chunk(const AttentionCall& c, const AttentionWork& w, int64_t kv_head, const Gathered& g, int64_t number,
                         bool last) {
  int64_t rows = num_rows(c, w), width = padded_lanes(c.value_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float total = sum(load(g.sums + r * kLanes));
    const float* acc = g.acc + r * width;
    int64_t token = w.token_begin + r / c.group, head = kv_head * c.group + r % c.group;
    if (w.partial) {
      float* to = w.partial + number * w.partial_step + ((kv_head - w.head_begin) * rows + r) * partial_stride(c);
      memcpy(to, acc, static_cast<size_t>(width) * 4);
      to[width] = g.top[r];
      to[width + 1] = total;
    } else if (number == 0 && last) {
      write_row(c, w, token, head, acc, g.top[r], total);
    } else {
      float* whole = g.whole + r * partial_stride(c);
      if (number == 0) clear_whole(width, whole);
      fold_row(width, whole, acc, g.top[r], total);
      if (last) write_row(c, w, token, head, whole, whole[width], whole[width + 1]);
    }
  }
}

// Pieces of the rows of one KV head, folded in the order of their keys.
static void merge_pieces(const AttentionCall& c, const AttentionWork& w, const AttentionMerge& m) {
  int64_t rows = num_rows(c, w), width = padded_lanes(c.value_dim);
  for (int64_t r = 0; r < rows; ++r) {
    const float* piece = m.partial + ((m.head - w.head_begin) * rows + r) * partial_stride(c);
    clear_whole(width, w.scratch);
    for (int64_t i = 0; i < m.pieces; ++i, piece += m.step) fold_row(width, w.scratch, piece, piece[width], piece[width + 1]);
    write_row(c, w, w.token_begin + r / c.group, m.head * c.group + r % c.group, w.scratch, w.scratch[width], w.scratch[width + 1]);
  }
}

// The chunk a block belongs to is the last one's where the next block begins a new one.
static inline bool ends_chunk(const AttentionWork& w, int64_t end) {
  return end >= w.key_end || (w.chunk_len && end % w.chunk_len == 0);
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
