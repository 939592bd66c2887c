// Packing as an op: chunks are runs of panels, from memory or read from a file into the thread's own scratch.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "ops.h"

namespace headrace {
namespace {

// Read at once: what stays in a core's own cache while it is packed, and is much beside the cost of a system call.
constexpr int64_t kPieceBytes = int64_t{128} << 10;

void read_whole(int file, uint8_t* out, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    ssize_t got = pread(file, out, static_cast<size_t>(bytes), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      throw ReadFailed("the model's file cannot be read at byte " + std::to_string(offset) + ": " +
                       (got ? strerror(errno) : "it ends there, though it was longer when it was opened"));
    out += got;
    offset += got;
    bytes -= got;
  }
}

class Pack : public Op {
 public:
  Pack(PackedWeight& weight, const uint8_t* raw) : Pack(weight, raw, -1, 0) {}
  Pack(PackedWeight& weight, int file, int64_t offset) : Pack(weight, nullptr, file, offset) {}
  int64_t chunks(int, const Sizes&, int) const override { return chunks_before(weight_.pieces.size()); }
  int64_t node_begin(int, const Sizes&, int node, const Nodes&) const override { return chunks_before(static_cast<size_t>(node)); }
  bool stays(int, const Sizes&) const override { return true; }  // memory is where it was first written

  void run(int, int64_t chunk, Worker& worker, const Sizes&) override {
    const PackedWeight::Piece* piece = weight_.pieces.data();
    for (; chunk >= chunks_in(*piece); ++piece) chunk -= chunks_in(*piece);
    int64_t first = piece->begin + chunk * per_chunk_, last = std::min(first + per_chunk_, piece->end);
    int64_t begin = first * panel_, bytes = std::min(last * 16, weight_.rows) * (panel_ / 16) - begin;
    const uint8_t* raw = raw_ ? raw_ + begin : read(worker, offset_ + begin, bytes);
    for (int64_t p = first; p < last; ++p) pack_panel(weight_, p, raw + (p - first) * panel_);
  }

 private:
  Pack(PackedWeight& weight, const uint8_t* raw, int file, int64_t offset)
      : Op("pack"), weight_(weight), raw_(raw), file_(file), offset_(offset),
        panel_(16 * row_bytes(weight.format, weight.cols)), per_chunk_(std::max<int64_t>(1, kPieceBytes / panel_)) {}

  int64_t chunks_in(const PackedWeight::Piece& piece) const { return (piece.end - piece.begin + per_chunk_ - 1) / per_chunk_; }
  int64_t chunks_before(size_t piece) const {
    int64_t sum = 0;
    for (size_t i = 0; i < piece; ++i) sum += chunks_in(weight_.pieces[i]);
    return sum;
  }

  const uint8_t* read(Worker& worker, int64_t offset, int64_t bytes) const {
    auto* piece = reinterpret_cast<uint8_t*>(worker.scratch(bytes));
    read_whole(file_, piece, bytes, offset);
    return piece;
  }

  PackedWeight& weight_;
  const uint8_t* raw_;
  int file_;
  int64_t offset_, panel_, per_chunk_;  // panel_: bytes in the file
};

void check_shape(WeightFormat format, int64_t rows, int64_t cols) {
  int block = format_info(format).block_len;
  Expect{"pack"}.that(rows > 0 && cols > 0 && cols % block == 0, "shape", "rows of a multiple of " + std::to_string(block),
                      std::to_string(rows) + " x " + std::to_string(cols));
}

// Memory for a matrix, the rows of each node in a piece of their own.
WeightRef new_weight(const Nodes& nodes, Arena& arena, WeightFormat format, int64_t rows, int64_t cols) {
  auto weight = std::make_shared<PackedWeight>();
  weight->format = format;
  weight->rows = rows;
  weight->cols = cols;
  weight->panel_stride = panel_bytes(format, cols);
  for (int node = 0; node < nodes.count(); ++node) {
    int64_t begin = std::min(weight->panels(), 2 * nodes.begin(weight->strips(), node));
    int64_t end = std::min(weight->panels(), 2 * nodes.begin(weight->strips(), node + 1));
    weight->pieces.push_back({begin, end, arena.take((end - begin) * weight->panel_stride, node)});
  }
  return weight;
}

}  // namespace

WeightRef pack_weight(Pool& pool, WeightFormat format, int64_t rows, int64_t cols, const uint8_t* raw, int64_t raw_bytes) {
  check_shape(format, rows, cols);
  int64_t in_row = row_bytes(format, cols);
  Expect{"pack"}.that(raw_bytes / in_row == rows && raw_bytes % in_row == 0, "raw",
                      std::to_string(rows) + " rows of " + std::to_string(in_row) + " bytes",
                      std::to_string(raw_bytes) + " bytes");
  auto weight = new_weight(pool.nodes(), pool.arena(), format, rows, cols);
  pool.submit(std::make_unique<Pack>(*weight, raw));
  return weight;
}

WeightRef pack_file(Pool& pool, Arena& arena, WeightFormat format, int64_t rows, int64_t cols, int file, int64_t offset) {
  check_shape(format, rows, cols);
  auto weight = new_weight(pool.nodes(), arena, format, rows, cols);
  pool.submit(std::make_unique<Pack>(*weight, file, offset));
  return weight;
}

int64_t packed_bytes(WeightFormat format, int64_t rows, int64_t cols) {
  return ((rows + 15) / 16 * panel_bytes(format, cols) + 63) & ~int64_t{63};
}

}  // namespace headrace
