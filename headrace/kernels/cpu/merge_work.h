// What the merge of partial attentions hands to its kernels: one row of each part. Plain numbers and pointers.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace headrace {

// One head of one token, as one part of the keys gave it.
struct MergePart {
  const char* out;  // [value_dim]
  float lse;        // natural log of the sum of exp(score); -infinity: no keys, and `out` is not read
  DType type;
};

struct MergeArgs {
  const MergePart* parts;
  int64_t num_parts, value_dim;
  float sink;      // a logit that takes weight and gives no value; -infinity: none
  float* weights;  // scratch, [num_parts rounded up to 16, and 16 more]
  char* out;       // [value_dim]
  DType out_type;
  float* lse;
};

}  // namespace headrace
