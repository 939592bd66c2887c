// The strings of a GGUF file, for Python. A vocabulary with its merges is hundreds of thousands of them, and every start
// reads them all: 3 times as fast here as in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <stdexcept>

namespace nb = nanobind;

namespace headrace {
namespace {

using BytesArray = nb::ndarray<const uint8_t, nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Up to `count` strings from `pos` on, each its length in 8 bytes and then its UTF-8, and where the last one ends.
// It stops before a string that passes `end` or is no UTF-8.
nb::tuple read_strings(const BytesArray& bytes, uint64_t pos, uint64_t end, uint64_t count) {
  if (end > bytes.size() || pos > end) throw std::invalid_argument("read_strings: pos and end must lie in the bytes");
  nb::list strings;
  for (uint64_t i = 0, length; i < count && end - pos >= sizeof length; ++i) {
    memcpy(&length, bytes.data() + pos, sizeof length);
    if (length > end - pos - sizeof length) break;
    const char* text = reinterpret_cast<const char*>(bytes.data() + pos + sizeof length);
    nb::object string = nb::steal(PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(length), nullptr));
    if (!string.is_valid()) {
      PyErr_Clear();
      break;
    }
    strings.append(string);
    pos += sizeof length + length;
  }
  return nb::make_tuple(strings, pos);
}

}  // namespace

void bind_strings(nb::module_& m) { m.def("read_strings", &read_strings); }

}  // namespace headrace
