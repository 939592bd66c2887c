// Weight matrices as the kernels read them: panels of 16 rows, K along the panel.
//
// float formats     F32, F16: [K][16]          BF16: [K/2][16][2]  (an AMX tile's order)
// quantized         a panel is a run of groups, one per `group` columns (32 or 256):
//                     16 x fp16 scale | 16 x fp16 min (if any) | sub-scales | sub-mins | codes
//                   codes come in steps of 32 columns; per step and lane (row) 4-byte words in the order the dot
//                   instructions take them: word i holds columns 4i..4i+3 in its low nibble and 16+4i.. in its high one.
//                   A step is nibble words (256 B), then 2-bit words (128 B), then 1-bit words (64 B), as many as the
//                   width needs; 8-bit codes are 8 x 64 B. Codes are unsigned; the format's zero point is subtracted.
// The same bytes serve vector dot products and, expanded, tiles.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace headrace {

// NOTE: counts the changes of what pack_panel writes, in any format: files of packed weights are told apart by it.
constexpr int kPackedLayout = 1;

enum class WeightFormat : uint8_t {
  F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS
};
constexpr int kNumFormats = 15;

struct FormatInfo {
  const char* name;
  int block_len;     // weights per block in the file
  int block_bytes;   // bytes per block in the file
  int bits;          // of a code; 0 for float formats
  int zero;          // subtracted from the code
  bool table;        // 4-bit codes index the IQ4 table (whose entries carry zero = 128)
  int group;         // columns per fp16 scale
  int sub;           // columns per sub-scale, or per scale when group == 32
  bool has_min;
};

const FormatInfo& format_info(WeightFormat format);
WeightFormat format_from_name(const std::string& name);  // throws std::invalid_argument
int64_t panel_bytes(WeightFormat format, int64_t cols);
int64_t row_bytes(WeightFormat format, int64_t cols);    // in the file
constexpr int step_bytes(int bits) { return bits * 64; } // 16 rows x 32 columns

extern const uint8_t kIq4Table[16];

struct PackedWeight {
  WeightFormat format;
  int64_t rows, cols;
  int64_t panel_stride;  // bytes
  struct Piece {  // panels in order, up to the next piece
    int64_t begin, end;
    std::shared_ptr<void> memory;
  };
  std::vector<Piece> pieces;  // one, or one for each NUMA node
  int64_t panels() const { return (rows + 15) / 16; }
  int64_t strips() const { return (panels() + 1) / 2; }  // of two panels: what is shared out
  int64_t bytes() const { return panels() * panel_stride; }
  const Piece& piece_of(int64_t p) const {
    const Piece* piece = pieces.data();
    while (p >= piece->end) ++piece;
    return *piece;
  }
  const uint8_t* panel(int64_t p) const {
    const Piece& piece = piece_of(p);
    return static_cast<const uint8_t*>(piece.memory.get()) + (p - piece.begin) * panel_stride;
  }
  uint8_t* panel(int64_t p) { return const_cast<uint8_t*>(static_cast<const PackedWeight*>(this)->panel(p)); }
};

// Packs panel p from the bytes a file has for its rows: 16, or what is left of the matrix.
void pack_panel(PackedWeight& weight, int64_t p, const uint8_t* raw);

// One row as floats, from the file's bytes / from the packed ones. Bit for bit what GGUF defines.
void dequantize_row(WeightFormat format, const uint8_t* raw, int64_t cols, float* out);
void unpack_row(const PackedWeight& weight, int64_t row, float* out);

}  // namespace headrace
