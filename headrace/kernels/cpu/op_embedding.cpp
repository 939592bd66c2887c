// embedding and select_rows: rows of a packed table by token id; rows of activations by number.
#include <cstring>

#include "ops.h"

namespace headrace {
namespace {

class Embedding : public Op {
 public:
  Embedding(TensorRef y, TensorRef ids, WeightRef table) : Op("embedding"), y_(out(y)), ids_(in(ids)), table_(table) {}
  int64_t chunks(int, const Sizes& sizes, int) const override { return ids_->rows(sizes); }
  void run(int, int64_t chunk, Worker&, const Sizes&) override {
    int32_t id = ids_->at<int32_t>()[chunk];
    if (id < 0 || id >= table_->rows)
      throw std::invalid_argument("embedding: ids: expected 0 to " + std::to_string(table_->rows - 1) + ", got " +
                                  std::to_string(id));
    unpack_row(*table_, id, y_->row_as<float>(chunk));
  }

 private:
  TensorRef y_, ids_;
  WeightRef table_;
};

class SelectRows : public Op {
 public:
  SelectRows(TensorRef y, TensorRef x, TensorRef rows) : Op("select_rows"), y_(out(y)), x_(in(x)), rows_(in(rows)) {}
  int64_t chunks(int, const Sizes& sizes, int) const override { return rows_->rows(sizes); }
  void run(int, int64_t chunk, Worker&, const Sizes& sizes) override {
    int32_t row = rows_->at<int32_t>()[chunk];
    if (row < 0 || row >= x_->rows(sizes))
      throw std::invalid_argument("select_rows: rows: expected 0 to " + std::to_string(x_->rows(sizes) - 1) + ", got " +
                                  std::to_string(row));
    memcpy(y_->row(chunk), x_->row(row), static_cast<size_t>(x_->cols()) * 4);
  }

 private:
  TensorRef y_, x_, rows_;
};

}  // namespace

void submit_embedding(Runner& runner, TensorRef y, TensorRef ids, WeightRef table) {
  Expect expect{"embedding"};
  expect.dtype(*ids, "ids", {DType::i32});
  expect.shape(*ids, "ids", {-1});
  expect.packed(*ids, "ids");
  expect.dtype(*y, "out", {DType::f32});
  expect.shape(*y, "out", {ids->shape[0], table->cols});
  expect.packed(*y, "out");
  runner.submit(std::make_unique<Embedding>(y, ids, table));
}

void submit_select_rows(Runner& runner, TensorRef y, TensorRef x, TensorRef rows) {
  Expect expect{"select_rows"};
  expect.dtype(*x, "x", {DType::f32});
  expect.dtype(*y, "out", {DType::f32});
  expect.dtype(*rows, "rows", {DType::i32});
  expect.shape(*rows, "rows", {-1});
  expect.that(x->shape.size() == 2, "x", "[tokens, dim]", shape_text(*x));
  expect.shape(*y, "out", {rows->shape[0], x->shape[1]});
  expect.packed(*x, "x");
  expect.packed(*y, "out");
  runner.submit(std::make_unique<SelectRows>(y, x, rows));
}

}  // namespace headrace
