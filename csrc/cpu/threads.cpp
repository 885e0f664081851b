// SPDX-License-Identifier: BSD-3-Clause
#include "threads.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace nf {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  Body body;
  void* context;
  int64_t n, grain;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};

  void drain() {
    const int slot = joined.fetch_add(1, std::memory_order_relaxed);
    if (slot >= threads) return;
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      body(context, begin, begin + grain < n ? begin + grain : n, slot);
    }
  }
};

// One job at a time. The caller publishes it, wakes sleepers if there are any, works on it, withdraws it, and then
// waits only for workers that have entered: a worker that the system has not scheduled yet costs nothing.
//
// A worker announces itself (`inside`) before it reads `job`; the caller clears `job` before it reads `inside`.
// Both pairs are sequentially consistent, so either the worker finds no job or the caller waits for it.
struct Pool {
  std::atomic<bool> busy{false};
  std::atomic<uint64_t> generation{0};
  std::atomic<Job*> job{nullptr};
  std::atomic<int> inside{0};
  std::atomic<int> sleepers{0};
  int workers = 0;  // guarded by `busy`
  std::mutex mutex;
  std::condition_variable wake;

  void work() {
    uint64_t seen = 0;
    for (;;) {
      // Spin a little: the next call often follows at once.
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      int turns = 0;
      while (generation.load(std::memory_order_acquire) == seen) {
        relax();
        if ((++turns & 63) == 0 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> lock(mutex);
          sleepers.fetch_add(1);
          wake.wait(lock, [&] { return generation.load() != seen; });
          sleepers.fetch_sub(1);
          break;
        }
      }
      seen = generation.load();
      inside.fetch_add(1);
      if (Job* j = job.load()) j->drain();
      inside.fetch_sub(1);
    }
  }

  void grow(int wanted) {
    while (workers < wanted) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those that exist, and the caller, do the work
      }
      ++workers;
    }
  }

  void run(Job& j) {
    const int64_t pieces = (j.n + j.grain - 1) / j.grain;
    const int helpers = int(pieces < j.threads ? pieces : j.threads) - 1;
    grow(helpers);
    job.store(&j);
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    j.drain();
    job.store(nullptr);
    for (int turns = 0; inside.load() != 0; ++turns) {
      if (turns < 4096) relax();
      else std::this_thread::yield();
    }
  }
};

// Never destroyed: workers may still look at it while the process exits. A forked child has none of the workers and
// perhaps locks held by threads that are gone, so it forgets the pool and makes another when it needs one.
std::atomic<Pool*> the_pool{nullptr};

void forget_pool() { the_pool.store(nullptr); }

Pool* get_pool() {
  Pool* p = the_pool.load(std::memory_order_acquire);
  if (p != nullptr) return p;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr) return nullptr;
  if (the_pool.compare_exchange_strong(p, fresh)) return fresh;
  delete fresh;
  return p;
}

int positive_number(const char* text) {
  if (text == nullptr) return 0;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);  // OMP_NUM_THREADS may be a list: its first number counts
  if (end == text || (*end != '\0' && *end != ',') || n < 1) return 0;
  return n < max_threads ? int(n) : max_threads;
}

int allowed_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? int(n) : 1;
}

int default_threads() {
  pthread_atfork(nullptr, nullptr, forget_pool);
  if (const int n = positive_number(std::getenv("NORMFAST_NUM_THREADS"))) return n;
  if (const int n = positive_number(std::getenv("OMP_NUM_THREADS"))) return n;
  const int n = allowed_cpus();
  return n < max_threads ? n : max_threads;
}

std::atomic<int> thread_count{default_threads()};

}  // namespace

int get_threads() { return thread_count.load(std::memory_order_relaxed); }
void set_threads(int n) { thread_count.store(n, std::memory_order_relaxed); }

void parallel_for(int64_t n, int64_t grain, Body body, void* context, int threads) {
  if (n <= 0) return;
  Pool* pool = n > grain && threads > 1 ? get_pool() : nullptr;
  if (pool == nullptr || pool->busy.exchange(true, std::memory_order_acquire)) {
    body(context, 0, n, 0);
    return;
  }
  Job job;
  job.body = body, job.context = context, job.n = n, job.grain = grain, job.threads = threads;
  pool->run(job);
  pool->busy.store(false, std::memory_order_release);
}

}  // namespace nf
