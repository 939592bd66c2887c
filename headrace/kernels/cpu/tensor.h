// Tensor: typed, strided memory whose first dimension may be known only when a program runs.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace headrace {

// f8 is e4m3fn. NOTE: i4 is for kernels, where strides count items of two codes; an array of int4 is one of u8.
enum class DType : uint8_t { f32, f16, bf16, f64, i32, i64, u8, i8, f8, i4 };

inline int64_t dtype_bytes(DType t) {
  switch (t) {
    case DType::f64: case DType::i64: return 8;
    case DType::f32: case DType::i32: return 4;
    case DType::f16: case DType::bf16: return 2;
    default: return 1;
  }
}
const char* dtype_name(DType t);
DType dtype_from_name(const std::string& name);

// What changes from step to step. In eager calls every count is in the shapes and Sizes is unused.
struct Sizes {
  int64_t tokens = 0;    // rows of activations
  int64_t requests = 0;  // sequences in the ragged batch
  int64_t outputs = 0;   // rows whose logits are wanted
};

enum class Rows : uint8_t { fixed, tokens, requests, outputs };

// NOTE: ops read `data` only inside run(): a program assigns it after recording.
struct Tensor {
  char* data = nullptr;
  DType dtype = DType::f32;
  Rows rows_kind = Rows::fixed;
  std::vector<int64_t> shape;    // shape[0] is the capacity when rows_kind is not fixed
  std::vector<int64_t> strides;  // in elements
  std::shared_ptr<Tensor> base;  // a view shares its base's memory
  int64_t base_offset_bytes = 0;
  std::shared_ptr<void> owner;   // keeps `data` alive
  bool planned = false;          // lives in a program's arena
  bool writable = true;

  int64_t rows(const Sizes& s) const {
    switch (rows_kind) {
      case Rows::tokens: return s.tokens;
      case Rows::requests: return s.requests;
      case Rows::outputs: return s.outputs;
      default: return shape.empty() ? 1 : shape[0];
    }
  }
  int64_t cols() const {  // elements per row, all inner dimensions together
    int64_t n = 1;
    for (size_t i = 1; i < shape.size(); ++i) n *= shape[i];
    return n;
  }
  int64_t row_stride() const { return strides.empty() ? 1 : strides[0]; }
  int64_t item_bytes() const { return dtype_bytes(dtype); }
  int64_t capacity_bytes() const {
    int64_t n = item_bytes();
    for (int64_t d : shape) n *= d;
    return n;
  }
  template <class T> T* at() const { return reinterpret_cast<T*>(data); }
  char* row(int64_t i) const { return data + i * row_stride() * item_bytes(); }
  template <class T> T* row_as(int64_t i) const { return reinterpret_cast<T*>(row(i)); }
};

using TensorRef = std::shared_ptr<Tensor>;

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape);
bool inner_contiguous(const Tensor& t);  // every dimension but the first is packed
std::string shape_text(const Tensor& t);

// One matcher for the C++ border: names the argument, what was expected, what came.
struct Expect {
  const char* op;
  void that(bool ok, const char* argument, const std::string& expected, const std::string& got) const {
    if (!ok) throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected + ", got " + got);
  }
  void dtype(const Tensor& t, const char* argument, std::initializer_list<DType> allowed) const;
  void shape(const Tensor& t, const char* argument, std::initializer_list<int64_t> dims) const;  // -1: any
  void packed(const Tensor& t, const char* argument) const;  // rows may be strided, the inside may not
};

// 2 MiB pages where the system gives them, zeroed, 64-byte aligned at least.
std::shared_ptr<void> allocate_bytes(int64_t bytes);

// Many small pieces on few 2 MiB pages: a matrix of 300 KB on pages of its own would be on 4 KiB ones, where every page
// costs a look-up and stops the prefetcher. A block lives as long as any of its pieces.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : room_(bytes) {}  // of each node, in one block: nothing is lost between pieces
  // 64-byte aligned, zeroed. Blocks are of one NUMA node each: their pages come from the node of whoever writes them first.
  std::shared_ptr<void> take(int64_t bytes, int node = 0);

 private:
  struct Block {
    std::shared_ptr<void> memory;
    int64_t used = 0, size = 0;
  };
  std::vector<Block> blocks_;
  int64_t room_ = 0;
};

}  // namespace headrace
