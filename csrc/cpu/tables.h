// SPDX-License-Identifier: BSD-3-Clause
// Small things that the kernel files share: parameters expanded to cells, sizes from which it pays to do more.
#pragma once

#include "memory.h"
#include "threads.h"
#include "vec.h"

#define NF_JOIN_(a, b) a##_##b
#define NF_JOIN(a, b) NF_JOIN_(a, b)
#define NF_NAME(table) NF_JOIN(table, NF_ISA)

namespace nf {
namespace {

// Up to this many bytes of x a call stays on its thread: another costs more than it saves, and much more where it must
// be woken first, unless it will be needed again at once.
constexpr int64_t small_work = 512 << 10, small_work_awake = 128 << 10;
inline int threads_for(int64_t bytes) {
  const int threads = get_threads();
  if (threads == 1 || bytes <= small_work_awake) return 1;
  return bytes > small_work || workers_awake() || calls_in_a_row() ? threads : 1;
}

// out[j] += v[j] for the lanes of v, in double.
NF_INLINE void add_wide(double* out, F32 v) {
  F64 a, b;
  load(a, out), load(b, out + 8);
  store(out, a + lower(v));
  store(out + 8, b + upper(v));
}
NF_INLINE void add_wide(double* out, F64 v) {
  F64 a;
  load(a, out);
  store(out, a + v);
}

// out[i*span + s] = p[i]; null stays null.
template <class C> NF_INLINE const C* expand_params(const C* p, C* out, int64_t n, int64_t span) {
  if (p == nullptr) return nullptr;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t s = 0; s < span; ++s) out[i * span + s] = p[i];
  return out;
}

template <class C> NF_INLINE const C* fill_params(C* out, int64_t n, C value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
  return out;
}

// Gradients from `at` on, rounded once; a null `out` wants none.
template <class T> NF_INLINE void round_into(void* out, int64_t at, const double* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(out)[at + i] = Cast<T>::from(values[i]);
}
NF_INLINE void round_gradients(DType type, void* out, int64_t at, const double* values, int64_t n) {
  if (out == nullptr) return;
  switch (type) {
    case DType::f64: return round_into<double>(out, at, values, n);
    case DType::f32: return round_into<float>(out, at, values, n);
    case DType::f16: return round_into<f16>(out, at, values, n);
    case DType::bf16: return round_into<bf16>(out, at, values, n);
  }
}

// Collects gradients in order, and rounds a handful at a time.
class GradientWriter {
 public:
  static constexpr int size = 64;
  __attribute__((always_inline)) inline GradientWriter(DType type, void* dweight, void* dbias)
      : type_(type), dweight_(dweight), dbias_(dbias) {}
  __attribute__((always_inline)) inline void add(double w, double b) {
    w_[count_] = w, b_[count_] = b;
    if (++count_ == size) flush();
  }
  // Up to `size` at once, which `sum` adds to zeros.
  template <class Sum> __attribute__((always_inline)) inline void add_some(int n, const Sum& sum) {
    for (int i = 0; i < n; ++i) w_[i] = b_[i] = 0;
    sum(w_, b_);
    count_ = n;
    flush();
  }
  __attribute__((always_inline)) inline void flush() {
    round_gradients(type_, dweight_, at_, w_, count_);
    round_gradients(type_, dbias_, at_, b_, count_);
    at_ += count_, count_ = 0;
  }

 private:
  DType type_;
  void *dweight_, *dbias_;
  int64_t at_ = 0;
  int count_ = 0;
  double w_[size], b_[size];
};

// How many rows ahead of the one being written is the one to be fetched meanwhile? 0: none. Short rows take less time
// than memory does. Long ones the processor's own prefetching follows well, and ours would take its place in the
// queues.
NF_INLINE int64_t rows_ahead(int64_t row_bytes, int64_t all_bytes) {
  constexpr int64_t distance = 12288, longest = 65536;
  if (all_bytes <= int64_t(cache_sizes().l2) || row_bytes > longest) return 0;
  return row_bytes < distance ? (distance + row_bytes - 1) / row_bytes : 1;
}

}  // namespace
}  // namespace nf
