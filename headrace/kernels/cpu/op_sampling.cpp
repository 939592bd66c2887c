// sample as an op: a chunk is a row. Penalties, the filters' borders and the draw. Everything a row needs is in the row's
// own numbers, so no other row and no thread can change what it draws.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "border_search.h"
#include "ops.h"
#include "random.h"

namespace headrace {
namespace {

struct RowSettings {
  double temperature, top_p, min_p, typical_p, repetition, presence, frequency;
  int64_t top_k, seed, draw;
  bool penalized() const { return repetition != 1 || presence != 0 || frequency != 0; }
  bool greedy() const { return static_cast<float>(temperature) == 0; }
};

[[noreturn]] void refuse(int64_t row, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string("sample: ") + argument + ": expected " + expected + ", got " + got +
                              " in row " + std::to_string(row));
}

RowSettings read_settings(const Tensor& reals, const Tensor& integers, int64_t row) {
  const double* r = reals.row_as<double>(row);
  const int64_t* n = integers.row_as<int64_t>(row);
  auto check = [&](bool ok, const char* name, const char* expected, double got) {
    if (!ok) refuse(row, name, expected, std::to_string(got));
  };
  RowSettings s{r[0], r[1], r[2], r[3], r[4], r[5], r[6], n[0], n[1], n[2]};
  check(s.temperature >= 0 && s.temperature <= 3e38, "temperature", "0 to 3e38", s.temperature);
  check(s.top_p > 0 && s.top_p <= 1, "top_p", "more than 0 and at most 1", s.top_p);
  check(s.min_p >= 0 && s.min_p <= 1, "min_p", "0 to 1", s.min_p);
  check(s.typical_p > 0 && s.typical_p <= 1, "typical_p", "more than 0 and at most 1", s.typical_p);
  check(s.repetition > 0 && std::isfinite(s.repetition), "repetition_penalty", "a finite number > 0", s.repetition);
  check(std::isfinite(s.presence), "presence_penalty", "a finite number", s.presence);
  check(std::isfinite(s.frequency), "frequency_penalty", "a finite number", s.frequency);
  if (s.top_k < 0) refuse(row, "top_k", "at least 0", std::to_string(s.top_k));
  return s;
}

// What a row has seen: ids rising, and how often each came in the answer (0: in the prompt only).
struct Seen {
  const int32_t *ids, *counts;
  int64_t size;
};

Seen seen_by(const Tensor& ids, const Tensor& counts, const Tensor& starts, int64_t row) {
  int64_t first = starts.at<int32_t>()[row], last = starts.at<int32_t>()[row + 1];
  if (first < 0 || last < first || last > ids.shape[0])
    refuse(row, "counts.starts", "rising, 0 to " + std::to_string(ids.shape[0]),
           std::to_string(first) + " to " + std::to_string(last));
  return {ids.at<int32_t>() + first, counts.at<int32_t>() + first, last - first};
}

void penalize(const RowSettings& s, const Seen& seen, int64_t vocab, int64_t row, float* x) {
  for (int64_t j = 0, before = -1; j < seen.size; ++j) {
    int64_t id = seen.ids[j];
    if (id <= before || id >= vocab)
      refuse(row, "counts.ids", "rising, 0 to " + std::to_string(vocab - 1), std::to_string(id));
    if (seen.counts[j] < 0) refuse(row, "counts.counts", "at least 0", std::to_string(seen.counts[j]));
    double value = x[id];
    value = value > 0 ? value / s.repetition : value * s.repetition;
    if (seen.counts[j]) value -= s.presence + s.frequency * seen.counts[j];
    x[id] = static_cast<float>(value);
    before = id;
  }
}

// The token of a draw: the first whose weights, summed in the order of ids, exceed u of the total.
int64_t draw_token(const float* weights, const double* block_sums, int64_t n, double u) {
  int64_t blocks = (n + kSampleBlock - 1) / kSampleBlock, chosen = 0;
  double total = 0, before = 0;
  for (int64_t b = 0; b < blocks; ++b) total += block_sums[b];
  const double target = u * total;
  for (int64_t b = 0; b < blocks; ++b) {
    if (block_sums[b] > 0) chosen = b;
    if (before + block_sums[b] > target) break;
    before += block_sums[b];
  }
  // NOTE: the sum of a block is rounded: at its end the last token with weight is the one.
  int64_t end = std::min(n, (chosen + 1) * kSampleBlock), token = 0;
  for (int64_t i = chosen * kSampleBlock; i < end; ++i) {
    if (weights[i] > 0) token = i;
    before += static_cast<double>(weights[i]);
    if (before > target && weights[i] > 0) break;
  }
  return token;
}

// How far from the peak a border is looked for at first, in logarithms of weights, and how often twice as far; how often
// what is between is halved, and how many are few.
constexpr float kFirstReach = 4.0f, kFirstDistance = 1.0f;
constexpr int kReaches = 4, kHalves = 8;
constexpr int64_t kFew = 256;

constexpr int32_t kNoToken = -1;  // of logits with NaN or infinity, or nothing above -infinity

int64_t padded(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

class Sample : public Op {
 public:
  Sample(const Kernels& kernels, const SampleTensors& t)
      : Op("sample"), kernels_(kernels), ids_(out(t.out)), logits_(in(t.logits)), reals_(in(t.reals)),
        integers_(in(t.integers)) {
    if (!t.seen_ids) return;
    seen_ids_ = in(t.seen_ids);
    seen_counts_ = in(t.seen_counts);
    seen_starts_ = in(t.seen_starts);
  }
  int64_t chunks(int, const Sizes& sizes, int) const override { return logits_->rows(sizes); }
  void run(int, int64_t row, Worker& worker, const Sizes&) override {
    if (integers_->row_as<int64_t>(row)[2] < 0) return;
    const int64_t n = logits_->cols(), blocks = (n + kSampleBlock - 1) / kSampleBlock;
    const int64_t floats = padded(n * 4), sums = padded(blocks * 8);
    char* scratch = worker.scratch(2 * floats + sums + padded((n + 1) * 4) + BorderSearch::scratch_bytes(n + 1));
    const RowSettings s = read_settings(*reals_, *integers_, row);
    const float* x = penalized_row(s, row, reinterpret_cast<float*>(scratch));
    Peak peak = kernels_.find_peak(x, n);
    if (!peak.proper) {
      ids_->at<int32_t>()[row] = kNoToken;
      return;
    }
    int64_t token = peak.place;
    if (!s.greedy()) {
      auto* weights = reinterpret_cast<float*>(scratch + floats);
      auto* block_sums = reinterpret_cast<double*>(scratch + 2 * floats);
      kernels_.weigh(x, n, peak.value, static_cast<float>(s.temperature), weights, block_sums);
      filter(s, x, peak.value, weights, block_sums, scratch + 2 * floats + sums);
      if (s.typical_p < 1) {
        auto* keys = reinterpret_cast<float*>(scratch);  // x may be there too: a key is written where its logit was
        kernels_.typical_keys(x, n, peak.value, static_cast<float>(s.temperature), weights, keys);
        keep_typical(s.typical_p, keys, weights, block_sums, scratch + 2 * floats + sums);
      }
      token = draw_token(weights, block_sums, n, uniform(static_cast<uint64_t>(s.seed), static_cast<uint64_t>(s.draw)));
    }
    ids_->at<int32_t>()[row] = static_cast<int32_t>(token);
  }

 private:
  const float* penalized_row(const RowSettings& s, int64_t row, float* copy) const {
    const float* x = logits_->row_as<float>(row);
    if (!seen_ids_ || !s.penalized()) return x;
    Seen seen = seen_by(*seen_ids_, *seen_counts_, *seen_starts_, row);
    memcpy(copy, x, static_cast<size_t>(logits_->cols()) * 4);
    penalize(s, seen, logits_->cols(), row, copy);
    return copy;
  }

  void filter(const RowSettings& s, const float* x, float peak, float* weights, double* block_sums, char* scratch) const {
    const int64_t n = logits_->cols();
    const bool some = s.top_k > 0 && s.top_k < n;
    if (!some && s.top_p >= 1 && s.min_p <= 0) return;
    const float reach = kFirstReach * static_cast<float>(s.temperature);
    Border border;
    double within = total_of(block_sums);
    if (some) {
      border = border_of(x, weights, peak, reach, {s.top_k, INFINITY}, scratch);
      within = border.weight;
    }
    if (s.top_p < 1) border = tighter(border, border_of(x, weights, peak, reach, {INT64_MAX, s.top_p * within}, scratch));
    if (border.ties != INT64_MAX) drop_surplus(border, x, weights, n);
    kernels_.keep_heavy(x, n, border.lowest, static_cast<float>(s.min_p), weights, block_sums);
  }

  void keep_typical(double typical_p, const float* keys, float* weights, double* block_sums, char* scratch) const {
    const int64_t n = logits_->cols();
    Border border = border_of(keys, weights, 0, kFirstDistance, {INT64_MAX, typical_p * total_of(block_sums)}, scratch);
    if (border.ties != INT64_MAX) drop_surplus(border, keys, weights, n);
    kernels_.keep_heavy(keys, n, border.lowest, 0.0f, weights, block_sums);
  }

  double total_of(const double* block_sums) const {
    double total = 0;
    for (int64_t b = 0; b < (logits_->cols() + kSampleBlock - 1) / kSampleBlock; ++b) total += block_sums[b];
    return total;
  }

  // What a border is looked for with: the first of the two that is reached.
  struct Wanted {
    int64_t count;
    double weight;
    bool reached(const Above& above) const { return above.count >= count || above.weight >= weight; }
  };

  // Passes over the whole row, which vectors make quick, find two values with few of the row between them and the border
  // among these; they are looked at one by one. reach: how far from the peak the border may be, as a first guess.
  Border border_of(const float* x, const float* weights, float peak, float reach, Wanted wanted, char* scratch) const {
    const int64_t n = logits_->cols();
    float limit = INFINITY, lowest = peak - reach;
    Above passed{0, 0}, within{n, 0};
    for (int tries = 0; tries < kReaches && lowest > -INFINITY; ++tries, reach *= 2, lowest = peak - reach) {
      within = kernels_.measure_above(x, weights, n, lowest);
      if (wanted.reached(within)) break;
      limit = lowest, passed = within, within = {n, 0};
    }
    if (within.count == n) lowest = -INFINITY;
    for (int halves = 0; halves < kHalves && within.count - passed.count > kFew && lowest > -INFINITY; ++halves) {
      const float middle = lowest + (std::min(limit, peak) - lowest) / 2;
      Above above = kernels_.measure_above(x, weights, n, middle);
      if (wanted.reached(above)) lowest = middle, within = above;
      else limit = middle, passed = above;
    }
    auto* places = reinterpret_cast<int32_t*>(scratch);
    const int64_t found = kernels_.gather_between(x, n, lowest, limit, places);
    if (!found) return {};
    BorderSearch search(x, weights, places, found, {passed.count, passed.weight}, scratch + padded((n + 1) * 4));
    return search.find(wanted.count, wanted.weight);
  }

  static void drop_surplus(const Border& border, const float* x, float* weights, int64_t n) {
    int64_t met = 0;
    for (int64_t i = 0; i < n; ++i)
      if (x[i] == border.lowest && ++met > border.ties) weights[i] = 0;
  }

  const Kernels& kernels_;
  TensorRef ids_, logits_, reals_, integers_, seen_ids_, seen_counts_, seen_starts_;
};

}  // namespace

void submit_sample(Runner& runner, Isa isa, const SampleTensors& t) {
  Expect expect{"sample"};
  expect.that(t.logits->shape.size() == 2 && t.logits->shape[1] >= 1 && t.logits->shape[1] <= INT32_MAX, "logits",
              "[rows, vocab] with vocab >= 1", shape_text(*t.logits));
  const int64_t rows = t.logits->shape[0];
  auto check = [&](const TensorRef& tensor, const char* name, DType type, std::initializer_list<int64_t> dims) {
    expect.dtype(*tensor, name, {type});
    expect.shape(*tensor, name, dims);
    expect.packed(*tensor, name);
  };
  expect.dtype(*t.logits, "logits", {DType::f32});
  expect.packed(*t.logits, "logits");
  check(t.out, "out", DType::i32, {rows});
  check(t.reals, "settings.reals", DType::f64, {rows, 7});
  check(t.integers, "settings.integers", DType::i64, {rows, 3});
  if (t.seen_ids) {
    check(t.seen_ids, "counts.ids", DType::i32, {-1});
    check(t.seen_counts, "counts.counts", DType::i32, {t.seen_ids->shape[0]});
    check(t.seen_starts, "counts.starts", DType::i32, {rows + 1});
  }
  runner.submit(std::make_unique<Sample>(kernels_for(isa), t));
}

}  // namespace headrace
