// What the append op hands to its kernel: the heads of one token.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

// Who says how large a code's unit is: nobody, the row itself (and it is written down), or the caller.
enum class Scaling : uint8_t { none, computed, given };

// Strides in bytes.
struct AppendArgs {
  const char* x;             // [heads, dim]
  const char* prefix;        // [heads, prefix_dim]: written before x and as it is; null: none
  const float* norm_weight;  // [dim]; null: no norm
  const float* table;        // cosines, then sines: rotary_dim / 2 of each; null: no rotation
  float* scratch;            // [prefix_dim + dim]
  char* out;                 // [heads, prefix_dim + dim], may be x
  char* scales;              // [heads] floats; null: none
  int64_t heads, dim, prefix_dim, rotary_dim, x_step, prefix_step, out_step, scale_step;
  float eps;
  DType x_type, prefix_type, out_type;
  Scaling scaling;
  bool interleaved, spread;
};

}  // namespace headrace
