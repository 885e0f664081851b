// SPDX-License-Identifier: BSD-3-Clause
#include "memory.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "system.h"

#if defined(NF_POISON) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace nf {
namespace {

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
  const size_t quarter = physical_memory() / 4, cap = size_t(1) << 30;
  return quarter < cap ? quarter : cap;
}

struct Setup {
  Setup() {
    limit = default_limit();
    // A fork while another thread holds the lock must not leave it locked in the child.
    at_fork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  }
} setup;

// Sizes come in steps of a sixteenth, so that slightly different results can share a block.
size_t rounded(size_t bytes) {
  size_t step = huge_page;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

Block* map_block(size_t capacity) {
  Block* b = reinterpret_cast<Block*>(map_pages(capacity));
  if (b != nullptr) *b = {capacity, nullptr};
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
    unmap_pages(reinterpret_cast<char*>(b), b->capacity);
    b = next;
  }
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

// Workspace: small from the heap, large from the pool. What stands before it says which, and where that began.
namespace {
struct Origin {
  char* start;
  bool large;
};
}  // namespace

void* work_alloc(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t all = (bytes + 63) / 64 * 64 + 128;
  const bool large = all >= pool_threshold;
  char* start = static_cast<char*>(large ? pool_alloc(all, nullptr) : std::malloc(all));
  if (start == nullptr) return nullptr;
  char* p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) / 64 + 2) * 64);
  reinterpret_cast<Origin*>(p)[-1] = {start, large};
  return p;
}

void work_free(void* p) {
  if (p == nullptr) return;
  const Origin origin = static_cast<Origin*>(p)[-1];
  if (origin.large) pool_free(origin.start);
  else std::free(origin.start);
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = [] {
    CacheSizes c{32u << 10, 1u << 20, 32u << 20};
    find_caches(c);
    return c;
  }();
  return sizes;
}

bool use_streaming(size_t bytes) { return bytes >= cache_sizes().last / 2; }

}  // namespace nf
