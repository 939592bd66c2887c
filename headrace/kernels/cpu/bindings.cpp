// The border between Python and the native runtime. Everything below has been checked when it gets there.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "ops.h"

namespace nb = nanobind;
namespace headrace {
void bind_append(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_attention_backward(nb::module_& m);
void bind_merge(nb::module_& m);
void bind_products(nb::module_& m);
void bind_roof(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_schedule(nb::module_& m);
void bind_strings(nb::module_& m);
void bind_weights(nb::module_& m);
}
using namespace headrace;
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

namespace {

// Wraps memory that Python owns. `dtype` names what the bytes mean: bfloat16 travels as uint16.
TensorRef wrap(const AnyArray& array, const std::string& dtype) {
  auto t = std::make_shared<Tensor>();
  t->dtype = dtype_from_name(dtype);
  if (static_cast<int64_t>(array.itemsize()) != t->item_bytes())
    throw std::invalid_argument("array: item size does not match dtype " + dtype);
  t->data = const_cast<char*>(static_cast<const char*>(array.data()));
  t->owner = std::shared_ptr<void>(new AnyArray(array), [](void* p) {
    nb::gil_scoped_acquire locked;
    delete static_cast<AnyArray*>(p);
  });
  for (size_t i = 0; i < array.ndim(); ++i) {
    t->shape.push_back(static_cast<int64_t>(array.shape(i)));
    t->strides.push_back(array.stride(i));
  }
  return t;
}

TensorRef view(const TensorRef& t, std::vector<int64_t> shape) {
  if (!inner_contiguous(*t)) throw std::invalid_argument("view: expected contiguous inner dimensions");
  auto v = std::make_shared<Tensor>(*t);
  int64_t per_row = 1;
  for (size_t i = 1; i < shape.size(); ++i) per_row *= shape[i];
  if (shape.empty() || shape[0] != t->shape[0] || per_row != t->cols())
    throw std::invalid_argument("view: expected the same rows and elements per row as " + shape_text(*t));
  v->shape = shape;
  v->strides = contiguous_strides(shape);
  v->strides[0] = t->row_stride();
  v->base = t->base ? t->base : t;
  return v;
}

nb::dlpack::dtype numpy_type(DType t) {
  switch (t) {
    case DType::f32: return nb::dtype<float>();
    case DType::f64: return nb::dtype<double>();
    case DType::f16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    case DType::bf16: return nb::dtype<uint16_t>();
    case DType::i32: return nb::dtype<int32_t>();
    case DType::i64: return nb::dtype<int64_t>();
    case DType::u8: case DType::f8: return nb::dtype<uint8_t>();
    default: return nb::dtype<int8_t>();
  }
}

// bfloat16 travels as uint16, float8_e4m3fn as uint8.
nb::ndarray<nb::numpy> to_numpy(const TensorRef& t) {
  if (!t->data) throw std::invalid_argument("tensor: has no memory before its program is finished");
  std::vector<size_t> shape(t->shape.begin(), t->shape.end());
  nb::capsule keep(new TensorRef(t), [](void* p) noexcept { delete static_cast<TensorRef*>(p); });
  return nb::ndarray<nb::numpy>(t->data, shape.size(), shape.data(), keep, t->strides.data(), numpy_type(t->dtype));
}

// Seconds of the run itself: waiting for the interpreter afterwards is not among them.
double run_program(Program& program, const Sizes& sizes) {
  nb::gil_scoped_release unlocked;
  const auto begin = std::chrono::steady_clock::now();
  program.run(sizes);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<double> run_timed(Program& program, const Sizes& sizes) {
  std::vector<double> seconds;
  {
    nb::gil_scoped_release unlocked;
    program.run(sizes, &seconds);
  }
  return seconds;
}

// The user's mistakes, in headrace's own exceptions.
void translate(const std::exception_ptr& e, void*) {
  auto raise = [](const char* name, const char* text) {
    PyErr_SetObject(nb::module_::import_("headrace.errors").attr(name).ptr(), nb::str(text).ptr());
  };
  try {
    std::rethrow_exception(e);
  } catch (const std::invalid_argument& error) {
    raise("ArgumentError", error.what());
  } catch (const ReadFailed& error) {
    raise("ModelFileError", error.what());
  } catch (const ForkedPool& error) {
    raise("HeadraceError", error.what());
  } catch (const std::bad_alloc&) {
    raise("CapacityError", "memory: the system has none left for this");
  }
}

void bind_runtime(nb::module_& m) {
  nb::class_<Tensor>(m, "Tensor")
      .def_prop_ro("shape", [](const Tensor& t) { return t.shape; })
      .def_prop_ro("dtype", [](const Tensor& t) { return std::string(dtype_name(t.dtype)); })
      .def_prop_ro("rows_kind", [](const Tensor& t) {
        static const char* const names[] = {"fixed", "tokens", "requests", "outputs"};
        return std::string(names[static_cast<int>(t.rows_kind)]);
      })
      .def("follow", [](const TensorRef& t, const std::string& kind) {
        t->rows_kind = kind == "tokens" ? Rows::tokens : kind == "requests" ? Rows::requests : Rows::outputs;
        return t;
      })
      .def("view", &view)
      .def("numpy", &to_numpy);
  nb::class_<Sizes>(m, "Sizes")
      .def("__init__", [](Sizes* s, int64_t tokens, int64_t requests, int64_t outputs) {
        new (s) Sizes{tokens, requests, outputs};
      }, nb::arg("tokens"), nb::arg("requests"), nb::arg("outputs"));
  nb::class_<Runner>(m, "Runner").def("buffer", [](Runner& r, const std::string& dtype, const std::string& rows,
                                                   std::vector<int64_t> shape) {
    Rows kind = rows == "tokens" ? Rows::tokens : rows == "requests" ? Rows::requests
                : rows == "outputs" ? Rows::outputs : Rows::fixed;
    return r.buffer(dtype_from_name(dtype), kind, std::move(shape));
  });
  nb::class_<Pool, Runner>(m, "Pool")
      .def("__init__", [](Pool* p, std::vector<int> threads, std::vector<std::vector<int>> node_cpus) {
        new (p) Pool(Nodes(threads), std::move(node_cpus));
      }, nb::arg("threads_per_node"), nb::arg("node_cpus") = std::vector<std::vector<int>>{})
      .def("__init__", [](Pool* p, int threads) { new (p) Pool(Nodes({threads})); })
      .def_prop_ro("num_threads", &Pool::num_threads)
      .def_prop_ro("num_nodes", [](const Pool& p) { return p.nodes().count(); });
  nb::class_<Nodes>(m, "Nodes")
      .def(nb::init<std::vector<int>>())
      .def_prop_ro("count", &Nodes::count)
      .def("of_thread", &Nodes::of_thread)
      .def("begin", &Nodes::begin)
      .def("thread_begin", &Nodes::thread_begin)
      .def("thread_end", &Nodes::thread_end);
  nb::class_<Program, Runner>(m, "Program")
      .def(nb::init<std::shared_ptr<Pool>, Sizes>())
      .def("keep", &Program::keep)
      .def("finish", &Program::finish)
      .def("run", &run_program)
      .def("run_timed", &run_timed)
      .def_prop_ro("op_names", &Program::op_names)
      .def_prop_ro("arena_bytes", &Program::arena_bytes);
}

void bind_ops(nb::module_& m) {
  auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<LinearPart>(m, "LinearPart")
      .def("__init__", [](LinearPart* p, WeightRef w, TensorRef out, std::optional<TensorRef> bias,
                          std::optional<TensorRef> residual) {
        new (p) LinearPart{w, out, bias.value_or(nullptr), residual.value_or(nullptr)};
      }, nb::arg("weight"), nb::arg("out"), nb::arg("bias").none(), nb::arg("residual").none());
  m.def("rms_norm", [](Runner& r, const std::string& isa, TensorRef out, TensorRef x, TensorRef weight, float eps) {
    submit_rms_norm(r, isa_from_name(isa), out, x, weight, eps);
  }, unlocked);
  nb::class_<LinearInput>(m, "LinearInput")
      .def("__init__", [](LinearInput* input, TensorRef x, int precision, std::optional<TensorRef> norm, float eps) {
        new (input) LinearInput{x, norm.value_or(nullptr), eps, static_cast<Precision>(precision)};
      }, nb::arg("x"), nb::arg("precision"), nb::arg("norm").none() = nb::none(), nb::arg("eps") = 0.0f);
  m.def("linear", [](Runner& r, const std::string& isa, const LinearInput& input, std::vector<LinearPart> parts) {
    submit_linear(r, isa_from_name(isa), input, std::move(parts));
  }, unlocked);
  m.def("linear_gated", [](Runner& r, const std::string& isa, const LinearInput& input, WeightRef gate, WeightRef up,
                           TensorRef out) {
    submit_linear_gated(r, isa_from_name(isa), input, gate, up, out);
  }, unlocked);
  m.def("embedding", &submit_embedding, unlocked);
  m.def("select_rows", &submit_select_rows, unlocked);
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator(translate);
  nb::set_leak_warnings(false);  // what still lives when the interpreter ends is not lost
  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("cpu_flags", &cpu_flags);
  m.def("wrap", &wrap);
  bind_runtime(m);
  bind_weights(m);
  bind_ops(m);
  bind_append(m);
  bind_attention(m);
  bind_attention_backward(m);
  bind_merge(m);
  bind_products(m);
  bind_roof(m);
  bind_sampling(m);
  bind_schedule(m);
  bind_strings(m);
}
