// SPDX-License-Identifier: BSD-3-Clause
// The machine behind emulation.h: one cluster at a time, a fiber for each of its threads.
//
// A fiber runs until it must wait; what completes a barrier makes all that wait there ready again (schedule.h says in
// which order they run). When none is ready and not all have returned, barriers are divergent.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/platform.cuh"
#include "fiber.h"
#include "schedule.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace nf::cuda::emulation {

bool hostile = false;

namespace {

constexpr size_t most_shared = 227 << 10, canary = 64;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};

struct Warp {
  unsigned waiting = 0, returned = 0;
};

struct Barrier {
  int arrived = 0;
  Place place{};
  const char* name;
};

struct Fiber;

struct Block {
  dim3 index;
  char* shared = nullptr;
  int alive = 0;
  bool begun = false;
  Barrier barrier{0, {}, "__syncthreads"};
  std::vector<Warp> warps;
};

struct Fiber {
  Stack stack;
  bool prepared = false;
  int id = 0, block = 0, thread = 0;
  enum { running, returned, at_block, at_cluster, at_warp } state = running;
  Place place{};
  // the operation of a warp it waits for, and its result
  Operation operation{};
  unsigned mask = 0;
  int source = 0, kind = 0;
  uint64_t value = 0, result = 0;
  std::vector<Copy> copies;
  int64_t groups = 0;
  Warp& warp() const;
  int lane() const { return thread % 32; }
};

// Everything about the launch under way; launches take turns.
std::mutex turn;
std::vector<Fiber*> fibers;
std::vector<Block> blocks;
Barrier cluster_barrier{0, {}, "cluster_sync"};
Fiber* current = nullptr;
Stack host;
Shape shape;
const void* the_kernel;
void (*the_call)(void*);
void* the_arguments;
int threads_in_cluster, still_running;
int failure = 0;
char message[4096] = "";
int cluster_limit = 8;

Warp& Fiber::warp() const { return blocks[size_t(block)].warps[size_t(thread / 32)]; }

// ---- whose turn it is ----------------------------------------------------------------------------------------------

Ready<Fiber> ready;

void enter(Fiber* f) {
  current = f;
  const Block& b = blocks[size_t(f->block)];
  threadIdx = dim3(unsigned(f->thread), 0, 0);
  blockIdx = b.index;
}

std::string where(const Place& p) {
  const char* slash = std::strrchr(p.file != nullptr ? p.file : "?", '/');
  return std::string(slash != nullptr ? slash + 1 : p.file != nullptr ? p.file : "?") + ":" + std::to_string(p.line);
}

std::string name(const Fiber& f) {
  const dim3& b = blocks[size_t(f.block)].index;
  char text[128];
  std::snprintf(text, sizeof text, "thread %d of block (%u, %u, %u)", f.thread, b.x, b.y, b.z);
  return text;
}

std::string kernel_name() {
  Dl_info info;
  if (dladdr(the_kernel, &info) != 0 && info.dli_sname != nullptr) return std::string(info.dli_sname) + ": ";
  return "";  // most are in an anonymous namespace
}

[[noreturn]] void divergent() {
  std::map<std::string, std::pair<int, std::string>> waiting;
  for (int i = 0; i < threads_in_cluster; ++i) {
    const Fiber& f = *fibers[size_t(i)];
    if (f.state == Fiber::running || f.state == Fiber::returned) continue;
    const char* what = f.state == Fiber::at_block     ? "__syncthreads"
                       : f.state == Fiber::at_cluster ? "cluster_sync"
                                                      : "an operation of the warp";
    auto& entry = waiting[std::string(what) + " at " + where(f.place)];
    if (entry.first++ == 0) entry.second = name(f);
  }
  std::string text;
  for (const auto& [what, entry] : waiting)
    text += "; " + std::to_string(entry.first) + " wait for " + what + ", the first being " + entry.second;
  fail(launch_failure, "divergent barrier: no thread can go on%s", text.c_str());
}

// Gives the turn to another fiber. With `keep` the running one stays among the ready.
void go_on(bool keep) {
  Fiber* from = current;
  if (keep) ready.add(from);
  if (ready.empty()) {
    if (still_running != 0) divergent();
    from->stack.switch_to(host);  // comes back for the next cluster
    return;
  }
  Fiber* to = ready.take();
  if (to == from) return;
  enter(to);
  from->stack.switch_to(to->stack);
}

// ---- the life of a block -------------------------------------------------------------------------------------------

void poison(Block& b) { std::memset(b.shared, 0xff, shape.shared); }

bool obtain_shared(Block& b) {
  void* p = nullptr;
  // To the byte, so that the sanitizer sees the first one past the end; without it, the canary does.
  if (posix_memalign(&p, 1024, shape.shared + (NF_ASAN ? 0 : canary)) != 0) return false;
  b.shared = static_cast<char*>(p);
  if (!NF_ASAN) std::memset(b.shared + shape.shared, 0xa5, canary);
  poison(b);
  return true;
}

void end_block(Block& b) {
  if (NF_ASAN) {
    std::free(b.shared);
    b.shared = nullptr;
    return;
  }
  poison(b);
  for (size_t i = 0; i < canary; ++i)
    if (static_cast<unsigned char>(b.shared[shape.shared + i]) != 0xa5)
      fail(launch_failure, "written past the end of the %zu bytes of shared memory", shape.shared);
}

void return_from_kernel() {
  Fiber& f = *current;
  Block& b = blocks[size_t(f.block)];
  if (!f.copies.empty()) fail(launch_failure, "returned with asynchronous copies under way");
  if (b.barrier.arrived != 0)
    fail(launch_failure, "divergent barrier: returned while others wait for __syncthreads at %s",
         where(b.barrier.place).c_str());
  if (cluster_barrier.arrived != 0)
    fail(launch_failure, "divergent barrier: returned while others wait for cluster_sync at %s",
         where(cluster_barrier.place).c_str());
  Warp& w = f.warp();
  for (int i = 0; i < 32; ++i) {
    const Fiber& g = *fibers[size_t(f.id - f.lane() + i)];
    if ((w.waiting >> i & 1u) != 0 && (g.mask >> f.lane() & 1u) != 0)
      fail(launch_failure, "divergent warp: returned while lane %d waits for it at %s", i, where(g.place).c_str());
  }
  w.returned |= 1u << f.lane();
  f.state = Fiber::returned;
  --still_running;
  if (--b.alive == 0) end_block(b);
}

void fiber_main() {
  current->stack.arrive();
  for (;;) {
    Block& b = blocks[size_t(current->block)];
    if (!b.begun) {
      b.begun = true;
      if (shape.cluster > 1) poison(b);  // again: a peer may have written before this block began
    }
    the_call(the_arguments);
    return_from_kernel();
    go_on(false);
  }
}

bool run_cluster() {
  const int threads = shape.threads;
  still_running = threads_in_cluster;
  cluster_barrier.arrived = 0;
  ready.clear();
  for (int i = 0; i < threads_in_cluster; ++i) {
    Fiber& f = *fibers[size_t(i)];
    f.id = i;
    f.block = i / threads;
    f.thread = i % threads;
    f.state = Fiber::running;
    f.place = {};
    f.copies.clear();
    f.groups = 0;
    if (!f.prepared && !f.stack.prepare(fiber_main, unsigned(i))) return false;
    f.prepared = true;
    ready.add(&f);
  }
  Fiber* first = ready.take();
  enter(first);
  host.switch_to(first->stack);
  current = nullptr;
  if (failure != 0)
    for (int i = 0; i < threads_in_cluster; ++i) fibers[size_t(i)]->prepared = false;  // stopped midway
  return true;
}

int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
int refuse(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(message, sizeof message, format, list);
  va_end(list);
  return invalid_configuration;
}

void arrive(Barrier& barrier, int first, int count, Place place, decltype(Fiber::state) state) {
  Fiber& f = *current;
  if (barrier.arrived != 0 && (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0))
    fail(launch_failure, "divergent barrier: waits for %s at %s, others at %s", barrier.name, where(place).c_str(),
         where(barrier.place).c_str());
  for (int i = first; i < first + count; i += shape.threads)
    if (blocks[size_t(i / shape.threads)].alive != shape.threads)
      fail(launch_failure, "divergent barrier: waits for %s at %s after others have returned", barrier.name,
           where(place).c_str());
  barrier.place = place;
  f.place = place;
  if (++barrier.arrived < count) {
    f.state = state;
    go_on(false);
    return;
  }
  barrier.arrived = 0;
  for (int i = first; i < first + count; ++i) {
    fibers[size_t(i)]->state = Fiber::running;
    if (i != f.id) ready.add(fibers[size_t(i)]);
  }
  if (hostile) go_on(true);
}

}  // namespace

// ---- what kernels call ---------------------------------------------------------------------------------------------

void fail(Error error, const char* format, ...) {
  char text[2048];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const Place last = current->place;
  std::snprintf(message, sizeof message, "%s%s%s: %s", kernel_name().c_str(), name(*current).c_str(),
                last.file != nullptr ? (", last seen at " + where(last)).c_str() : "", text);
  failure = error;
  current->stack.switch_to(host);
  std::abort();  // nothing switches back
}

void maybe_switch() {
  if (chance.draw() % 8 == 0) go_on(true);
}

void block_barrier(Place place) {
  touch();
  Block& b = blocks[size_t(current->block)];
  arrive(b.barrier, current->block * shape.threads, shape.threads, place, Fiber::at_block);
}

char* shared_memory() { return blocks[size_t(current->block)].shared; }

void* cluster_peer(void* p, int rank) {
  touch();
  const Block& own = blocks[size_t(current->block)];
  char* at = static_cast<char*>(p);
  if (rank < 0 || rank >= shape.cluster)
    fail(launch_failure, "cluster_peer(%d) in a cluster of %d", rank, shape.cluster);
  if (at < own.shared || at >= own.shared + shape.shared)
    fail(launch_failure, "cluster_peer of an address outside the block's own shared memory");
  const Block& peer = blocks[size_t(rank)];
  if (peer.alive == 0) fail(launch_failure, "cluster_peer(%d): that block has returned", rank);
  return peer.shared + (at - own.shared);
}

int lane() { return current->lane(); }

void check_width(int width) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) fail(launch_failure, "shuffle of width %d", width);
}

uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, int kind, Place place) {
  touch();
  Fiber& f = *current;
  Warp& w = f.warp();
  const unsigned own = 1u << f.lane();
  if ((mask & own) == 0) fail(launch_failure, "%s: the mask 0x%08x lacks the lane itself", where(place).c_str(), mask);
  if ((mask & w.returned) != 0)
    fail(launch_failure, "%s: the mask 0x%08x names lanes that have returned", where(place).c_str(), mask);
  if ((mask >> (source & 31) & 1u) == 0)
    fail(launch_failure, "%s: reads lane %d, which is not in the mask 0x%08x", where(place).c_str(), source, mask);
  f.operation = operation;
  f.mask = mask;
  f.value = value;
  f.source = source;
  f.kind = kind;
  f.place = place;
  w.waiting |= own;
  if ((mask & ~w.waiting) != 0) {
    f.state = Fiber::at_warp;
    go_on(false);
    return f.result;
  }
  // All are here.
  Fiber** lanes = &fibers[size_t(f.id - f.lane())];
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    const Fiber& g = *lanes[i];
    if (g.mask != mask || g.operation != operation || g.kind != kind || g.place.line != place.line)
      fail(launch_failure, "divergent warp: lane %d is at %s with the mask 0x%08x, lane %d at %s with 0x%08x", f.lane(),
           where(place).c_str(), mask, i, where(g.place).c_str(), g.mask);
    ballot |= unsigned(g.value & 1u) << i;
  }
  w.waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    Fiber& g = *lanes[i];
    g.result = operation == Operation::shuffle ? lanes[g.source]->value : ballot;
    g.state = Fiber::running;
    if (&g != &f) ready.add(&g);
  }
  const uint64_t result = f.result;
  if (hostile) go_on(true);
  return result;
}

void copy_async(void* to, const void* from, int bytes) {
  touch();
  const Block& own = blocks[size_t(current->block)];
  char* at = static_cast<char*>(to);
  if (at < own.shared || at + bytes > own.shared + shape.shared)
    fail(launch_failure, "asynchronous copy to an address outside the block's own shared memory");
  char probe[16];
  std::memcpy(probe, from, size_t(bytes));  // the sanitizer then names the line that asked for the copy
  std::memset(to, 0xff, size_t(bytes));
  current->copies.push_back({to, from, bytes, current->groups});
}

void copy_async_commit() { ++current->groups; }

void copy_async_wait(int groups) {
  touch();
  auto& copies = current->copies;
  size_t n = 0;
  for (; n < copies.size() && copies[n].group < current->groups - groups; ++n)
    std::memcpy(copies[n].to, copies[n].from, size_t(copies[n].bytes));
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(n));
}

// ---- what the host calls -------------------------------------------------------------------------------------------

void set_schedule(uint64_t value) {
  const std::lock_guard<std::mutex> lock(turn);
  chance.begin(value);
  hostile = value != 0;
}

void set_max_cluster(int n) { cluster_limit = n; }

const char* last_error() { return message; }

int launch(const void* kernel, const Shape& asked, void (*call)(void*), void* with) {
  if (asked.grid.x == 0 || asked.grid.y == 0 || asked.grid.z == 0) return 0;
  const std::lock_guard<std::mutex> lock(turn);
  message[0] = 0;
  if (asked.threads <= 0 || asked.threads > 1024 || asked.threads % 32 != 0)
    return refuse("launch of %d threads", asked.threads);
  if (asked.cluster <= 0 || asked.cluster > cluster_limit)
    return refuse("launch of clusters of %d blocks, at most %d here", asked.cluster, cluster_limit);
  if (asked.grid.x % unsigned(asked.cluster) != 0)
    return refuse("launch of %u blocks in clusters of %d", asked.grid.x, asked.cluster);
  if (asked.grid.x > 0x7fffffffu || asked.grid.y > 65535 || asked.grid.z > 65535)
    return refuse("launch of a grid of (%u, %u, %u)", asked.grid.x, asked.grid.y, asked.grid.z);
  if (asked.shared > most_shared) return refuse("launch with %zu bytes of shared memory", asked.shared);

  shape = asked;
  the_kernel = kernel;
  the_call = call;
  the_arguments = with;
  failure = 0;
  gridDim = shape.grid;
  blockDim = dim3(unsigned(shape.threads), 1, 1);
  threads_in_cluster = shape.threads * shape.cluster;
  while (int(fibers.size()) < threads_in_cluster) fibers.push_back(new Fiber);  // kept for the next launches

  const uint64_t across = shape.grid.x / unsigned(shape.cluster);
  const uint64_t clusters = across * shape.grid.y * shape.grid.z;
  std::vector<uint64_t> order;
  if (hostile) {
    order.resize(clusters);
    for (uint64_t i = 0; i < clusters; ++i) {
      const uint64_t j = chance.draw() % (i + 1);
      order[i] = order[j];
      order[j] = i;
    }
  }
  bool memory = true;
  for (uint64_t n = 0; n < clusters && failure == 0 && memory; ++n) {
    const uint64_t c = hostile ? order[n] : n;
    blocks.clear();
    for (int rank = 0; rank < shape.cluster; ++rank) {
      Block b;
      b.index = dim3(unsigned(c % across) * unsigned(shape.cluster) + unsigned(rank),
                     unsigned(c / across % shape.grid.y), unsigned(c / across / shape.grid.y));
      b.alive = shape.threads;
      b.warps.resize(size_t(shape.threads / 32));
      memory = memory && obtain_shared(b);
      blocks.push_back(std::move(b));
    }
    memory = memory && run_cluster();
    for (Block& b : blocks) std::free(b.shared);
  }
  if (!memory) return refuse("no memory for the emulation");
  return failure;
}

}  // namespace nf::cuda::emulation

namespace nf::cuda {

int cluster_rank() { return emulation::current->block; }
int cluster_size() { return emulation::shape.cluster; }

// Without a cluster it is __syncthreads().
void cluster_sync(const char* file, int line) {
  using namespace emulation;
  if (shape.cluster == 1) return block_barrier({file, line});
  touch();
  arrive(cluster_barrier, 0, threads_in_cluster, {file, line}, Fiber::at_cluster);
}

int max_cluster() { return emulation::cluster_limit; }

}  // namespace nf::cuda
