// linear as an op. Phase 0: activations to int8 (once for all parts). Phase 1: chunks are runs of panels.
#include <algorithm>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kRowsPerChunk = 4;
constexpr int64_t kChunksPerThread = 8;  // enough to even out, few enough that the counter costs nothing

struct Item {
  LinearPart part;
  WeightRef up;  // gated: part.weight is the gate
};

class Linear : public Op {
 public:
  Linear(Runner& runner, const Kernels& kernels, TensorRef x, std::vector<Item> items, bool exact, const char* name)
      : Op(name), kernels_(kernels), x_(in(x)), items_(std::move(items)), exact_(exact) {
    for (auto& item : items_) declare(item);
    int64_t rows = x->shape[0], cols = x->shape[1];
    if (quantize_) {
      values_ = out(runner.buffer(DType::i8, x->rows_kind, {rows, cols}));
      records_ = out(runner.buffer(DType::f32, x->rows_kind, {rows, cols / kBlock * 4}));
    }
    if (x->dtype != DType::f32) wide_ = out(runner.buffer(DType::f32, x->rows_kind, {rows, cols}));
  }
  int phases() const override { return 2; }

  int64_t chunks(int phase, const Sizes& sizes, int num_threads) const override {
    int64_t tokens = x_->rows(sizes);
    if (phase == 0) return quantize_ || wide_ ? (tokens + kRowsPerChunk - 1) / kRowsPerChunk : 0;
    return tokens ? (panels_ + panels_per_chunk(num_threads) - 1) / panels_per_chunk(num_threads) : 0;
  }

  void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t tokens = x_->rows(sizes);
    if (phase == 0) return prepare_rows(chunk * kRowsPerChunk, std::min((chunk + 1) * kRowsPerChunk, tokens));
    int64_t step = panels_per_chunk(worker.num_threads());
    for (int64_t p = chunk * step; p < std::min((chunk + 1) * step, panels_); ++p) {
      int64_t first = 0;
      for (const auto& item : items_) {
        int64_t count = item.part.weight->panels();
        if (p < first + count) {
          run_panel(item, p - first, tokens, worker);
          break;
        }
        first += count;
      }
    }
  }

 private:
  void declare(Item& item) {
    out(item.part.out);
    if (item.part.bias) in(item.part.bias);
    if (item.part.residual) in(item.part.residual);
    panels_ += item.part.weight->panels();
    auto is_quantized = [](const WeightRef& w) { return w && format_info(w->format).bits > 0; };
    if (!exact_ && (is_quantized(item.part.weight) || is_quantized(item.up))) quantize_ = true;
  }

  int64_t panels_per_chunk(int num_threads) const {
    return std::max<int64_t>(1, panels_ / (num_threads * kChunksPerThread));
  }

  void prepare_rows(int64_t begin, int64_t end) {
    int64_t cols = x_->cols();
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x_->row_as<float>(i);
      if (wide_) {
        kernels_.widen_row(x_->row(i), x_->dtype, cols, wide_->row_as<float>(i));
        row = wide_->row_as<float>(i);
      }
      if (quantize_) kernels_.quantize_row(row, cols, values_->row_as<int8_t>(i), records_->row_as<BlockRecord>(i));
    }
  }

  TileArgs tile_args(int64_t token, int count, float* result) const {
    const Tensor& x = wide_ ? *wide_ : *x_;
    TileArgs a{};
    a.cols = x.cols();
    a.x = x.row_as<float>(token);
    a.x_stride = x.row_stride();
    if (quantize_) {
      a.values = values_->row_as<int8_t>(token);
      a.values_stride = values_->row_stride();
      a.records = records_->row_as<BlockRecord>(token);
      a.records_stride = records_->row_stride() / 4;
    }
    a.tokens = count;
    a.result = result;
    return a;
  }

  // A panel as the tile kernel will read it: 16-bit and exact panels become fp32 once when many rows follow.
  struct Source {
    WeightFormat format;
    const uint8_t* panel;
  };
  Source source(const PackedWeight& w, int64_t p, int64_t tokens, float* scratch) const {
    bool quantized = format_info(w.format).bits > 0;
    bool widen = quantized ? exact_ : w.format != WeightFormat::F32 && tokens > kMaxTile;
    if (!widen) return {w.format, w.panel(p)};
    kernels_.unpack_panel(w.format, w.panel(p), w.cols, scratch);
    return {WeightFormat::F32, reinterpret_cast<const uint8_t*>(scratch)};
  }

  void run_panel(const Item& item, int64_t p, int64_t tokens, Worker& worker) {
    int64_t panel_floats = (x_->cols() + 1) * kPanelRows;
    auto* scratch = reinterpret_cast<float*>(worker.scratch(2 * panel_floats * 4));
    Source gate = source(*item.part.weight, p, tokens, scratch);
    Source up = item.up ? source(*item.up, p, tokens, scratch + panel_floats) : Source{};
    alignas(64) float result[kMaxTile * kPanelRows], second[kMaxTile * kPanelRows];
    for (int64_t t = 0; t < tokens; t += kMaxTile) {
      int count = static_cast<int>(std::min<int64_t>(kMaxTile, tokens - t));
      TileArgs a = tile_args(t, count, result);
      a.panel = gate.panel;
      kernels_.tile(gate.format, a);
      if (item.up) {
        a.panel = up.panel;
        a.result = second;
        kernels_.tile(up.format, a);
        kernels_.silu_gate(result, second, result, count * kPanelRows);
      }
      finish(item.part, p, t, count, result);
    }
  }

  void finish(const LinearPart& part, int64_t p, int64_t token, int count, const float* result) {
    int64_t first = p * kPanelRows;
    int valid = static_cast<int>(std::min<int64_t>(kPanelRows, part.weight->rows - first));
    const float* bias = part.bias ? part.bias->at<float>() + first : nullptr;
    for (int i = 0; i < count; ++i) {
      const float* residual = part.residual ? part.residual->row_as<float>(token + i) + first : nullptr;
      char* y = part.out->row(token + i) + first * part.out->item_bytes();
      kernels_.finish_row(result + i * kPanelRows, bias, residual, y, part.out->dtype, valid);
    }
  }

  const Kernels& kernels_;
  TensorRef x_, values_, records_, wide_;
  std::vector<Item> items_;
  bool exact_, quantize_ = false;
  int64_t panels_ = 0;
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

void check_x(const Expect& expect, const Tensor& x) {
  expect.that(x.shape.size() == 2, "x", "[tokens, cols]", shape_text(x));
  expect.dtype(x, "x", {DType::f32, DType::f16, DType::bf16});
  expect.packed(x, "x");
}

}  // namespace

void submit_linear(Runner& runner, Isa isa, TensorRef x, std::vector<LinearPart> parts, bool exact) {
  Expect expect{"linear"};
  check_x(expect, *x);
  std::vector<Item> items;
  for (auto& part : parts) {
    check_part(expect, *x, part);
    items.push_back({part, nullptr});
  }
  runner.submit(std::make_unique<Linear>(runner, kernels_for(isa), x, std::move(items), exact, "linear"));
}

void submit_linear_gated(Runner& runner, Isa isa, TensorRef x, WeightRef gate, WeightRef up, TensorRef y, bool exact) {
  Expect expect{"linear_gated"};
  check_x(expect, *x);
  check_part(expect, *x, {gate, y, nullptr, nullptr});
  check_part(expect, *x, {up, y, nullptr, nullptr});
  std::vector<Item> items{{{gate, y, nullptr, nullptr}, up}};
  runner.submit(std::make_unique<Linear>(runner, kernels_for(isa), x, std::move(items), exact, "linear_gated"));
}

namespace {

class Pack : public Op {
 public:
  Pack(PackedWeight& weight, const uint8_t* raw) : Op("pack"), weight_(weight), raw_(raw) {}
  int64_t chunks(int, const Sizes&, int) const override { return weight_.panels(); }
  void run(int, int64_t chunk, Worker&, const Sizes&) override { pack_panel(weight_, chunk, raw_); }

 private:
  PackedWeight& weight_;
  const uint8_t* raw_;
};

}  // namespace

WeightRef pack_weight(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, const uint8_t* raw, int64_t raw_bytes) {
  Expect expect{"pack"};
  int block = format_info(format).block_len;
  expect.that(rows > 0 && cols > 0 && cols % block == 0, "shape", "rows of a multiple of " + std::to_string(block),
              std::to_string(rows) + " x " + std::to_string(cols));
  expect.that(raw_bytes / row_bytes(format, cols) == rows && raw_bytes % row_bytes(format, cols) == 0, "raw",
              std::to_string(rows) + " rows of " + std::to_string(row_bytes(format, cols)) + " bytes",
              std::to_string(raw_bytes) + " bytes");
  auto weight = std::make_shared<PackedWeight>();
  weight->format = format;
  weight->rows = rows;
  weight->cols = cols;
  weight->panel_stride = panel_bytes(format, cols);
  weight->memory = allocate_bytes(weight->bytes());
  pool.submit(std::make_unique<Pack>(*weight, raw));
  return weight;
}

}  // namespace headrace
