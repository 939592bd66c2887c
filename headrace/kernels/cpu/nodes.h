// NUMA nodes as the pool knows them, and what belongs to whom: integers only.
//
// Threads are numbered node by node. The rows of a matrix are shared out among the nodes in proportion to their threads, in
// whole strips, and every thread begins with a run of chunks of its own node's. With one node that is a run per thread.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace headrace {

// The first of `count` things that belongs to part `part` of `parts` equal ones.
inline int64_t first_of_part(int64_t count, int64_t part, int64_t parts) { return (count * part + parts - 1) / parts; }

class Nodes {
 public:
  explicit Nodes(const std::vector<int>& threads_per_node) {
    for (int threads : threads_per_node) {
      if (threads < 1 || threads > 1024) throw std::invalid_argument("threads: expected 1 to 1024, got " + std::to_string(threads));
      first_.push_back(first_.back() + threads);
    }
    if (threads_per_node.empty() || num_threads() > 1024)
      throw std::invalid_argument("threads: expected 1 to 1024, got " + std::to_string(num_threads()));
  }
  int count() const { return static_cast<int>(first_.size()) - 1; }
  int num_threads() const { return first_.back(); }
  int first_thread(int node) const { return first_[static_cast<size_t>(node)]; }
  int of_thread(int thread) const {
    int node = 0;
    while (thread >= first_thread(node + 1)) ++node;
    return node;
  }
  // Of things shared out among the nodes, a node's first one; that of the node after the last is `things`.
  int64_t begin(int64_t things, int node) const {
    if (node == 0 || node == count()) return node ? things : 0;  // one node: no division
    return first_of_part(things, first_thread(node), num_threads());
  }
  // The same for a thread among those of its node, which has the things from `first` to `end`.
  int64_t thread_begin(int64_t first, int64_t end, int thread) const {
    int node = of_thread(thread);
    return first + first_of_part(end - first, thread - first_thread(node), first_thread(node + 1) - first_thread(node));
  }
  int64_t thread_end(int64_t first, int64_t end, int thread) const {
    int node = of_thread(thread);
    return first + first_of_part(end - first, thread + 1 - first_thread(node), first_thread(node + 1) - first_thread(node));
  }

 private:
  std::vector<int> first_{0};  // thread of each node, and their number
};

}  // namespace headrace
