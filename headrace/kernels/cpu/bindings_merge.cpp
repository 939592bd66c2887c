// merge_attention, for ops/merge_attention.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "ops.h"

namespace nb = nanobind;

namespace headrace {

void bind_merge(nb::module_& m) {
  m.def("merge_attention", [](Runner& runner, const std::string& isa, std::vector<TensorRef> outs, std::vector<TensorRef> lses,
                              TensorRef out, TensorRef lse, std::optional<TensorRef> sinks) {
    MergeTensors tensors{std::move(outs), std::move(lses), out, lse, sinks.value_or(nullptr)};
    submit_merge_attention(runner, isa_from_name(isa), std::move(tensors));
  }, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("outs"), nb::arg("lses"), nb::arg("out"), nb::arg("lse"),
     nb::arg("sinks").none(), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace headrace
