// A file of packed weights in memory: read-only, shared with every process that maps it, read when it is touched.
#pragma once
#include "ops.h"

namespace headrace {

// NOTE: a mapped file must not be shortened: the system then kills whoever reads what is gone (SIGBUS).
class MappedFile {
 public:
  MappedFile(int file, int64_t bytes);  // the descriptor may be closed afterwards; throws ReadFailed
  // The matrix that lies packed at `offset`; it keeps the mapping alive.
  WeightRef weight(WeightFormat format, int64_t rows, int64_t cols, int64_t offset) const;

 private:
  std::shared_ptr<void> memory_;
  int64_t bytes_;
};

}  // namespace headrace
