// The table of kernels each instruction set fills in. Plain pointers only: nothing here allocates, throws or locks.
#pragma once
#include <cstdint>

#include "append_work.h"
#include "attention_work.h"
#include "backward_work.h"
#include "isa.h"
#include "merge_work.h"
#include "products_work.h"
#include "tensor.h"
#include "weight.h"

namespace headrace {

// A row of activations as integers: K values, and one record per 32 of them.
struct BlockRecord {
  float scale;            // value = scale * integer
  float weighted_sum;     // scale * (sum of the integers)
  int32_t minus_sum;      // -(sum of the integers)
  int32_t minus_low_sum;  // -(sum of the first 16)
};
constexpr int kBlock = 32;  // activations that share a scale

// A strip is two panels of 16 weight rows, or the last one alone.
constexpr int kPanelRows = 16, kStripRows = 32;

// Rows of activations times a strip.
struct TileArgs {
  const uint8_t* panel;
  int64_t panel_stride;        // bytes to the second panel
  int panels;                  // 1 or 2
  int64_t ahead;               // how far in front of what it reads it asks for more; 0: not at all
  int64_t cols;                // K
  const float* x;              // fp32 rows, for float panels
  const int8_t* values;        // rows of integers, for quantized panels
  const BlockRecord* records;
  bool fine;                   // which integers: quantize_fine's
  int64_t x_stride, values_stride, records_stride;
  int tokens;                  // 1 or more
  float* result;               // [tokens, 32]
};

// The results of a strip, to be stored.
struct FinishArgs {
  const float* result;         // [tokens, 32]
  const float *bias, *residual;  // may be null
  void* out;
  DType type;
  int64_t residual_stride, out_stride;
  int tokens, rows;            // rows: of the strip, 1 .. 32
};

// The largest of a row of logits. Improper: NaN or +infinity is among them, or nothing above -infinity.
struct Peak {
  float value;
  int64_t place;  // of the first
  bool proper;
};
constexpr int64_t kSampleBlock = 1024;  // logits that share a partial sum

// How many of a row are at least some value, and their weight.
struct Above {
  int64_t count;
  double weight;
};

// 32 tokens times a strip of 32 weight rows, both as bf16 with or without their low parts.
constexpr int kStripTokens = 32;
struct StripArgs {
  int64_t cols;
  const uint16_t *x_high, *x_low;  // [32 rows or more][x_stride]; x_low and w_low may be null
  int64_t x_stride;                // elements
  const uint16_t *w_high, *w_low;  // two panels of tiles
  float* result;                   // [32][32]
};

struct Kernels {
  void (*rms_norm)(const void* x, DType x_type, const float* weight, void* y, DType y_type, int64_t n, float eps);
  // A row of activations in int8 / in 16 bits, two bytes each in an order of this table's own.
  void (*quantize_coarse)(const float* x, int64_t n, int8_t* values, BlockRecord* records);
  void (*quantize_fine)(const float* x, int64_t n, int8_t* values, BlockRecord* records);
  // format -> product of activations with a strip of that format, as packed
  void (*tile)(WeightFormat format, const TileArgs& args);
  // one panel, any format, to [K, 16] floats
  void (*unpack_panel)(WeightFormat format, const uint8_t* panel, int64_t cols, float* out);
  void (*finish)(const FinishArgs& args);
  void (*widen_row)(const void* x, DType type, int64_t n, float* out);
  void (*silu_gate)(const float* gate, const float* up, float* y, int64_t n);
  // probes of the machine's roofs (roof.h)
  uint8_t (*read_bytes)(const uint8_t* bytes, int64_t n);
  int64_t (*multiply_floats)(int64_t rounds, float* result);
  int64_t (*multiply_bytes)(int64_t rounds, float* result);
  Peak (*find_peak)(const float* x, int64_t n);
  void (*weigh)(const float* x, int64_t n, float peak, float temperature, float* weights, double* block_sums);
  void (*keep_heavy)(const float* x, int64_t n, float lowest, float lightest, float* weights, double* block_sums);
  void (*typical_keys)(const float* x, int64_t n, float peak, float temperature, const float* weights, float* keys);
  Above (*measure_above)(const float* x, const float* weights, int64_t n, float lowest);
  int64_t (*gather_between)(const float* x, int64_t n, float lowest, float limit, int32_t* ids);
  // pages and attention (append.h, attention_decode.h, attention_prefill.h)
  bool (*append_heads)(const AppendArgs& args);
  void (*convert_row)(const float* x, void* y, DType type, int64_t n);
  void (*attend_few)(const AttentionCall& call, const AttentionWork& work);
  void (*attend_tile)(const AttentionCall& call, const AttentionWork& work);
  void (*attend_double)(const AttentionCall& call, const AttentionWork& work);
  void (*merge_pieces)(const AttentionCall& call, const AttentionWork& work, const AttentionMerge& merge);
  void (*merge_parts)(const MergeArgs& args);
  // gradients (attention_backward.h)
  void (*gradient_row)(const GradientRow& row);
  void (*attend_backward)(const AttentionCall& call, const GradientCall& gradients, const GradientWork& work);
  void (*attend_backward_double)(const AttentionCall& call, const GradientCall& gradients, const GradientWork& work);
  // Present where there are products of bf16:
  void (*product_bf16)(const ProductProbe& probe) = nullptr;  // for tests
  // Present where there are products of bf16 pairs:
  void (*attend_few_bf16)(const AttentionCall& call, const AttentionWork& work) = nullptr;
  void (*attend_backward_bf16)(const AttentionCall& call, const GradientCall& gradients, const GradientWork& work) = nullptr;
  void (*attend_tile_bf16)(const AttentionCall& call, const AttentionWork& work) = nullptr;
  // Present where there are tiles:
  void (*split_row)(const float* x, int64_t n, uint16_t* high, uint16_t* low) = nullptr;
  void (*pack_tiles)(const float* panel, int64_t cols, uint16_t* high, uint16_t* low) = nullptr;
  void (*strip_block)(const StripArgs& args) = nullptr;
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
const Kernels& amx_emulated_kernels();
const Kernels& kernels_for(Isa isa);

}  // namespace headrace
