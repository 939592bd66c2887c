// The probes of the machine's roofs, for kernels/cpu/roof.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "roof_probes.h"

namespace nb = nanobind;

namespace headrace {

void bind_roof(nb::module_& m) {
  auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  m.def("multiply_probes", [](const std::string& isa) { return multiply_probes(isa_from_name(isa)); });
  m.def("touch_pages", &touch_pages, unlocked);
  m.def("read_seconds", [](Pool& pool, const std::string& isa, const TensorRef& memory, int64_t bytes, int64_t passes) {
    return read_seconds(pool, isa_from_name(isa), memory, bytes, passes);
  }, unlocked);
  m.def("multiply_seconds", [](Pool& pool, const std::string& isa, const std::string& probe, int64_t rounds) {
    Multiplied done = multiply_seconds(pool, isa_from_name(isa), probe, rounds);
    return std::make_pair(done.operations, done.seconds);
  }, unlocked);
}

}  // namespace headrace
