// The arrays of an attention call: what they must be, and what kernels see of them.
#include "attention_arrays.h"

namespace headrace {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string text(int64_t n) { return std::to_string(n); }

const char* at(const TensorRef& t, int64_t elements) { return t ? t->data + elements * t->item_bytes() : nullptr; }

}  // namespace

void AttentionArrays::refuse(const std::string& what) const { throw std::invalid_argument(std::string(op_) + ": " + what); }

Asked AttentionArrays::asked_of(int64_t r) const {
  int64_t begin = dense_ ? 0 : int_at(t_.query_starts, r), end = dense_ ? t_.query->shape[1] : int_at(t_.query_starts, r + 1);
  return {begin, end - begin, t_.key_lens ? int_at(t_.key_lens, r) : key_limit()};
}

void AttentionArrays::check_starts(int64_t requests, int64_t tokens) const {
  if (dense_) return;
  int64_t first = int_at(t_.query_starts, 0), last = int_at(t_.query_starts, requests);
  if (first != 0 || last != tokens)
    refuse("query_starts: expected to begin with 0 and end with the number of tokens, " + text(tokens) + ", got " + text(first) +
           " and " + text(last));
}

void AttentionArrays::check_request(int64_t r, const Asked& a, int64_t tokens) const {
  const char* lens = t_.page_table ? "sequence_lens" : "key_lens";
  if (a.first_row < 0 || a.query_len < 0 || (!dense_ && a.first_row + a.query_len > tokens))
    refuse("query_starts: expected whole numbers that never fall, up to the number of tokens, got " + text(a.first_row) + " and " +
           text(a.first_row + a.query_len) + " for request " + text(r));
  if (a.key_len < 0 || a.key_len > key_limit())
    refuse(std::string(lens) + ": expected 0 to " + text(key_limit()) + (t_.page_table ? " (all pages of a row)" : "") + ", got " +
           text(a.key_len) + " for request " + text(r));
  if (!t_.key_starts) return;
  int64_t start = key_start(r);
  if (start < 0 || start + a.key_len > key_limit())
    refuse("key_starts: expected whole numbers that never fall, up to the number of keys, " + text(key_limit()) + ", got " +
           text(start) + " and " + text(start + a.key_len) + " for request " + text(r));
}

void AttentionArrays::check_pages(int64_t r, const AttentionWork& w) const {
  if (!w.pages || w.key_begin >= w.key_end) return;
  int64_t pages = key().shape[0], page_size = key().shape[1];
  for (int64_t i = w.key_begin / page_size; i <= (w.key_end - 1) / page_size; ++i)
    if (w.pages[i] < 0 || w.pages[i] >= pages)
      refuse("page_table: expected 0 to " + text(pages - 1) + " within the sequence, got " + text(w.pages[i]) + " at [" + text(r) +
             ", " + text(i) + "]");
}

CacheStrides cache_strides(const Tensor& t, int64_t rank, int64_t codes) {
  const auto& s = t.strides;
  auto of = [&](size_t i) { return t.shape[i] == 1 ? 0 : s[i] * codes; };
  return rank == 4 ? CacheStrides{of(0), of(1), of(2)} : CacheStrides{0, of(0), of(1)};
}
RowStrides row_strides(const Tensor& t, size_t token) { return {t.strides[token], t.strides[token + 1]}; }

AttentionCall AttentionArrays::call() const {
  AttentionCall c{};
  int64_t rank = static_cast<int64_t>(key().shape.size()), codes = key().dtype == DType::u8 ? 2 : 1;
  size_t token = dense_ ? 1 : 0;
  c.keys = key().data;
  c.values = t_.value->data;
  c.key_strides = cache_strides(key(), rank, codes);
  c.value_strides = cache_strides(*t_.value, rank, codes);
  if (t_.key_scales) c.key_scales = t_.key_scales->at<float>(), c.key_scale_strides = cache_strides(*t_.key_scales, rank, 1);
  if (t_.value_scales) c.value_scales = t_.value_scales->at<float>(), c.value_scale_strides = cache_strides(*t_.value_scales, rank, 1);
  if (t_.sinks) c.sinks = t_.sinks->at<float>();
  c.query_strides = row_strides(*t_.query, token);
  c.out_strides = row_strides(*t_.out, token);
  if (t_.lse) c.lse_strides = row_strides(*t_.lse, token);
  if (t_.mask) set_mask(c);
  c.heads = heads();
  c.kv_heads = kv_heads();
  c.group = group();
  c.head_dim = t_.query->shape.back();
  c.value_dim = t_.out->shape.back();
  c.page_size = t_.page_table ? key().shape[1] : 1;
  c.window_left = o_.window_left;
  c.window_right = o_.window_right;
  c.scale = o_.scale;
  c.softcap = o_.softcap;
  c.query_type = t_.query->dtype;
  c.kv_type = key().dtype == DType::u8 ? DType::i4 : key().dtype;
  c.out_type = t_.out->dtype;
  c.top_left = o_.top_left;
  return c;
}

// Dense: [batch, heads, tokens, columns]; else [heads, tokens, columns]. A size of 1 stands for all.
void AttentionArrays::set_mask(AttentionCall& c) const {
  const Tensor& m = *t_.mask;
  size_t head = dense_ ? 1 : 0;
  auto of = [&](size_t i) { return m.shape[i] == 1 ? 0 : m.strides[i]; };
  c.mask_strides = {of(head + 1), of(head)};
  c.mask_columns = m.shape[head + 2];
  c.mask_column_stride = m.strides[head + 2];
  c.mask_type = m.dtype;
}

char* AttentionArrays::rows_of(const TensorRef& t, int64_t r, const Asked& a) const {
  return const_cast<char*>(at(t, (dense_ ? r : a.first_row) * (t ? t->strides[0] : 0)));
}

AttentionWork AttentionArrays::work_of(int64_t r, const Asked& a) const {
  AttentionWork w{};
  w.query_len = a.query_len;
  w.key_len = a.key_len;
  w.query = rows_of(t_.query, r, a);
  w.out = rows_of(t_.out, r, a);
  w.lse = rows_of(t_.lse, r, a);
  if (t_.mask) {
    const Tensor& m = *t_.mask;
    int64_t offset = dense_ ? (m.shape[0] == 1 ? 0 : r * m.strides[0]) : (m.shape[1] == 1 ? 0 : a.first_row * m.strides[1]);
    w.mask = at(t_.mask, offset);
  }
  if (t_.alibi_slopes) w.alibi = t_.alibi_slopes->row_as<float>(t_.alibi_slopes->shape[0] == 1 ? 0 : r);
  int64_t first_token = dense_ ? r * a.query_len : a.first_row;
  if (t_.first_keys) w.first_keys = t_.first_keys->at<int32_t>() + first_token, w.last_keys = t_.last_keys->at<int32_t>() + first_token;
  if (t_.page_table) w.pages = t_.page_table->row_as<int32_t>(r);
  w.page = dense_ ? r : 0;
  w.first_slot = key_start(r);
  return w;
}

void check_last_dim(const Expect& expect, const TensorRef& t, const char* argument) {
  if (!t || t->capacity_bytes() == 0) return;
  expect.that(t->shape.back() == 1 || t->strides.back() == 1, argument, "a contiguous last dimension", shape_text(*t) + " with another stride");
}

namespace {

void check_arrays(const Expect& expect, const AttentionTensors& t, const AttentionOptions& o) {
  size_t rank = t.query->shape.size();
  bool dense = rank == 4, paged = t.page_table != nullptr;
  expect.that(rank == 3 || rank == 4, "query", "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim]", shape_text(*t.query));
  expect.that(t.key->shape.size() == (dense || paged ? 4u : 3u), paged ? "key_pages" : "key",
              paged ? "[pages, page_size, kv_heads, head_dim]" : dense ? "[batch, keys, kv_heads, head_dim]" : "[keys, kv_heads, head_dim]",
              shape_text(*t.key));
  expect.that(t.value->shape.size() == t.key->shape.size(), paged ? "value_pages" : "value", "as many dimensions as the keys", shape_text(*t.value));
  const char *key_name = paged ? "key_pages" : "key", *value_name = paged ? "value_pages" : "value";
  const auto &q = t.query->shape, &k = t.key->shape, &v = t.value->shape;
  int64_t codes = t.key->dtype == DType::u8 ? 2 : 1, head_dim = q.back(), stored = divide_up(head_dim, codes);
  expect.that(k.back() == stored, key_name, "a last dimension of " + text(stored), shape_text(*t.key));
  for (size_t i = 0; i + 1 < k.size(); ++i) expect.that(k[i] == v[i], value_name, "the keys' sizes but for the last", shape_text(*t.value));
  int64_t kv_heads = k[k.size() - 2], heads = q[rank - 2], value_dim = t.out->shape.back();
  expect.that(kv_heads > 0 && head_dim > 0 && v.back() > 0 && (!paged || k[1] > 0), key_name, "sizes of at least 1", shape_text(*t.key));
  expect.that(heads > 0 && heads % kv_heads == 0, "query", "a multiple of " + text(kv_heads) + " heads", text(heads));
  expect.that(!dense || paged || k[0] == q[0], key_name, "a batch of " + text(q[0]), shape_text(*t.key));
  expect.that(v.back() == divide_up(value_dim, codes), value_name, "a last dimension of " + text(divide_up(value_dim, codes)), shape_text(*t.value));
  auto out_shape = q;
  out_shape.back() = value_dim;
  expect.that(t.out->shape == out_shape, "out", "the query's shape but for the last dimension", shape_text(*t.out));
  out_shape.pop_back();
  if (t.lse) expect.that(t.lse->shape == out_shape, "lse", "the query's shape without its last dimension", shape_text(*t.lse));
  if (o.arithmetic == Arithmetic::fp64) {
    for (const auto& [tensor, argument] : {std::pair{t.query, "query"}, {t.key, key_name}, {t.value, value_name}, {t.out, "out"}})
      expect.dtype(*tensor, argument, {DType::f64});
    if (t.lse) expect.dtype(*t.lse, "lse", {DType::f64});
  } else {
    expect.dtype(*t.query, "query", {DType::f32, DType::f16, DType::bf16});
    expect.dtype(*t.out, "out", {DType::f32, DType::f16, DType::bf16});
    expect.dtype(*t.key, key_name, {DType::f32, DType::f16, DType::bf16, DType::f8, DType::i8, DType::u8});
    if (t.lse) expect.dtype(*t.lse, "lse", {DType::f32});
  }
  expect.dtype(*t.value, value_name, {t.key->dtype});
  check_last_dim(expect, t.query, "query");
  check_last_dim(expect, t.out, "out");
  check_last_dim(expect, t.key, key_name);
  check_last_dim(expect, t.value, value_name);
}

void check_scales(const Expect& expect, const AttentionTensors& t) {
  bool coded = t.key->dtype == DType::i8 || t.key->dtype == DType::u8, scaled = coded || t.key->dtype == DType::f8;
  for (const auto& [scales, argument] : {std::pair{t.key_scales, "key_scales"}, {t.value_scales, "value_scales"}}) {
    expect.that(!coded || scales, argument, "scales, as int8 and int4 caches need them", "None");
    if (!scales) continue;
    expect.that(scaled, argument, "none but for float8, int8 and int4 caches", shape_text(*scales));
    expect.dtype(*scales, argument, {DType::f32});
    auto shape = t.key->shape;
    shape.pop_back();
    auto per_page = shape;
    if (shape.size() == 3) per_page[1] = 1;
    expect.that(scales->shape == shape || scales->shape == per_page, argument, "the keys' shape without its last dimension", shape_text(*scales));
  }
}

// A layout's own arrays: which there must be, which not.
void check_layout(const Expect& expect, const AttentionTensors& t) {
  bool dense = t.query->shape.size() == 4;
  int64_t requests = dense ? t.query->shape[0] : t.key_lens ? t.key_lens->shape[0] : 0;
  const char* lens = t.page_table ? "sequence_lens" : "key_lens";
  if (dense) expect.that(!t.query_starts && !t.key_starts && !t.page_table, "query_starts, key_starts, page_table", "none for a dense batch", "some");
  if (!dense) {
    expect.that(t.query_starts && t.key_lens && (t.key_starts || t.page_table), "query_starts, key_starts", "both for a ragged batch", "none");
    expect.dtype(*t.query_starts, "query_starts", {DType::i32});
    expect.shape(*t.key_lens, lens, {-1});
    expect.shape(*t.query_starts, "query_starts", {requests + 1});
  }
  if (t.key_lens) expect.dtype(*t.key_lens, lens, {DType::i32}), expect.shape(*t.key_lens, lens, {requests});
  if (t.key_starts) expect.dtype(*t.key_starts, "key_starts", {DType::i32}), expect.shape(*t.key_starts, "key_starts", {requests});
  if (!t.page_table) return;
  expect.dtype(*t.page_table, "page_table", {DType::i32});
  expect.shape(*t.page_table, "page_table", {requests, -1});
  expect.packed(*t.page_table, "page_table");
}

void check_vector(const Expect& expect, const TensorRef& t, const char* argument, DType type, int64_t n) {
  if (!t) return;
  expect.dtype(*t, argument, {type});
  expect.shape(*t, argument, {n});
  expect.that(t->strides[0] == 1 || n <= 1, argument, "contiguous numbers", shape_text(*t) + " with another stride");
}

void check_options(const Expect& expect, const AttentionTensors& t) {
  bool dense = t.query->shape.size() == 4;
  const auto& q = t.query->shape;
  int64_t heads = q[q.size() - 2], tokens = dense ? q[0] * q[1] : q[0];
  int64_t requests = dense ? q[0] : t.key_lens->shape[0];
  check_vector(expect, t.sinks, "sinks", DType::f32, heads);
  expect.that(!t.first_keys == !t.last_keys, "first_keys, last_keys", "both or none", "one");
  check_vector(expect, t.first_keys, "first_keys", DType::i32, tokens);
  check_vector(expect, t.last_keys, "last_keys", DType::i32, tokens);
  if (t.alibi_slopes) {
    expect.dtype(*t.alibi_slopes, "alibi_slopes", {DType::f32});
    const auto& shape = t.alibi_slopes->shape;
    expect.that(shape.size() == 2 && (shape[0] == 1 || shape[0] == requests) && shape[1] == heads, "alibi_slopes",
                "[heads] or [requests, heads]", shape_text(*t.alibi_slopes));
    expect.packed(*t.alibi_slopes, "alibi_slopes");
  }
  if (!t.mask) return;
  expect.dtype(*t.mask, "mask", {DType::u8, DType::f32, DType::f16, DType::bf16, DType::f64});
  expect.that(t.mask->dtype != DType::f64 || t.query->dtype == DType::f64, "mask", "bool or floats of at most 32 bits", shape_text(*t.mask));
  const auto& m = t.mask->shape;
  std::vector<int64_t> full = dense ? std::vector<int64_t>{q[0], heads, q[1]} : std::vector<int64_t>{heads, q[0]};
  bool fits = m.size() == full.size() + 1;
  for (size_t i = 0; fits && i < full.size(); ++i) fits = m[i] == full[i] || m[i] == 1;
  expect.that(fits, "mask", dense ? "[batch, heads, tokens, columns], 1 for all" : "[tokens, columns] or [heads, tokens, columns], 1 for all",
              shape_text(*t.mask));
}

}  // namespace

void check_attention(const Expect& expect, const AttentionTensors& t, const AttentionOptions& options) {
  check_arrays(expect, t, options);
  check_layout(expect, t);
  check_scales(expect, t);
  check_options(expect, t);
}

}  // namespace headrace
