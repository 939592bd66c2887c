// Where top-k and top-p cut a row: the search for a border in a row that is never sorted.
// Counting, eleven bits of the order at a time (three levels), among places of the row that the border is certainly one of.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace {

// The end of a beginning of the row sorted by falling logit, equal logits by rising id.
struct Border {
  float lowest = -INFINITY;  // the last logit inside
  int64_t ties = INT64_MAX;  // how many logits of that value are inside; INT64_MAX: all
  double weight = 0;         // of everything inside
};

inline Border tighter(const Border& a, const Border& b) {
  if (a.lowest != b.lowest) return a.lowest > b.lowest ? a : b;
  return a.ties < b.ties ? a : b;
}

// The order of floats as unsigned integers; -0 and +0 are equal.
inline uint32_t order_of(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float value_of(uint32_t order) {
  uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// How much of a row comes before what is looked at.
struct Passed {
  int64_t count = 0;
  double weight = 0;
};

class BorderSearch {
 public:
  // For so many places.
  static int64_t scratch_bytes(int64_t n) { return 2 * kBuckets * static_cast<int64_t>(sizeof(Bucket)) + n * 4; }

  // places: rising; of the row behind what has been passed, and up to the border at least.
  BorderSearch(const float* x, const float* weights, const int32_t* places, int64_t n, Passed passed, char* scratch)
      : x_(x), weights_(weights), places_(places), n_(n), passed_(passed), all_(reinterpret_cast<Bucket*>(scratch)), part_(all_ + kBuckets),
        ids_(reinterpret_cast<int32_t*>(part_ + kBuckets)) {
    clear(all_, kBuckets);
    for (int64_t j = 0; j < n_; ++j) all_[order_of(x_[places_[j]]) >> kTopShift].take(weights_[places_[j]]);
  }

  // The shortest beginning with `count` logits or with `weight`, whichever comes first; everything if neither is reached.
  Border find(int64_t count, double weight) {
    Passed above = passed_;
    uint32_t prefix = descend(all_, kBuckets, count, weight, &above);
    int64_t candidates = gather(prefix);
    for (int shift = kTopShift; shift > 0 && !all_equal(candidates);) {
      const int bits = shift > 11 ? 11 : shift;
      shift -= bits;
      split(candidates, shift, bits);
      prefix = (prefix << bits) | descend(part_, 1 << bits, count, weight, &above);
      candidates = narrow(candidates, prefix, shift);
    }
    return among_equals(candidates, count, weight, above);
  }

 private:
  static constexpr int kTopShift = 21, kBuckets = 1 << 11;
  struct Bucket {
    int64_t count;
    double weight;
    void take(float w) {
      ++count;
      weight += static_cast<double>(w);
    }
  };

  static void clear(Bucket* buckets, int n) { memset(static_cast<void*>(buckets), 0, sizeof(Bucket) * static_cast<size_t>(n)); }

  // From the highest bucket down to the one that reaches a limit, or to the lowest that holds anything.
  static uint32_t descend(const Bucket* buckets, int n, int64_t count, double weight, Passed* above) {
    int lowest = 0;
    while (!buckets[lowest].count) ++lowest;
    int b = n - 1;
    for (; b > lowest; --b) {
      if (above->count + buckets[b].count >= count || above->weight + buckets[b].weight >= weight) break;
      above->count += buckets[b].count;
      above->weight += buckets[b].weight;
    }
    return static_cast<uint32_t>(b);
  }

  int64_t gather(uint32_t prefix) {
    int64_t m = 0;
    for (int64_t j = 0; j < n_; ++j) {
      ids_[m] = places_[j];
      m += order_of(x_[places_[j]]) >> kTopShift == prefix;
    }
    return m;
  }

  bool all_equal(int64_t candidates) const {
    for (int64_t j = 1; j < candidates; ++j)
      if (x_[ids_[j]] != x_[ids_[0]]) return false;
    return true;
  }

  // Counts the candidates, which begin with `prefix`, by their next bits.
  void split(int64_t candidates, int shift, int bits) {
    clear(part_, 1 << bits);
    for (int64_t j = 0; j < candidates; ++j)
      part_[(order_of(x_[ids_[j]]) >> shift) & ((1u << bits) - 1)].take(weights_[ids_[j]]);
  }

  int64_t narrow(int64_t candidates, uint32_t prefix, int shift) {
    int64_t m = 0;
    for (int64_t j = 0; j < candidates; ++j)
      if (order_of(x_[ids_[j]]) >> shift == prefix) ids_[m++] = ids_[j];
    return m;
  }

  Border among_equals(int64_t candidates, int64_t count, double weight, const Passed& above) const {
    const double each = static_cast<double>(weights_[ids_[0]]);
    int64_t ties = candidates;
    if (count - above.count < ties) ties = count - above.count;
    if (above.weight + each * static_cast<double>(ties) > weight)
      ties = static_cast<int64_t>(std::ceil((weight - above.weight) / each));
    if (ties < 1) ties = 1;
    const float value = value_of(order_of(x_[ids_[0]]));
    return {value, ties < candidates ? ties : INT64_MAX, above.weight + each * static_cast<double>(ties)};
  }

  const float* x_;
  const float* weights_;
  const int32_t* places_;
  const int64_t n_;
  const Passed passed_;
  Bucket *all_, *part_;
  int32_t* ids_;
};

}  // namespace headrace
