// attention as an op. Phase 0: the work is divided (schedule.h); 1: every interval's segments; 2: split items are merged.
// An item is one request, one KV head (or all of them, where keys are many and rows few) and one tile of its tokens; its
// units are blocks of keys. Batch-invariant: one kernel, units are chunks of fixed length, each folded or merged in order,
// so that how the work is divided cannot be seen in the bits.
#include <algorithm>

#include "attention_arrays.h"
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

struct Item {
  int64_t request, head_begin, head_end, token_begin, token_end;
  int64_t key_begin, key_end, first_unit;
  bool few;
};

class Attention : public Op {
 public:
  Attention(const Kernels& kernels, const AttentionTensors& t, const AttentionOptions& options, const char* name)
      : Op(name), kernels_(kernels), t_(t), o_(options), arrays_(t, options, name) {
    for (const auto& tensor : {t.query, t.key, t.value, t.query_starts, t.key_starts, t.key_lens, t.page_table, t.key_scales,
                               t.value_scales, t.mask, t.sinks, t.alibi_slopes, t.first_keys, t.last_keys})
      if (tensor) in(tensor);
    out(t_.out);
    if (t_.lse) out(t_.lse);
  }
  int phases() const override { return 3; }

  AttentionDivision division(int64_t threads) {
    divide(Sizes{}, threads);
    int64_t splits = 1;
    for (const auto& m : schedule_.merges) splits = std::max(splits, m.pieces);
    return {splits, intervals_, workspace_bytes()};
  }

  int64_t chunks(int phase, const Sizes& sizes, int) const override {
    if (phase == 0) return t_.query->rows(sizes) + arrays_.requests(sizes) > 0;
    return phase == 1 ? intervals_ : merge_rows_;
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    if (phase == 0) return prepare(sizes, worker);
    if (phase == 1) return attend_interval(chunk, worker);
    merge(chunk, worker);
  }

 private:
  const Tensor& key() const { return *t_.key; }
  int64_t kv_heads() const { return arrays_.kv_heads(); }
  int64_t group() const { return arrays_.group(); }
  AttentionCall call() const { return arrays_.call(); }

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
    AttentionWork w = arrays_.work_of(r, a);
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
    int64_t n = arrays_.requests(sizes), tokens = t_.query->rows(sizes);
    items_.clear(), counts_.clear(), weights_.clear();
    schedule_.merges.clear();
    intervals_ = merge_rows_ = 0;
    arrays_.check_starts(n, tokens);
    AttentionCall c = call();
    requests_ = n;
    bool all_few = true;
    for (int64_t r = 0; r < n; ++r) {
      Asked a = arrays_.asked_of(r);
      arrays_.check_request(r, a, tokens);
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
    arrays_.check_pages(item.request, w);
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
    AttentionWork w = arrays_.work_of(item.request, arrays_.asked_of(item.request));
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
  AttentionArrays arrays_;
  Schedule schedule_;
  std::vector<Item> items_;
  std::vector<int64_t> counts_, weights_;
  int64_t requests_ = 0, intervals_ = 0, merge_rows_ = 0, slot_floats_ = 0;
  float* partial_ = nullptr;
};

std::unique_ptr<Attention> checked_attention(Isa isa, const AttentionTensors& t, const AttentionOptions& options) {
  Expect expect{t.page_table ? "paged_attention" : "attention"};
  check_attention(expect, t, options);
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
