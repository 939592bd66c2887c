// What the rope op hands to its kernel: the heads of one token.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

struct RotateArgs {
  const float* x;            // [heads, head_dim]
  const float* norm_weight;  // [head_dim]; null: no norm
  const float* table;        // cosines, then sines: rotary_dim / 2 of each
  float* scratch;            // [head_dim]
  char* out;                 // [heads, head_dim], may be x
  int64_t heads, head_dim, rotary_dim, out_head_bytes;
  float eps;
  DType out_type;
  bool interleaved;
};

}  // namespace headrace
