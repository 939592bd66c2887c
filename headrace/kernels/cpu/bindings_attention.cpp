// rope and attention for ops/rope.py and ops/paged_attention.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "ops.h"

namespace nb = nanobind;

namespace headrace {

using MaybeTensor = std::optional<TensorRef>;

void bind_attention(nb::module_& m) {
  auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  m.def("rope_table", &submit_rope_table, unlocked);
  m.def("rope_append", [](Runner& runner, const std::string& isa, TensorRef query_out, TensorRef query, TensorRef key,
                          TensorRef value, TensorRef key_pages, TensorRef value_pages, TensorRef slots, TensorRef table,
                          MaybeTensor query_norm, MaybeTensor key_norm, bool interleaved, float eps) {
    RopeAppendTensors tensors{query_out, query, key, value, key_pages, value_pages, slots, table,
                              query_norm.value_or(nullptr), key_norm.value_or(nullptr)};
    submit_rope_append(runner, isa_from_name(isa), std::move(tensors), interleaved, eps);
  }, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("query_out"), nb::arg("query"), nb::arg("key"), nb::arg("value"),
     nb::arg("key_pages"), nb::arg("value_pages"), nb::arg("slots"), nb::arg("table"), nb::arg("query_norm").none(),
     nb::arg("key_norm").none(), nb::arg("interleaved"), nb::arg("eps"), unlocked);
  m.def("paged_attention", [](Runner& runner, const std::string& isa, TensorRef out, TensorRef query, TensorRef key_pages,
                              TensorRef value_pages, TensorRef page_table, TensorRef sequence_lens, TensorRef query_starts,
                              int64_t window_left, float scale, float softcap) {
    PagedAttentionTensors tensors{out, query, key_pages, value_pages, page_table, sequence_lens, query_starts};
    submit_paged_attention(runner, isa_from_name(isa), std::move(tensors), window_left, scale, softcap);
  }, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("out"), nb::arg("query"), nb::arg("key_pages"), nb::arg("value_pages"),
     nb::arg("page_table"), nb::arg("sequence_lens"), nb::arg("query_starts"), nb::arg("window_left"), nb::arg("scale"),
     nb::arg("softcap"), unlocked);
}

}  // namespace headrace
