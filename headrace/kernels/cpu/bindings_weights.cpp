// The border's part for weights: packing from memory or a file, packed files, and back to floats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "mapped_file.h"

namespace nb = nanobind;

namespace headrace {
namespace {

using BytesArray = nb::ndarray<const uint8_t, nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

WeightRef pack(Pool& pool, const std::string& format, int64_t rows, int64_t cols, const BytesArray& raw) {
  nb::gil_scoped_release unlocked;
  return pack_weight(pool, format_from_name(format), rows, cols, raw.data(), static_cast<int64_t>(raw.size()));
}

WeightRef pack_open_file(Pool& pool, Arena& arena, const std::string& format, std::pair<int64_t, int64_t> shape, int file,
                         int64_t offset) {
  nb::gil_scoped_release unlocked;
  return pack_file(pool, arena, format_from_name(format), shape.first, shape.second, file, offset);
}

void unpack(const PackedWeight& weight, FloatArray out) {
  for (int64_t r = 0; r < weight.rows; ++r) unpack_row(weight, r, out.data() + r * weight.cols);
}

// The panels as they lie in memory.
nb::ndarray<nb::numpy, const uint8_t> panels(const WeightRef& weight) {
  if (weight->pieces.size() > 1) throw std::invalid_argument("panels: expected a matrix in one piece, this one is shared among nodes");
  size_t shape[] = {static_cast<size_t>(weight->bytes())};
  nb::capsule keep(new WeightRef(weight), [](void* p) noexcept { delete static_cast<WeightRef*>(p); });
  return nb::ndarray<nb::numpy, const uint8_t>(weight->panel(0), 1, shape, keep);
}

WeightRef mapped_weight(const MappedFile& file, const std::string& format, std::pair<int64_t, int64_t> shape, int64_t offset) {
  return file.weight(format_from_name(format), shape.first, shape.second, offset);
}

void dequantize(const std::string& format, int64_t rows, int64_t cols, const BytesArray& raw, FloatArray out) {
  WeightFormat f = format_from_name(format);
  if (static_cast<int64_t>(raw.size()) != rows * row_bytes(f, cols) || static_cast<int64_t>(out.size()) != rows * cols)
    throw std::invalid_argument("dequantize: raw or out does not have the size the shape asks for");
  for (int64_t r = 0; r < rows; ++r) dequantize_row(f, raw.data() + r * row_bytes(f, cols), cols, out.data() + r * cols);
}

}  // namespace

void bind_weights(nb::module_& m) {
  nb::class_<PackedWeight>(m, "PackedWeight")
      .def_prop_ro("format", [](const PackedWeight& w) { return std::string(format_info(w.format).name); })
      .def_prop_ro("shape", [](const PackedWeight& w) { return std::make_pair(w.rows, w.cols); })
      .def_prop_ro("num_bytes", &PackedWeight::bytes)
      .def("panels", &panels)
      .def("unpack", &unpack);
  nb::class_<MappedFile>(m, "MappedFile").def(nb::init<int, int64_t>()).def("weight", &mapped_weight);
  nb::class_<Arena>(m, "Arena").def(nb::init<int64_t>());
  m.attr("PACKED_LAYOUT") = kPackedLayout;
  m.def("pack", &pack);
  m.def("pack_file", &pack_open_file);
  m.def("packed_bytes", [](const std::string& format, std::pair<int64_t, int64_t> shape) {
    return packed_bytes(format_from_name(format), shape.first, shape.second);
  });
  m.def("dequantize", &dequantize);
}

}  // namespace headrace
