// SPDX-License-Identifier: BSD-3-Clause
// Memory: recycled blocks for large results, workspace of the kernels, and what the caches hold.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nf {

// Results of at least this size come from the pool: fresh pages from the system cost more than the kernels.
constexpr size_t pool_threshold = size_t(1) << 20;

// A block of at least `bytes`, or null. `like` is the input that will be read while the block is written: the two
// are placed so that they do not alias within a page. `pool_free` accepts the pointer given, from any thread.
void* pool_alloc(size_t bytes, const void* like);
void pool_free(void* data);

void pool_set_limit(size_t bytes);
size_t pool_limit();
size_t pool_held();
void pool_release();

// Scratch of a kernel, 64-byte aligned; null when there is none to be had.
void* work_alloc(size_t bytes);
void work_free(void* p);

struct CacheSizes {
  size_t l1, l2, last;
};
const CacheSizes& cache_sizes();

// Should `bytes` of input and output together bypass the cache when written? From half the last-level cache on: in a
// loop over one array that still fits, cached stores would win, but between other work they first fetch what they
// overwrite, and lose twice as much.
bool use_streaming(size_t bytes);

// Scratch that frees itself.
template <class T> struct Work {
  T* p;
  explicit Work(int64_t n) : p(n > 0 ? static_cast<T*>(work_alloc(size_t(n) * sizeof(T))) : nullptr), wanted(n > 0) {}
  ~Work() { work_free(p); }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  bool failed() const { return wanted && p == nullptr; }
  bool wanted;
};

}  // namespace nf
