// Checks and memory of tensors.
#include "tensor.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace headrace {

const char* dtype_name(DType t) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64", "int32",
                                      "int64", "uint8", "int8", "float8_e4m3fn", "int4"};
  return names[static_cast<int>(t)];
}

DType dtype_from_name(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::i4); ++i)
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  throw std::invalid_argument("dtype: unknown '" + name + "'");
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

bool inner_contiguous(const Tensor& t) {
  if (t.capacity_bytes() == 0) return true;
  int64_t step = 1;
  for (size_t i = t.shape.size(); i-- > 1;) {
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
    step *= t.shape[i];
  }
  return true;
}

std::string shape_text(const Tensor& t) {
  std::string text = dtype_name(t.dtype);
  text += " [";
  for (size_t i = 0; i < t.shape.size(); ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

void Expect::dtype(const Tensor& t, const char* argument, std::initializer_list<DType> allowed) const {
  std::string names;
  for (DType d : allowed) {
    if (t.dtype == d) return;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(d));
  }
  that(false, argument, names, shape_text(t));
}

void Expect::shape(const Tensor& t, const char* argument, std::initializer_list<int64_t> dims) const {
  std::string text = "[";
  bool ok = dims.size() == t.shape.size();
  size_t i = 0;
  for (int64_t d : dims) {
    if (ok && d >= 0 && t.shape[i] != d) ok = false;
    text += (i++ ? ", " : "") + (d < 0 ? std::string("any") : std::to_string(d));
  }
  that(ok, argument, text + "]", shape_text(t));
}

void Expect::packed(const Tensor& t, const char* argument) const {
  that(inner_contiguous(t), argument, "contiguous inner dimensions", shape_text(t) + " with other strides");
}

#ifdef __SANITIZE_ADDRESS__

// Every piece an allocation of its own and of its exact size, so that the sanitizer sees what reaches over its end.
std::shared_ptr<void> allocate_bytes(int64_t bytes) {
  void* data = nullptr;
  size_t wanted = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  if (posix_memalign(&data, 64, wanted)) throw std::bad_alloc();
  memset(data, 0, wanted);
  return std::shared_ptr<void>(data, free);
}

std::shared_ptr<void> Arena::take(int64_t bytes, int) { return allocate_bytes(bytes); }

#else

std::shared_ptr<void> allocate_bytes(int64_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  size_t wanted = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  size_t alignment = wanted >= kHuge ? kHuge : 4096;
  size_t size = (wanted + 4095) & ~size_t{4095};
  size_t reserve = size + alignment;
  void* raw = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  auto address = (reinterpret_cast<uintptr_t>(raw) + alignment - 1) & ~(alignment - 1);
  auto* data = reinterpret_cast<void*>(address);
#ifdef MADV_HUGEPAGE
  if (wanted >= kHuge) madvise(data, size, MADV_HUGEPAGE);
#endif
  return std::shared_ptr<void>(data, [raw, reserve](void*) { munmap(raw, reserve); });
}

std::shared_ptr<void> Arena::take(int64_t bytes, int node) {
  constexpr int64_t kBlockBytes = int64_t{16} << 20;
  if (blocks_.size() <= static_cast<size_t>(node)) blocks_.resize(static_cast<size_t>(node) + 1);
  Block& block = blocks_[static_cast<size_t>(node)];
  if (block.used + bytes > block.size) {
    int64_t size = block.memory || bytes > room_ ? kBlockBytes : room_;
    if (bytes > size) return allocate_bytes(bytes);
    block = Block{allocate_bytes(size), 0, size};
  }
  void* piece = static_cast<char*>(block.memory.get()) + block.used;
  block.used += (bytes + 63) & ~int64_t{63};
  return std::shared_ptr<void>(block.memory, piece);
}

#endif

}  // namespace headrace
