// The schedule's integer functions, for the tests that hold them against kernels/schedule.py. Boundaries travel as pairs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "schedule.h"

namespace nb = nanobind;

namespace headrace {
namespace {

using Numbers = std::vector<int64_t>;
using Costs = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;

Pairs to_pairs(const std::vector<Boundary>& boundaries) {
  Pairs pairs;
  for (const Boundary& b : boundaries) pairs.emplace_back(b.item, b.unit);
  return pairs;
}

ScheduleCosts to_costs(const Costs& costs) {
  auto [overhead, merge_cost, workers, snap] = costs;
  return {overhead, merge_cost, workers, snap};
}

// NOTE: the functions trust what they are given, so what comes from Python is checked here.
std::vector<Boundary> to_boundaries(const Pairs& pairs, const Numbers& counts) {
  std::vector<Boundary> boundaries;
  int64_t items = static_cast<int64_t>(counts.size());
  for (auto [item, unit] : pairs) {
    if (item < 0 || item > items || unit < 0 || (unit > 0 && (item == items || unit >= counts[item])))
      throw std::invalid_argument("boundaries: expected an item and one of its units");
    if (!boundaries.empty() && Pairs::value_type{boundaries.back().item, boundaries.back().unit} > Pairs::value_type{item, unit})
      throw std::invalid_argument("boundaries: expected them in order");
    boundaries.push_back({item, unit});
  }
  if (boundaries.empty() || !(boundaries.front() == Boundary{0, 0}) || !(boundaries.back() == Boundary{items, 0}))
    throw std::invalid_argument("boundaries: expected the first item's start first and the last one's end last");
  return boundaries;
}

}  // namespace

void bind_schedule(nb::module_& m) {
  m.def("item_starts", &item_starts);
  m.def("stream_boundaries", [](const Numbers& counts, const Numbers& weights, const Costs& costs) {
    return to_pairs(stream_boundaries(counts, weights, to_costs(costs)));
  });
  m.def("equal_boundaries", [](const Numbers& counts, const Numbers& weights, const Costs& costs) {
    return to_pairs(equal_boundaries(counts, weights, to_costs(costs)));
  });
  m.def("best_boundaries", [](const Numbers& counts, const Numbers& weights, const Costs& costs) {
    return to_pairs(best_boundaries(counts, weights, to_costs(costs)));
  });
  m.def("makespan", [](const Pairs& pairs, const Numbers& counts, const Numbers& weights, const Costs& costs) {
    return makespan(to_boundaries(pairs, counts), counts, weights, to_costs(costs));
  });
  m.def("first_slots", [](const Pairs& pairs, const Numbers& counts, bool per_unit) {
    return first_slots(to_boundaries(pairs, counts), counts, per_unit ? SlotHolds::unit : SlotHolds::segment);
  });
  m.def("merges", [](const Pairs& pairs, const Numbers& counts, bool per_unit) {
    std::vector<std::tuple<int64_t, int64_t, int64_t>> rows;
    for (const MergedItem& m : merges(to_boundaries(pairs, counts), counts, per_unit ? SlotHolds::unit : SlotHolds::segment))
      rows.emplace_back(m.item, m.first_slot, m.pieces);
    return rows;
  });
  m.def("workspace_slots", &workspace_slots);
}

}  // namespace headrace
