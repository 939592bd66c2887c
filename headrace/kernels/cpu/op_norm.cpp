// rms_norm as an op: chunks are blocks of rows.
#include <algorithm>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kRowsPerChunk = 8;

class RmsNorm : public Op {
 public:
  RmsNorm(const Kernels& kernels, TensorRef y, TensorRef x, TensorRef weight, float eps)
      : Op("rms_norm"), kernels_(kernels), y_(out(y)), x_(in(x)), weight_(in(weight)), eps_(eps) {}
  int64_t chunks(int, const Sizes& sizes, int) const override {
    return (x_->rows(sizes) + kRowsPerChunk - 1) / kRowsPerChunk;
  }
  void run(int, int64_t chunk, Worker&, const Sizes& sizes) override {
    int64_t end = std::min((chunk + 1) * kRowsPerChunk, x_->rows(sizes));
    for (int64_t i = chunk * kRowsPerChunk; i < end; ++i)
      kernels_.rms_norm(x_->row(i), x_->dtype, weight_->at<float>(), y_->row(i), y_->dtype, x_->cols(), eps_);
  }

 private:
  const Kernels& kernels_;
  TensorRef y_, x_, weight_;
  float eps_;
};

}  // namespace

void submit_rms_norm(Runner& runner, Isa isa, TensorRef y, TensorRef x, TensorRef weight, float eps) {
  Expect expect{"rms_norm"};
  expect.that(x->shape.size() == 2, "x", "[tokens, dim]", shape_text(*x));
  expect.dtype(*x, "x", {DType::f32, DType::f16, DType::bf16});
  expect.dtype(*y, "out", {DType::f32, DType::f16, DType::bf16});
  expect.dtype(*weight, "weight", {DType::f32});
  expect.shape(*weight, "weight", {x->shape[1]});
  expect.shape(*y, "out", {x->shape[0], x->shape[1]});
  expect.packed(*x, "x");
  expect.packed(*y, "out");
  runner.submit(std::make_unique<RmsNorm>(kernels_for(isa), y, x, weight, eps));
}

}  // namespace headrace
