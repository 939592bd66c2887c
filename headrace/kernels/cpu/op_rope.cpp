// rope_table: the step's cosines and sines, once for all layers. (What is rotated by them: op_append.cpp.)
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

}  // namespace headrace
