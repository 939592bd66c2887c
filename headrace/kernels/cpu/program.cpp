// Recording, buffer planning by lifetime, replay.
#include <algorithm>
#include <map>

#include "runtime.h"

namespace headrace {

struct Program::Life {
  Tensor* tensor;
  int64_t bytes;
  size_t first, last;  // ops that touch it first and last
  int64_t offset = -1;
};

TensorRef Program::buffer(DType dtype, Rows rows, std::vector<int64_t> shape) {
  auto t = std::make_shared<Tensor>();
  t->dtype = dtype;
  t->rows_kind = rows;
  if (rows == Rows::tokens) shape[0] = capacity_.tokens;
  if (rows == Rows::requests) shape[0] = capacity_.requests;
  if (rows == Rows::outputs) shape[0] = capacity_.outputs;
  t->strides = contiguous_strides(shape);
  t->shape = std::move(shape);
  t->planned = true;
  buffers_.push_back(t);
  return t;
}

void Program::submit(std::unique_ptr<Op> op) {
  if (finished_) throw std::invalid_argument("program: finished, nothing more can be recorded");
  ops_.push_back(std::move(op));
}

void Program::keep(const TensorRef& t) { kept_.push_back(t); }

std::vector<Program::Life> Program::lives() const {
  std::map<Tensor*, Life> lives;
  for (const auto& b : buffers_) lives[b.get()] = {b.get(), b->capacity_bytes(), SIZE_MAX, 0};
  auto touch = [&](const TensorRef& t, size_t i) {
    auto found = lives.find(t->base ? t->base.get() : t.get());
    if (found == lives.end()) return;
    found->second.first = std::min(found->second.first, i);
    found->second.last = std::max(found->second.last, i);
  };
  for (size_t i = 0; i < ops_.size(); ++i) {
    for (const auto& t : ops_[i]->reads()) touch(t, i);
    for (const auto& t : ops_[i]->writes()) touch(t, i);
  }
  for (const auto& t : kept_) {
    touch(t, 0);
    touch(t, ops_.size());
  }
  std::vector<Life> used;
  for (auto& entry : lives)
    if (entry.second.first != SIZE_MAX) used.push_back(entry.second);
  return used;
}

// Largest first, each at the lowest offset where nothing alive at the same time lies.
void Program::finish() {
  if (finished_) return;
  auto all = lives();
  std::sort(all.begin(), all.end(), [](const Life& a, const Life& b) {
    return a.bytes != b.bytes ? a.bytes > b.bytes : a.first < b.first;
  });
  for (size_t i = 0; i < all.size(); ++i) {
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (size_t j = 0; j < i; ++j)
      if (all[j].first <= all[i].last && all[i].first <= all[j].last)
        taken.push_back({all[j].offset, all[j].offset + all[j].bytes});
    std::sort(taken.begin(), taken.end());
    int64_t offset = 0;
    for (const auto& range : taken) {
      if (offset + all[i].bytes <= range.first) break;
      offset = std::max(offset, (range.second + 63) & ~int64_t{63});
    }
    all[i].offset = offset;
    arena_bytes_ = std::max(arena_bytes_, offset + all[i].bytes);
  }
  arena_ = allocate_bytes(arena_bytes_);
  for (const auto& life : all) {
    life.tensor->data = static_cast<char*>(arena_.get()) + life.offset;
    life.tensor->owner = arena_;
  }
  auto place_view = [](const TensorRef& t) {
    if (t->base) t->data = t->base->data + t->base_offset_bytes;
  };
  for (const auto& op : ops_) {
    for (const auto& t : op->reads()) place_view(t);
    for (const auto& t : op->writes()) place_view(t);
  }
  finished_ = true;
}

void Program::run(const Sizes& sizes, std::vector<double>* seconds) {
  if (!finished_) throw std::invalid_argument("program: call finish() before run()");
  auto check = [](const char* what, int64_t n, int64_t capacity) {
    if (n < 0 || n > capacity)
      throw std::invalid_argument(std::string("program: ") + what + ": expected 0 to " + std::to_string(capacity) +
                                  ", got " + std::to_string(n));
  };
  check("tokens", sizes.tokens, capacity_.tokens);
  check("requests", sizes.requests, capacity_.requests);
  check("outputs", sizes.outputs, capacity_.outputs);
  if (seconds) seconds->assign(ops_.size(), 0.0);
  pool_->run(ops_, sizes, seconds);
}

std::vector<std::string> Program::op_names() const {
  std::vector<std::string> names;
  for (const auto& op : ops_) names.push_back(op->name());
  return names;
}

}  // namespace headrace
