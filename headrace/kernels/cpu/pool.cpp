// The thread pool: workers spin while work is likely, then sleep; chunks are taken from one counter.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>

#include "runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

// Between two steps the caller is in Python for some 0.1 ms: long enough to lose by sleeping, too short to gain by it.
constexpr double kSpinSeconds = 2e-3;
constexpr int kSpinsBeforeYield = 1 << 14;
constexpr int kSpinsBeforePause = 1 << 13;

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

}  // namespace

char* Memory::take(int64_t bytes) {
  if (bytes > capacity) {
    data = allocate_bytes(bytes);
    capacity = bytes;
  }
  return static_cast<char*>(data.get());
}

char* Worker::scratch(int64_t bytes) { return own_.take(bytes); }
char* Worker::workspace(int64_t bytes) { return shared_.take(bytes); }

Pool::Pool(int num_threads) : num_threads_(num_threads), owner_process_(getpid()) {
  if (num_threads < 1 || num_threads > 1024)
    throw std::invalid_argument("threads: expected 1 to 1024, got " + std::to_string(num_threads));
  for (int i = 0; i < num_threads; ++i) workers_.push_back(std::make_unique<Worker>(i, num_threads, workspace_));
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { worker_loop(i); });
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
  failure_ = nullptr;
  failed_.store(false, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  next_chunk_.store(num_threads_, std::memory_order_relaxed);
  if (num_threads_ > 1) keep_workers_off_this_core();
  wake_all();
  take_part(*workers_[0]);
  if (failure_) std::rethrow_exception(failure_);
}

// A woken worker is often put on the core of the thread that woke it, and then both spin for each other until the
// system's balancer looks, some 4 ms later. So the workers keep off the caller's core, wherever that is now.
void Pool::keep_workers_off_this_core() {
#if defined(__linux__)
  int core = sched_getcpu();
  if (core < 0 || core == caller_core_) return;
  caller_core_ = core;
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) || CPU_COUNT(&usable) < num_threads_) return;
  CPU_CLR(core, &usable);
  for (auto& t : threads_) pthread_setaffinity_np(t.native_handle(), sizeof usable, &usable);
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
  double deadline = now() + kSpinSeconds;
  for (int spins = 1; job_number_.load(std::memory_order_acquire) == seen; ++spins) {
    pause_cpu();
    if (spins % 1024 || now() < deadline) continue;
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

void Pool::take_part(Worker& worker) {
  const Job job = job_;
  double started = job.seconds && worker.thread() == 0 ? now() : 0;
  for (size_t i = 0; i < job.ops->size(); ++i) {
    Op& op = *(*job.ops)[i];
    for (int phase = 0; phase < op.phases(); ++phase) {
      // NOTE: after a failure every thread skips every phase, so all of them still meet at the last barrier.
      int64_t chunks = failed_.load(std::memory_order_acquire) ? 0 : op.chunks(phase, job.sizes, num_threads_);
      if (chunks > 0) run_phase(op, phase, chunks, worker);
    }
    if (job.seconds && worker.thread() == 0) {
      double t = now();
      (*job.seconds)[i] = t - started;
      started = t;
    }
  }
  barrier();  // nobody leaves while another still reads the job
}

void Pool::run_phase(Op& op, int phase, int64_t chunks, Worker& worker) {
  const Sizes sizes = job_.sizes;
  int64_t chunk = worker.thread();
  try {
    while (chunk < chunks) {
      op.run(phase, chunk, worker, sizes);
      chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) failure_ = std::current_exception();
    next_chunk_.store(chunks, std::memory_order_relaxed);
  }
  barrier();
}

// NOTE: `failed_` is published by the last to arrive, so all threads see the same value after the barrier.
void Pool::barrier() {
  if (num_threads_ == 1) {
    next_chunk_.store(1, std::memory_order_relaxed);
    failed_.store(failure_ != nullptr, std::memory_order_relaxed);
    return;
  }
  uint64_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    next_chunk_.store(num_threads_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(failure_mutex_);
      failed_.store(failure_ != nullptr, std::memory_order_relaxed);
    }
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 1; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    wait_a_little(spins);
    if (spins % kSpinsBeforeYield == 0) sched_yield();
  }
}

}  // namespace headrace
