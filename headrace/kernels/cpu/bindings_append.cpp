// What pages hold, for ops/append_pages.py: elements of a KV cache from and to floats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
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

}  // namespace

void bind_append(nb::module_& m) {
  m.def("codes_to_floats", &codes_to_floats);
  m.def("floats_to_codes", &floats_to_codes);
}

}  // namespace headrace
