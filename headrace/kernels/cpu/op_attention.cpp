// attention as an op. Phase 0: the work is divided (schedule.h); 1: every interval's segments; 2: split items are merged.
// An item is one request, one KV head (or all of them, where keys are many and rows few) and one tile of its tokens; its
// units are blocks of keys. Batch-invariant: one kernel, units are chunks of fixed length, each folded or merged in order,
// so that how the work is divided cannot be seen in the bits.
#include <algorithm>

#include "ops.h"
#include "schedule.h"

namespace headrace {
namespace {

constexpr int64_t kFewRows = 16;  // query rows per KV head that the decode kernel takes
constexpr int64_t kLeastTile = 48, kLargestTile = 192;  // query rows
constexpr int64_t kLeastChunk = 256, kLargestChunk = 4096;  // keys, batch-invariant
constexpr int64_t kTogetherBlocks = 4;  // blocks of keys per worker from which on KV heads stay together
constexpr int64_t kTogetherRequests = 4;  // or requests per worker
constexpr int64_t kMostWorkspace = int64_t{64} << 20;

// Costs in rows x blocks of keys.
constexpr int64_t kSegmentCost = 12, kMergeCost = 6, kLeastSegment = 6;
constexpr int64_t kMemoryRows = 6;  // few rows cost what reading the block does
constexpr int64_t kLoadRows = 10;   // a tile's block is transposed and widened first

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string text(int64_t n) { return std::to_string(n); }

// What is asked of one request, and where its rows begin.
struct Asked {
  int64_t first_row, query_len, key_len;
};

struct Item {
  int64_t request, head_begin, head_end, token_begin, token_end;
  int64_t key_begin, key_end, first_unit;
  bool few;
};

class Attention : public Op {
 public:
  Attention(const Kernels& kernels, const AttentionTensors& t, const AttentionOptions& options, const char* name)
      : Op(name), kernels_(kernels), t_(t), o_(options) {
    for (const auto& tensor : {t.query, t.key, t.value, t.query_starts, t.key_starts, t.key_lens, t.page_table, t.key_scales,
                               t.value_scales, t.mask, t.sinks, t.alibi_slopes, t.first_keys, t.last_keys})
      if (tensor) in(tensor);
    out(t_.out);
    if (t_.lse) out(t_.lse);
    dense_ = t.query->shape.size() == 4;
  }
  int phases() const override { return 3; }

  AttentionDivision division(int64_t threads) {
    divide(Sizes{}, threads);
    int64_t splits = 1;
    for (const auto& m : schedule_.merges) splits = std::max(splits, m.pieces);
    return {splits, intervals_, workspace_bytes()};
  }

  int64_t chunks(int phase, const Sizes& sizes, int) const override {
    if (phase == 0) return t_.query->rows(sizes) + requests(sizes) > 0;
    return phase == 1 ? intervals_ : merge_rows_;
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    if (phase == 0) return prepare(sizes, worker);
    if (phase == 1) return attend_interval(chunk, worker);
    merge(chunk, worker);
  }

 private:
  const Tensor& key() const { return *t_.key; }
  int64_t kv_heads() const { return key().shape[key().shape.size() - 2]; }
  int64_t heads() const { return t_.query->shape[t_.query->shape.size() - 2]; }
  int64_t group() const { return heads() / kv_heads(); }
  int64_t requests(const Sizes& sizes) const { return dense_ ? t_.query->shape[0] : t_.key_lens->rows(sizes); }
  int64_t key_limit() const { return t_.page_table ? t_.page_table->shape[1] * key().shape[1] : dense_ ? key().shape[1] : key().shape[0]; }
  const char* lens_name() const { return t_.page_table ? "sequence_lens" : "key_lens"; }
  static int64_t int_at(const TensorRef& t, int64_t i) { return *t->row_as<int32_t>(i); }

  [[noreturn]] void refuse(const std::string& what) const { throw std::invalid_argument(std::string(name()) + ": " + what); }

  Asked asked_of(int64_t r) const {
    int64_t begin = dense_ ? 0 : int_at(t_.query_starts, r), end = dense_ ? t_.query->shape[1] : int_at(t_.query_starts, r + 1);
    return {begin, end - begin, t_.key_lens ? int_at(t_.key_lens, r) : key_limit()};
  }

  void check_starts(int64_t requests, int64_t tokens) const {
    if (dense_) return;
    int64_t first = int_at(t_.query_starts, 0), last = int_at(t_.query_starts, requests);
    if (first != 0 || last != tokens)
      refuse("query_starts: expected to begin with 0 and end with the number of tokens, " + text(tokens) + ", got " + text(first) +
             " and " + text(last));
  }

  void check_request(int64_t r, const Asked& a, int64_t tokens) const {
    if (a.first_row < 0 || a.query_len < 0 || (!dense_ && a.first_row + a.query_len > tokens))
      refuse("query_starts: expected whole numbers that never fall, up to the number of tokens, got " + text(a.first_row) + " and " +
             text(a.first_row + a.query_len) + " for request " + text(r));
    if (a.key_len < 0 || a.key_len > key_limit())
      refuse(std::string(lens_name()) + ": expected 0 to " + text(key_limit()) + (t_.page_table ? " (all pages of a row)" : "") +
             ", got " + text(a.key_len) + " for request " + text(r));
    if (!t_.key_starts) return;
    int64_t start = int_at(t_.key_starts, r);
    if (start < 0 || start + a.key_len > key_limit())
      refuse("key_starts: expected whole numbers that never fall, up to the number of keys, " + text(key_limit()) + ", got " +
             text(start) + " and " + text(start + a.key_len) + " for request " + text(r));
  }

  void check_pages(int64_t r, const AttentionWork& w) const {
    if (!w.pages || w.key_begin >= w.key_end) return;
    int64_t pages = key().shape[0], page_size = key().shape[1];
    for (int64_t i = w.key_begin / page_size; i <= (w.key_end - 1) / page_size; ++i)
      if (w.pages[i] < 0 || w.pages[i] >= pages)
        refuse("page_table: expected 0 to " + text(pages - 1) + " within the sequence, got " + text(w.pages[i]) + " at [" + text(r) +
               ", " + text(i) + "]");
  }

  static CacheStrides cache_strides(const Tensor& t, int64_t rank, int64_t codes) {
    const auto& s = t.strides;
    auto of = [&](size_t i) { return t.shape[i] == 1 ? 0 : s[i] * codes; };
    return rank == 4 ? CacheStrides{of(0), of(1), of(2)} : CacheStrides{0, of(0), of(1)};
  }
  static RowStrides row_strides(const Tensor& t, size_t token) { return {t.strides[token], t.strides[token + 1]}; }

  AttentionCall call() const {
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
  void set_mask(AttentionCall& c) const {
    const Tensor& m = *t_.mask;
    size_t head = dense_ ? 1 : 0;
    auto of = [&](size_t i) { return m.shape[i] == 1 ? 0 : m.strides[i]; };
    c.mask_strides = {of(head + 1), of(head)};
    c.mask_columns = m.shape[head + 2];
    c.mask_column_stride = m.strides[head + 2];
    c.mask_type = m.dtype;
  }

  static const char* at(const TensorRef& t, int64_t elements) { return t ? t->data + elements * t->item_bytes() : nullptr; }

  // Everything of a request but which of its rows and keys.
  AttentionWork work_of(int64_t r, const Asked& a) const {
    AttentionWork w{};
    w.query_len = a.query_len;
    w.key_len = a.key_len;
    auto rows = [&](const TensorRef& t) { return const_cast<char*>(at(t, (dense_ ? r : a.first_row) * (t ? t->strides[0] : 0))); };
    w.query = rows(t_.query);
    w.out = rows(t_.out);
    w.lse = rows(t_.lse);
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
    w.first_slot = t_.key_starts ? int_at(t_.key_starts, r) : 0;
    return w;
  }

  bool few(int64_t rows) const { return rows <= kFewRows && few_kernel() && (!o_.batch_invariant || in_order()); }
  // Whether the decode kernel gives the bits of the tile kernel, which multiplies codes by their scales first. AMX tiles
  // sum the even and the odd of their pairs apart, which vectors do not.
  bool in_order() const {
    if (o_.arithmetic == Arithmetic::fp32) return !t_.key_scales && !t_.value_scales;
    return o_.arithmetic == Arithmetic::bf16 && key().dtype == DType::bf16 && !kernels_.strip_block;
  }
  void (*few_kernel() const)(const AttentionCall&, const AttentionWork&) {
    bool narrow = o_.arithmetic == Arithmetic::bf16 && key().dtype == DType::bf16;  // others are converted, to float as well
    return narrow                               ? kernels_.attend_few_bf16
           : o_.arithmetic != Arithmetic::fp64 ? kernels_.attend_few
                                               : nullptr;
  }
  void (*tile_kernel() const)(const AttentionCall&, const AttentionWork&) {
    return o_.arithmetic == Arithmetic::bf16   ? kernels_.attend_tile_bf16
           : o_.arithmetic == Arithmetic::fp32 ? kernels_.attend_tile
                                               : kernels_.attend_double;
  }

  // Keys whose unfinished rows are worth writing down: those cost a tenth of reading the keys at most, up to a limit.
  int64_t chunk_len(const AttentionCall& c) const {
    int64_t partial = c.group * c.value_dim * 8, cached = (c.head_dim + c.value_dim) * dtype_bytes(c.kv_type), len = kLeastChunk;
    while (len < kLargestChunk && len * cached < 10 * partial) len *= 2;
    return len;
  }
  int64_t unit_len(const AttentionCall& c) const { return o_.batch_invariant ? chunk_len(c) : kKeyBlock; }

  void add_item(const AttentionCall& c, const AttentionWork& w, Item item) {
    KeyRange seen = keys_seen(c, w, item.token_begin, item.token_end);
    int64_t unit = unit_len(c), rows = (item.token_end - item.token_begin) * group(), heads = item.head_end - item.head_begin;
    item.key_begin = seen.begin;
    item.key_end = seen.end;
    item.first_unit = seen.begin / unit;
    int64_t count = seen.begin < seen.end ? divide_up(seen.end, unit) - item.first_unit : 0;
    int64_t weight = heads * (item.few ? std::max(rows, kMemoryRows) : rows + kLoadRows) * (unit / kKeyBlock);
    bool whole = o_.arithmetic == Arithmetic::fp64 || (o_.batch_invariant && rows > kLargestTile / 2);
    items_.push_back(item);
    counts_.push_back(whole ? std::min<int64_t>(count, 1) : count);
    weights_.push_back(whole ? weight * std::max<int64_t>(count, 1) : weight);
  }

  // Tiles of tokens from the request's end: those with most keys first.
  void add_items(int64_t r, const Asked& a, const AttentionCall& c, int64_t workers) {
    if (a.query_len == 0) return;
    AttentionWork w = work_of(r, a);
    // NOTE: the decode kernel sums the weights of a block in another order where its first block begins late.
    bool late = o_.batch_invariant && keys_seen(c, w, 0, a.query_len).begin % kKeyBlock;
    bool few_rows = few(a.query_len * group()) && !late;
    bool many = requests_ >= kTogetherRequests * workers || divide_up(a.key_len, kKeyBlock) >= kTogetherBlocks * workers;
    bool together = few_rows && many;
    int64_t rows = std::clamp(a.query_len * group() / 8, kLeastTile, kLargestTile), heads = together ? kv_heads() : 1;
    int64_t tile = few_rows ? a.query_len : std::max<int64_t>(1, rows / group());
    for (int64_t end = a.query_len; end > 0; end = (end - 1) / tile * tile)
      for (int64_t head = 0; head < kv_heads(); head += heads)
        add_item(c, w, Item{r, head, head + heads, (end - 1) / tile * tile, end, 0, 0, 0, few_rows});
  }

  void prepare(const Sizes& sizes, Worker& worker) {
    divide(sizes, worker.num_threads());
    partial_ = workspace_bytes() ? reinterpret_cast<float*>(worker.workspace(workspace_bytes())) : nullptr;
  }
  int64_t workspace_bytes() const { return items_.empty() ? 0 : schedule_.slots * slot_floats_ * 4; }

  void divide(const Sizes& sizes, int64_t threads) {
    int64_t n = requests(sizes), tokens = t_.query->rows(sizes);
    items_.clear(), counts_.clear(), weights_.clear();
    schedule_.merges.clear();
    intervals_ = merge_rows_ = 0;
    check_starts(n, tokens);
    AttentionCall c = call();
    requests_ = n;
    bool all_few = true;
    for (int64_t r = 0; r < n; ++r) {
      Asked a = asked_of(r);
      check_request(r, a, tokens);
      all_few = all_few && few(a.query_len * group());
      add_items(r, a, c, threads);
    }
    if (items_.empty()) return;
    place(c, all_few ? (n == 1 ? threads : 2 * threads) : 4 * threads);
  }

  void place(const AttentionCall& c, int64_t workers) {
    ScheduleCosts costs{kSegmentCost, kMergeCost, workers, kLeastSegment};
    auto plan = [&] {
      schedule_.plan(counts_.data(), weights_.data(), static_cast<int64_t>(items_.size()), costs);
      schedule_.place(counts_.data(), o_.batch_invariant ? SlotHolds::unit : SlotHolds::segment);
    };
    plan();
    slot_floats_ = 0;
    for (const auto& m : schedule_.merges) slot_floats_ = std::max(slot_floats_, item_rows(items_[m.item]) * partial_stride(c));
    if (schedule_.slots * slot_floats_ * 4 > kMostWorkspace) {
      for (size_t i = 0; i < counts_.size(); ++i) {
        weights_[i] *= std::max<int64_t>(counts_[i], 1);
        counts_[i] = std::min<int64_t>(counts_[i], 1);
      }
      plan();
    }
    intervals_ = schedule_.intervals();
    for (const auto& m : schedule_.merges) merge_rows_ += items_[m.item].head_end - items_[m.item].head_begin;
  }
  int64_t item_rows(const Item& i) const { return (i.head_end - i.head_begin) * (i.token_end - i.token_begin) * group(); }

  void attend_interval(int64_t number, Worker& worker) {
    int64_t slot = schedule_.first_slots[number];
    Segment now{nullptr, {}};
    for_each_segment(counts_.data(), schedule_.boundaries[number], schedule_.boundaries[number + 1],
                     [&](int64_t item, int64_t begin, int64_t end, bool partial) {
                       const Item& of = items_[item];
                       Segment next{&of, segment(of, begin, end == counts_[item] ? -1 : end, partial ? slot : -1)};
                       if (partial) slot += o_.batch_invariant ? end - begin : 1;
                       if (now.item) attend(now, &next, worker);
                       now = next;
                     });
    if (now.item) attend(now, nullptr, worker);
  }

  struct Segment {
    const Item* item;
    AttentionWork work;
  };

  // Units [begin, end) of an item; end -1: to its last.
  AttentionWork segment(const Item& item, int64_t begin, int64_t end, int64_t slot) const {
    int64_t unit = unit_len(call());
    AttentionWork w = of_item(item);
    w.key_begin = std::max(item.key_begin, (item.first_unit + begin) * unit);
    w.key_end = end < 0 ? item.key_end : std::min(item.key_end, (item.first_unit + end) * unit);
    w.chunk_len = o_.batch_invariant ? unit : 0;
    w.partial_step = slot_floats_;
    w.in_order = o_.batch_invariant;
    if (slot >= 0) w.partial = partial_ + slot * slot_floats_;
    check_pages(item.request, w);
    return w;
  }

  void attend(Segment& now, Segment* next, Worker& worker) {
    const Item& item = *now.item;
    AttentionWork& w = now.work;
    AttentionCall c = call();
    int64_t rows = num_rows(c, w), heads = item.head_end - item.head_begin;
    if (next && leads_to(now, *next)) {
      w.following = &next->work;
      next->work.fetched = std::min((w.key_end - 1) % kKeyBlock + 1, next->work.key_end - next->work.key_begin);
    }
    int64_t floats = item.few ? few_scratch_floats(c, heads, rows) : tile_scratch_floats(c, rows);
    if (o_.arithmetic == Arithmetic::fp64) floats = 2 * (item.key_end - item.key_begin) + 2;
    w.scratch = reinterpret_cast<float*>(worker.scratch(floats * 4));
    (item.few ? few_kernel() : tile_kernel())(c, w);
  }

  static bool leads_to(const Segment& now, const Segment& next) {
    auto reads = [](const Segment& s) { return s.item->few && s.work.key_begin < s.work.key_end; };
    return reads(now) && reads(next) && next.item->head_end - next.item->head_begin == now.item->head_end - now.item->head_begin;
  }

  AttentionWork of_item(const Item& item) const {
    AttentionWork w = work_of(item.request, asked_of(item.request));
    w.token_begin = item.token_begin;
    w.token_end = item.token_end;
    w.head_begin = item.head_begin;
    w.head_end = item.head_end;
    return w;
  }

  void merge(int64_t row, Worker& worker) {
    for (const auto& m : schedule_.merges) {
      const Item& item = items_[m.item];
      int64_t heads = item.head_end - item.head_begin;
      if (row >= heads) {
        row -= heads;
        continue;
      }
      AttentionCall c = call();
      AttentionWork w = of_item(item);
      w.scratch = reinterpret_cast<float*>(worker.scratch(partial_stride(c) * 4));
      return kernels_.merge_pieces(c, w, {partial_ + m.first_slot * slot_floats_, slot_floats_, m.pieces, item.head_begin + row});
    }
  }

  const Kernels& kernels_;
  AttentionTensors t_;
  AttentionOptions o_;
  bool dense_ = false;
  Schedule schedule_;
  std::vector<Item> items_;
  std::vector<int64_t> counts_, weights_;
  int64_t requests_ = 0, intervals_ = 0, merge_rows_ = 0, slot_floats_ = 0;
  float* partial_ = nullptr;
};

void check_last_dim(const Expect& expect, const TensorRef& t, const char* argument) {
  if (!t || t->capacity_bytes() == 0) return;
  expect.that(t->shape.back() == 1 || t->strides.back() == 1, argument, "a contiguous last dimension", shape_text(*t) + " with another stride");
}

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

std::unique_ptr<Attention> checked_attention(Isa isa, const AttentionTensors& t, const AttentionOptions& options) {
  Expect expect{t.page_table ? "paged_attention" : "attention"};
  check_arrays(expect, t, options);
  check_layout(expect, t);
  check_scales(expect, t);
  check_options(expect, t);
  const Kernels& kernels = kernels_for(isa);
  if (options.arithmetic == Arithmetic::bf16 && !kernels.attend_tile_bf16)
    throw std::invalid_argument(std::string("attention: kernel: no bf16 products at level ") + isa_name(isa));
  return std::make_unique<Attention>(kernels, t, options, expect.op);
}

}  // namespace

void submit_attention(Runner& runner, Isa isa, const AttentionTensors& t, const AttentionOptions& options) {
  runner.submit(checked_attention(isa, t, options));
}

AttentionDivision attention_division(int64_t threads, Isa isa, const AttentionTensors& t, const AttentionOptions& options) {
  if (threads < 1) throw std::invalid_argument("attention: threads: expected 1 at least, got " + text(threads));
  return checked_attention(isa, t, options)->division(threads);
}

}  // namespace headrace
