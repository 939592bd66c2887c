// sample and its random numbers, for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "ops.h"
#include "random.h"

namespace nb = nanobind;

namespace headrace {

void bind_sampling(nb::module_& m) {
  using Maybe = std::optional<TensorRef>;
  m.def("sample", [](Runner& runner, const std::string& isa, std::vector<TensorRef> settings, TensorRef logits, TensorRef out,
                     Maybe ids, Maybe counts, Maybe starts) {
    if (settings.size() != 2) throw std::invalid_argument("sample: settings: expected two arrays");
    SampleTensors t{logits, out, settings[0], settings[1], ids.value_or(nullptr), counts.value_or(nullptr),
                    starts.value_or(nullptr)};
    submit_sample(runner, isa_from_name(isa), t);
  }, nb::arg("runner"), nb::arg("isa"), nb::arg("settings"), nb::arg("logits"), nb::arg("out"), nb::arg("ids").none(),
     nb::arg("counts").none(), nb::arg("starts").none(), nb::call_guard<nb::gil_scoped_release>());
  m.def("uniform", [](uint64_t seed, uint64_t draw) { return uniform(seed, draw); });
}

}  // namespace headrace
