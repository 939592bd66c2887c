// The machine's roofs as ops: one chunk per thread, each on memory of its own.
#include "roof_probes.h"

#include <chrono>

#include "kernels.h"

namespace headrace {
namespace {

// Slices start on 4 KiB and end before the next one's start.
struct Slice {
  int64_t begin, bytes;
};
Slice slice_of(int64_t bytes, int64_t part, int parts) {
  auto cut = [&](int64_t i) { return i == parts ? bytes : (bytes / parts * i) & ~int64_t{4095}; };
  return {cut(part), cut(part + 1) - cut(part)};
}

class TouchPages : public Op {
 public:
  explicit TouchPages(TensorRef memory) : Op("touch_pages"), memory_(out(memory)) {}
  int64_t chunks(int, const Sizes&, int num_threads) const override { return num_threads; }
  void run(int, int64_t chunk, Worker& worker, const Sizes&) override {
    Slice slice = slice_of(memory_->capacity_bytes(), chunk, worker.num_threads());
    for (int64_t i = 0; i < slice.bytes; i += 4096) memory_->data[slice.begin + i] = 1;
  }

 private:
  TensorRef memory_;
};

class ReadProbe : public Op {
 public:
  ReadProbe(const Kernels& kernels, TensorRef memory, int64_t bytes, int64_t passes)
      : Op("read_probe"), kernels_(kernels), memory_(in(memory)), bytes_(bytes), passes_(passes) {}
  int64_t chunks(int, const Sizes&, int num_threads) const override { return num_threads; }
  void run(int, int64_t chunk, Worker& worker, const Sizes&) override {
    Slice slice = slice_of(bytes_, chunk, worker.num_threads());
    const auto* data = reinterpret_cast<const uint8_t*>(memory_->data) + slice.begin;
    uint8_t all = 0;
    for (int64_t pass = 0; pass < passes_; ++pass) all |= kernels_.read_bytes(data, slice.bytes);
    *worker.scratch(64) = static_cast<char>(all);
  }

 private:
  const Kernels& kernels_;
  TensorRef memory_;
  int64_t bytes_, passes_;
};

using Multiply = int64_t (*)(int64_t rounds, float* result);

class MultiplyProbe : public Op {
 public:
  MultiplyProbe(Multiply multiply, int64_t rounds, std::atomic<int64_t>& operations)
      : Op("multiply_probe"), multiply_(multiply), rounds_(rounds), operations_(operations) {}
  int64_t chunks(int, const Sizes&, int num_threads) const override { return num_threads; }
  void run(int, int64_t, Worker& worker, const Sizes&) override {
    auto* result = reinterpret_cast<float*>(worker.scratch(64));
    result[0] = 0.5f;
    result[1] = 1.0f;
    operations_ += multiply_(rounds_, result);
  }

 private:
  Multiply multiply_;
  int64_t rounds_;
  std::atomic<int64_t>& operations_;
};

Multiply probe_named(Isa isa, const std::string& name) {
  if (name == "fp32") return kernels_for(isa).multiply_floats;
  if (name == "int8") return kernels_for(isa).multiply_bytes;
#if defined(__x86_64__)
  if (name == "bf16_avx512" && isa >= Isa::avx512_bf16) return multiply_bf16_avx512;
  if (name == "bf16_amx" && isa >= Isa::amx) return multiply_bf16_amx;
  if (name == "int8_amx" && isa >= Isa::amx) return multiply_int8_amx;
#endif
  return nullptr;
}

Isa checked(Isa isa) {
  if (isa > best_isa()) throw std::invalid_argument(std::string("isa: this CPU has no ") + isa_name(isa));
  return isa;
}

double submit_timed(Pool& pool, std::unique_ptr<Op> op) {
  auto started = std::chrono::steady_clock::now();
  pool.submit(std::move(op));
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace

std::vector<std::string> multiply_probes(Isa isa) {
  std::vector<std::string> names;
  for (const char* name : {"fp32", "int8", "bf16_avx512", "bf16_amx", "int8_amx"})
    if (probe_named(checked(isa), name)) names.push_back(name);
  return names;
}

void touch_pages(Pool& pool, const TensorRef& memory) { pool.submit(std::make_unique<TouchPages>(memory)); }

double read_seconds(Pool& pool, Isa isa, const TensorRef& memory, int64_t num_bytes, int64_t passes) {
  Expect expect{"read_seconds"};
  bool fits = num_bytes >= 1 && num_bytes <= memory->capacity_bytes();
  expect.that(fits, "num_bytes", "1 to " + std::to_string(memory->capacity_bytes()), std::to_string(num_bytes));
  expect.that(passes >= 1, "passes", "at least 1", std::to_string(passes));
  return submit_timed(pool, std::make_unique<ReadProbe>(kernels_for(checked(isa)), memory, num_bytes, passes));
}

Multiplied multiply_seconds(Pool& pool, Isa isa, const std::string& probe, int64_t rounds) {
  Expect expect{"multiply_seconds"};
  Multiply multiply = probe_named(checked(isa), probe);
  expect.that(multiply, "probe", std::string("one that runs on ") + isa_name(isa), probe);
  expect.that(rounds >= 1, "rounds", "at least 1", std::to_string(rounds));
  std::atomic<int64_t> operations{0};
  double seconds = submit_timed(pool, std::make_unique<MultiplyProbe>(multiply, rounds, operations));
  return {operations.load(), seconds};
}

}  // namespace headrace
