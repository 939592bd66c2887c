// rope as two ops: the step's table of cosines and sines, once; then per layer queries rotated, keys and values to pages.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kTokensPerChunk = 4;

int64_t chunks_of(const Tensor& t, const Sizes& sizes) {
  return (t.rows(sizes) + kTokensPerChunk - 1) / kTokensPerChunk;
}

// Angles in float64: at position 100000 a float32 angle would be off by a hundredth of a turn.
class RopeTable : public Op {
 public:
  RopeTable(TensorRef table, TensorRef positions, TensorRef frequencies, float magnitude)
      : Op("rope_table"), table_(out(table)), positions_(in(positions)), frequencies_(in(frequencies)), magnitude_(magnitude) {}
  int64_t chunks(int, const Sizes& sizes, int) const override { return chunks_of(*positions_, sizes); }
  void run(int, int64_t chunk, Worker&, const Sizes& sizes) override {
    int64_t end = std::min((chunk + 1) * kTokensPerChunk, positions_->rows(sizes)), pairs = frequencies_->shape[0];
    for (int64_t t = chunk * kTokensPerChunk; t < end; ++t) {
      double position = *positions_->row_as<int32_t>(t);
      float* row = table_->row_as<float>(t);
      for (int64_t i = 0; i < pairs; ++i) {
        double angle = position * frequency(i);
        row[i] = static_cast<float>(magnitude_ * std::cos(angle));
        row[pairs + i] = static_cast<float>(magnitude_ * std::sin(angle));
      }
    }
  }

 private:
  double frequency(int64_t i) const {
    return frequencies_->dtype == DType::f64 ? *frequencies_->row_as<double>(i) : *frequencies_->row_as<float>(i);
  }

  TensorRef table_, positions_, frequencies_;
  double magnitude_;
};

class RopeAppend : public Op {
 public:
  RopeAppend(const Kernels& kernels, RopeAppendTensors t, bool interleaved, float eps)
      : Op("rope_append"), kernels_(kernels), t_(std::move(t)), interleaved_(interleaved), eps_(eps) {
    for (const auto& tensor : {t_.query, t_.key, t_.value, t_.slots, t_.table}) in(tensor);
    for (const auto& tensor : {t_.query_norm, t_.key_norm})
      if (tensor) in(tensor);
    for (const auto& tensor : {t_.query_out, t_.key_pages, t_.value_pages}) out(tensor);
  }
  int64_t chunks(int, const Sizes& sizes, int) const override { return chunks_of(*t_.query, sizes); }
  void run(int, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t end = std::min((chunk + 1) * kTokensPerChunk, t_.query->rows(sizes));
    for (int64_t token = chunk * kTokensPerChunk; token < end; ++token) append(token, worker);
  }

 private:
  void append(int64_t token, Worker& worker) {
    int64_t slot = *t_.slots->row_as<int32_t>(token);
    int64_t page_size = t_.key_pages->shape[1], slots = t_.key_pages->shape[0] * page_size;
    if (slot < 0 || slot >= slots)
      throw std::invalid_argument("rope_append: slots: expected 0 to " + std::to_string(slots - 1) + ", got " +
                                  std::to_string(slot) + " for token " + std::to_string(token));
    RotateArgs a = args(token, worker);
    kernels_.rotate_heads(a);
    char* key_to = slot_of(*t_.key_pages, slot / page_size, slot % page_size);
    char* value_to = slot_of(*t_.value_pages, slot / page_size, slot % page_size);
    a.x = t_.key->row_as<float>(token);
    a.heads = t_.key->shape[1];
    a.norm_weight = weight(t_.key_norm);
    set_out(a, key_to, t_.key_pages->dtype);
    kernels_.rotate_heads(a);
    kernels_.convert_row(t_.value->row_as<float>(token), value_to, t_.value_pages->dtype, t_.value->cols());
  }

  RotateArgs args(int64_t token, Worker& worker) const {
    RotateArgs a{};
    a.x = t_.query->row_as<float>(token);
    a.norm_weight = weight(t_.query_norm);
    a.table = t_.table->row_as<float>(token);
    a.scratch = reinterpret_cast<float*>(worker.scratch(t_.query->shape[2] * 4));
    a.heads = t_.query->shape[1];
    a.head_dim = t_.query->shape[2];
    a.rotary_dim = t_.table->shape[1];
    a.eps = eps_;
    a.interleaved = interleaved_;
    set_out(a, t_.query_out->row(token), t_.query_out->dtype);
    return a;
  }

  static void set_out(RotateArgs& a, char* to, DType type) {
    a.out = to;
    a.out_type = type;
    a.out_head_bytes = a.head_dim * dtype_bytes(type);
  }

  static const float* weight(const TensorRef& norm) { return norm ? norm->at<float>() : nullptr; }
  static char* slot_of(const Tensor& pages, int64_t page, int64_t offset) {
    return pages.row(page) + offset * pages.strides[1] * pages.item_bytes();
  }

  const Kernels& kernels_;
  RopeAppendTensors t_;
  bool interleaved_;
  float eps_;
};

void check_inputs(const Expect& expect, const RopeAppendTensors& t) {
  expect.that(t.query->shape.size() == 3, "query", "[tokens, heads, head_dim]", shape_text(*t.query));
  expect.that(t.value->shape.size() == 3, "value", "[tokens, kv_heads, value_head_dim]", shape_text(*t.value));
  int64_t tokens = t.query->shape[0], head_dim = t.query->shape[2];
  expect.shape(*t.key, "key", {tokens, -1, head_dim});
  expect.shape(*t.value, "value", {tokens, t.key->shape[1], -1});
  expect.shape(*t.slots, "slots", {tokens});
  expect.shape(*t.table, "table", {tokens, -1});
  expect.that(t.table->shape[1] % 2 == 0 && t.table->shape[1] <= head_dim, "table",
              "[tokens, rotary_dim], rotary_dim even and at most " + std::to_string(head_dim), shape_text(*t.table));
  for (const auto& tensor : {t.query, t.key, t.value, t.table}) expect.dtype(*tensor, "query, key, value, table", {DType::f32});
  expect.dtype(*t.slots, "slots", {DType::i32});
  expect.packed(*t.query, "query");
  expect.packed(*t.key, "key");
  expect.packed(*t.value, "value");
  expect.packed(*t.table, "table");
  for (const auto& norm : {t.query_norm, t.key_norm}) {
    if (!norm) continue;
    expect.dtype(*norm, "query_norm, key_norm", {DType::f32});
    expect.shape(*norm, "query_norm, key_norm", {head_dim});
    expect.that(norm->strides[0] == 1 || head_dim == 1, "query_norm, key_norm", "contiguous", shape_text(*norm));
  }
}

void check_outputs(const Expect& expect, const RopeAppendTensors& t) {
  expect.shape(*t.query_out, "out", {t.query->shape[0], t.query->shape[1], t.query->shape[2]});
  expect.shape(*t.key_pages, "key_pages", {-1, -1, t.key->shape[1], t.key->shape[2]});
  expect.shape(*t.value_pages, "value_pages", {t.key_pages->shape[0], t.key_pages->shape[1], t.value->shape[1], t.value->shape[2]});
  auto floats = {DType::f32, DType::f16, DType::bf16};
  expect.dtype(*t.query_out, "out", floats);
  expect.dtype(*t.key_pages, "key_pages", floats);
  expect.dtype(*t.value_pages, "value_pages", floats);
  expect.packed(*t.query_out, "out");
  expect.packed(*t.key_pages, "key_pages");
  expect.packed(*t.value_pages, "value_pages");
}

}  // namespace

void submit_rope_table(Runner& runner, TensorRef table, TensorRef positions, TensorRef frequencies, float magnitude) {
  Expect expect{"rope_table"};
  expect.dtype(*positions, "positions", {DType::i32});
  expect.shape(*positions, "positions", {-1});
  expect.dtype(*frequencies, "inverse_frequencies", {DType::f32, DType::f64});
  expect.shape(*frequencies, "inverse_frequencies", {-1});
  expect.dtype(*table, "out", {DType::f32});
  expect.shape(*table, "out", {positions->shape[0], 2 * frequencies->shape[0]});
  expect.packed(*table, "out");
  runner.submit(std::make_unique<RopeTable>(table, positions, frequencies, magnitude));
}

void submit_rope_append(Runner& runner, Isa isa, RopeAppendTensors t, bool interleaved, float eps) {
  Expect expect{"rope_append"};
  check_inputs(expect, t);
  check_outputs(expect, t);
  runner.submit(std::make_unique<RopeAppend>(kernels_for(isa), std::move(t), interleaved, eps));
}

}  // namespace headrace
