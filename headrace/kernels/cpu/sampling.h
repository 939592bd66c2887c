// The passes of sampling over a row of logits: its peak, its weights, and the removal of what the filters exclude.
// A weight is e^((x - peak) / temperature). Blocks of kSampleBlock keep partial sums, so that a draw looks into one block.
// Wins: always. Schedule: 16 lanes across the row; the peak's place is looked up afterwards, inside one block.
#pragma once
#include <cmath>

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

constexpr int64_t kGroup = 4 * kLanes;  // that a pass adds up, or leaves alone, together

static inline float log_weight(float x, float peak, float temperature) { return (x - peak) / temperature; }

// Keys whose falling order is that of rising distance from the mean logarithm of the weights; -inf where there is none.
// Logits and keys may be the same row.
static void typical_keys(const float* x, int64_t n, float peak, float temperature, const float* weights, float* keys) {
  const Floats top = broadcast(peak), scale = broadcast(temperature), none = broadcast(-INFINITY);
  double total = 0, moment = 0;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    Floats weight = zero(), moments = zero();
    for (int64_t j = i; j < i + kGroup; j += kLanes) {
      Floats w = load(weights + j), key = div(sub(load(x + j), top), scale);
      store(keys + j, key);
      weight = add(weight, w);
      moments = add(moments, select_less(zero(), w, mul(w, key), zero()));
    }
    total += sum_of_lanes(weight);
    moment += sum_of_lanes(moments);
  }
  for (int64_t j = i; j < n; ++j) {
    keys[j] = log_weight(x[j], peak, temperature);
    if (!(weights[j] > 0)) continue;
    total += static_cast<double>(weights[j]);
    moment += static_cast<double>(weights[j]) * static_cast<double>(keys[j]);
  }
  // In two parts, so that no more is lost than by one rounding.
  const double mean = moment / total;
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
  for (i = 0; i + kLanes <= n; i += kLanes) {
    Floats distance = absolute(sub(sub(load(keys + i), broadcast(high)), broadcast(low)));
    store(keys + i, select_less(zero(), load(weights + i), sub(zero(), distance), none));
  }
  for (; i < n; ++i) keys[i] = weights[i] > 0 ? -std::fabs(keys[i] - high - low) : -INFINITY;
}

static Above measure_above(const float* x, const float* weights, int64_t n, float lowest) {
  const Floats low = broadcast(lowest), one = broadcast(1.0f);
  Above above{0, 0};
  for (int64_t start = 0; start < n; start += kSampleBlock) {
    int64_t end = n - start < kSampleBlock ? n : start + kSampleBlock;
    Floats weight = zero(), count = zero();
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      Floats a = load(x + i);
      weight = add(weight, select_less(a, low, zero(), load(weights + i)));
      count = add(count, select_less(a, low, zero(), one));
    }
    above.weight += sum_of_lanes(weight);
    above.count += static_cast<int64_t>(sum_of_lanes(count));
    for (; i < end; ++i) {
      if (x[i] < lowest) continue;
      above.weight += static_cast<double>(weights[i]);
      ++above.count;
    }
  }
  return above;
}

// The places of what is at least `lowest` and below `limit`, rising; their number. NOTE: one place more is written.
static int64_t gather_between(const float* x, int64_t n, float lowest, float limit, int32_t* ids) {
  const Floats top = broadcast(limit), none = broadcast(-INFINITY);
  int64_t m = 0, i = 0;
  auto take = [&](int64_t end) {
    for (; i < end; ++i) {
      ids[m] = static_cast<int32_t>(i);
      m += x[i] >= lowest && x[i] < limit;
    }
  };
  while (lowest > -INFINITY && i + kGroup <= n) {
    Floats most = none;
    for (int64_t j = i; j < i + kGroup; j += kLanes) {
      Floats a = load(x + j);
      most = maximum(most, select_less(a, top, a, none));
    }
    if (largest(most) < lowest) i += kGroup;
    else take(i + kGroup);
  }
  take(n);
  return m;
}

}  // namespace HEADRACE_ISA
}  // namespace headrace
