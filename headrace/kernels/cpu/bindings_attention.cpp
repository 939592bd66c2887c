// rope and attention for ops/rope.py and ops/paged_attention.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "ops.h"

namespace nb = nanobind;

namespace headrace {

using MaybeTensor = std::optional<TensorRef>;

// A function of (first, isa, *, the arguments of an attention call), from one of (first, isa, tensors, options).
template <typename First, typename Function>
auto of_attention(Function function) {
  return [function](First first, const std::string& isa, TensorRef out, MaybeTensor lse, TensorRef query, TensorRef key,
                    TensorRef value, MaybeTensor query_starts, MaybeTensor key_starts, MaybeTensor key_lens,
                    MaybeTensor page_table, MaybeTensor key_scales, MaybeTensor value_scales, MaybeTensor mask,
                    MaybeTensor sinks, MaybeTensor alibi_slopes, MaybeTensor first_keys, MaybeTensor last_keys,
                    bool top_left, int64_t window_left, int64_t window_right, double scale, double softcap,
                    bool batch_invariant, const std::string& arithmetic) {
    auto maybe = [](MaybeTensor& t) { return t.value_or(nullptr); };
    AttentionTensors tensors{out, maybe(lse), query, key, value, maybe(query_starts), maybe(key_starts), maybe(key_lens),
                             maybe(page_table), maybe(key_scales), maybe(value_scales), maybe(mask), maybe(sinks),
                             maybe(alibi_slopes), maybe(first_keys), maybe(last_keys)};
    Arithmetic kind = arithmetic == "bf16" ? Arithmetic::bf16 : arithmetic == "fp64" ? Arithmetic::fp64 : Arithmetic::fp32;
    AttentionOptions options{top_left, batch_invariant, window_left, window_right, scale, softcap, kind};
    return function(first, isa_from_name(isa), tensors, options);
  };
}

template <typename Function, typename... Guard>
void def_attention(nb::module_& m, const char* name, Function function, Guard... guard) {
  m.def(name, function, nb::arg(), nb::arg(), nb::kw_only(), nb::arg("out"), nb::arg("lse").none(), nb::arg("query"),
        nb::arg("key"), nb::arg("value"), nb::arg("query_starts").none() = nb::none(), nb::arg("key_starts").none() = nb::none(),
        nb::arg("key_lens").none() = nb::none(), nb::arg("page_table").none() = nb::none(),
        nb::arg("key_scales").none() = nb::none(), nb::arg("value_scales").none() = nb::none(),
        nb::arg("mask").none() = nb::none(), nb::arg("sinks").none() = nb::none(),
        nb::arg("alibi_slopes").none() = nb::none(), nb::arg("first_keys").none() = nb::none(),
        nb::arg("last_keys").none() = nb::none(), nb::arg("top_left"), nb::arg("window_left"), nb::arg("window_right"),
        nb::arg("scale"), nb::arg("softcap"), nb::arg("batch_invariant"), nb::arg("arithmetic"),
        guard...);
}

void bind_attention(nb::module_& m) {
  auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  m.def("rope_table", &submit_rope_table, unlocked);
  def_attention(m, "attention", of_attention<Runner&>(&submit_attention), unlocked);
  def_attention(m, "attention_division", of_attention<int64_t>([](auto... arguments) {
    AttentionDivision d = attention_division(arguments...);
    return std::make_tuple(d.splits, d.intervals, d.workspace_bytes);
  }));
}

}  // namespace headrace
