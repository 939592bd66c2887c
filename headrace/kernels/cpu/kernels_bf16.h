// Included by the instruction sets with products of bf16: what they add to a table.
#pragma once
#include "attention_backward_bf16.h"
#include "attention_few_bf16.h"

namespace headrace {
namespace HEADRACE_ISA {

static Kernels with_bf16(Kernels base) {
  base.product_bf16 = product_bf16;
  base.attend_tile_bf16 = attend_tile_bf16;
  base.attend_backward_bf16 = attend_backward_bf16;
#if defined(HEADRACE_BF16_VECTORS)
  base.attend_few_bf16 = attend_few_bf16;
#endif
  return base;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
