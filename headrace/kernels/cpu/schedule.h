// How work is divided among workers: units of items on a line, cut into intervals. The twin of kernels/schedule.py.
//
// An item (one request, one group of KV heads, one tile of query rows) has counts[i] units of KV costing weights[i] each, and
// `overhead` wherever one of its segments begins. Boundary (item, unit), unit < counts[item]; (item + 1, 0) is an item's end.
// Interval p is boundaries[p] .. boundaries[p + 1]. kernels/schedule.py says why it is done so, docs/kernels/schedule.md more.
#pragma once
#include <cstdint>
#include <vector>

namespace headrace {

struct Boundary {
  int64_t item, unit;
};
inline bool operator==(const Boundary& a, const Boundary& b) { return a.item == b.item && a.unit == b.unit; }

// An item whose units lie in more than one interval: its partial results are in slots first_slot .. first_slot + pieces, in
// the order of its units.
struct MergedItem {
  int64_t item, first_slot, pieces;
};

struct ScheduleCosts {
  int64_t overhead;    // of a segment, in the unit of the weights
  int64_t merge_cost;  // of a partial segment, besides
  int64_t workers;
  int64_t snap;  // a segment of a split item is not cheaper than this
};

// What a slot of the workspace holds: a segment, or (batch-invariant: units are chunks) one unit of a split item.
enum class SlotHolds { segment, unit };

// A plan, and the memory it is made in: used again and again, it allocates only to grow.
struct Schedule {
  std::vector<int64_t> starts;  // items + 1: where each begins on the line; the last is the total
  std::vector<Boundary> boundaries;
  int64_t makespan = 0;  // predicted, in the unit of the weights

  // Filled by place(). The partial pieces of interval p take slots first_slots[p], first_slots[p] + 1, ... as it meets them.
  std::vector<int64_t> first_slots;
  std::vector<MergedItem> merges;
  int64_t slots = 0;

  // The cheapest of: closed-form intervals, equal splits, closed-form intervals for fewer workers.
  // Throws std::invalid_argument where a number is out of range or the total is above 2^60.
  void plan(const int64_t* counts, const int64_t* weights, int64_t items, const ScheduleCosts& costs);
  void place(const int64_t* counts, SlotHolds holds);

  int64_t intervals() const { return static_cast<int64_t>(boundaries.size()) - 1; }

 private:
  std::vector<Boundary> trial_;
  std::vector<int64_t> free_;
};

// Calls f(item, unit_begin, unit_end, partial) for each segment of an interval, in order. An item of no units is one segment
// of none: its output still wants writing.
template <class F>
void for_each_segment(const int64_t* counts, Boundary begin, const Boundary& end, F&& f) {
  for (; begin.item < end.item; begin = {begin.item + 1, 0}) f(begin.item, begin.unit, counts[begin.item], begin.unit > 0);
  if (end.unit > begin.unit) f(end.item, begin.unit, end.unit, true);
}

// The same, one by one; they allocate what they return.
std::vector<int64_t> item_starts(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights, int64_t overhead);
std::vector<Boundary> stream_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                        const ScheduleCosts& costs);
std::vector<Boundary> equal_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                       const ScheduleCosts& costs);
std::vector<Boundary> best_boundaries(const std::vector<int64_t>& counts, const std::vector<int64_t>& weights,
                                      const ScheduleCosts& costs);
int64_t makespan(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts,
                 const std::vector<int64_t>& weights, const ScheduleCosts& costs);
std::vector<int64_t> first_slots(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts, SlotHolds holds);
std::vector<MergedItem> merges(const std::vector<Boundary>& boundaries, const std::vector<int64_t>& counts, SlotHolds holds);

// The most partial segments that a plan for so many items and workers can have; some plan has as many.
inline int64_t workspace_slots(int64_t items, int64_t workers) {
  return workers - 1 + (items < workers - 1 ? items : workers - 1);
}

}  // namespace headrace
