// How work is divided among workers: closed-form intervals, equal splits, their price, and where partial results lie.
#include "schedule.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>

namespace headrace {
namespace {

// Together these keep every sum below 2^63.
constexpr int64_t kMostTotal = int64_t{1} << 60;
constexpr int64_t kMostCost = int64_t{1} << 38;
constexpr int64_t kMostWorkers = int64_t{1} << 20;
constexpr int64_t kTargetSteps = 64;  // equal splits: the target is found to a 64th

struct Items {
  const int64_t* counts;
  const int64_t* weights;
  const int64_t* starts;
  int64_t size;
  int64_t payload(int64_t i) const { return counts[i] * weights[i]; }
  int64_t total() const { return starts[size]; }
};

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(most) +
                                ", got " + std::to_string(value));
}

void check_costs(const ScheduleCosts& c) {
  check_range("overhead", c.overhead, 0, kMostCost);
  check_range("merge_cost", c.merge_cost, 0, kMostCost);
  check_range("workers", c.workers, 1, kMostWorkers);
  check_range("snap", c.snap, 0, kMostCost);
}

void fill_starts(std::vector<int64_t>& starts, const int64_t* counts, const int64_t* weights, int64_t items, int64_t overhead) {
  check_range("overhead", overhead, 0, kMostCost);
  starts.resize(items + 1);
  int64_t total = 0;
  for (int64_t i = 0; i < items; ++i) {
    starts[i] = total;
    if (counts[i] < 0) check_range("counts", counts[i], 0, kMostTotal);
    if (weights[i] < 1) check_range("weights", weights[i], 1, kMostTotal);
    if (counts[i] > (kMostTotal - total) / weights[i] || (total += overhead + counts[i] * weights[i]) > kMostTotal)
      throw std::invalid_argument("counts: all work together may cost at most 2^60");
  }
  starts[items] = total;
}

// Where a point of the line falls: its item, the nearest unit, and the item's start or end where that is less than snap away.
Boundary boundary_at(const Items& items, const ScheduleCosts& c, int64_t x, int64_t from) {
  int64_t i = std::upper_bound(items.starts + from, items.starts + items.size + 1, x) - items.starts - 1;
  if (i == items.size) return {items.size, 0};
  int64_t weight = items.weights[i], count = items.counts[i];
  int64_t inside = std::max<int64_t>(0, x - items.starts[i] - c.overhead);
  int64_t unit = std::min(count, (inside + weight / 2) / weight);
  int64_t rest = count - unit;
  if (unit <= rest) return {i, unit * weight < c.snap ? 0 : unit};
  return rest == 0 || rest * weight < c.snap ? Boundary{i + 1, 0} : Boundary{i, unit};
}

void fill_stream(std::vector<Boundary>& out, const Items& items, const ScheduleCosts& c, int64_t workers) {
  out.resize(workers + 1);
  out[0] = {0, 0};
  // A cut costs its two pieces an overhead and two merges: the first worker, who continues nothing, has room for more.
  int64_t total = items.total(), lead = c.overhead + c.merge_cost;
  int64_t step = divide_up(std::max<int64_t>(0, total - lead - c.merge_cost), workers);
  int64_t last = std::max<int64_t>(0, items.size - 1);
  for (int64_t p = 1; p < workers; ++p)
    out[p] = boundary_at(items, c, std::min(lead + p * step, total), std::min(out[p - 1].item, last));
  out[workers] = {items.size, 0};
}

int64_t equal_parts(const Items& items, const ScheduleCosts& c, int64_t i, int64_t target) {
  int64_t most = items.counts[i] / std::max<int64_t>(1, divide_up(c.snap, items.weights[i]));
  return std::max<int64_t>(1, std::min(most, divide_up(items.payload(i), target)));
}

int64_t count_equal_parts(const Items& items, const ScheduleCosts& c, int64_t target) {
  int64_t parts = 0;
  for (int64_t i = 0; i < items.size; ++i) parts += equal_parts(items, c, i, target);
  return parts;
}

// What a part may cost: with fewer items than workers, the least that gives no worker two parts; else a worker's share.
int64_t equal_target(const Items& items, const ScheduleCosts& c) {
  int64_t payload = items.total() - items.size * c.overhead;
  int64_t low = std::max<int64_t>(1, divide_up(payload, c.workers));
  if (items.size >= c.workers || count_equal_parts(items, c, low) <= c.workers) return low;
  int64_t high = low;
  for (int64_t i = 0; i < items.size; ++i) high = std::max(high, items.payload(i));
  while (high - low > 1 + low / kTargetSteps) {
    int64_t middle = low + (high - low) / 2;
    (count_equal_parts(items, c, middle) <= c.workers ? high : low) = middle;
  }
  return high;
}

void fill_equal(std::vector<Boundary>& out, const Items& items, const ScheduleCosts& c) {
  out.clear();
  int64_t target = equal_target(items, c);
  for (int64_t i = 0; i < items.size; ++i) {
    int64_t parts = equal_parts(items, c, i, target);
    int64_t each = items.counts[i] / parts, longer = items.counts[i] % parts;
    for (int64_t k = 0; k < parts; ++k) out.push_back({i, k * each + std::min(k, longer)});
  }
  out.push_back({items.size, 0});
}

int64_t interval_cost(const Items& items, const ScheduleCosts& c, const Boundary& begin, const Boundary& end) {
  int64_t partial = c.overhead + c.merge_cost;
  if (begin.item == end.item) return end.unit > begin.unit ? partial + (end.unit - begin.unit) * items.weights[end.item] : 0;
  int64_t cost = end.unit > 0 ? partial + end.unit * items.weights[end.item] : 0;
  int64_t whole = begin.item;
  if (begin.unit > 0) {
    cost += partial + (items.counts[whole] - begin.unit) * items.weights[whole];
    ++whole;
  }
  return cost + items.starts[end.item] - items.starts[whole];
}

// Workers claim intervals in order as they become free.
int64_t price(const std::vector<Boundary>& boundaries, const Items& items, const ScheduleCosts& c, std::vector<int64_t>& free) {
  int64_t intervals = static_cast<int64_t>(boundaries.size()) - 1, latest = 0;
  bool one_each = intervals <= c.workers;
  if (!one_each) free.assign(c.workers, 0);
  for (int64_t p = 0; p < intervals; ++p) {
    int64_t done = interval_cost(items, c, boundaries[p], boundaries[p + 1]);
    if (!one_each) {
      std::pop_heap(free.begin(), free.end(), std::greater<>());
      done = free.back() += done;
      std::push_heap(free.begin(), free.end(), std::greater<>());
    }
    latest = std::max(latest, done);
  }
  return latest;
}

Items checked_items(std::vector<int64_t>& starts, const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                    const ScheduleCosts& costs) {
  starts = item_starts(counts, weights, costs.overhead);
  check_costs(costs);
  return {counts.data(), weights.data(), starts.data(), static_cast<int64_t>(counts.size())};
}

}  // namespace

void Schedule::plan(const int64_t* counts, const int64_t* weights, int64_t size, const ScheduleCosts& costs) {
  check_costs(costs);
  fill_starts(starts, counts, weights, size, costs.overhead);
  Items items{counts, weights, starts.data(), size};
  fill_stream(boundaries, items, costs, costs.workers);
  makespan = price(boundaries, items, costs, free_);
  fill_equal(trial_, items, costs);
  if (int64_t cost = price(trial_, items, costs, free_); cost < makespan) {
    makespan = cost;
    boundaries.swap(trial_);
  }
  // So many workers take at least total / workers: once that is too much, fewer take longer still.
  for (int64_t few = costs.workers / 2; few > 0 && divide_up(items.total(), few) <= makespan; few /= 2) {
    fill_stream(trial_, items, costs, few);
    if (int64_t cost = price(trial_, items, costs, free_); cost <= makespan) {
      makespan = cost;
      boundaries.swap(trial_);
    }
  }
}

void Schedule::place(const int64_t* counts, SlotHolds holds) {
  first_slots.clear();
  merges.clear();
  slots = 0;
  for (int64_t p = 0; p < intervals(); ++p) {
    first_slots.push_back(slots);
    for_each_segment(counts, boundaries[p], boundaries[p + 1], [&](int64_t item, int64_t begin, int64_t end, bool partial) {
      if (!partial) return;
      if (begin == 0) merges.push_back({item, slots, 0});
      int64_t pieces = holds == SlotHolds::unit ? end - begin : 1;
      merges.back().pieces += pieces;
      slots += pieces;
    });
  }
}

std::vector<int64_t> item_starts(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights, int64_t overhead) {
  if (counts.size() != weights.size())
    throw std::invalid_argument("weights: expected one for each of " + std::to_string(counts.size()) + " items, got " +
                                std::to_string(weights.size()));
  std::vector<int64_t> starts;
  fill_starts(starts, counts.data(), weights.data(), static_cast<int64_t>(counts.size()), overhead);
  return starts;
}

std::vector<Boundary> stream_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                        const ScheduleCosts& costs) {
  std::vector<int64_t> starts;
  std::vector<Boundary> out;
  fill_stream(out, checked_items(starts, counts, weights, costs), costs, costs.workers);
  return out;
}

std::vector<Boundary> equal_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                       const ScheduleCosts& costs) {
  std::vector<int64_t> starts;
  std::vector<Boundary> out;
  fill_equal(out, checked_items(starts, counts, weights, costs), costs);
  return out;
}

std::vector<Boundary> best_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                      const ScheduleCosts& costs) {
  item_starts(counts, weights, costs.overhead);  // for its checks
  Schedule schedule;
  schedule.plan(counts.data(), weights.data(), static_cast<int64_t>(counts.size()), costs);
  return schedule.boundaries;
}

int64_t makespan(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts,
                 const std::vector<int64_t>& weights, const ScheduleCosts& costs) {
  std::vector<int64_t> starts, free;
  return price(boundaries, checked_items(starts, counts, weights, costs), costs, free);
}

std::vector<int64_t> first_slots(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts, SlotHolds holds) {
  Schedule schedule;
  schedule.boundaries = boundaries;
  schedule.place(counts.data(), holds);
  return schedule.first_slots;
}

std::vector<MergedItem> merges(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts, SlotHolds holds) {
  Schedule schedule;
  schedule.boundaries = boundaries;
  schedule.place(counts.data(), holds);
  return schedule.merges;
}

}  // namespace headrace
