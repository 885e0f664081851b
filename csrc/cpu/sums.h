// SPDX-License-Identifier: BSD-3-Clause
// The order in which this library adds.
//
// A reduction over cells 0..n-1 puts cell i into lane i mod L (L = 16 floats or 8 doubles) of vector v = i / L.
// Four vectors are added in a chain, four chains make a group, four groups a block: no float32 sum has more than
// four terms, so that even data that always round the same way stay within two units in the last place. Blocks are
// added in double, lane i + 8 to lane i first; sixteen blocks are a chunk, whose lanes are folded by a tree; chunks
// are added in order, with their rounding errors. Rows and Columns follow the same order, wherever the cells lie,
// whoever computes a chunk and however wide the registers are. Batch norm alone, whose statistics have nothing beside
// them that could be left out, takes an order that suits its memory: plane by plane, or row by row (batch_sums.h).
#pragma once

#include "../formula.h"
#include "vec.h"

namespace nf {
namespace {

template <class C> constexpr int64_t block_cells = 64 * Lanes<C>::n;
template <class C> constexpr int64_t chunk_cells = 16 * block_cells<C>;
template <class C> NF_INLINE int64_t chunk_count(int64_t n) { return (n + chunk_cells<C> - 1) / chunk_cells<C>; }

struct Sums {
  double s, q;
};

// Adds chunk sums one after the other, keeping what rounding drops.
struct ChunkTotal {
  double s = 0, s_rest = 0, q = 0, q_rest = 0;
  __attribute__((always_inline)) inline void add(Sums c) {
    const Exact a = two_sum(s, c.s), b = two_sum(q, c.q);
    // An infinite or NaN sum has no meaningful rest.
    s = a.sum, q = b.sum;
    s_rest += a.error, q_rest += b.error;
  }
  __attribute__((always_inline)) inline void join(const ChunkTotal& other) {
    add(Sums{other.s, other.q});
    s_rest += other.s_rest, q_rest += other.q_rest;
  }
  __attribute__((always_inline)) inline Sums total() const {
    const double ts = s + s_rest, tq = q + q_rest;
    return {ts == ts ? ts : s, tq == tq ? tq : q};
  }
};

// Double lanes into which blocks are flushed.
template <class C> struct BlockSums;
template <> struct BlockSums<float> {
  NF_INLINE F64 widen(F32 v) { return lower(v) + upper(v); }
};
template <> struct BlockSums<double> {
  NF_INLINE F64 widen(F64 v) { return v; }
};

// A term that meanwhile brings memory into the cache, half as much as it reads: from `next` on, and from `second`, if
// two arrays are read.
template <class Term, class T> struct Fetching : Term {
  const T *next, *second = nullptr;
};
template <int64_t cells, class Term> NF_INLINE void fetch(const Term&, int64_t) {}
template <int64_t cells, class Term, class T> NF_INLINE void fetch(const Fetching<Term, T>& f, int64_t i) {
  fetch_lines<cells / 2, 2>(f.next + i / 2);
  if (f.second != nullptr) fetch_lines<cells / 2, 2>(f.second + i / 2);
}

// A term has get(i, a, b, c), the vector at cell i, and get_n(i, k, a, b, c) for the last k < L cells, with zeros in
// the other lanes. It contributes a to the first sum and b*c to the second.
template <class C, class Term> NF_INLINE void add_chain(const Term& f, int64_t i, Vec<C>& s, Vec<C>& q) {
  constexpr int64_t L = Lanes<C>::n;
  fetch<4 * L>(f, i);
  Vec<C> a, b, c;
  f.get(i, a, b, c);
  Vec<C> s1 = a, q1 = b * c;
  f.get(i + L, a, b, c);
  s1 = s1 + a, q1 = fma(b, c, q1);
  f.get(i + 2 * L, a, b, c);
  s1 = s1 + a, q1 = fma(b, c, q1);
  f.get(i + 3 * L, a, b, c);
  s = s + (s1 + a), q = q + fma(b, c, q1);
}

// The last chain of a run: the cells [i, n), fewer than four whole vectors.
template <class C, class Term> NF_INLINE void add_last(const Term& f, int64_t i, int64_t n, Vec<C>& s1, Vec<C>& q1) {
  constexpr int64_t L = Lanes<C>::n;
  Vec<C> a, b, c;
  for (; i + L <= n; i += L) {
    fetch<L>(f, i);
    f.get(i, a, b, c);
    s1 = s1 + a, q1 = fma(b, c, q1);
  }
  if (i < n) {
    fetch<L>(f, i);
    f.get_n(i, int(n - i), a, b, c);
    s1 = s1 + a, q1 = fma(b, c, q1);
  }
}

// The sums of one group, or what there is of it: the cells [i, n), at most sixteen vectors.
template <class C, class Term> NF_INLINE void sum_group(const Term& f, int64_t i, int64_t n, Vec<C>& s2, Vec<C>& q2) {
  constexpr int64_t L = Lanes<C>::n;
  const Vec<C> zero = splat<C>(0);
  s2 = zero, q2 = zero;
  for (; i + 4 * L <= n; i += 4 * L) add_chain<C>(f, i, s2, q2);
  if (i < n) {
    Vec<C> s1 = zero, q1 = zero;
    add_last<C>(f, i, n, s1, q1);
    s2 = s2 + s1, q2 = q2 + q1;
  }
}

// The last block: fewer than 64 whole vectors, perhaps a partial one.
template <class C, class Term> NF_INLINE void add_rest(const Term& f, int64_t i, int64_t n, Vec<C>& s3, Vec<C>& q3) {
  constexpr int64_t group = 16 * Lanes<C>::n;
  for (; i < n; i += group) {
    Vec<C> s2, q2;
    sum_group<C>(f, i, i + group < n ? i + group : n, s2, q2);
    s3 = s3 + s2, q3 = q3 + q2;
  }
}

// Adds the cells [i, n) to the double lanes s and q, block by block.
template <class C, class Term> NF_INLINE void add_blocks(const Term& f, int64_t i, int64_t n, F64& s, F64& q) {
  constexpr int64_t L = Lanes<C>::n;
  const Vec<C> zero = splat<C>(0);
  for (; i + block_cells<C> <= n; i += block_cells<C>) {
    Vec<C> s3 = zero, q3 = zero;
    for (int64_t g = i; g < i + block_cells<C>; g += 16 * L) {
      Vec<C> s2 = zero, q2 = zero;
      add_chain<C>(f, g, s2, q2);
      add_chain<C>(f, g + 4 * L, s2, q2);
      add_chain<C>(f, g + 8 * L, s2, q2);
      add_chain<C>(f, g + 12 * L, s2, q2);
      s3 = s3 + s2, q3 = q3 + q2;
    }
    s = s + BlockSums<C>::widen(s3), q = q + BlockSums<C>::widen(q3);
  }
  if (i < n) {
    Vec<C> s3 = zero, q3 = zero;
    add_rest<C>(f, i, n, s3, q3);
    s = s + BlockSums<C>::widen(s3), q = q + BlockSums<C>::widen(q3);
  }
}

// The double lanes of a run of n cells, often fewer than a group: no loops to set up, and nothing added to zeros.
// `Opens`: they are s and q; otherwise they are added to these.
template <class C, bool Opens, class Term> NF_INLINE void add_run(const Term& f, int64_t n, F64& s, F64& q) {
  if (n > 16 * Lanes<C>::n) {
    if constexpr (Opens) s = q = splat<double>(0);
    return add_blocks<C>(f, 0, n, s, q);
  }
  Vec<C> s2, q2;
  if (n < 4 * Lanes<C>::n) s2 = q2 = splat<C>(0), add_last<C>(f, 0, n, s2, q2);
  else sum_group<C>(f, 0, n, s2, q2);
  const F64 s8 = BlockSums<C>::widen(s2), q8 = BlockSums<C>::widen(q2);
  if constexpr (Opens) s = s8, q = q8;
  else s = s + s8, q = q + q8;
}

// Sums over the cells [i, n) of one chunk; n - i <= chunk_cells.
template <class C, class Term> NF_INLINE Sums chunk_sums(const Term& f, int64_t i, int64_t n) {
  F64 s = splat<double>(0), q = splat<double>(0);
  add_blocks<C>(f, i, n, s, q);
  return {sum_lanes(s), sum_lanes(q)};
}

template <class C, class Term> NF_INLINE Sums run_sums(const Term& f, int64_t n) {
  if (n <= Lanes<C>::n) {  // one vector: no loops to set up
    Vec<C> a, b, c;
    if (n == Lanes<C>::n) f.get(0, a, b, c);
    else f.get_n(0, int(n), a, b, c);
    return {sum_lanes(a), sum_lanes(b * c)};
  }
  if (n <= chunk_cells<C>) return chunk_sums<C>(f, 0, n);
  ChunkTotal total;
  for (int64_t i = 0; i < n; i += chunk_cells<C>) {
    const int64_t end = i + chunk_cells<C>;
    total.add(chunk_sums<C>(f, i, end < n ? end : n));
  }
  return total.total();
}

// ---- terms over a contiguous run -----------------------------------------------------------------------------

// (x - k, (x - k)^2)
template <class C, class T> struct Shifted {
  const T* x;
  C k;
  using V = Vec<C>;
  // The same difference, written as a fused multiply-add: the units for additions are the busier ones here.
  __attribute__((always_inline)) inline void get(int64_t i, V& a, V& b, V& c) const {
    a = b = c = fma(Cells<C, T>::load(x + i), splat<C>(1), splat<C>(-k));
  }
  __attribute__((always_inline)) inline void get_n(int64_t i, int n, V& a, V& b, V& c) const {
    a = b = c = Cells<C, T>::load_n(x + i, n, k) - splat<C>(k);
  }
};

// (0, x^2)
template <class C, class T> struct Squared {
  const T* x;
  using V = Vec<C>;
  __attribute__((always_inline)) inline void get(int64_t i, V& a, V& b, V& c) const {
    a = splat<C>(0), b = c = Cells<C, T>::load(x + i);
  }
  __attribute__((always_inline)) inline void get_n(int64_t i, int n, V& a, V& b, V& c) const {
    a = splat<C>(0), b = c = Cells<C, T>::load_n(x + i, n, C(0));
  }
};

// (dy, dy*(x - k))
template <class C, class T> struct Slopes {
  const T *dy, *x;
  C k;
  using V = Vec<C>;
  __attribute__((always_inline)) inline void get(int64_t i, V& a, V& b, V& c) const {
    a = b = Cells<C, T>::load(dy + i);
    c = Cells<C, T>::load(x + i) - splat<C>(k);
  }
  __attribute__((always_inline)) inline void get_n(int64_t i, int n, V& a, V& b, V& c) const {
    a = b = Cells<C, T>::load_n(dy + i, n, C(0));
    c = Cells<C, T>::load_n(x + i, n, k) - splat<C>(k);
  }
};

// (dy*w, dy*w*xhat)
template <class C, class T, bool Weighted, bool Center> struct WeightedSlopes {
  const T *dy, *x;
  const typename TypeOf<T>::compute* w;
  Hat<C> h;
  using V = Vec<C>;
  using P = typename TypeOf<T>::compute;
  __attribute__((always_inline)) inline V xhat(V x0) const {
    if constexpr (Center) return fma(x0 - splat<C>(h.hi), splat<C>(h.rs), splat<C>(h.t));
    else return x0 * splat<C>(h.rs);
  }
  __attribute__((always_inline)) inline void get(int64_t i, V& a, V& b, V& c) const {
    a = Cells<C, T>::load(dy + i);
    if constexpr (Weighted) a = a * Cells<C, P>::load(w + i);
    b = a;
    c = xhat(Cells<C, T>::load(x + i));
  }
  __attribute__((always_inline)) inline void get_n(int64_t i, int n, V& a, V& b, V& c) const {
    a = Cells<C, T>::load_n(dy + i, n, C(0));
    if constexpr (Weighted) a = a * Cells<C, P>::load_n(w + i, n, C(0));
    b = a;
    c = xhat(Cells<C, T>::load_n(x + i, n, h.hi));
  }
};

// ---- moments of a contiguous run -------------------------------------------------------------------------------

// A value near the mean: the average of 4 L cells spread over the run, exact for constant data. Scaling by 1/4 first
// keeps the sum from overflowing.
template <class C> NF_INLINE C few_pilot(C first, double rest, int64_t n) {
  return static_cast<C>(double(first) + rest / double(n));
}

// The lanes of that average, for at least one whole vector of cells.
template <class C, class T> NF_INLINE Vec<C> pilot_lanes(const T* x, int64_t n) {
  const Vec<C> quarter = splat<C>(C(0.25));
  const int64_t last = n - Lanes<C>::n;
  Vec<C> p = Cells<C, T>::load(x) * quarter;
  p = fma(Cells<C, T>::load(x + last / 3), quarter, p);
  p = fma(Cells<C, T>::load(x + 2 * last / 3), quarter, p);
  return fma(Cells<C, T>::load(x + last), quarter, p);
}

template <class C, class T> NF_INLINE C pilot(const T* x, int64_t n) {
  constexpr int64_t L = Lanes<C>::n;
  if (n < L) {  // the mean itself, from differences
    const C first = Cast<T>::get(x[0]);
    const Vec<C> v = Cells<C, T>::load_n(x, int(n), first) - splat<C>(first);
    return few_pilot(first, sum_lanes(v), n);
  }
  return static_cast<C>(sum_lanes(pilot_lanes<C>(x, n)) / double(L));
}

// Two passes in double, for data that the quick way cannot do.
template <class T, bool Center> __attribute__((noinline)) Moments careful_moments(const T* x, int64_t n) {
  if constexpr (Center) {
    const double k = Cast<T>::get(x[0]);
    const double first = k + run_sums<double>(Shifted<double, T>{x, k}, n).s / double(n);
    const Sums t = run_sums<double>(Shifted<double, T>{x, first}, n);
    return moments_from_sums(t.s, t.q, first, double(n), false);
  } else {
    return {0, 0, run_sums<double>(Squared<double, T>{x}, n).q / double(n), true};
  }
}

template <class C> NF_INLINE Moments quick_moments(Sums t, double k, int64_t n, bool center) {
  constexpr bool single = sizeof(C) == 4;
  if (center) return moments_from_sums(t.s, t.q, k, double(n), single);
  const bool good = t.q >= (single ? 0x1p-90 : 0x1p-900) && t.q <= (single ? 0x1p+100 : 0x1p+900);
  return {0, 0, t.q / double(n), good};
}

// So few cells that their roundings do not average out are summed in double from the start. Numbers that were not
// double then need no shift but the first of them: with x0 among n cells (x0 - mean)^2 <= n var, and the cancellation
// that this costs is far below their own precision.
constexpr int64_t few_cells = 16;
template <class T> constexpr bool few_in_one_pass = sizeof(typename TypeOf<T>::compute) == 4;

// Few cells in double, less a shift: two vectors, zeros behind the end. `Whole`: all sixteen. Not `Center`: no shift.
template <class T, bool Whole, bool Center> struct FewCells {
  F64 a, b;
  __attribute__((always_inline)) inline FewCells(const T* x, int n, double shift) {
    if constexpr (few_in_one_pass<T>) {  // by way of float, which holds the shift, too
      using X = Cells<float, T>;
      F32 v;
      if (Whole || n == few_cells) v = X::load(x);
      else v = X::load_n(x, n, float(shift));
      a = lower(v), b = upper(v);
    } else {
      using X = Cells<double, T>;
      a = Whole || n >= 8 ? X::load(x) : X::load_n(x, n, shift);
      b = Whole || n == few_cells ? X::load(x + 8) : n > 8 ? X::load_n(x + 8, n - 8, shift) : splat<double>(shift);
    }
    if constexpr (Center) a = a - splat<double>(shift), b = b - splat<double>(shift);
  }
};

// Their moments, as rows.cpp computes them for many rows at once.
template <class T, bool Center> NF_INLINE Moments few_moments(const T* x, int n) {
  using Few = FewCells<T, false, Center>;
  if constexpr (Center) {
    double shift = double(Cast<T>::get(x[0]));
    if constexpr (!few_in_one_pass<T>) {
      const Few first(x, n, shift);
      shift = shift + sum_lanes(first.a + first.b) / double(n);
    }
    const Few c(x, n, shift);
    return moments_from_sums(sum_lanes(c.a + c.b), sum_lanes(fma(c.b, c.b, c.a * c.a)), shift, double(n), false);
  } else {
    const Few c(x, n, 0);
    return {0, 0, sum_lanes(fma(c.b, c.b, c.a * c.a)) / double(n), true};
  }
}

// Fetch: cells from `next` on will be needed next, of which half as many as these are fetched.
template <class T, bool Center, bool Fetch> NF_INLINE Moments run_moments(const T* x, int64_t n, const T* next) {
  using C = typename TypeOf<T>::compute;
  using Term = std::conditional_t<Center, Shifted<C, T>, Squared<C, T>>;
  if (n <= few_cells) return few_moments<T, Center>(x, int(n));
  C k = 0;
  Term term;
  if constexpr (Center) k = pilot<C>(x, n), term = {x, k};
  else term = {x};
  Sums s;
  if constexpr (Fetch) s = run_sums<C>(Fetching<Term, T>{term, next}, n);
  else s = run_sums<C>(term, n);
  const Moments m = quick_moments<C>(s, double(k), n, Center);
  if (__builtin_expect(!m.good, 0)) return careful_moments<T, Center>(x, n);
  return m;
}

}  // namespace
}  // namespace nf
