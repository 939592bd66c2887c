// attention backward: gradients of queries, keys and values from those of out and lse, scores recomputed from lse.
//   weight = exp(score - total)   d_value = weight^T d_out   flow = d_out value^T   slope = weight (flow - delta) cap' scale
//   d_query = slope key           d_key = slope^T query
// Wins: always; the only one. Schedule: a work item is one KV head of a request. Two blocks of 64 keys at a time (four of bf16), and for them
// tile after tile of 64 rows (all heads of the group); scores stand keys by rows, so that weights and slopes are the left
// factors of d_value and d_key as they come, what belongs to a row lies in a lane, and nothing is transposed between the five
// products. d_query is gathered transposed. Items that would keep threads waiting are computed in parts, keys and rows apart
// (seven products): every sum has the same order either way, so bits depend on nothing but the request.
// Blocks nobody sees are skipped. Memory: rows x head_dim of one item per thread. Bound: multiply-adds.
// A way to multiply (attention_backward_fp32.h, _bf16.h) has:
//   Item               what is multiplied       padded(n)    the width of rows of n of them
//   pack_query(..)     64 rows, as right factors by element and by row
//   pack_keys(..)      64 keys, as left factors by key and, if wanted, by element
//   multiply(..)       c = a b, or c keep + a b           weigh_block(..)   products to weights and slopes
#pragma once
#include "attention.h"
#include "backward_work.h"

namespace headrace {
namespace HEADRACE_ISA {

static void gradient_row(const GradientRow& row) {
  for (int64_t head = 0; head < row.heads; ++head) {
    Floats products = zero();
    with_element(row.d_out_type, [&](auto gradient) {
      with_element(row.out_type, [&](auto result) {
        using D = decltype(gradient);
        using O = decltype(result);
        const auto* d_out = reinterpret_cast<const typename D::type*>(row.d_out) + head * row.d_out_step;
        const auto* out = reinterpret_cast<const typename O::type*>(row.out) + head * row.out_step;
        for (int64_t i = 0; i < row.value_dim; i += kLanes)
          products = fma(load_first<D>(d_out + i, row.value_dim - i), load_first<O>(out + i, row.value_dim - i), products);
      });
    });
    float lse = reinterpret_cast<const float*>(row.lse)[head * row.lse_step], delta = sum(products), total = lse;
    row.totals[head] = __builtin_inff();
    row.deltas[head] = 0.0f;
    if (lse == kNoScore) continue;
    if (row.sinks) {
      float sink = row.sinks[head], high = sink > lse ? sink : lse;
      total = high + logf(expf(lse - high) + expf(sink - high));
      if (row.d_sinks) row.d_sinks[head] -= static_cast<double>(expf(sink - total)) * static_cast<double>(delta);
    }
    if (row.d_lse) delta -= reinterpret_cast<const float*>(row.d_lse)[head * row.d_lse_step] * expf(total - lse);
    row.totals[head] = total;
    row.deltas[head] = delta;
  }
}

template <class Item> struct Factors {
  const Item *a, *b;
  float* c;
  int64_t a_stride, b_width, c_stride, depth;
  const float* keep;  // null: what was in c is dropped
};

// The buffers of a work item (gradient_scratch_floats).
template <class Way> struct GradientBuffers {
  using Item = typename Way::Item;
  int64_t query_width, value_width;
  Item *keys, *turned, *values;                      // [keys, width]; each block's [width, 64]; [keys, width]
  Item *query, *query_rows, *d_out, *d_out_rows;     // right factors by element and by row
  float *scores, *flows;                             // [64 keys, 64 rows]
  Item *weights, *slopes, *slope_rows;               // left factors, the same; right factor by key
  float *d_keys, *d_values, *d_query;                // sums: [keys, width], [keys, width], each tile's [width, 64]
  float *bias, *masked, *ones;                       // [64 keys, 64 rows], [16 rows, 64 keys], a factor of 1 for each row
  float *minus_totals, *deltas;                      // of the tile's rows; totals in units of the way's power
  float *first, *last, *own, *alibi;                 // keys counted from the block's first
  Item* spare;                                       // 64 keys

  static_assert(Way::kKeys <= kMostGradientKeys, "");
  GradientBuffers(const AttentionCall& c, const GradientWork& w) : free_(reinterpret_cast<char*>(w.scratch)) {
    constexpr int64_t square = kKeyBlock * kGradientRows;
    query_width = Way::padded(c.head_dim);
    value_width = Way::padded(c.value_dim);
    take(keys, Way::kKeys * query_width), take(turned, Way::kKeys * query_width), take(values, Way::kKeys * value_width);
    take(query, kGradientRows * query_width), take(query_rows, kGradientRows * query_width);
    take(d_out, kGradientRows * value_width), take(d_out_rows, kGradientRows * value_width);
    take(scores, square), take(flows, square), take(weights, square), take(slopes, square), take(slope_rows, square);
    take(d_keys, Way::kKeys * query_width), take(d_values, Way::kKeys * value_width);
    take(bias, square), take(masked, kLanes * kKeyBlock), take(ones, greater(query_width, kKeyBlock));
    take(minus_totals, kGradientRows), take(deltas, kGradientRows), take(first, kGradientRows), take(last, kGradientRows);
    take(own, kGradientRows), take(alibi, kGradientRows);
    take(spare, kKeyBlock * query_width);
    take(d_query, 0);
    if constexpr (Way::kInPlace) weights = scores, slopes = slope_rows = flows;
    for (int64_t i = 0; i < greater(query_width, kKeyBlock); ++i) ones[i] = 1.0f;
  }

 private:
  template <class T> void take(T*& place, int64_t count) {
    place = reinterpret_cast<T*>(free_);
    free_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  char* free_;
};

// What a score becomes, and its gradient.
struct WeighRule {
  float scale, cap;
  bool distant, masked;
};
struct Weighed {
  Floats weight, slope;
};

// The products of one key, number `key` of its block, with sixteen rows from `row` on, and how out would flow through them.
template <class Way, bool adjusted>
static inline Weighed weigh_products(const WeighRule& rule, const GradientBuffers<Way>& b, int64_t key, int64_t row) {
  int64_t at = key * kGradientRows + row;
  Floats scale = broadcast(rule.scale), score = load(b.scores + at), unit = broadcast(rule.scale * Way::kUnit);
  Floats slope = mul(sub(load(b.flows + at), load(b.deltas + row)), scale);
  if (adjusted) {
    Floats number = broadcast(static_cast<float>(key)), hidden = broadcast(kNoScore);
    score = mul(score, scale);
    unit = broadcast(Way::kUnit);
    if (rule.cap > 0) {
      Floats bent = hyperbolic_tangent(mul(score, broadcast(1.0f / rule.cap)));
      score = mul(bent, broadcast(rule.cap));
      slope = mul(slope, sub(broadcast(1.0f), mul(bent, bent)));
    }
    if (rule.distant) score = sub(score, mul(load(b.alibi + row), absolute(sub(load(b.own + row), number))));
    if (rule.masked) score = add(score, load(b.bias + at));
    score = select_less(number, load(b.first + row), hidden, score);
    score = select_less(load(b.last + row), number, hidden, score);
  }
  Floats weight = Way::power(fma(score, unit, load(b.minus_totals + row)));
  return {weight, mul(weight, slope)};
}

// Up to 64 rows of the item, and the tokens they are of.
struct RowTile {
  int64_t row, rows, columns, first_token, last_token;
};

static inline RowTile tile_at(const AttentionCall& c, const GradientWork& w, int64_t row) {
  int64_t rows = lesser(kGradientRows, w.row_end - row);
  return {row, rows, padded_to(rows, kOpposed), row / c.group, (row + rows - 1) / c.group};
}

// Calls f(number in the tile, token, head) for each of its rows.
template <class F> static inline void each_row(const AttentionCall& c, const GradientWork& w, const RowTile& t, F f) {
  int64_t token = t.first_token, member = t.row % c.group;
  for (int64_t i = 0; i < t.rows; ++i) {
    f(i, token, w.head * c.group + member);
    if (++member == c.group) member = 0, ++token;
  }
}

template <class Way>
static void load_row_tile(const AttentionCall& c, const GradientCall& g, const GradientWork& w, const RowTile& t, GradientBuffers<Way>& b) {
  int64_t queries[kGradientRows], d_outs[kGradientRows];
  for (int64_t i = t.rows; i < kGradientRows; ++i) b.minus_totals[i] = kNoScore, b.deltas[i] = b.alibi[i] = 0.0f;
  each_row(c, w, t, [&](int64_t i, int64_t token, int64_t head) {
    int64_t at = (w.first_token + token) * c.heads + head;
    b.minus_totals[i] = -g.totals[at] * Way::kUnit;
    b.deltas[i] = g.deltas[at];
    if (w.rows.alibi) b.alibi[i] = w.rows.alibi[head];
    queries[i] = token * c.query_strides.token + head * c.query_strides.head;
    d_outs[i] = token * g.d_out_strides.token + head * g.d_out_strides.head;
  });
  with_element(c.query_type, [&](auto element) {
    using E = decltype(element);
    const auto* from = reinterpret_cast<const typename E::type*>(w.rows.query);
    Way::template pack_query<E>(c.head_dim, [&](int64_t i) { return i < t.rows ? from + queries[i] : nullptr; }, b.query, b.query_rows);
  });
  with_element(g.d_out_type, [&](auto element) {
    using E = decltype(element);
    const auto* from = reinterpret_cast<const typename E::type*>(w.d_out);
    Way::template pack_query<E>(c.value_dim, [&](int64_t i) { return i < t.rows ? from + d_outs[i] : nullptr; }, b.d_out, b.d_out_rows);
  });
}

// Some blocks of keys and values from number `origin` on; those that are none of the request's are zeros, and not touched.
template <class Way> static void load_key_blocks(const AttentionCall& c, const GradientWork& w, int64_t origin, GradientBuffers<Way>& b) {
  with_element(c.kv_type, [&](auto element) {
    using E = decltype(element);
    auto head_of = [&](const char* base, const CacheStrides& s) {
      return reinterpret_cast<const typename E::type*>(base) + w.rows.page * s.page + w.rows.first_slot * s.token + w.head * s.head;
    };
    const auto *keys = head_of(c.keys, c.key_strides), *values = head_of(c.values, c.value_strides);
    for (int64_t block = 0; block < Way::kKeys; block += kKeyBlock) {
      int64_t start = origin + block;
      auto there = [&](int64_t i) { return start + i >= 0 && start + i < w.rows.key_len; };
      Way::template pack_keys<E>(c.head_dim, [&](int64_t i) { return there(i) ? keys + (start + i) * c.key_strides.token : nullptr; },
                                 b.keys + block * b.query_width, b.turned + block * b.query_width, b.spare);
      Way::template pack_keys<E>(c.value_dim, [&](int64_t i) { return there(i) ? values + (start + i) * c.value_strides.token : nullptr; },
                                 b.values + block * b.value_width, nullptr, b.spare);
    }
  });
}

// The first and last key that each row of the tile sees, and its own, counted from `start`; only whether they are before, within
// or after the block matters.
template <class Way>
static void load_limits(const AttentionCall& c, const GradientWork& w, const RowTile& t, int64_t start, GradientBuffers<Way>& b) {
  auto within = [](int64_t n) { return static_cast<float>(lesser(greater(n, -1), kKeyBlock)); };
  for (int64_t i = t.rows; i < kGradientRows; ++i) b.first[i] = kKeyBlock, b.last[i] = -1, b.own[i] = 0;
  each_row(c, w, t, [&](int64_t i, int64_t token, int64_t) {
    b.first[i] = within(first_key(c, w.rows, token) - start);
    b.last[i] = within(last_key(c, w.rows, token) - start);
    b.own[i] = static_cast<float>(own_key(c, w.rows, token) - start);
  });
}

// What the mask adds, keys by rows.
template <class Way>
static void load_bias(const AttentionCall& c, const GradientWork& w, const RowTile& t, int64_t start, GradientBuffers<Way>& b) {
  for (int64_t first = 0; first < t.columns; first += kLanes) {
    memset(b.masked, 0, kLanes * kKeyBlock * sizeof(float));
    each_row(c, w, t, [&](int64_t i, int64_t token, int64_t head) {
      if (i >= first && i < first + kLanes) add_mask(c, w.rows, token, head, start, b.masked + (i - first) * kKeyBlock);
    });
    for (int64_t key = 0; key < kKeyBlock; key += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(b.masked + i * kKeyBlock + key);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(b.bias + (key + i) * kGradientRows + first, square[i]);
    }
  }
}

// Whether every row of the tile sees the whole block at `start`.
static bool seen_by_all(const AttentionCall& c, const GradientWork& w, const RowTile& t, int64_t start) {
  int64_t step = w.rows.first_keys ? 1 : greater(t.last_token - t.first_token, 1);  // without ranges they only grow
  for (int64_t token = t.first_token; token <= t.last_token; token += step)
    if (first_key(c, w.rows, token) > start || last_key(c, w.rows, token) < start + kKeyBlock - 1) return false;
  return true;
}

// One tile against the block of keys at `start`, number `block` of those loaded; what nobody of the tile sees is left out.
template <class Way>
static void add_block(Way& way, const AttentionCall& c, const GradientWork& w, const RowTile& t, int64_t start, int64_t block,
                      GradientBuffers<Way>& b) {
  KeyRange seen = keys_seen(c, w.rows, t.first_token, t.last_token + 1);
  int64_t from = greater(seen.begin - start, 0) / kOpposed * kOpposed, to = padded_to(lesser(seen.end - start, kKeyBlock), kOpposed);
  if (seen.begin >= seen.end || from >= to) return;
  bool all_seen = seen_by_all(c, w, t, start);
  WeighRule rule{static_cast<float>(c.scale), static_cast<float>(c.softcap), w.rows.alibi != nullptr, w.rows.mask != nullptr};
  int64_t rows = kGradientRows, count = to - from, first = block * kKeyBlock + from;
  way.multiply(count, t.columns, {b.keys + first * b.query_width, b.query, b.scores + from * rows, b.query_width, rows, rows, b.query_width, nullptr});
  way.multiply(count, t.columns, {b.values + first * b.value_width, b.d_out, b.flows + from * rows, b.value_width, rows, rows, b.value_width, nullptr});
  if (!all_seen || rule.cap > 0 || rule.distant || rule.masked) {
    load_limits(c, w, t, start, b);
    if (rule.masked) load_bias(c, w, t, start, b);
    Way::template weigh_block<true>(rule, b, from, to, t.columns);
  } else {
    Way::template weigh_block<false>(rule, b, from, to, t.columns);
  }
  if (w.wants_keys) {
    way.multiply(count, padded_lanes(c.value_dim), {b.weights + from * rows, b.d_out_rows, b.d_values + first * b.value_width, rows,
                                                    b.value_width, b.value_width, t.columns, b.ones});
    way.multiply(count, padded_lanes(c.head_dim), {b.slopes + from * rows, b.query_rows, b.d_keys + first * b.query_width, rows,
                                                   b.query_width, b.query_width, t.columns, b.ones});
  }
  if (w.wants_queries)
    way.multiply(padded_lanes(c.head_dim), t.columns, {b.turned + block * kKeyBlock * b.query_width + from, b.slope_rows + from * rows,
                                                       b.d_query + (t.row - w.row_begin) * b.query_width, kKeyBlock, rows, rows, count, b.ones});
}

// All tiles against the blocks from `origin` on; they are loaded when the first tile sees any of them.
template <class Way>
static void add_tiles(Way& way, const AttentionCall& c, const GradientCall& g, const GradientWork& w, int64_t origin, GradientBuffers<Way>& b) {
  int64_t end = lesser(origin + Way::kKeys, w.key_end);
  bool loaded = false;
  for (int64_t row = w.row_begin; row < w.row_end; row += kGradientRows) {
    RowTile t = tile_at(c, w, row);
    KeyRange seen = keys_seen(c, w.rows, t.first_token, t.last_token + 1);
    if (seen.begin >= seen.end || seen.begin >= end || seen.end <= origin) continue;
    if (!loaded) load_key_blocks(c, w, origin, b);
    loaded = true;
    load_row_tile(c, g, w, t, b);
    for (int64_t start = origin; start < end; start += kKeyBlock) add_block(way, c, w, t, start, (start - origin) / kKeyBlock, b);
  }
}

static void store_gradients(const float* from, int64_t width, char* base, int64_t place, int64_t step, DType type, int64_t count, int64_t dim) {
  with_element(type, [&](auto element) {
    using E = decltype(element);
    auto* to = reinterpret_cast<typename E::type*>(base) + place;
    for (int64_t i = 0; i < count; ++i, from += width, to += step)
      for (int64_t j = 0; j < dim; j += kLanes) store_first<E>(to + j, load(from + j), dim - j);
  });
}

template <class Way>
static void store_key_gradients(const AttentionCall& c, const GradientCall& g, const GradientWork& w, int64_t origin, const GradientBuffers<Way>& b) {
  int64_t count = lesser(Way::kKeys, w.key_end - origin), slot = w.rows.first_slot + origin;
  auto place_of = [&](const CacheStrides& s) { return w.rows.page * s.page + slot * s.token + w.head * s.head; };
  store_gradients(b.d_keys, b.query_width, g.d_keys, place_of(g.d_key_strides), g.d_key_strides.token, c.kv_type, count, c.head_dim);
  store_gradients(b.d_values, b.value_width, g.d_values, place_of(g.d_value_strides), g.d_value_strides.token, c.kv_type, count, c.value_dim);
}

template <class Way>
static void store_query_gradients(const AttentionCall& c, const GradientCall& g, const GradientWork& w, const GradientBuffers<Way>& b) {
  for (int64_t row = w.row_begin; row < w.row_end; row += kGradientRows) {
    RowTile t = tile_at(c, w, row);
    const float* sums = b.d_query + (row - w.row_begin) * b.query_width;
    float* turned = b.bias;
    for (int64_t j = 0; j < c.head_dim; j += kLanes) {
      for (int64_t i = 0; i < t.columns; i += kLanes) {
        Floats square[kLanes];
        for (int k = 0; k < kLanes; ++k) square[k] = load(sums + (j + k) * kGradientRows + i);
        transpose(square);
        for (int k = 0; k < kLanes; ++k) store(turned + (i + k) * kLanes, square[k]);
      }
      each_row(c, w, t, [&](int64_t i, int64_t token, int64_t head) {
        int64_t at = token * g.d_query_strides.token + head * g.d_query_strides.head + j;
        store_gradients(turned + i * kLanes, kLanes, w.d_query, at, 0, c.query_type, 1, lesser(kLanes, c.head_dim - j));
      });
    }
  }
}

template <class Way> static void attend_backward_in(const AttentionCall& c, const GradientCall& g, const GradientWork& w) {
  Way way;
  GradientBuffers<Way> b(c, w);
  int64_t tiles = padded_to(w.row_end - w.row_begin, kGradientRows);
  if (w.wants_queries) memset(b.d_query, 0, static_cast<size_t>(tiles * b.query_width) * sizeof(float));
  for (int64_t origin = w.key_begin; origin < w.key_end; origin += Way::kKeys) {
    if (w.wants_keys && w.begins) {
      memset(b.d_keys, 0, static_cast<size_t>(Way::kKeys * b.query_width) * sizeof(float));
      memset(b.d_values, 0, static_cast<size_t>(Way::kKeys * b.value_width) * sizeof(float));
    }
    add_tiles(way, c, g, w, origin, b);
    if (w.wants_keys && w.ends) store_key_gradients(c, g, w, origin, b);
  }
  if (w.wants_queries) store_query_gradients(c, g, w, b);
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
