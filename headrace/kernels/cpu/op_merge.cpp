// merge_attention as an op: chunks are blocks of rows, a row being one head of one token. float64 (out and lse) here, in
// plain loops.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kFloatsPerChunk = 1 << 15;  // of all parts together
constexpr int64_t kLanesPadding = 32;

class MergeAttention : public Op {
 public:
  MergeAttention(const Kernels& kernels, MergeTensors t) : Op("merge_attention"), kernels_(kernels), t_(std::move(t)) {
    for (const auto& part : t_.outs) in(part);
    for (const auto& part : t_.lses) in(part);
    if (t_.sinks) in(t_.sinks);
    out(t_.out);
    out(t_.lse);
    heads_ = t_.lse->shape.back();
    value_dim_ = t_.out->shape.back();
    per_row_ = t_.lse->cols();
    step_ = std::max<int64_t>(1, kFloatsPerChunk / std::max<int64_t>(1, value_dim_ * static_cast<int64_t>(t_.outs.size())));
  }
  int64_t chunks(int, const Sizes& sizes, int) const override { return (t_.out->rows(sizes) * per_row_ + step_ - 1) / step_; }

  void run(int, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t end = std::min((chunk + 1) * step_, t_.out->rows(sizes) * per_row_);
    auto count = static_cast<int64_t>(t_.outs.size());
    int64_t bytes = count * static_cast<int64_t>(sizeof(MergePart)) + (count + kLanesPadding) * 8;
    char* scratch = worker.scratch(bytes);
    auto* parts = reinterpret_cast<MergePart*>(scratch + (count + kLanesPadding) * 8);
    for (int64_t i = chunk * step_; i < end; ++i) {
      if (t_.out->dtype == DType::f64) {
        merge_doubles(i, reinterpret_cast<double*>(scratch));
        continue;
      }
      find_parts(i, parts);
      MergeArgs a{parts, count, value_dim_, sink_of(i), reinterpret_cast<float*>(scratch), row_of(*t_.out, i), t_.out->dtype,
                  lse_of<float>(*t_.lse, i)};
      kernels_.merge_parts(a);
    }
  }

 private:
  char* row_of(const Tensor& t, int64_t i) const {
    return t.row(i / per_row_) + i % per_row_ * value_dim_ * t.item_bytes();
  }
  template <class T> T* lse_of(const Tensor& t, int64_t i) const { return t.row_as<T>(i / per_row_) + i % per_row_; }
  float sink_of(int64_t i) const {
    return t_.sinks ? t_.sinks->at<float>()[i % heads_ * t_.sinks->row_stride()] : -std::numeric_limits<float>::infinity();
  }

  void find_parts(int64_t i, MergePart* parts) const {
    for (size_t p = 0; p < t_.outs.size(); ++p)
      parts[p] = MergePart{row_of(*t_.outs[p], i), *lse_of<float>(*t_.lses[p], i), t_.outs[p]->dtype};
  }

  void merge_doubles(int64_t i, double* weights) const {
    constexpr double kNothing = -std::numeric_limits<double>::infinity();
    double top = kNothing, total = 0, sink = sink_of(i);
    bool seen = false;
    for (size_t p = 0; p < t_.outs.size(); ++p) {
      weights[p] = *lse_of<double>(*t_.lses[p], i);
      seen |= weights[p] != kNothing;
      top = weights[p] > top ? weights[p] : top;
    }
    for (size_t p = 0; p < t_.outs.size(); ++p) {
      weights[p] = weights[p] == kNothing ? 0.0 : std::exp(weights[p] - top);
      total += weights[p];
    }
    double divisor = total + (sink == kNothing ? 0.0 : std::exp(sink - top));
    auto* out = reinterpret_cast<double*>(row_of(*t_.out, i));
    for (int64_t j = 0; j < value_dim_; ++j) {
      double mixed = 0;
      for (size_t p = 0; seen && p < t_.outs.size(); ++p)
        if (*lse_of<double>(*t_.lses[p], i) != kNothing) mixed += weights[p] * reinterpret_cast<const double*>(row_of(*t_.outs[p], i))[j];
      out[j] = seen ? mixed / divisor : 0.0;
    }
    *lse_of<double>(*t_.lse, i) = seen ? top + std::log(total) : kNothing;
  }

  const Kernels& kernels_;
  MergeTensors t_;
  int64_t heads_ = 1, value_dim_ = 1, per_row_ = 1, step_ = 1;
};

void check_like(const Expect& expect, const Tensor& t, const Tensor& first, const std::string& name) {
  expect.that(t.shape == first.shape, name.c_str(), shape_text(first), shape_text(t));
  expect.packed(t, name.c_str());
}

void check(const Expect& expect, const MergeTensors& t) {
  expect.that(!t.outs.empty() && t.outs.size() == t.lses.size(), "parts", "one or more, each (out, lse)", std::to_string(t.outs.size()));
  const auto &out = t.out->shape, &lse = t.lse->shape;
  expect.that(lse.size() >= 2 && out.size() == lse.size() + 1 && std::equal(lse.begin(), lse.end(), out.begin()), "out",
              "[..., heads, value_dim] beside lse [..., heads]", shape_text(*t.out) + " beside " + shape_text(*t.lse));
  bool wide = t.out->dtype == DType::f64;
  for (size_t i = 0; i < t.outs.size(); ++i) {
    std::string part_out = "parts[" + std::to_string(i) + "].out", part_lse = "parts[" + std::to_string(i) + "].lse";
    check_like(expect, *t.outs[i], *t.out, part_out);
    check_like(expect, *t.lses[i], *t.lse, part_lse);
    if (wide)
      expect.dtype(*t.outs[i], part_out.c_str(), {DType::f64});
    else
      expect.dtype(*t.outs[i], part_out.c_str(), {DType::f32, DType::f16, DType::bf16});
    expect.dtype(*t.lses[i], part_lse.c_str(), {wide ? DType::f64 : DType::f32});
  }
  expect.dtype(*t.out, "out", {DType::f32, DType::f16, DType::bf16, DType::f64});
  expect.dtype(*t.lse, "lse", {wide ? DType::f64 : DType::f32});
  expect.packed(*t.out, "out");
  expect.packed(*t.lse, "lse");
  if (!t.sinks) return;
  expect.dtype(*t.sinks, "sinks", {DType::f32});
  expect.shape(*t.sinks, "sinks", {lse.back()});
}

}  // namespace

void submit_merge_attention(Runner& runner, Isa isa, MergeTensors tensors) {
  check(Expect{"merge_attention"}, tensors);
  runner.submit(std::make_unique<MergeAttention>(kernels_for(isa), std::move(tensors)));
}

}  // namespace headrace
