// attention backward as an op. Phase 0: the work is divided; 1: what each row's gradients have in common; 2: gradients of
// queries, keys and values; 3: of sinks.
// An item is one KV head of one request. Computed whole it takes five products; cut in pieces, so that no thread waits for
// another's last item, seven: pieces of its keys, all rows, and pieces of its rows, all keys. The bits are the same, since a
// gradient's terms are added in the same order. Of requests whose keys overlap, all items are cut.
#include <algorithm>
#include <atomic>

#include "attention_arrays.h"

namespace headrace {
namespace {

constexpr int64_t kTokensAtOnce = 64;    // of phase 1
constexpr int64_t kPiecesPerThread = 4;  // of what is cut
constexpr int64_t kRowsOfPiece = 8 * kGradientRows;  // where requests share keys
constexpr int64_t kWhole = 5, kKeysAlone = 4, kRowsAlone = 3;  // products

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some rows and keys of a request's KV head, keys counted from the request's first; with request -1 some keys of all.
struct Piece {
  int64_t request, head, row_begin, row_end, key_begin, key_end;
  bool queries, keys;
  int64_t weight;
};

class AttentionBackward : public Op {
 public:
  AttentionBackward(const Kernels& kernels, const AttentionGradientTensors& t, const AttentionOptions& options, const char* name)
      : Op(name), kernels_(kernels), t_(t), o_(options), arrays_(t.forward, options, name) {
    const AttentionTensors& f = t_.forward;
    for (const auto& tensor : {f.query, f.key, f.value, f.out, f.lse, f.query_starts, f.key_starts, f.key_lens, f.mask, f.sinks,
                               f.alibi_slopes, f.first_keys, f.last_keys, t.d_out, t.d_lse})
      if (tensor) in(tensor);
    for (const auto& tensor : {t.d_query, t.d_key, t.d_value, t.d_sinks})
      if (tensor) out(tensor);
  }
  int phases() const override { return 4; }

  int64_t chunks(int phase, const Sizes&, int) const override {
    if (phase == 0) return 1;
    if (double_precision()) return phase == 2 ? arrays_.kv_heads() : 0;
    if (phase == 1) return row_chunks_;
    return phase == 2 ? static_cast<int64_t>(pieces_.size()) : t_.d_sinks != nullptr;
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    if (phase == 0) return prepare(sizes, worker);
    if (phase == 1) return prepare_rows(chunk);
    if (phase == 3) return sum_sinks();
    if (double_precision()) return run_doubles(chunk, worker);
    // The heaviest that is left, whoever asks.
    run_piece(pieces_[static_cast<size_t>(next_.fetch_add(1, std::memory_order_relaxed))], worker);
  }

 private:
  bool double_precision() const { return o_.arithmetic == Arithmetic::fp64; }
  int64_t requests() const { return static_cast<int64_t>(asked_.size()); }
  int64_t rows_of(int64_t r) const { return asked_[r].query_len * arrays_.group(); }

  void prepare(const Sizes& sizes, Worker& worker) {
    int64_t n = arrays_.requests(sizes), rows = t_.forward.query->rows(sizes);
    arrays_.check_starts(n, rows);
    asked_.clear();
    for (int64_t r = 0; r < n; ++r) {
      asked_.push_back(arrays_.asked_of(r));
      arrays_.check_request(r, asked_.back(), rows);
    }
    tokens_ = arrays_.dense() ? rows * t_.forward.query->shape[1] : rows;
    row_chunks_ = divide_up(tokens_, kTokensAtOnce);
    next_ = 0;
    if (double_precision()) return;
    share_out_keys();
    divide(worker.num_threads());
    int64_t each = padded_lanes(tokens_ * arrays_.heads());
    totals_ = reinterpret_cast<float*>(worker.workspace(8 * (each + row_chunks_ * arrays_.heads()) + 64));
    deltas_ = totals_ + each;
    d_sinks_ = reinterpret_cast<double*>(deltas_ + each);
  }

  // Which keys' gradients each request writes: its own and those after them that are nobody's. Where several requests have
  // the same keys, or none has any, nobody's are anybody's.
  void share_out_keys() {
    int64_t limit = arrays_.key_limit(), before = -1;
    own_.assign(asked_.size(), {0, arrays_.dense() ? limit : 0});
    shared_ = false;
    if (arrays_.dense()) return;
    std::vector<int64_t> order;
    for (int64_t r = 0; r < requests(); ++r)
      if (asked_[r].key_len) order.push_back(r);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return arrays_.key_start(a) < arrays_.key_start(b); });
    shared_ = order.empty();
    for (int64_t r : order) {
      int64_t start = arrays_.key_start(r);
      if (before >= 0) {
        shared_ = shared_ || start < arrays_.key_start(before) + asked_[before].key_len;
        own_[before].end = start - arrays_.key_start(before);
      }
      own_[r] = {before < 0 ? -start : 0, limit - start};
      before = r;
    }
  }

  // Tiles of rows times blocks of keys, of those of which a row sees a key.
  int64_t blocks_in(int64_t r, int64_t row_begin, int64_t row_end, KeyRange keys) const {
    AttentionCall c = arrays_.call();
    AttentionWork w = arrays_.work_of(r, asked_[r]);
    int64_t count = 0;
    for (int64_t row = row_begin; row < row_end; row += kGradientRows) {
      KeyRange seen = keys_seen(c, w, row / c.group, (std::min(row + kGradientRows, row_end) - 1) / c.group + 1);
      count += std::max<int64_t>(divide_up(std::min(seen.end, keys.end) - std::max(seen.begin, keys.begin), kKeyBlock), 0);
    }
    return count;
  }

  void divide(int64_t threads) {
    pieces_.clear();
    if (shared_) return divide_shared();
    std::vector<Piece> items;
    int64_t total = 0;
    for (int64_t r = 0; r < requests(); ++r) {
      int64_t weight = kWhole * blocks_in(r, 0, rows_of(r), own_[r]);
      for (int64_t head = 0; head < arrays_.kv_heads(); ++head, total += weight)
        items.push_back({r, head, 0, rows_of(r), own_[r].begin, own_[r].end, true, true, weight});
    }
    auto heavier = [](const Piece& a, const Piece& b) { return a.weight > b.weight; };
    std::stable_sort(items.begin(), items.end(), heavier);
    size_t cut = items_to_cut(items, total, threads);
    for (size_t i = 0; i < items.size(); ++i) i < cut ? cut_item(items[i], total / (threads * kPiecesPerThread)) : pieces_.push_back(items[i]);
    std::stable_sort(pieces_.begin(), pieces_.end(), heavier);
  }

  // How many of the heaviest items are better cut: what is cut fills the threads evenly, but is more work.
  static size_t items_to_cut(const std::vector<Piece>& items, int64_t total, int64_t threads) {
    size_t most = std::min(items.size(), static_cast<size_t>(2 * threads)), best = 0;
    int64_t least = -1, cut = 0;
    for (size_t count = 0; count <= most && threads > 1; ++count) {
      int64_t even = (total + cut) / threads, time = std::max(even, longest_share(items, count, threads));
      if (least < 0 || time < least - least / 32) least = time, best = count;
      if (time <= even + even / 32) break;
      if (count < most) cut += items[count].weight * (kKeysAlone + kRowsAlone - kWhole) / kWhole;
    }
    return best;
  }

  // The most that a thread gets of the whole items from number `first` on, each given to whoever has least.
  static int64_t longest_share(const std::vector<Piece>& items, size_t first, int64_t threads) {
    std::vector<int64_t> shares(static_cast<size_t>(threads), 0);
    for (size_t i = first; i < std::min(items.size(), first + static_cast<size_t>(8 * threads)); ++i)
      *std::min_element(shares.begin(), shares.end()) += items[i].weight;
    return *std::max_element(shares.begin(), shares.end());
  }

  void cut_item(const Piece& item, int64_t weight) {
    int64_t blocks = item.weight / kWhole, keys = item.key_end - item.key_begin;
    int64_t key_steps = divide_up(keys, kGradientKeys), row_steps = divide_up(item.row_end, kGradientRows);
    auto step_of = [&](int64_t steps, int64_t products) {
      return divide_up(steps, std::clamp<int64_t>(divide_up(products * blocks, std::max<int64_t>(weight, 1)), 1, std::max<int64_t>(steps, 1)));
    };
    int64_t key_step = step_of(key_steps, kKeysAlone) * kGradientKeys, row_step = step_of(row_steps, kRowsAlone) * kGradientRows;
    for (int64_t begin = item.key_begin; begin < item.key_end; begin += key_step) {
      Piece piece = item;
      piece.queries = false;
      piece.key_begin = begin;
      piece.key_end = std::min(begin + key_step, item.key_end);
      piece.weight = kKeysAlone * blocks_in(item.request, 0, item.row_end, {piece.key_begin, piece.key_end});
      pieces_.push_back(piece);
    }
    for (int64_t begin = 0; begin < item.row_end; begin += row_step) add_rows(item, begin, std::min(begin + row_step, item.row_end));
  }

  void add_rows(const Piece& item, int64_t begin, int64_t end) {
    Piece piece = item;
    piece.keys = false;
    piece.row_begin = begin;
    piece.row_end = end;
    piece.weight = kRowsAlone * blocks_in(item.request, begin, end, {item.key_begin, item.key_end});
    pieces_.push_back(piece);
  }

  void divide_shared() {
    for (int64_t head = 0; head < arrays_.kv_heads(); ++head) {
      for (int64_t begin = 0, limit = arrays_.key_limit(); begin < limit; begin += kGradientKeys)
        pieces_.push_back({-1, head, 0, 0, begin, std::min(begin + kGradientKeys, limit), false, true, 0});
      for (int64_t r = 0; r < requests(); ++r)
        for (int64_t begin = 0; begin < rows_of(r); begin += kRowsOfPiece)
          add_rows({r, head, 0, 0, 0, asked_[r].key_len, true, false, 0}, begin, std::min(begin + kRowsOfPiece, rows_of(r)));
    }
  }

  // Rows

  // Where a token of all requests is in an array whose rows are the query's.
  char* token_in(const TensorRef& t, int64_t token) const {
    if (!t) return nullptr;
    int64_t per = arrays_.dense() ? t->shape[1] : 1, inner = arrays_.dense() ? t->strides[1] : 0;
    return t->data + (token / per * t->strides[0] + token % per * inner) * t->item_bytes();
  }
  static int64_t head_step(const TensorRef& t, size_t from_end) { return t ? t->strides[t->strides.size() - from_end] : 0; }

  void prepare_rows(int64_t chunk) {
    const AttentionTensors& f = t_.forward;
    int64_t heads = arrays_.heads(), end = std::min((chunk + 1) * kTokensAtOnce, tokens_);
    double* d_sinks = t_.d_sinks ? d_sinks_ + chunk * heads : nullptr;
    if (d_sinks) std::fill(d_sinks, d_sinks + heads, 0.0);
    for (int64_t token = chunk * kTokensAtOnce; token < end; ++token)
      kernels_.gradient_row({token_in(t_.d_out, token), token_in(f.out, token), token_in(f.lse, token), token_in(t_.d_lse, token),
                             f.sinks ? f.sinks->at<float>() : nullptr, totals_ + token * heads, deltas_ + token * heads, d_sinks,
                             heads, f.out->shape.back(), head_step(t_.d_out, 2), head_step(f.out, 2), head_step(f.lse, 1),
                             head_step(t_.d_lse, 1), t_.d_out->dtype, f.out->dtype});
  }

  void sum_sinks() {
    for (int64_t head = 0; head < arrays_.heads(); ++head) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < row_chunks_; ++chunk) sum += d_sinks_[chunk * arrays_.heads() + head];
      *t_.d_sinks->row_as<float>(head) = static_cast<float>(sum);
    }
  }

  // Pieces

  GradientCall gradient_call() const {
    size_t token = arrays_.dense() ? 1 : 0;
    auto rank = static_cast<int64_t>(t_.d_key->shape.size());
    GradientCall g{};
    g.totals = totals_;
    g.deltas = deltas_;
    g.d_keys = t_.d_key->data;
    g.d_values = t_.d_value->data;
    g.d_key_strides = cache_strides(*t_.d_key, rank, 1);
    g.d_value_strides = cache_strides(*t_.d_value, rank, 1);
    g.d_out_strides = row_strides(*t_.d_out, token);
    g.d_query_strides = row_strides(*t_.d_query, token);
    if (t_.d_lse) g.d_lse_strides = row_strides(*t_.d_lse, token);
    g.d_out_type = t_.d_out->dtype;
    return g;
  }

  GradientWork work_of(int64_t r, int64_t head) const {
    const Asked& a = asked_[r];
    GradientWork w{};
    w.rows = arrays_.work_of(r, a);
    w.d_out = arrays_.rows_of(t_.d_out, r, a);
    w.d_lse = arrays_.rows_of(t_.d_lse, r, a);
    w.d_query = arrays_.rows_of(t_.d_query, r, a);
    w.first_token = arrays_.dense() ? r * a.query_len : a.first_row;
    w.head = head;
    w.row_end = rows_of(r);
    return w;
  }

  void run_piece(const Piece& p, Worker& worker) {
    AttentionCall c = arrays_.call();
    auto* scratch = reinterpret_cast<float*>(worker.scratch(gradient_scratch_floats(c, p.queries ? p.row_end - p.row_begin : 0) * 4));
    if (p.request < 0) return run_shared(p, c, scratch);
    GradientWork w = work_of(p.request, p.head);
    w.row_begin = p.row_begin;
    w.row_end = p.row_end;
    w.key_begin = p.key_begin;
    w.key_end = p.key_end;
    w.wants_queries = p.queries;
    w.wants_keys = p.keys;
    w.begins = w.ends = true;
    w.scratch = scratch;
    attend(c, w);
  }

  // Some keys, for all requests in turn.
  void run_shared(const Piece& p, const AttentionCall& c, float* scratch) {
    bool begins = true;
    for (int64_t r = 0; r < requests(); ++r) {
      int64_t start = arrays_.key_start(r);
      if (std::max(p.key_begin, start) >= std::min(p.key_end, start + asked_[r].key_len)) continue;
      run_keys(c, work_of(r, p.head), {p.key_begin - start, p.key_end - start}, begins, scratch);
      begins = false;
    }
    GradientWork last{};
    last.head = p.head;
    last.ends = true;
    run_keys(c, last, {p.key_begin, p.key_end}, begins, scratch);
  }

  void run_keys(const AttentionCall& c, GradientWork w, KeyRange keys, bool begins, float* scratch) const {
    w.key_begin = keys.begin;
    w.key_end = keys.end;
    w.wants_keys = true;
    w.begins = begins;
    w.scratch = scratch;
    attend(c, w);
  }

  void attend(const AttentionCall& c, const GradientWork& w) const {
    (o_.arithmetic == Arithmetic::bf16 ? kernels_.attend_backward_bf16 : kernels_.attend_backward)(c, gradient_call(), w);
  }

  // float64: one KV head of all requests, one after the other.
  void run_doubles(int64_t head, Worker& worker) {
    auto* d_sinks = reinterpret_cast<double*>(worker.scratch(arrays_.heads() * 8));
    std::fill(d_sinks, d_sinks + arrays_.heads(), 0.0);
    clear(*t_.d_key, head);
    clear(*t_.d_value, head);
    for (int64_t r = 0; r < requests(); ++r) {
      GradientWork w = work_of(r, head);
      w.d_sinks = t_.d_sinks ? d_sinks : nullptr;
      kernels_.attend_backward_double(arrays_.call(), gradient_call(), w);
    }
    for (int64_t h = head * arrays_.group(); t_.d_sinks && h < (head + 1) * arrays_.group(); ++h)
      *t_.d_sinks->row_as<float>(h) = static_cast<float>(d_sinks[h]);
  }

  // One head of [batch, keys, heads, dim] or [keys, heads, dim].
  static void clear(const Tensor& t, int64_t head) {
    size_t last = t.shape.size() - 1;
    int64_t batch = last == 3 ? t.shape[0] : 1, outer = last == 3 ? t.strides[0] : 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t key = 0; key < t.shape[last - 2]; ++key) {
        double* row = t.at<double>() + b * outer + key * t.strides[last - 2] + head * t.strides[last - 1];
        std::fill(row, row + t.shape[last], 0.0);
      }
  }

  const Kernels& kernels_;
  AttentionGradientTensors t_;
  AttentionOptions o_;
  AttentionArrays arrays_;
  std::vector<Asked> asked_;
  std::vector<KeyRange> own_;  // counted from each request's first key
  std::vector<Piece> pieces_;
  std::atomic<int64_t> next_{0};
  bool shared_ = false;
  int64_t tokens_ = 0, row_chunks_ = 0;
  float *totals_ = nullptr, *deltas_ = nullptr;  // of the workspace
  double* d_sinks_ = nullptr;                    // [row_chunks, heads]
};

void check_like(const Expect& expect, const TensorRef& t, const Tensor& like, const char* argument) {
  expect.that(t->shape == like.shape, argument, shape_text(like), shape_text(*t));
  expect.dtype(*t, argument, {like.dtype});
  check_last_dim(expect, t, argument);
}

void check_gradients(const Expect& expect, const AttentionGradientTensors& t, const AttentionOptions& o) {
  const AttentionTensors& f = t.forward;
  bool wide = o.arithmetic == Arithmetic::fp64;
  expect.that(f.lse != nullptr, "lse", "the log-sum-exp of the forward", "None");
  if (wide)
    expect.dtype(*f.key, "key", {DType::f64});
  else
    expect.dtype(*f.key, "key", {DType::f32, DType::f16, DType::bf16});
  expect.that(t.d_out->shape == f.out->shape, "d_out", shape_text(*f.out), shape_text(*t.d_out));
  if (wide)
    expect.dtype(*t.d_out, "d_out", {DType::f64});
  else
    expect.dtype(*t.d_out, "d_out", {DType::f32, DType::f16, DType::bf16});
  check_last_dim(expect, t.d_out, "d_out");
  if (t.d_lse) {
    expect.that(t.d_lse->shape == f.lse->shape, "d_lse", shape_text(*f.lse), shape_text(*t.d_lse));
    expect.dtype(*t.d_lse, "d_lse", {f.lse->dtype});
  }
  check_like(expect, t.d_query, *f.query, "d_query");
  check_like(expect, t.d_key, *f.key, "d_key");
  check_like(expect, t.d_value, *f.value, "d_value");
  expect.that(!f.sinks == !t.d_sinks, "d_sinks", f.sinks ? "an array, as there are sinks" : "None, as there are no sinks", f.sinks ? "None" : "an array");
  if (t.d_sinks) check_like(expect, t.d_sinks, *f.sinks, "d_sinks");
}

}  // namespace

void submit_attention_backward(Runner& runner, Isa isa, const AttentionGradientTensors& t, const AttentionOptions& options) {
  Expect expect{"attention_backward"};
  check_attention(expect, t.forward, options);
  check_gradients(expect, t, options);
  const Kernels& kernels = kernels_for(isa);
  if (options.arithmetic == Arithmetic::bf16 && !kernels.attend_backward_bf16)
    throw std::invalid_argument(std::string("attention_backward: kernel: no bf16 products at level ") + isa_name(isa));
  runner.submit(std::make_unique<AttentionBackward>(kernels, t, options, expect.op));
}

}  // namespace headrace
