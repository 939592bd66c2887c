// Mapping a file so that the system can use 2 MiB pages, and matrices out of it.
#include "mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

namespace headrace {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

ReadFailed failed(const std::string& reason) { return ReadFailed("packed weights cannot be mapped: " + reason); }

// Where the file begins at a multiple of 2 MiB, for only then can a page of the file's cache be one of the process.
std::shared_ptr<void> map_aligned(int file, size_t size) {
  size_t reserve = size + kHuge;
  void* raw = mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw failed(strerror(errno));
  std::shared_ptr<void> reserved(raw, [reserve](void* p) { munmap(p, reserve); });
  auto address = (reinterpret_cast<uintptr_t>(raw) + kHuge - 1) & ~(kHuge - 1);
  void* data = mmap(reinterpret_cast<void*>(address), size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0);
  if (data == MAP_FAILED) throw failed(strerror(errno));
#ifdef MADV_HUGEPAGE
  madvise(data, size, MADV_HUGEPAGE);  // read from the disk in pages of that size, where the file system has them
#endif
  return std::shared_ptr<void>(reserved, data);
}

}  // namespace

MappedFile::MappedFile(int file, int64_t bytes) : bytes_(bytes) {
  struct stat status;
  if (fstat(file, &status)) throw failed(strerror(errno));
  if (bytes <= 0 || status.st_size < bytes)
    throw failed("expected " + std::to_string(bytes) + " bytes, the file has " + std::to_string(status.st_size));
  memory_ = map_aligned(file, static_cast<size_t>(bytes));
}

WeightRef MappedFile::weight(WeightFormat format, int64_t rows, int64_t cols, int64_t offset) const {
  int64_t needed = packed_bytes(format, rows, cols);
  if (offset < 0 || offset % 64 || needed > bytes_ || offset > bytes_ - needed)
    throw failed("a matrix of " + std::to_string(needed) + " bytes at " + std::to_string(offset) + " is not in a file of " +
                 std::to_string(bytes_));
  auto weight = std::make_shared<PackedWeight>();
  weight->format = format;
  weight->rows = rows;
  weight->cols = cols;
  weight->panel_stride = panel_bytes(format, cols);
  std::shared_ptr<void> memory(memory_, static_cast<char*>(memory_.get()) + offset);
  weight->pieces.push_back({0, weight->panels(), memory});
  return weight;
}

}  // namespace headrace
