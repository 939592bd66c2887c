// What a test hands to products_bf16.h: plain arrays, and the memory for what is packed of them.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

// a [rows, depth] times 64 tokens b: keys [64, depth], by their elements, or values [64, columns], by tokens (depth 64).
struct ProductProbe {
  const char *a, *b;
  DType type;  // of both
  bool keys;
  int64_t rows, columns, depth;
  const float* keep;              // [rows] or null
  float* c;                       // [rows up to a multiple of 32, c_stride]
  int64_t c_stride;               // a multiple of 16
  uint16_t *packed_a, *packed_b;  // [rows as above, depth], [depth, columns], both sizes up to multiples of 32
};

}  // namespace headrace
