// The native runtime: an Op is work cut into chunks; a Pool runs ops; a Program is a recorded list of them.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nodes.h"
#include "tensor.h"

namespace headrace {

// Memory that grows to what is asked for and stays.
struct Memory {
  std::shared_ptr<void> data;
  int64_t capacity = 0;
  char* take(int64_t bytes);
};

// What a chunk gets besides its number: who runs it, and memory of that thread's own.
class Worker {
 public:
  Worker(int thread, const Nodes& nodes, Memory& shared) : thread_(thread), nodes_(nodes), shared_(shared) {}
  int thread() const { return thread_; }
  int num_threads() const { return nodes_.num_threads(); }
  const Nodes& nodes() const { return nodes_; }
  char* scratch(int64_t bytes);  // 64-byte aligned, valid until the chunk ends, contents undefined
  char* kept(int64_t bytes);     // the same, valid until the op ends; always of the same size within an op
  bool begins() const { return begins_; }  // whether this is the thread's first chunk of the phase
  // The same for all threads, valid until the op ends. NOTE: only for a phase of one chunk, and once per op.
  char* workspace(int64_t bytes);

 private:
  friend class Pool;
  int thread_;
  const Nodes& nodes_;
  bool begins_ = true;
  Memory own_, kept_;
  Memory& shared_;
};

// Memory that a thread will read, in order.
struct Stream {
  const char* data;
  int64_t bytes;
};

// One call of one kernel. Phases follow one another with a barrier between; the chunks of a phase run in any order.
// NOTE: chunks() is asked by every thread and must give every one the same answer.
class Op {
 public:
  explicit Op(const char* op_name) : name_(op_name) {}
  virtual ~Op() = default;
  virtual int phases() const { return 1; }
  virtual int64_t chunks(int phase, const Sizes& sizes, int num_threads) const = 0;
  virtual void run(int phase, int64_t chunk, Worker& worker, const Sizes& sizes) = 0;
  // Where in its memory of weights a thread will begin. It is asked for while that thread waits for others, ops before.
  virtual Stream begins_at(int /*thread*/, const Nodes&) const { return {nullptr, 0}; }
  // A phase's first chunk that belongs to a node, which is not the first one.
  virtual int64_t node_begin(int phase, const Sizes& sizes, int node, const Nodes& nodes) const {
    return nodes.begin(chunks(phase, sizes, nodes.num_threads()), node);
  }
  // Whether chunks stay with their node, where their memory is, though its threads be late.
  virtual bool stays(int /*phase*/, const Sizes&) const { return false; }
  const char* name() const { return name_; }
  const std::vector<TensorRef>& reads() const { return reads_; }
  const std::vector<TensorRef>& writes() const { return writes_; }

 protected:
  const TensorRef& in(const TensorRef& t) { reads_.push_back(t); return reads_.back(); }
  const TensorRef& out(const TensorRef& t) { writes_.push_back(t); return writes_.back(); }

 private:
  const char* name_;
  std::vector<TensorRef> reads_, writes_;
};

// A forked child has the pool's memory but none of its threads.
struct ForkedPool : std::runtime_error {
  ForkedPool() : std::runtime_error("threads: this process was forked after the pool was made; make a new one in the child") {}
};

// Where ops go: a Pool runs them at once, a Program records them.
class Runner {
 public:
  virtual ~Runner() = default;
  virtual void submit(std::unique_ptr<Op> op) = 0;
  virtual TensorRef buffer(DType dtype, Rows rows, std::vector<int64_t> shape) = 0;
};

class Pool : public Runner {
 public:
  // node_cpus: those that a node's threads are kept to; empty: all that the process may use.
  explicit Pool(Nodes nodes, std::vector<std::vector<int>> node_cpus = {});
  ~Pool() override;
  void submit(std::unique_ptr<Op> op) override;
  TensorRef buffer(DType dtype, Rows rows, std::vector<int64_t> shape) override;
  // Runs the ops in order; `seconds`, when given, receives the time of each. Rethrows what a worker threw.
  void run(const std::vector<std::unique_ptr<Op>>& ops, const Sizes& sizes, std::vector<double>* seconds = nullptr);
  int num_threads() const { return num_threads_; }
  const Nodes& nodes() const { return nodes_; }
  Arena& arena() { return arena_; }  // for what lives long; not for several threads at once

 private:
  Arena arena_;
  struct Job {
    const std::vector<std::unique_ptr<Op>>* ops = nullptr;
    Sizes sizes;
    std::vector<double>* seconds = nullptr;
  };
  // How many of a thread's own chunks were taken: from the front, by itself (lower half), and from the back, by others who
  // had none left (upper half). One count for even and one for odd phases: while one is in use the other becomes zero.
  struct Taken {
    alignas(64) std::atomic<uint64_t> counts[2];
  };
  struct Phase {
    Op& op;
    int number;
    const Sizes& sizes;
    int64_t chunks;
    int parity;
  };
  struct Run {
    int64_t first, count;
    int parity;
  };
  class Ahead;
  void worker_loop(int thread);
  void take_part(Worker& worker);
  void run_phase(const Phase& phase, Worker& worker);
  Run run_of(const Phase& phase, int thread) const;
  int64_t take(const Run& run, int owner, bool own);
  bool barrier(Ahead* ahead);
  void wake_all();
  void place_threads();
  bool wait_for_job(uint64_t seen);

  const Nodes nodes_;
  const std::vector<std::vector<int>> node_cpus_;
  const int num_threads_;
  const int owner_process_;
  std::mutex running_;  // one run at a time
  Job job_;
  std::atomic<bool> alone_{false};  // the last job was a single call, not a program
  std::vector<std::thread> threads_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::unique_ptr<Taken[]> taken_;  // of each thread
  Memory workspace_;

  std::mutex sleep_mutex_;
  // NOTE: never destroyed in a forked child, where its waiters are gone and it would wait for them.
  std::condition_variable* const sleep_ = new std::condition_variable;
  std::exception_ptr failure_;
  std::mutex failure_mutex_;
  bool stopping_ = false;
  int sleepers_ = 0;
  int caller_core_ = -1;
  alignas(64) std::atomic<uint64_t> job_number_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<bool> failing_{false};
  alignas(64) std::atomic<uint64_t> generation_{0};  // of the barrier, times two; odd: a chunk has failed
};

// Recorded once, replayed with any number of tokens up to its capacity. Buffers whose lives do not overlap share memory.
class Program : public Runner {
 public:
  Program(std::shared_ptr<Pool> pool, Sizes capacity) : pool_(std::move(pool)), capacity_(capacity) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  void submit(std::unique_ptr<Op> op) override;
  TensorRef buffer(DType dtype, Rows rows, std::vector<int64_t> shape) override;
  void keep(const TensorRef& t);  // its contents outlive the run: never shared
  void finish();                  // plans the arena; nothing can be recorded afterwards
  void run(const Sizes& sizes, std::vector<double>* seconds = nullptr);
  std::vector<std::string> op_names() const;
  int64_t arena_bytes() const { return arena_bytes_; }
  const Sizes& capacity() const { return capacity_; }

 private:
  struct Life;
  std::vector<Life> lives() const;

  std::shared_ptr<Pool> pool_;
  Sizes capacity_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<TensorRef> buffers_, kept_;
  std::shared_ptr<void> arena_;
  int64_t arena_bytes_ = 0;
  bool finished_ = false;
};

}  // namespace headrace
