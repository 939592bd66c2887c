// linear as an op. Phase 0: activations normed and to integers or bf16, once for all parts. Phase 1: a chunk is a strip,
// two panels: multiplied as packed, or over AMX tiles where there are any and tokens enough.
// Of few rows every thread makes its own copy instead: that takes less than one thread working while the others wait.
#include <algorithm>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kRowsPerChunk = 4;
constexpr int64_t kFewestStripTokens = 16;
constexpr int64_t kTileColumns = 32;
constexpr int64_t kTileTokens = 36;  // whose results wait together, in the first level of cache; whole tiles of 4 and of 6
constexpr int64_t kFewTokens = 8;    // for which 16-bit panels are not widened
constexpr int64_t kAheadBytes = 4096;

struct Item {
  LinearPart part;
  WeightRef up;  // gated: part.weight is the gate
};

class Linear : public Op {
 public:
  Linear(Runner& runner, const Kernels& kernels, const LinearInput& input, std::vector<Item> items, const char* name)
      : Op(name), kernels_(kernels), x_(in(input.x)), items_(std::move(items)), eps_(input.eps),
        exact_(input.precision == Precision::exact), passes_(input.precision == Precision::fine ? 2 : 1) {
    const TensorRef& x = x_;
    if (input.norm) norm_ = in(input.norm);
    for (auto& item : items_) declare(item);
    int64_t rows = x->shape[0], cols = x->shape[1];
    if (quantize_) {
      values_ = out(runner.buffer(DType::i8, x->rows_kind, {rows, passes_ * cols}));
      records_ = out(runner.buffer(DType::f32, x->rows_kind, {rows, cols / kBlock * 4}));
    }
    if (norm_ || x->dtype != DType::f32) wide_ = out(runner.buffer(DType::f32, x->rows_kind, {rows, cols}));
    prepares_ = quantize_ || wide_ || (kernels.strip_block && !exact_);
    if (!kernels.strip_block || exact_) return;
    padded_cols_ = (cols + kTileColumns - 1) / kTileColumns * kTileColumns;
    x_high_ = out(runner.buffer(DType::bf16, x->rows_kind, {rows, padded_cols_}));
    if (needs_low_) x_low_ = out(runner.buffer(DType::bf16, x->rows_kind, {rows, padded_cols_}));
  }
  int phases() const override { return 2; }

  int64_t chunks(int phase, const Sizes& sizes, int) const override {
    int64_t tokens = x_->rows(sizes);
    if (phase == 0) return prepares_ && !few(tokens) ? (tokens + kRowsPerChunk - 1) / kRowsPerChunk : 0;
    return tokens ? strips_ : 0;
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t tokens = x_->rows(sizes);
    if (phase == 0)
      return prepare_rows(shared_rows(), chunk * kRowsPerChunk, std::min((chunk + 1) * kRowsPerChunk, tokens), tokens);
    if (prepares_ && few(tokens) && worker.begins()) prepare_rows(own_rows(worker), 0, tokens, tokens);
    Place place = place_of(chunk, worker.nodes());
    if (tiles_fit(*place.item, tokens)) return run_tiles(*place.item, place.strip, tokens, worker);
    run_panels(*place.item, place.strip, tokens, worker);
  }

  Stream begins_at(int thread, const Nodes& nodes) const override {
    int node = nodes.of_thread(thread);
    int64_t end = strips_before(node + 1, nodes), first = nodes.thread_begin(strips_before(node, nodes), end, thread);
    if (first == end) return {nullptr, 0};
    Place place = place_of(first, nodes);
    const PackedWeight& w = *place.item->part.weight;
    int64_t p = 2 * place.strip;
    return {reinterpret_cast<const char*>(w.panel(p)), (w.piece_of(p).end - p) * w.panel_stride};
  }

  int64_t node_begin(int phase, const Sizes& sizes, int node, const Nodes& nodes) const override {
    return phase == 0 ? Op::node_begin(phase, sizes, node, nodes) : strips_before(node, nodes);
  }

  // Few tokens are bound by reading weights, which is slow from another node; many are not, and there nobody should wait.
  bool stays(int phase, const Sizes& sizes) const override { return phase == 1 && x_->rows(sizes) < kFewestStripTokens; }

 private:
  static int64_t strips_of(const Item& item) { return item.part.weight->strips(); }

  // Strips are counted node by node, and within a node item by item.
  int64_t strips_before(int node, const Nodes& nodes) const {
    int64_t sum = 0;
    for (const auto& item : items_) sum += nodes.begin(strips_of(item), node);
    return sum;
  }
  struct Place {
    const Item* item;
    int64_t strip;
  };
  Place place_of(int64_t chunk, const Nodes& nodes) const {
    int node = 0;
    while (chunk >= strips_before(node + 1, nodes)) ++node;
    chunk -= strips_before(node, nodes);
    const Item* item = items_.data();
    for (;; ++item) {
      int64_t begin = nodes.begin(strips_of(*item), node), count = nodes.begin(strips_of(*item), node + 1) - begin;
      if (chunk < count) return {item, begin + chunk};
      chunk -= count;
    }
  }

  void declare(Item& item) {
    out(item.part.out);
    if (item.part.bias) in(item.part.bias);
    if (item.part.residual) in(item.part.residual);
    strips_ += strips_of(item);
    for (const auto& w : {item.part.weight, item.up})
      if (w && (w->format == WeightFormat::F16 || w->format == WeightFormat::BF16)) needs_low_ = true;
    auto is_quantized = [](const WeightRef& w) { return w && format_info(w->format).bits > 0; };
    if (!exact_ && (is_quantized(item.part.weight) || is_quantized(item.up))) quantize_ = true;
  }

  bool tiles_fit(const Item& item, int64_t tokens) const {
    bool floats = item.part.weight->format == WeightFormat::F32 || (item.up && item.up->format == WeightFormat::F32);
    return x_high_ && tokens >= kFewestStripTokens && !floats;
  }

  // The rows as kernels read them: in buffers of the op, or in a thread's own memory.
  struct Rows {
    float* x;
    int8_t* values;
    BlockRecord* records;
    int64_t x_stride, values_stride, records_stride;  // elements
  };

  static bool few(int64_t tokens) { return tokens <= kRowsPerChunk; }
  Rows rows(Worker& worker, int64_t tokens) const { return few(tokens) ? own_rows(worker) : shared_rows(); }

  Rows shared_rows() const {
    const Tensor& x = wide_ ? *wide_ : *x_;
    Rows r{x.at<float>(), nullptr, nullptr, x.row_stride(), 0, 0};
    if (!quantize_) return r;
    r.values = values_->at<int8_t>();
    r.records = records_->at<BlockRecord>();
    r.values_stride = values_->row_stride();
    r.records_stride = records_->row_stride() / 4;
    return r;
  }

  Rows own_rows(Worker& worker) const {
    int64_t cols = (x_->cols() + kBlock - 1) / kBlock * kBlock, blocks = cols / kBlock;
    char* memory = worker.kept(kRowsPerChunk * (4 * cols + passes_ * cols + blocks * static_cast<int64_t>(sizeof(BlockRecord))));
    auto* floats = reinterpret_cast<float*>(memory);
    auto* records = reinterpret_cast<BlockRecord*>(floats + kRowsPerChunk * cols);
    auto* values = reinterpret_cast<int8_t*>(records + kRowsPerChunk * blocks);
    if (wide_) return {floats, values, records, cols, passes_ * cols, blocks};
    return {x_->at<float>(), values, records, x_->row_stride(), passes_ * cols, blocks};
  }

  void prepare_rows(const Rows& rows, int64_t begin, int64_t end, int64_t tokens) {
    int64_t cols = x_->cols();
    auto quantize = passes_ == 2 ? kernels_.quantize_fine : kernels_.quantize_coarse;
    for (int64_t i = begin; i < end; ++i) {
      float* row = rows.x + i * rows.x_stride;
      if (norm_) kernels_.rms_norm(x_->row(i), x_->dtype, norm_->at<float>(), row, DType::f32, cols, eps_);
      else if (wide_) kernels_.widen_row(x_->row(i), x_->dtype, cols, row);
      if (x_high_ && tokens >= kFewestStripTokens)
        kernels_.split_row(row, cols, x_high_->row_as<uint16_t>(i), x_low_ ? x_low_->row_as<uint16_t>(i) : nullptr);
      if (quantize_) quantize(row, cols, rows.values + i * rows.values_stride, rows.records + i * rows.records_stride);
    }
  }

  TileArgs tile_args(const Rows& rows, int64_t token, int count, float* result) const {
    TileArgs a{};
    a.cols = x_->cols();
    a.x = rows.x + token * rows.x_stride;
    a.x_stride = rows.x_stride;
    if (quantize_) {
      a.values = rows.values + token * rows.values_stride;
      a.values_stride = rows.values_stride;
      a.records = rows.records + token * rows.records_stride;
      a.records_stride = rows.records_stride;
      a.fine = passes_ == 2;
    }
    a.tokens = count;
    a.result = result;
    return a;
  }

  // A strip as the tile kernel will read it: 16-bit and exact panels become fp32 once when many rows follow.
  struct Source {
    WeightFormat format;
    const uint8_t* panel;
    int64_t stride, ahead;
    int panels;
  };
  Source source(const PackedWeight& w, int64_t strip, int64_t tokens, float* scratch) const {
    int panels = static_cast<int>(std::min<int64_t>(2, w.panels() - 2 * strip));
    bool quantized = format_info(w.format).bits > 0;
    bool widen = quantized ? exact_ : w.format != WeightFormat::F32 && tokens > kFewTokens;
    if (!widen) return {w.format, w.panel(2 * strip), w.panel_stride, ahead_of(w), panels};
    int64_t panel_floats = (w.cols + 1) * kPanelRows;
    for (int i = 0; i < panels; ++i)
      kernels_.unpack_panel(w.format, w.panel(2 * strip + i), w.cols, scratch + i * panel_floats);
    return {WeightFormat::F32, reinterpret_cast<const uint8_t*>(scratch), panel_floats * 4, 0, panels};
  }

  // The hardware follows a stream only to the end of its 4 KiB page; what comes after is asked for early enough to
  // cross memory while the steps between are computed. Two short panels read side by side end at once: then it is the
  // next two.
  static int64_t ahead_of(const PackedWeight& w) { return std::min<int64_t>(kAheadBytes, 2 * w.panel_stride); }

  void run_panels(const Item& item, int64_t strip, int64_t tokens, Worker& worker) {
    int64_t strip_floats = (x_->cols() + 1) * kStripRows;
    auto* scratch = reinterpret_cast<float*>(worker.scratch(2 * strip_floats * 4));
    Source gate = source(*item.part.weight, strip, tokens, scratch);
    Source up = item.up ? source(*item.up, strip, tokens, scratch + strip_floats) : Source{};
    const Rows x = rows(worker, tokens);
    alignas(64) float result[kTileTokens * kStripRows], second[kTileTokens * kStripRows];
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      int count = static_cast<int>(std::min(kTileTokens, tokens - t));
      TileArgs a = tile_args(x, t, count, result);
      multiply(a, gate);
      if (item.up) {
        a.result = second;
        multiply(a, up);
        kernels_.silu_gate(result, second, result, count * kStripRows);
      }
      finish(item.part, strip, t, count, result);
      gate.ahead = up.ahead = 0;
    }
  }

  void multiply(TileArgs a, const Source& source) const {
    a.panel = source.panel;
    a.panel_stride = source.stride;
    a.panels = source.panels;
    a.ahead = source.ahead;
    if (a.tokens > 1) return kernels_.tile(source.format, a);
    // Of one token memory binds, and two panels side by side are two streams: a third slower than one after the other.
    for (a.panels = 1; a.panel < source.panel + source.panels * source.stride; a.panel += source.stride, a.result += kPanelRows)
      kernels_.tile(source.format, a);
  }

  // The two panels of a strip as bf16 tiles.
  struct Tiled {
    uint16_t *high = nullptr, *low = nullptr;
  };
  Tiled tile_strip(const PackedWeight& w, int64_t strip, float* floats, uint16_t* out) const {
    int64_t panel = padded_cols_ * kPanelRows;
    Tiled tiled{out, w.format == WeightFormat::F16 ? out + 2 * panel : nullptr};
    for (int i = 0; i < 2; ++i) {
      int64_t p = std::min(2 * strip + i, w.panels() - 1);  // the last one twice where the number is odd
      kernels_.unpack_panel(w.format, w.panel(p), w.cols, floats);
      kernels_.pack_tiles(floats, w.cols, tiled.high + i * panel, tiled.low ? tiled.low + i * panel : nullptr);
    }
    return tiled;
  }

  // Scratch: one panel of floats | tiles of the strip (of gate and up) | 32 rows of x | results.
  void run_tiles(const Item& item, int64_t strip, int64_t tokens, Worker& worker) {
    int64_t panel = padded_cols_ * kPanelRows, rows = padded_cols_ * kStripTokens;
    char* scratch = worker.scratch(4 * (panel + kPanelRows) + 2 * 8 * panel + 2 * 2 * rows + 2 * 4 * kStripRows * kStripTokens);
    auto* floats = reinterpret_cast<float*>(scratch);
    auto* tiles = reinterpret_cast<uint16_t*>(floats + panel + kPanelRows);
    uint16_t* tail = tiles + 8 * panel;
    auto* result = reinterpret_cast<float*>(tail + 2 * rows);
    float* second = result + kStripRows * kStripTokens;
    Tiled gate = tile_strip(*item.part.weight, strip, floats, tiles);
    Tiled up = item.up ? tile_strip(*item.up, strip, floats, tiles + 4 * panel) : Tiled{};
    for (int64_t t = 0; t < tokens; t += kStripTokens) {
      StripArgs a = strip_args(t, tokens, item, tail);
      multiply(a, gate, result);
      if (item.up) {
        multiply(a, up, second);
        kernels_.silu_gate(result, second, result, kStripRows * kStripTokens);
      }
      finish(item.part, strip, t, static_cast<int>(std::min<int64_t>(kStripTokens, tokens - t)), result);
    }
  }

  void multiply(StripArgs a, const Tiled& w, float* result) const {
    a.w_high = w.high;
    a.w_low = w.low;
    a.result = result;
    kernels_.strip_block(a);
  }

  // Fewer than 32 rows are copied out, so that the tiles never read past the buffer.
  StripArgs strip_args(int64_t t, int64_t tokens, const Item& item, uint16_t* tail) const {
    bool low = x_low_ && (!format_info(item.part.weight->format).bits || (item.up && !format_info(item.up->format).bits));
    StripArgs a{};
    a.cols = x_->cols();
    a.x_stride = padded_cols_;
    a.x_high = x_high_->row_as<uint16_t>(t);
    a.x_low = low ? x_low_->row_as<uint16_t>(t) : nullptr;
    if (tokens - t >= kStripTokens) return a;
    int64_t count = (tokens - t) * padded_cols_, all = kStripTokens * padded_cols_;
    for (const uint16_t** side : {&a.x_high, &a.x_low}) {
      if (!*side) continue;
      std::copy_n(*side, count, tail);
      std::fill_n(tail + count, all - count, uint16_t{0});
      *side = tail;
      tail += all;
    }
    return a;
  }

  void finish(const LinearPart& part, int64_t strip, int64_t token, int count, const float* result) const {
    int64_t first = strip * kStripRows;
    FinishArgs a{};
    a.result = result;
    a.bias = part.bias ? part.bias->at<float>() + first : nullptr;
    if (part.residual) {
      a.residual = part.residual->row_as<float>(token) + first;
      a.residual_stride = part.residual->row_stride();
    }
    a.out = part.out->row(token) + first * part.out->item_bytes();
    a.type = part.out->dtype;
    a.out_stride = part.out->row_stride();
    a.tokens = count;
    a.rows = static_cast<int>(std::min<int64_t>(kStripRows, part.weight->rows - first));
    kernels_.finish(a);
  }

  const Kernels& kernels_;
  TensorRef x_, norm_, values_, records_, wide_, x_high_, x_low_;
  std::vector<Item> items_;
  float eps_;
  bool exact_;
  int passes_;
  bool quantize_ = false, needs_low_ = false, prepares_ = false;
  int64_t strips_ = 0, padded_cols_ = 0;
};

void check_part(const Expect& expect, const Tensor& x, const LinearPart& part) {
  expect.that(part.weight->cols == x.shape[1], "weight", "rows of " + std::to_string(x.shape[1]) + " columns",
              std::to_string(part.weight->cols));
  expect.shape(*part.out, "out", {x.shape[0], part.weight->rows});
  expect.dtype(*part.out, "out", {DType::f32, DType::f16, DType::bf16});
  expect.packed(*part.out, "out");
  if (part.bias) {
    expect.dtype(*part.bias, "bias", {DType::f32});
    expect.shape(*part.bias, "bias", {part.weight->rows});
  }
  if (part.residual) {
    expect.dtype(*part.residual, "residual", {DType::f32});
    expect.shape(*part.residual, "residual", {x.shape[0], part.weight->rows});
    expect.packed(*part.residual, "residual");
  }
}

void check_input(const Expect& expect, const LinearInput& input) {
  const Tensor& x = *input.x;
  expect.that(x.shape.size() == 2, "x", "[tokens, cols]", shape_text(x));
  expect.dtype(x, "x", {DType::f32, DType::f16, DType::bf16});
  expect.packed(x, "x");
  if (!input.norm) return;
  expect.dtype(*input.norm, "norm", {DType::f32});
  expect.shape(*input.norm, "norm", {x.shape[1]});
  expect.that(x.shape[1] == 1 || input.norm->strides[0] == 1, "norm", "a contiguous array", "other strides");
}

}  // namespace

void submit_linear(Runner& runner, Isa isa, const LinearInput& input, std::vector<LinearPart> parts) {
  Expect expect{"linear"};
  check_input(expect, input);
  std::vector<Item> items;
  for (auto& part : parts) {
    check_part(expect, *input.x, part);
    items.push_back({part, nullptr});
  }
  runner.submit(std::make_unique<Linear>(runner, kernels_for(isa), input, std::move(items), "linear"));
}

void submit_linear_gated(Runner& runner, Isa isa, const LinearInput& input, WeightRef gate, WeightRef up, TensorRef y) {
  Expect expect{"linear_gated"};
  check_input(expect, input);
  check_part(expect, *input.x, {gate, y, nullptr, nullptr});
  check_part(expect, *input.x, {up, y, nullptr, nullptr});
  std::vector<Item> items{{{gate, y, nullptr, nullptr}, up}};
  runner.submit(std::make_unique<Linear>(runner, kernels_for(isa), input, std::move(items), "linear_gated"));
}

}  // namespace headrace
