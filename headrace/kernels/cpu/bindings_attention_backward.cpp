// attention_backward, for ops/attention_gradients.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "ops.h"

namespace nb = nanobind;

namespace headrace {

using MaybeTensor = std::optional<TensorRef>;

void bind_attention_backward(nb::module_& m) {
  m.def("attention_backward", [](Runner& runner, const std::string& isa, TensorRef d_out, MaybeTensor d_lse, TensorRef d_query,
                                 TensorRef d_key, TensorRef d_value, MaybeTensor d_sinks, TensorRef out, TensorRef lse,
                                 TensorRef query, TensorRef key, TensorRef value, MaybeTensor query_starts,
                                 MaybeTensor key_starts, MaybeTensor key_lens, MaybeTensor mask, MaybeTensor sinks,
                                 MaybeTensor alibi_slopes, MaybeTensor first_keys, MaybeTensor last_keys, bool top_left,
                                 int64_t window_left, int64_t window_right, double scale, double softcap,
                                 const std::string& arithmetic) {
    auto maybe = [](MaybeTensor& t) { return t.value_or(nullptr); };
    AttentionTensors forward{out, lse, query, key, value, maybe(query_starts), maybe(key_starts), maybe(key_lens), nullptr, nullptr,
                             nullptr, maybe(mask), maybe(sinks), maybe(alibi_slopes), maybe(first_keys), maybe(last_keys)};
    AttentionGradientTensors tensors{forward, d_out, maybe(d_lse), d_query, d_key, d_value, maybe(d_sinks)};
    Arithmetic kind = arithmetic == "bf16" ? Arithmetic::bf16 : arithmetic == "fp64" ? Arithmetic::fp64 : Arithmetic::fp32;
    submit_attention_backward(runner, isa_from_name(isa), tensors, {top_left, true, window_left, window_right, scale, softcap, kind});
  }, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("d_out"), nb::arg("d_lse").none() = nb::none(), nb::arg("d_query"),
     nb::arg("d_key"), nb::arg("d_value"), nb::arg("d_sinks").none() = nb::none(), nb::arg("out"), nb::arg("lse"), nb::arg("query"),
     nb::arg("key"), nb::arg("value"), nb::arg("query_starts").none() = nb::none(), nb::arg("key_starts").none() = nb::none(),
     nb::arg("key_lens").none() = nb::none(), nb::arg("mask").none() = nb::none(), nb::arg("sinks").none() = nb::none(),
     nb::arg("alibi_slopes").none() = nb::none(), nb::arg("first_keys").none() = nb::none(), nb::arg("last_keys").none() = nb::none(),
     nb::arg("top_left"), nb::arg("window_left"), nb::arg("window_right"), nb::arg("scale"), nb::arg("softcap"), nb::arg("arithmetic"),
     nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace headrace
