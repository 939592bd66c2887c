// The passes of sampling over a row of logits: its peak, its weights, and the removal of what the filters exclude.
// A weight is e^((x - peak) / temperature). Blocks of kSampleBlock keep partial sums, so that a draw looks into one block.
// Wins: always. Schedule: 16 lanes across the row; the peak's place is looked up afterwards, inside one block.
#pragma once
#include "elements.h"
#include "kernels.h"

namespace headrace {
namespace HEADRACE_ISA {

static inline int64_t first_equal(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] == value) return i;
  return n;
}

// One block: its largest value; `bad` becomes 1 in a lane that met NaN or +infinity.
static inline float block_peak(const float* x, int64_t n, Floats* bad) {
  const Floats infinity = broadcast(INFINITY), one = broadcast(1.0f);
  Floats most = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats a = load(x + i);
    most = maximum(most, a);
    *bad = maximum(*bad, select_less(a, infinity, zero(), one));
  }
  if (i < n) {
    float last[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) last[lane] = i + lane < n ? x[i + lane] : -INFINITY;
    Floats a = load(last);
    most = maximum(most, a);
    *bad = maximum(*bad, select_less(a, infinity, zero(), one));
  }
  return largest(most);
}

static Peak find_peak(const float* x, int64_t n) {
  Floats bad = zero();
  Peak peak{-INFINITY, 0, true};
  int64_t best_start = 0;
  for (int64_t start = 0; start < n; start += kSampleBlock) {
    float most = block_peak(x + start, n - start < kSampleBlock ? n - start : kSampleBlock, &bad);
    if (most > peak.value) {
      peak.value = most;
      best_start = start;
    }
  }
  peak.proper = !(largest(bad) > 0.0f) && peak.value > -INFINITY;
  if (peak.proper) peak.place = best_start + first_equal(x + best_start, n - best_start, peak.value);
  return peak;
}

static inline double sum_of_lanes(Floats a) {
  float lanes[kLanes];
  store(lanes, a);
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(lanes[i]);
  return total;
}

// weights[i] = e^((x[i] - peak) / temperature); block_sums[b] = the sum of block b.
static void weigh(const float* x, int64_t n, float peak, float temperature, float* weights, double* block_sums) {
  const Floats top = broadcast(peak), scale = broadcast(temperature);
  for (int64_t start = 0; start < n; start += kSampleBlock) {
    int64_t end = n - start < kSampleBlock ? n : start + kSampleBlock;
    Floats total = zero();
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      Floats w = exponential(div(sub(load(x + i), top), scale));
      store(weights + i, w);
      total = add(total, w);
    }
    double rest = 0;
    if (i < end) {
      float lanes[kLanes];
      store(lanes, exponential(div(sub(load_first<AsFloat>(x + i, end - i), top), scale)));
      for (int64_t lane = 0; i + lane < end; ++lane) {
        weights[i + lane] = lanes[lane];
        rest += static_cast<double>(lanes[lane]);
      }
    }
    block_sums[start / kSampleBlock] = sum_of_lanes(total) + rest;
  }
}

// Zero weight for logits below `lowest` and for weights below `lightest`; block_sums again.
static void keep_heavy(const float* x, int64_t n, float lowest, float lightest, float* weights, double* block_sums) {
  const Floats low = broadcast(lowest), light = broadcast(lightest);
  for (int64_t start = 0; start < n; start += kSampleBlock) {
    int64_t end = n - start < kSampleBlock ? n : start + kSampleBlock;
    Floats total = zero();
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      Floats w = load(weights + i);
      w = select_less(w, light, zero(), select_less(load(x + i), low, zero(), w));
      store(weights + i, w);
      total = add(total, w);
    }
    double rest = 0;
    for (; i < end; ++i) {
      if (x[i] < lowest || weights[i] < lightest) weights[i] = 0.0f;
      rest += static_cast<double>(weights[i]);
    }
    block_sums[start / kSampleBlock] = sum_of_lanes(total) + rest;
  }
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
