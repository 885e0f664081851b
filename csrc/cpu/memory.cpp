// SPDX-License-Identifier: BSD-3-Clause
#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#if defined(NF_POISON) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace nf {
namespace {

constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t page = 4096;

// Stands at the start of every block, which is aligned to a huge page; the data begin within the first two pages
// after it, so the block of a pointer is found by rounding down.
struct Block {
  size_t capacity;  // bytes of the whole mapping
  Block* older;     // list of free blocks, most recently returned first
};

std::mutex mutex;
Block* free_blocks = nullptr;
size_t held = 0;  // bytes in free blocks
std::atomic<size_t> limit{0};

size_t default_limit() {
  if (const char* text = std::getenv("NORMFAST_POOL_BYTES")) {
    char* end = nullptr;
    errno = 0;
    const unsigned long long n = std::strtoull(text, &end, 10);
    if (end != text && *end == '\0' && errno == 0 && text[0] != '-') return size_t(n);
  }
  const size_t ram = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  const size_t quarter = ram / 4, cap = size_t(1) << 30;
  return quarter < cap ? quarter : cap;
}

struct Setup {
  Setup() {
    limit = default_limit();
    // A fork while another thread holds the lock must not leave it locked in the child.
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  }
} setup;

// Sizes come in steps of a sixteenth, so that slightly different results can share a block.
size_t rounded(size_t bytes) {
  size_t step = huge_page;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

Block* map_block(size_t capacity) {
  const size_t reserve = capacity + huge_page;
  void* p = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(p);
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + huge_page - 1) / huge_page * huge_page);
  if (aligned > start) munmap(start, size_t(aligned - start));
  char* tail = aligned + capacity;
  if (tail < start + reserve) munmap(tail, size_t(start + reserve - tail));
#if defined(MADV_HUGEPAGE)
  madvise(aligned, capacity, MADV_HUGEPAGE);
#endif
  Block* b = reinterpret_cast<Block*>(aligned);
  b->capacity = capacity;
  b->older = nullptr;
  return b;
}

// A pool hides two errors from every tool: reading what the last owner left, and reaching beyond what was asked for but
// not beyond the block. Builds with sanitizers (NF_POISON) therefore fill blocks with NaN when they are given out and
// when they come back, and let AddressSanitizer watch what is nobody's.
constexpr bool poison =
#if defined(NF_POISON)
    true;
#else
    false;
#endif
void given_out(Block* b, char* data, size_t bytes) {
  if (!poison) return;
  ASAN_UNPOISON_MEMORY_REGION(b, b->capacity);
  std::memset(data, 0xff, bytes);
  char* const end = data + bytes;
  ASAN_POISON_MEMORY_REGION(b + 1, size_t(data - reinterpret_cast<char*>(b + 1)));
  ASAN_POISON_MEMORY_REGION(end, size_t(reinterpret_cast<char*>(b) + b->capacity - end));
}
void came_back(Block* b) {
  if (!poison) return;
  ASAN_UNPOISON_MEMORY_REGION(b, b->capacity);
  std::memset(static_cast<void*>(b + 1), 0xff, b->capacity - sizeof *b);
  ASAN_POISON_MEMORY_REGION(b + 1, b->capacity - sizeof *b);
}

// Unlinks the least recently returned blocks until at most `keep` bytes are held, and returns them as a list.
Block* take_excess(size_t keep) {
  size_t sum = 0;
  Block** at = &free_blocks;
  while (*at != nullptr && sum + (*at)->capacity <= keep) {
    sum += (*at)->capacity;
    at = &(*at)->older;
  }
  Block* excess = *at;
  *at = nullptr;
  held = sum;
  return excess;
}

void unmap_list(Block* b) {
  while (b != nullptr) {
    Block* next = b->older;
    ASAN_UNPOISON_MEMORY_REGION(b, b->capacity);  // the address may be mapped again, by others
    munmap(b, b->capacity);
    b = next;
  }
}

// A number from the description of CPU 0's cache `index`, with its suffix K or M; 0 when there is none.
size_t cache_fact(int index, const char* what) {
  char path[96], text[32] = {};
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return 0;
  const size_t n = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  if (n == 0) return 0;
  char* end = nullptr;
  const size_t value = std::strtoul(text, &end, 10);
  return *end == 'K' ? value << 10 : *end == 'M' ? value << 20 : value;
}

}  // namespace

void* pool_alloc(size_t bytes, const void* like) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t capacity = rounded(bytes + 3 * page);
  Block* b = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex);
    Block** best = nullptr;
    for (Block** at = &free_blocks; *at != nullptr; at = &(*at)->older)
      if ((*at)->capacity >= capacity && (*at)->capacity <= 2 * capacity &&
          (best == nullptr || (*at)->capacity < (*best)->capacity))
        best = at;
    if (best != nullptr) {
      b = *best;
      *best = b->older;
      held -= b->capacity;
    }
  }
  if (b == nullptr) b = map_block(capacity);
  if (b == nullptr) return nullptr;
  // Half a page away from the input, modulo the page: a load must not look as if it followed a store to its address.
  const size_t colour = (reinterpret_cast<uintptr_t>(like) / 64 * 64 + page / 2) % page;
  char* const data = reinterpret_cast<char*>(b) + page + colour;
  given_out(b, data, bytes);
  return data;
}

void pool_free(void* data) {
  if (data == nullptr) return;
  Block* b = reinterpret_cast<Block*>(reinterpret_cast<uintptr_t>(data) / huge_page * huge_page);
  came_back(b);
  Block* excess;
  {
    std::lock_guard<std::mutex> lock(mutex);
    b->older = free_blocks;
    free_blocks = b;
    held += b->capacity;
    const size_t most = limit.load(std::memory_order_relaxed);
    if (held <= most) return;
    // A block larger than the whole pool must not drive the others out.
    if (b->capacity > most) {
      free_blocks = b->older;
      held -= b->capacity;
      b->older = nullptr;
      excess = b;
    } else {
      excess = take_excess(most);
    }
  }
  unmap_list(excess);
}

void pool_set_limit(size_t bytes) {
  Block* excess;
  {
    std::lock_guard<std::mutex> lock(mutex);
    limit = bytes;
    excess = take_excess(bytes);
  }
  unmap_list(excess);
}

size_t pool_limit() { return limit.load(std::memory_order_relaxed); }

size_t pool_held() {
  std::lock_guard<std::mutex> lock(mutex);
  return held;
}

void pool_release() {
  Block* all;
  {
    std::lock_guard<std::mutex> lock(mutex);
    all = take_excess(0);
  }
  unmap_list(all);
}

// Workspace: small from the heap, large from the pool; the 64 bytes before it say which.
void* work_alloc(size_t bytes) {
  const size_t all = bytes + 64;
  if (all < bytes) return nullptr;
  const bool large = all >= pool_threshold;
  char* p = static_cast<char*>(large ? pool_alloc(all, nullptr) : std::aligned_alloc(64, (all + 63) / 64 * 64));
  if (p == nullptr) return nullptr;
  *p = large;
  return p + 64;
}

void work_free(void* p) {
  if (p == nullptr) return;
  char* start = static_cast<char*>(p) - 64;
  if (*start) pool_free(start);
  else std::free(start);
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = [] {
    // The kernel's description rather than sysconf: in virtual machines the latter may add up the slices of a
    // last-level cache of which this CPU reaches only one.
    CacheSizes c{32u << 10, 1u << 20, 32u << 20};
    bool last_known = false;
    for (int index = 0; index < 8; ++index) {
      const size_t level = cache_fact(index, "level"), size = cache_fact(index, "size");
      if (size == 0) continue;
      if (level == 1 && index == 0) c.l1 = size;
      if (level == 2) c.l2 = size;
      if (level >= 2 && (size >= c.last || !last_known)) c.last = size, last_known = true;
    }
    return c;
  }();
  return sizes;
}

bool use_streaming(size_t bytes) { return bytes >= cache_sizes().last / 2; }

}  // namespace nf
