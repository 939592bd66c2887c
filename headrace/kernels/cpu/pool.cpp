// The thread pool: workers spin while work is likely, then sleep. Each thread has its own run of a phase's chunks, which
// memory streams best; who is done early takes from the far end of another's.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

// Between two steps the caller is in Python for some 0.1 ms: long enough to lose by sleeping, too short to gain by it.
// Behind a single call there may be another library's threads, which want the cores at once.
constexpr double kSpinSeconds = 2e-3, kSpinSecondsAfterCall = 50e-6;
constexpr int kSpinsBeforeYield = 1 << 14;
constexpr int kSpinsBeforeLook = 512;
constexpr int kSpinsBeforePause = 1 << 13;
// Asked for ahead: more than memory's latency, little beside a second-level cache. Few lines between looks at the barrier.
constexpr int64_t kAheadBytes = 16 << 10;
constexpr int kLinesAtOnce = 4;

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// NOTE: in a virtual machine a row of PAUSEs is taken for idling and hands the core to the host: some 10 us for a wait
// that was over after one. So short waits are spent on nothing, and only long ones pause.
void wait_a_little(int spins) {
  if (spins > kSpinsBeforePause) return pause_cpu();
  for (int i = 0; i < 8; ++i) asm volatile("nop");
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if defined(__linux__)
cpu_set_t set_of(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  return set;
}

// The calling thread on a node's cores for as long as this lives: it is somebody else's, and goes back to where it was.
class OnNode {
 public:
  explicit OnNode(const std::vector<int>* cpus) {
    if (!cpus || sched_getaffinity(0, sizeof before_, &before_)) return;
    cpu_set_t set = set_of(*cpus);
    moved_ = !sched_setaffinity(0, sizeof set, &set);
  }
  OnNode(const OnNode&) = delete;
  ~OnNode() {
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
  }

 private:
  cpu_set_t before_;
  bool moved_ = false;
};
#else
struct OnNode {
  explicit OnNode(const std::vector<int>*) {}
};
#endif

}  // namespace

char* Memory::take(int64_t bytes) {
  if (bytes > capacity) {
    data = allocate_bytes(bytes);
    capacity = bytes;
  }
  return static_cast<char*>(data.get());
}

char* Worker::scratch(int64_t bytes) { return own_.take(bytes); }
char* Worker::kept(int64_t bytes) { return kept_.take(bytes); }
char* Worker::workspace(int64_t bytes) { return shared_.take(bytes); }

Pool::Pool(Nodes nodes, std::vector<std::vector<int>> node_cpus)
    : nodes_(std::move(nodes)), node_cpus_(std::move(node_cpus)), num_threads_(nodes_.num_threads()), owner_process_(getpid()) {
  if (!node_cpus_.empty() && static_cast<int>(node_cpus_.size()) != nodes_.count())
    throw std::invalid_argument("node_cpus: expected a list for each of " + std::to_string(nodes_.count()) + " nodes");
  taken_.reset(new Taken[static_cast<size_t>(num_threads_)]);
  for (int i = 0; i < num_threads_; ++i) workers_.push_back(std::make_unique<Worker>(i, nodes_, workspace_));
  for (int i = 1; i < num_threads_; ++i) threads_.emplace_back([this, i] { worker_loop(i); });
}

Pool::~Pool() {
  if (getpid() != owner_process_) {  // a forked child has no threads to join, and cannot detach them either
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_ = true;
    job_number_.fetch_add(1, std::memory_order_release);
  }
  sleep_->notify_all();
  for (auto& t : threads_) t.join();
  delete sleep_;
}

void Pool::submit(std::unique_ptr<Op> op) {
  std::vector<std::unique_ptr<Op>> one;
  one.push_back(std::move(op));
  run(one, Sizes{});
}

TensorRef Pool::buffer(DType dtype, Rows, std::vector<int64_t> shape) {
  auto t = std::make_shared<Tensor>();
  t->dtype = dtype;
  t->strides = contiguous_strides(shape);
  t->shape = std::move(shape);
  t->owner = allocate_bytes(t->capacity_bytes());
  t->data = static_cast<char*>(t->owner.get());
  return t;
}

void Pool::run(const std::vector<std::unique_ptr<Op>>& ops, const Sizes& sizes, std::vector<double>* seconds) {
  if (getpid() != owner_process_) throw ForkedPool();
  std::lock_guard<std::mutex> one_run(running_);
  job_ = Job{&ops, sizes, seconds};
  alone_.store(ops.size() == 1, std::memory_order_relaxed);
  failure_ = nullptr;
  failing_.store(false, std::memory_order_relaxed);
  // NOTE: never back to an earlier value: a worker may not have seen yet that the last run's barrier opened.
  generation_.fetch_and(~uint64_t{1}, std::memory_order_relaxed);
  for (int i = 0; i < num_threads_; ++i)
    for (auto& counts : taken_[i].counts) counts.store(0, std::memory_order_relaxed);
  OnNode caller(node_cpus_.empty() ? nullptr : &node_cpus_[0]);
  if (num_threads_ > 1) place_threads();
  wake_all();
  take_part(*workers_[0]);
  if (failure_) std::rethrow_exception(failure_);
}

// A woken worker is often put on the core of the thread that woke it, and then both spin for each other until the
// system's balancer looks, some 4 ms later. So the workers keep off the caller's core, wherever that is now.
// Those of a node are kept to its cores, too.
void Pool::place_threads() {
#if defined(__linux__)
  int core = sched_getcpu();
  if (core < 0 || core == caller_core_) return;
  caller_core_ = core;
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable)) return;
  for (int i = 1; i < num_threads_; ++i) {
    int node = nodes_.of_thread(i);
    cpu_set_t set = node_cpus_.empty() ? usable : set_of(node_cpus_[static_cast<size_t>(node)]);
    int threads = node_cpus_.empty() ? num_threads_ : nodes_.first_thread(node + 1) - nodes_.first_thread(node);
    if (CPU_COUNT(&set) >= threads) CPU_CLR(core, &set);
    else if (node_cpus_.empty()) return;
    pthread_setaffinity_np(threads_[static_cast<size_t>(i - 1)].native_handle(), sizeof set, &set);
  }
#endif
}

void Pool::wake_all() {
  if (num_threads_ == 1) return;
  bool any_asleep;
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    job_number_.fetch_add(1, std::memory_order_release);
    any_asleep = sleepers_ > 0;
  }
  if (any_asleep) sleep_->notify_all();
}

bool Pool::wait_for_job(uint64_t seen) {
  double deadline = now() + (alone_.load(std::memory_order_relaxed) ? kSpinSecondsAfterCall : kSpinSeconds);
  for (int spins = 1; job_number_.load(std::memory_order_acquire) == seen; ++spins) {
    pause_cpu();
    if (spins % kSpinsBeforeLook) continue;
    sched_yield();  // whoever else has work on this core goes first
    if (now() < deadline) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++sleepers_;
    sleep_->wait(lock, [&] { return job_number_.load(std::memory_order_relaxed) != seen; });
    --sleepers_;
  }
  std::lock_guard<std::mutex> lock(sleep_mutex_);
  return !stopping_;
}

void Pool::worker_loop(int thread) {
  for (uint64_t seen = 0; wait_for_job(seen); ++seen) take_part(*workers_[thread]);
}

// What a thread will read next from memory, asked for a little at a time while it waits: else memory would idle as well,
// and every op would begin with a cold stream.
class Pool::Ahead {
 public:
  Ahead(const Job& job, const Worker& worker) : ops_(*job.ops), worker_(worker) {}

  // The nearest op from number i on that knows its stream is the one to ask for.
  void look_from(size_t i) {
    if (i < searched_) return;
    next_ = end_ = nullptr;
    for (searched_ = i; searched_ < ops_.size() && !next_; ++searched_) {
      Stream stream = ops_[searched_]->begins_at(worker_.thread(), worker_.nodes());
      next_ = stream.data;
      end_ = stream.data + std::min(stream.bytes, kAheadBytes);
    }
  }

  // NOTE: called while others may have ended the run: it must not look at an op.
  bool fetch_some() {
    if (next_ >= end_) return false;
    for (int line = 0; line < kLinesAtOnce; ++line, next_ += 64) __builtin_prefetch(next_, 0, 2);
    return true;
  }

 private:
  const std::vector<std::unique_ptr<Op>>& ops_;
  const Worker& worker_;
  size_t searched_ = 0;
  const char *next_ = nullptr, *end_ = nullptr;
};

void Pool::take_part(Worker& worker) {
  const Job job = job_;
  Ahead ahead(job, worker);
  double started = job.seconds && worker.thread() == 0 ? now() : 0;
  bool failed = false;
  int parity = 0;
  for (size_t i = 0; i < job.ops->size(); ++i) {
    Op& op = *(*job.ops)[i];
    if (num_threads_ > 1) ahead.look_from(i + 1);
    for (int phase = 0; phase < op.phases(); ++phase) {
      // NOTE: after a failure every thread skips every phase, so all of them still meet at the last barrier.
      int64_t chunks = failed ? 0 : op.chunks(phase, job.sizes, num_threads_);
      if (chunks == 0) continue;
      run_phase(Phase{op, phase, job.sizes, chunks, parity}, worker);
      failed = barrier(&ahead);
      parity ^= 1;
    }
    if (job.seconds && worker.thread() == 0) {
      double t = now();
      (*job.seconds)[i] = t - started;
      started = t;
    }
  }
  barrier(nullptr);  // nobody leaves while another still reads the job
}

// The chunks that a thread begins with.
Pool::Run Pool::run_of(const Phase& phase, int thread) const {
  const int node = nodes_.of_thread(thread), next = node + 1;
  const int64_t begin = node ? phase.op.node_begin(phase.number, phase.sizes, node, nodes_) : 0;
  const int64_t end = next < nodes_.count() ? phase.op.node_begin(phase.number, phase.sizes, next, nodes_) : phase.chunks;
  const int64_t first = nodes_.thread_begin(begin, end, thread);
  return {first, nodes_.thread_end(begin, end, thread) - first, phase.parity};
}

// First a thread's own chunks, then what others have left: of its own node, then of the next ones unless the op says no.
void Pool::run_phase(const Phase& phase, Worker& worker) {
  const int thread = worker.thread(), own_node = nodes_.of_thread(thread);
  taken_[thread].counts[phase.parity ^ 1].store(0, std::memory_order_relaxed);
  worker.begins_ = true;
  try {
    const int nodes = phase.op.stays(phase.number, phase.sizes) ? 1 : nodes_.count();
    for (int distance = 0; distance < nodes; ++distance) {
      const int node = (own_node + distance) % nodes_.count();
      const int first = nodes_.first_thread(node), threads = nodes_.first_thread(node + 1) - first;
      const int from = distance ? 0 : thread - first;
      for (int turn = 0; turn < threads; ++turn) {
        const int owner = first + (from + turn) % threads;
        const Run run = run_of(phase, owner);
        for (int64_t chunk; (chunk = take(run, owner, owner == thread)) >= 0; worker.begins_ = false)
          phase.op.run(phase.number, chunk, worker, phase.sizes);
      }
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) failure_ = std::current_exception();
    failing_.store(true, std::memory_order_relaxed);
  }
}

// The next of the owner's chunks for the owner, the last one for others; -1 where none is left.
int64_t Pool::take(const Run& run, int owner, bool own) {
  auto& counts = taken_[owner].counts[run.parity];
  uint64_t seen = counts.load(std::memory_order_relaxed);
  for (;;) {
    const auto front = static_cast<int64_t>(seen & 0xffffffff), back = static_cast<int64_t>(seen >> 32);
    if (front + back >= run.count) return -1;
    if (counts.compare_exchange_weak(seen, seen + (own ? 1 : uint64_t{1} << 32), std::memory_order_relaxed))
      return own ? run.first + front : run.first + run.count - 1 - back;
  }
}

// Returns whether a chunk has failed. NOTE: that travels with the generation, so all threads see the same.
bool Pool::barrier(Ahead* ahead) {
  if (num_threads_ == 1) return failing_.load(std::memory_order_relaxed);
  const uint64_t seen = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    const bool failing = failing_.load(std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store((seen | 1) + 1 + failing, std::memory_order_release);
    return failing;
  }
  uint64_t generation;
  for (int spins = 1; (generation = generation_.load(std::memory_order_acquire)) == seen; ++spins) {
    if (ahead && ahead->fetch_some()) continue;
    wait_a_little(spins);
    if (spins % kSpinsBeforeYield == 0) sched_yield();
  }
  return generation & 1;
}

}  // namespace headrace
