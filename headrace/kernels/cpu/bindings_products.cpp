// Products of bf16 matrices as the attention kernels compute them, for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace headrace {
namespace {

int64_t whole(int64_t n) { return (n + 31) / 32 * 32; }

// c [rows, columns] = a [rows, depth] b^T, b [64, depth] (keys), or a [rows, 64] b, b [64, columns]; with keep [rows],
// c * keep + that.
void product_bf16(const std::string& isa, const TensorRef& a, const TensorRef& b, const TensorRef& c, std::optional<TensorRef> keep,
                  bool keys) {
  const Kernels& kernels = kernels_for(isa_from_name(isa));
  Expect expect{"product_bf16"};
  expect.that(kernels.product_bf16, "isa", "one with products of bf16", isa);
  expect.dtype(*a, "a", {DType::f32, DType::f16, DType::bf16});
  expect.dtype(*b, "b", {a->dtype});
  expect.dtype(*c, "c", {DType::f32});
  expect.shape(*a, "a", {-1, -1});
  int64_t rows = a->shape[0], depth = a->shape[1], columns = keys ? 64 : b->shape[1];
  expect.shape(*b, "b", {64, keys ? depth : columns});
  expect.shape(*c, "c", {rows, columns});
  expect.that(keys || depth == 64, "a", "64 columns", shape_text(*a));
  for (const auto& tensor : {a, b, c}) expect.packed(*tensor, "a, b, c");
  if (keep) expect.shape(**keep, "keep", {rows});
  int64_t stride = (columns + 15) / 16 * 16;
  std::vector<uint16_t> packed_a(static_cast<size_t>(whole(rows) * whole(depth)));
  std::vector<uint16_t> packed_b(static_cast<size_t>(whole(depth) * whole(columns)));
  std::vector<float> sums(static_cast<size_t>(whole(rows) * stride));
  for (int64_t r = 0; r < rows; ++r) std::copy_n(c->row_as<float>(r), columns, sums.data() + r * stride);
  kernels.product_bf16({a->data, b->data, a->dtype, keys, rows, columns, depth, keep ? (*keep)->at<float>() : nullptr,
                        sums.data(), stride, packed_a.data(), packed_b.data()});
  for (int64_t r = 0; r < rows; ++r) std::copy_n(sums.data() + r * stride, columns, c->row_as<float>(r));
}

}  // namespace

void bind_products(nb::module_& m) {
  m.def("product_bf16", &product_bf16, nb::arg(), nb::kw_only(), nb::arg("a"), nb::arg("b"), nb::arg("c"),
        nb::arg("keep").none(), nb::arg("keys"));
}

}  // namespace headrace
