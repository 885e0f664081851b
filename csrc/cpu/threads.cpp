// SPDX-License-Identifier: BSD-3-Clause
#include "threads.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "system.h"

namespace nf {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread that is woken goes where the system puts it, and a virtual machine's system takes a processor that sleeps
// for one that its host has taken away: the worker would queue up behind its caller for milliseconds, with another
// processor idle. While it sleeps, a worker therefore may not run where its caller does: it leaves when it falls
// asleep, and whoever wakes it from another processor moves it again. Guarded by the pool's mutex, but for `return_`.
class Sleeper {
 public:
  Sleeper* next = nullptr;
#if defined(__linux__)
  Sleeper() : thread_(pid_t(syscall(SYS_gettid))) {}
  void leave(int cpu) {
    if (cpu < 0 || cpu == left_) return;
    if (left_ >= 0 ? !as_left() : sched_getaffinity(thread_, sizeof usual_, &usual_) != 0 || CPU_COUNT(&usual_) < 2)
      return;
    cpu_set_t others = usual_;
    CPU_CLR(cpu, &others);
    if (sched_setaffinity(thread_, sizeof others, &others) == 0) others_ = others, left_ = cpu;
  }
  void return_() {
    if (left_ >= 0 && as_left()) sched_setaffinity(thread_, sizeof usual_, &usual_);
    left_ = -1;
  }
  static int here() { return sched_getcpu(); }

 private:
  // Has nobody else changed meanwhile where this thread may run?
  bool as_left() const {
    cpu_set_t now;
    return sched_getaffinity(thread_, sizeof now, &now) == 0 && CPU_EQUAL(&now, &others_);
  }

  pid_t thread_;
  cpu_set_t usual_, others_;
  int left_ = -1;  // the processor it may not run on
#else
  void leave(int) {}
  void return_() {}
  static int here() { return -1; }
#endif
};

// The pieces of one thread, its owner. Others take from them when their own are done, but for the last while the owner
// is there: what is left by then is not worth moving between caches.
struct alignas(64) Share {
  std::atomic<int64_t> taken{0};
  std::atomic<bool> attended{false};  // the owner has come, and stays until nothing is left
  int64_t first = 0, count = 0;

  bool take(bool owner, int64_t& k) {
    const int64_t spared = !owner && attended.load(std::memory_order_relaxed) ? 1 : 0;
    if (taken.load(std::memory_order_relaxed) >= count - spared) return false;
    k = taken.fetch_add(1, std::memory_order_relaxed);
    return k < count;
  }
};

struct Job {
  static constexpr int most_shares = 64;  // beyond as many threads, several have a share together

  Body body;
  void* context;
  int64_t n, grain;
  int threads;
  Direction direction;
  int share_count;
  Share shares[most_shares];

  Job(int64_t n_, int64_t grain_, Body body_, void* context_, int threads_, Direction direction_)
      : body(body_), context(context_), n(n_), grain(grain_), threads(threads_), direction(direction_) {
    const int64_t pieces = (n + grain - 1) / grain;
    share_count = threads < most_shares ? threads : most_shares;
    if (pieces < share_count) share_count = int(pieces);
    for (int i = 0; i < share_count; ++i) {
      shares[i].first = pieces * i / share_count;
      shares[i].count = pieces * (i + 1) / share_count - shares[i].first;
    }
  }

  void drain(int slot) {
    if (slot >= threads) return;
    for (int i = 0; i < share_count; ++i) {
      Share& share = shares[(slot + i) % share_count];
      if (i == 0) share.attended.store(true, std::memory_order_relaxed);
      for (int64_t k; share.take(i == 0, k);) {
        const int64_t begin = (share.first + (direction == Direction::forwards ? k : share.count - 1 - k)) * grain;
        body(context, begin, begin + grain < n ? begin + grain : n, slot);
      }
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
  std::atomic<int> sleepers{0};  // that nobody has woken yet
  std::atomic<int> workers{0};   // changed by who holds `busy`
  std::atomic<int> caller_cpu{-1};
  Sleeper* asleep = nullptr;
  std::mutex mutex;
  std::condition_variable wake;

  void work(int slot) {
    Sleeper me;
    me.leave(caller_cpu.load(std::memory_order_relaxed));  // new threads start beside their maker
    me.return_();
    uint64_t seen = 0;
    for (;;) {
      await(seen, me);
      seen = generation.load();
      inside.fetch_add(1);
      if (Job* j = job.load()) j->drain(slot);
      inside.fetch_sub(1);
    }
  }

  // Until there is something new. The next call often follows at once, and a processor that has gone to sleep takes
  // 100 us and more to come back on a virtual machine: first this thread spins, then it spins and lets others pass.
  void await(uint64_t seen, Sleeper& me) {
    using std::chrono::microseconds;
    const auto start = std::chrono::steady_clock::now();
    bool polite = false;
    for (int turns = 1; generation.load(std::memory_order_acquire) == seen; ++turns) {
      if (polite) std::this_thread::yield();
      else relax();
      if ((turns & 63) != 0) continue;
      const auto waited = std::chrono::steady_clock::now() - start;
      polite = waited > microseconds(50);
      if (waited > microseconds(500)) break;
    }
    if (generation.load() != seen) return;
    {
      std::unique_lock<std::mutex> lock(mutex);
      bool listed = false;
      // Counts itself each time that it goes to sleep, not once: who wakes the sleepers takes them all for awake, and
      // may have been on its way here since before this one saw what is new.
      for (;; wake.wait(lock)) {
        sleepers.fetch_add(1);
        if (generation.load() != seen) break;
        if (listed) continue;
        me.leave(caller_cpu.load(std::memory_order_relaxed));
        me.next = asleep, asleep = &me, listed = true;
      }
      sleepers.fetch_sub(1);
      if (!listed) return;
      Sleeper** at = &asleep;
      while (*at != &me) at = &(*at)->next;
      *at = me.next;
    }
    me.return_();
  }

  void grow(int wanted) {
    while (workers < wanted) {
      try {
        std::thread([this, slot = workers.load() + 1] { work(slot); }).detach();
      } catch (const std::exception&) {
        return;  // no more threads to be had, or no memory for one: those that exist, and the caller, do the work
      }
      ++workers;
    }
  }

  void run(Job& j) {
    const int here = Sleeper::here();
    caller_cpu.store(here, std::memory_order_relaxed);
    const int64_t pieces = (j.n + j.grain - 1) / j.grain;
    grow(int(pieces < j.threads ? pieces : j.threads) - 1);
    job.store(&j);
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      // Once only: to notify again before all have come would wait for them.
      {
        std::lock_guard<std::mutex> lock(mutex);
        sleepers.store(0);
        for (Sleeper* s = asleep; s != nullptr; s = s->next) s->leave(here);
      }
      wake.notify_all();
    }
    j.drain(0);
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

int default_threads() {
  at_fork(nullptr, nullptr, forget_pool);
  if (const int n = positive_number(std::getenv("NORMFAST_NUM_THREADS"))) return n;
  if (const int n = positive_number(std::getenv("OMP_NUM_THREADS"))) return n;
  const int n = allowed_cpus();
  return n < max_threads ? n : max_threads;
}

std::atomic<int> thread_count{default_threads()};

}  // namespace

int get_threads() { return thread_count.load(std::memory_order_relaxed); }
void set_threads(int n) { thread_count.store(n, std::memory_order_relaxed); }

bool workers_awake() {
  const Pool* pool = the_pool.load(std::memory_order_acquire);
  return pool != nullptr && pool->workers.load(std::memory_order_relaxed) > 0 &&
         pool->sleepers.load(std::memory_order_relaxed) == 0;
}

bool calls_in_a_row() {
  static std::atomic<int64_t> last{INT64_MIN / 2};
  using namespace std::chrono;
  const int64_t now = duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
  return now - last.exchange(now, std::memory_order_relaxed) < 1000;
}

void parallel_for(int64_t n, int64_t grain, Body body, void* context, int threads, Direction direction) {
  if (n <= 0) return;
  Pool* pool = n > grain && threads > 1 ? get_pool() : nullptr;
  if (pool == nullptr || pool->busy.exchange(true, std::memory_order_acquire)) {
    if (direction == Direction::forwards) return body(context, 0, n, 0);
    // In at most 64 steps: a body that streams waits for its stores at the end of each.
    const int64_t pieces = (n + grain - 1) / grain, step = (pieces + 63) / 64 * grain;
    for (int64_t end = n, begin; end > 0; end = begin) begin = (end - 1) / step * step, body(context, begin, end, 0);
    return;
  }
  Job job(n, grain, body, context, threads, direction);
  pool->run(job);
  pool->busy.store(false, std::memory_order_release);
}

}  // namespace nf
