// paged attention as an op. Phase 0: every request's work, cut into items; phase 1: requests whose keys were cut are merged.
// How a request is cut follows from its own lengths alone, so its result does not depend on threads or neighbours; only how
// many pieces and heads make an item follows from the threads.
#include <algorithm>
#include <atomic>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kFewRows = 16;         // query rows per KV head that the decode kernel takes
constexpr int64_t kLeastChunk = 128;     // keys
constexpr int64_t kLeastTile = 48;       // query rows
constexpr int64_t kLargestTile = 192;
constexpr int64_t kPartsPerThread = 4;   // below that, KV heads are parted
constexpr int64_t kItemsPerThread = 2;   // above that, pieces are joined: an item begins cold

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How one request is computed. `few`: pieces are chunks of its keys; otherwise tiles of its tokens.
struct Cut {
  int64_t first_row, query_len, key_len;
  int64_t pieces, first_piece, piece_len;
  bool few, valid;
};

class PagedAttention : public Op {
 public:
  PagedAttention(Runner& runner, const Kernels& kernels, PagedAttentionTensors t, int64_t window_left, float scale, float softcap)
      : Op("paged_attention"), kernels_(kernels), t_(std::move(t)), window_left_(window_left), scale_(scale), softcap_(softcap) {
    for (const auto& tensor : {t_.query, t_.key_pages, t_.value_pages, t_.page_table, t_.sequence_lens, t_.query_starts}) in(tensor);
    out(t_.out);
    group_ = t_.query->shape[1] / t_.key_pages->shape[2];
    int64_t longest = t_.page_table->shape[1] * t_.key_pages->shape[1];
    int64_t chunks = std::min<int64_t>(kMaxChunks, divide_up(longest, kLeastChunk) + 1);
    int64_t rows = chunks * t_.key_pages->shape[2] * std::max(kFewRows, group_);
    partial_ = out(runner.buffer(DType::f32, t_.sequence_lens->rows_kind, {t_.sequence_lens->shape[0], rows * partial_stride(call())}));
  }
  int phases() const override { return 2; }

  int64_t chunks(int phase, const Sizes& sizes, int num_threads) const override {
    int64_t requests = t_.sequence_lens->rows(sizes), tokens = t_.query->rows(sizes);
    if (phase == 1) return any_cut(requests, tokens) ? requests * kv_heads() : 0;
    set_item_size(requests, tokens, num_threads);
    int64_t items = 0;
    for (int64_t r = 0; r < requests; ++r) items += items_of(cut_request(r, tokens));
    return std::max<int64_t>(items, requests + tokens > 0);
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t requests = t_.sequence_lens->rows(sizes), tokens = t_.query->rows(sizes);
    if (phase == 1) return merge(chunk / kv_heads(), chunk % kv_heads(), tokens, worker);
    if (chunk == 0) check_starts(requests, tokens);
    for (int64_t r = 0; r < requests; ++r) {
      Cut cut = cut_request(r, tokens);
      int64_t items = items_of(cut);
      if (chunk < items) return attend(r, cut, items - 1 - chunk, worker);
      chunk -= items;
    }
  }

 private:
  int64_t kv_heads() const { return t_.key_pages->shape[2]; }
  int64_t page_size() const { return t_.key_pages->shape[1]; }
  int32_t start_of(int64_t r) const { return *t_.query_starts->row_as<int32_t>(r); }
  int32_t length_of(int64_t r) const { return *t_.sequence_lens->row_as<int32_t>(r); }

  // NOTE: lengths are not checked yet here; nonsense becomes one item, whose run() says so.
  Cut cut_request(int64_t r, int64_t tokens) const {
    int64_t begin = start_of(r), end = start_of(r + 1);
    Cut cut{begin, end - begin, length_of(r), 1, 0, 1, true, true};
    cut.valid = begin >= 0 && end >= begin && end <= tokens && cut.key_len >= 0 && cut.key_len <= t_.page_table->shape[1] * page_size();
    if (!cut.valid) return cut;
    int64_t rows = cut.query_len * group_;
    cut.few = cut.query_len <= 1 || rows <= kFewRows;
    if (cut.query_len == 0) {
      cut.pieces = 0;
    } else if (cut.few) {
      int64_t lowest = first_key_of(cut.key_len - cut.query_len), span = cut.key_len - lowest;
      cut.piece_len = std::max(kLeastChunk, divide_up(span, 32 * kLeastChunk) * kLeastChunk);
      cut.first_piece = lowest / cut.piece_len;
      cut.pieces = std::max<int64_t>(1, divide_up(cut.key_len, cut.piece_len) - cut.first_piece);
    } else {
      int64_t tile = std::min(std::max(rows / 8, kLeastTile), kLargestTile);
      cut.piece_len = std::max<int64_t>(1, tile / group_);
      cut.pieces = divide_up(cut.query_len, cut.piece_len);
    }
    return cut;
  }
  int64_t first_key_of(int64_t last) const { return window_left_ < 0 || last < window_left_ ? 0 : last - window_left_; }

  // Of requests with few rows: heads are parted when there are too few pieces, pieces are joined when there are too many.
  // NOTE: every thread computes and stores the same two numbers.
  void set_item_size(int64_t requests, int64_t tokens, int64_t num_threads) const {
    int64_t pieces = 0, keys = 0;
    for (int64_t r = 0; r < requests; ++r) {
      Cut cut = cut_request(r, tokens);
      pieces += cut.few ? cut.pieces : cut.pieces * kv_heads();
      keys += cut.few ? cut.pieces * cut.piece_len : 0;
    }
    int64_t parts = std::min(divide_up(kPartsPerThread * num_threads, std::max<int64_t>(pieces, 1)), kv_heads());
    heads_per_item_.store(divide_up(kv_heads(), parts), std::memory_order_relaxed);
    int64_t wanted = requests == 1 ? num_threads : kItemsPerThread * num_threads;
    keys_per_item_.store(divide_up(keys, wanted), std::memory_order_relaxed);
  }
  int64_t heads_per_item() const { return heads_per_item_.load(std::memory_order_relaxed); }
  int64_t pieces_per_item(const Cut& cut) const {
    return cut.few ? std::max<int64_t>(1, keys_per_item_.load(std::memory_order_relaxed) / cut.piece_len) : 1;
  }
  int64_t head_parts(const Cut& cut) const { return cut.few ? divide_up(kv_heads(), heads_per_item()) : kv_heads(); }
  int64_t items_of(const Cut& cut) const {
    return cut.valid ? divide_up(cut.pieces, pieces_per_item(cut)) * head_parts(cut) : 1;
  }
  bool any_cut(int64_t requests, int64_t tokens) const {
    for (int64_t r = 0; r < requests; ++r) {
      Cut cut = cut_request(r, tokens);
      if (cut.few && cut.pieces > 1) return true;
    }
    return false;
  }

  void check_starts(int64_t requests, int64_t tokens) const {
    if (start_of(0) != 0 || start_of(requests) != tokens)
      throw std::invalid_argument("paged_attention: query_starts: expected to begin with 0 and end with the number of tokens, " +
                                  std::to_string(tokens) + ", got " + std::to_string(start_of(0)) + " and " +
                                  std::to_string(start_of(requests)));
  }

  void check_request(int64_t r, const Cut& cut) const {
    if (cut.valid) return;
    if (cut.key_len < 0 || cut.key_len > t_.page_table->shape[1] * page_size())
      throw std::invalid_argument("paged_attention: sequence_lens: expected 0 to " +
                                  std::to_string(t_.page_table->shape[1] * page_size()) + " (all pages of a row), got " +
                                  std::to_string(cut.key_len) + " for request " + std::to_string(r));
    throw std::invalid_argument("paged_attention: query_starts: expected whole numbers that never fall, up to the number of tokens, got " +
                                std::to_string(cut.first_row) + " and " + std::to_string(cut.first_row + cut.query_len) +
                                " for request " + std::to_string(r));
  }

  void check_pages(int64_t r, const AttentionWork& w) const {
    if (w.key_begin >= w.key_end) return;
    int64_t pages = t_.key_pages->shape[0];
    for (int64_t i = w.key_begin / page_size(); i <= (w.key_end - 1) / page_size(); ++i)
      if (w.pages[i] < 0 || w.pages[i] >= pages)
        throw std::invalid_argument("paged_attention: page_table: expected 0 to " + std::to_string(pages - 1) + " within the sequence, got " +
                                    std::to_string(w.pages[i]) + " at [" + std::to_string(r) + ", " + std::to_string(i) + "]");
  }

  AttentionCall call() const {
    AttentionCall c{};
    c.query = t_.query->data;
    c.out = t_.out->data;
    c.key_pages = t_.key_pages->data;
    c.value_pages = t_.value_pages->data;
    c.query_stride = t_.query->row_stride();
    c.out_stride = t_.out->row_stride();
    c.key_page_stride = t_.key_pages->row_stride();
    c.value_page_stride = t_.value_pages->row_stride();
    c.heads = t_.query->shape[1];
    c.kv_heads = kv_heads();
    c.group = group_;
    c.head_dim = t_.query->shape[2];
    c.value_dim = t_.value_pages->shape[3];
    c.page_size = page_size();
    c.window_left = window_left_;
    c.scale = scale_;
    c.softcap = softcap_;
    c.query_type = t_.query->dtype;
    c.kv_type = t_.key_pages->dtype;
    c.out_type = t_.out->dtype;
    return c;
  }

  // Items of a request: tiles of tokens from its end (the ones with most keys first), or chunks of keys.
  void attend(int64_t r, const Cut& cut, int64_t item, Worker& worker) {
    check_request(r, cut);
    AttentionCall c = call();
    int64_t parts = head_parts(cut), together = pieces_per_item(cut), piece = item / parts * together, part = item % parts;
    int64_t heads = cut.few ? heads_per_item() : 1;
    AttentionWork w{};
    w.pages = t_.page_table->row_as<int32_t>(r);
    w.first_row = cut.first_row;
    w.query_len = cut.query_len;
    w.key_len = cut.key_len;
    w.head_begin = part * heads;
    w.head_end = std::min(w.head_begin + heads, kv_heads());
    w.token_begin = cut.few ? 0 : piece * cut.piece_len;
    w.token_end = cut.few ? cut.query_len : std::min(w.token_begin + cut.piece_len, cut.query_len);
    w.key_begin = first_key_of(cut.key_len - cut.query_len + w.token_begin);
    w.key_end = std::max<int64_t>(0, cut.key_len - cut.query_len + w.token_end);
    if (cut.few) {
      int64_t chunk = cut.first_piece + piece;
      w.key_begin = std::max(w.key_begin, chunk * cut.piece_len);
      w.key_end = std::min(w.key_end, (chunk + together) * cut.piece_len);
      w.chunk_len = cut.piece_len;
      w.partial_step = piece_floats(c, cut);
      if (cut.pieces > 1) w.partial = partial_->row_as<float>(r) + piece * w.partial_step;
    }
    check_pages(r, w);
    int64_t rows = (w.token_end - w.token_begin) * group_;
    int64_t floats = cut.few ? few_scratch_floats(c, w.head_end - w.head_begin, rows) : tile_scratch_floats(c, rows);
    w.scratch = reinterpret_cast<float*>(worker.scratch(floats * 4));
    (cut.few ? kernels_.attend_few : kernels_.attend_tile)(c, w);
  }

  int64_t piece_floats(const AttentionCall& c, const Cut& cut) const {
    return kv_heads() * cut.query_len * group_ * partial_stride(c);
  }

  void merge(int64_t r, int64_t kv_head, int64_t tokens, Worker& worker) {
    Cut cut = cut_request(r, tokens);
    if (!cut.few || cut.pieces < 2) return;
    AttentionCall c = call();
    int64_t rows = cut.query_len * group_;
    AttentionMerge m{partial_->row_as<float>(r) + kv_head * rows * partial_stride(c), piece_floats(c, cut), cut.pieces,
                     cut.first_row, rows, kv_head};
    kernels_.merge_attention(c, m, reinterpret_cast<float*>(worker.scratch(padded_lanes(c.value_dim) * 4)));
  }

  const Kernels& kernels_;
  PagedAttentionTensors t_;
  TensorRef partial_;
  int64_t window_left_, group_ = 1;
  float scale_, softcap_;
  mutable std::atomic<int64_t> heads_per_item_{1}, keys_per_item_{0};
};

void check_arrays(const Expect& expect, const PagedAttentionTensors& t) {
  expect.that(t.query->shape.size() == 3, "query", "[tokens, heads, head_dim]", shape_text(*t.query));
  expect.that(t.key_pages->shape.size() == 4, "key_pages", "[pages, page_size, kv_heads, head_dim]", shape_text(*t.key_pages));
  expect.that(t.value_pages->shape.size() == 4, "value_pages", "[pages, page_size, kv_heads, value_dim]", shape_text(*t.value_pages));
  const auto &q = t.query->shape, &k = t.key_pages->shape, &v = t.value_pages->shape;
  expect.shape(*t.key_pages, "key_pages", {-1, -1, -1, q[2]});
  expect.shape(*t.value_pages, "value_pages", {k[0], k[1], k[2], -1});
  for (size_t i = 1; i < 4; ++i) expect.that(k[i] > 0 && v[i] > 0, "key_pages, value_pages", "sizes of at least 1", shape_text(*t.key_pages));
  expect.that(q[1] > 0 && q[1] % k[2] == 0, "query", "a multiple of " + std::to_string(k[2]) + " heads", std::to_string(q[1]));
  expect.shape(*t.out, "out", {q[0], q[1], v[3]});
  auto floats = {DType::f32, DType::f16, DType::bf16};
  expect.dtype(*t.query, "query", floats);
  expect.dtype(*t.out, "out", floats);
  expect.dtype(*t.key_pages, "key_pages", floats);
  expect.dtype(*t.value_pages, "value_pages", {t.key_pages->dtype});
  expect.packed(*t.query, "query");
  expect.packed(*t.out, "out");
  expect.packed(*t.key_pages, "key_pages");
  expect.packed(*t.value_pages, "value_pages");
}

void check_lengths(const Expect& expect, const PagedAttentionTensors& t) {
  expect.dtype(*t.page_table, "page_table", {DType::i32});
  expect.dtype(*t.sequence_lens, "sequence_lens", {DType::i32});
  expect.dtype(*t.query_starts, "query_starts", {DType::i32});
  expect.shape(*t.sequence_lens, "sequence_lens", {-1});
  expect.shape(*t.page_table, "page_table", {t.sequence_lens->shape[0], -1});
  expect.shape(*t.query_starts, "query_starts", {t.sequence_lens->shape[0] + 1});
  expect.packed(*t.page_table, "page_table");
}

}  // namespace

void submit_paged_attention(Runner& runner, Isa isa, PagedAttentionTensors t, int64_t window_left, float scale, float softcap) {
  Expect expect{"paged_attention"};
  check_arrays(expect, t);
  check_lengths(expect, t);
  runner.submit(std::make_unique<PagedAttention>(runner, kernels_for(isa), std::move(t), window_left, scale, softcap));
}

}  // namespace headrace
