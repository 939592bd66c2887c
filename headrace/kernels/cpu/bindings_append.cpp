// What pages hold, for ops/append_pages.py: elements of a KV cache from and to floats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "ops.h"

namespace nb = nanobind;

namespace headrace {
namespace {

using Codes = nb::ndarray<const uint8_t, nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NumbersOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_sizes(DType type, size_t bytes, size_t elements) {
  size_t expected = type == DType::i4 ? (elements + 1) / 2 : elements * static_cast<size_t>(dtype_bytes(type));
  if (bytes != expected) throw std::invalid_argument("codes: expected " + std::to_string(expected) + " bytes, got " + std::to_string(bytes));
}

void codes_to_floats(const std::string& isa, const std::string& dtype, const Codes& codes, NumbersOut out) {
  DType type = dtype_from_name(dtype);
  check_sizes(type, codes.size(), out.size());
  kernels_for(isa_from_name(isa)).widen_row(codes.data(), type, static_cast<int64_t>(out.size()), out.data());
}

void floats_to_codes(const std::string& isa, const std::string& dtype, const Numbers& x, CodesOut out) {
  DType type = dtype_from_name(dtype);
  check_sizes(type, out.size(), x.size());
  kernels_for(isa_from_name(isa)).convert_row(x.data(), out.data(), type, static_cast<int64_t>(x.size()));
}

using MaybeTensor = std::optional<TensorRef>;

TensorRef tensor_or_none(const MaybeTensor& t) { return t.value_or(nullptr); }

void append_pages(Runner& runner, const std::string& isa, TensorRef key, MaybeTensor latent, MaybeTensor value,
                  TensorRef key_pages, MaybeTensor value_pages, MaybeTensor key_scales, MaybeTensor value_scales,
                  TensorRef slots, MaybeTensor query, MaybeTensor query_out, MaybeTensor table, MaybeTensor query_norm,
                  MaybeTensor key_norm, bool interleaved, bool spread, float eps) {
  AppendTensors t;
  t.key = key, t.latent = tensor_or_none(latent), t.value = tensor_or_none(value);
  t.key_pages = key_pages, t.value_pages = tensor_or_none(value_pages), t.slots = slots;
  t.key_scales = tensor_or_none(key_scales), t.value_scales = tensor_or_none(value_scales);
  t.query = tensor_or_none(query), t.query_out = tensor_or_none(query_out), t.table = tensor_or_none(table);
  t.query_norm = tensor_or_none(query_norm), t.key_norm = tensor_or_none(key_norm);
  submit_append_pages(runner, isa_from_name(isa), std::move(t), interleaved, spread, eps);
}

}  // namespace

void bind_append(nb::module_& m) {
  auto maybe = [](const char* name) { return nb::arg(name) = nb::none(); };
  m.def("append_pages", &append_pages, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("key"), maybe("latent"), maybe("value"),
        nb::arg("key_pages"), maybe("value_pages"), maybe("key_scales"), maybe("value_scales"), nb::arg("slots"),
        maybe("query"), maybe("query_out"), maybe("table"), maybe("query_norm"), maybe("key_norm"), nb::arg("interleaved"),
        nb::arg("spread"), nb::arg("eps"), nb::call_guard<nb::gil_scoped_release>());
  m.def("codes_to_floats", &codes_to_floats);
  m.def("floats_to_codes", &floats_to_codes);
}

}  // namespace headrace
