// SPDX-License-Identifier: BSD-3-Clause
// The affine maps that every norm ends with, cell by cell: a loop for cells that
// each have their own coefficients (`map_cells`), one for runs that share theirs (`map_runs`), and what they compute.
#pragma once

#include "../formula.h"
#include "vec.h"

namespace nf {
namespace {

// Memory that will be needed next, brought into the cache while a loop of the same length writes, so that reading and
// writing overlap. Null: nothing. An operation says how near (Op::fetch: 3 the first-level cache, 2 the second-level),
// by measurement: with a weight and a bias per cell the first level has no room.
struct Ahead {
  const void *first = nullptr, *second = nullptr;
};

// y[i] = op(i) for i in [0, n). An operation has get(i), the L cells from i, and get_n(i, k), the k < L cells from i.
// Streaming stores need an aligned address: the loop starts with the cells before it.
template <class C, bool Stream, class T, class Op>
NF_INLINE void map_cells(T* y, int64_t n, Ahead ahead, const Op& op) {
  constexpr int64_t L = Lanes<C>::n;
  int64_t i = 0;
  if constexpr (Stream) {
    const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(y) / sizeof(T) % uintptr_t(L));
    if (before > 0) {
      i = before < n ? before : n;
      Cells<C, T>::store_n(y, op.get_n(0, int(i)), int(i));
    }
  }
  const T *a = static_cast<const T*>(ahead.first), *b = static_cast<const T*>(ahead.second);
  if (b != nullptr) {
    for (; i + L <= n; i += L) {
      __builtin_prefetch(a + i, 0, Op::fetch);
      __builtin_prefetch(b + i, 0, Op::fetch);
      put<Stream, C>(y + i, op.get(i));
    }
  } else if (a != nullptr) {
    for (; i + L <= n; i += L) {
      __builtin_prefetch(a + i, 0, Op::fetch);
      put<Stream, C>(y + i, op.get(i));
    }
  }
  for (; i + L <= n; i += L) put<Stream, C>(y + i, op.get(i));
  if (i < n) Cells<C, T>::store_n(y + i, op.get_n(i, int(n - i)), int(n - i));
}

// Can y be written by streaming stores at all?
template <class T> NF_INLINE bool streamable(const T* y) { return reinterpret_cast<uintptr_t>(y) % sizeof(T) == 0; }

// y = (x - mean)*rstd*weight + bias, each cell with its own parameters
template <class C, class T, bool Center, bool Weighted, bool Biased> struct HatOp {
  static constexpr int fetch = 2;
  const T* x;
  Hat<C> h;
  const C *w, *b;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V apply(V v, V wv, V bv) const {
    if constexpr (Center) v = fma(v - splat<C>(h.hi), splat<C>(h.rs), splat<C>(h.t));
    else v = v * splat<C>(h.rs);
    if constexpr (Weighted && Biased) return fma(v, wv, bv);
    else if constexpr (Weighted) return v * wv;
    else return v;
  }
  __attribute__((always_inline)) inline V get(int64_t i) const {
    V wv{}, bv{};
    if constexpr (Weighted) wv = Cells<C, C>::load(w + i);
    if constexpr (Biased) bv = Cells<C, C>::load(b + i);
    return apply(Cells<C, T>::load(x + i), wv, bv);
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    V wv{}, bv{};
    if constexpr (Weighted) wv = Cells<C, C>::load_n(w + i, n, C(0));
    if constexpr (Biased) bv = Cells<C, C>::load_n(b + i, n, C(0));
    return apply(Cells<C, T>::load_n(x + i, n, C(0)), wv, bv);
  }
};

// y[i] = op(i) for n cells that lie in runs, each with coefficients of its own: the first run ends after `lead` cells,
// the others are `span` >= L long. A vector that lies in two runs takes its coefficients from both, so the loop goes on
// in whole vectors, on whole cache lines where it streams, however long the runs are.
template <class C, bool Stream, class T, class Op>
NF_INLINE void map_runs(T* y, int64_t n, int64_t lead, int64_t span, Ahead ahead, Op op) {
  constexpr int64_t L = Lanes<C>::n;
  int64_t i = 0, r = 0, run_end = lead;
  auto k = op.run(0);
  // The next m <= L cells. Goes on to the next run where this one ends.
  const auto some = [&i, &r, &run_end, &k, op, y, span](int64_t m) {
    auto mine = k;
    if (i + m > run_end) {
      k = op.run(++r);
      mine = Op::join(int(run_end - i), mine, k);
      run_end += span;
    }
    if (m == L) put<Stream, C>(y + i, op.get(i, mine));
    else Cells<C, T>::store_n(y + i, op.get_n(i, int(m), mine), int(m));
    i += m;
  };
  if constexpr (Stream) {
    const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(y) / sizeof(T) % uintptr_t(L));
    if (before > 0) some(before < n ? before : n);
  }
  const T *a = static_cast<const T*>(ahead.first), *b = static_cast<const T*>(ahead.second);
  while (i + L <= n) {
    const int64_t whole = run_end < n ? run_end : n;
    const auto here = k;  // copies, which stay in registers
    int64_t j = i;
    if (b != nullptr) {
      for (; j + L <= whole; j += L) {
        __builtin_prefetch(a + j, 0, Op::fetch);
        __builtin_prefetch(b + j, 0, Op::fetch);
        put<Stream, C>(y + j, op.get(j, here));
      }
    } else if (a != nullptr) {
      for (; j + L <= whole; j += L) {
        __builtin_prefetch(a + j, 0, Op::fetch);
        put<Stream, C>(y + j, op.get(j, here));
      }
    } else {
      for (; j + L <= whole; j += L) put<Stream, C>(y + j, op.get(j, here));
    }
    i = j;
    if (i + L <= n) some(L);
  }
  if (i < n) some(n - i);
}

// y = fma(x - hi, s, t), coefficients per run
template <class C, class T> struct RunAffineOp {
  static constexpr int fetch = 3;
  const T* x;
  const C *hi, *s, *t;
  using V = Vec<C>;
  struct K {
    V hi, s, t;
  };
  __attribute__((always_inline)) inline K run(int64_t r) const {
    return {splat<C>(hi[r]), splat<C>(s[r]), splat<C>(t[r])};
  }
  __attribute__((always_inline)) static inline K join(int n, const K& a, const K& b) {
    return {first_n(n, a.hi, b.hi), first_n(n, a.s, b.s), first_n(n, a.t, b.t)};
  }
  __attribute__((always_inline)) inline V get(int64_t i, const K& k) const {
    return fma(Cells<C, T>::load(x + i) - k.hi, k.s, k.t);
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n, const K& k) const {
    return fma(Cells<C, T>::load_n(x + i, n, C(0)) - k.hi, k.s, k.t);
  }
};

// dx = fma(dy, p, fma(x - hi, q, t)), coefficients per run
template <class C, class T> struct RunGradientOp {
  static constexpr int fetch = 2;
  const T *dy, *x;
  const C *hi, *p, *q, *t;
  using V = Vec<C>;
  struct K {
    V hi, p, q, t;
  };
  __attribute__((always_inline)) inline K run(int64_t r) const {
    return {splat<C>(hi[r]), splat<C>(p[r]), splat<C>(q[r]), splat<C>(t[r])};
  }
  __attribute__((always_inline)) static inline K join(int n, const K& a, const K& b) {
    return {first_n(n, a.hi, b.hi), first_n(n, a.p, b.p), first_n(n, a.q, b.q), first_n(n, a.t, b.t)};
  }
  __attribute__((always_inline)) inline V get(int64_t i, const K& k) const {
    return fma(Cells<C, T>::load(dy + i), k.p, fma(Cells<C, T>::load(x + i) - k.hi, k.q, k.t));
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n, const K& k) const {
    return fma(Cells<C, T>::load_n(dy + i, n, C(0)), k.p, fma(Cells<C, T>::load_n(x + i, n, C(0)) - k.hi, k.q, k.t));
  }
};

// dx = rstd*(g - c1 - xhat*c2), g = dy*w: each cell with its own weight
template <class C, class T, bool Center, bool Weighted> struct HatGradientOp {
  static constexpr int fetch = 2;
  const T *dy, *x;
  Hat<C> h;
  Slope<C> k;
  const C* w;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V apply(V d, V v, V wv) const {
    if constexpr (Center) v = fma(v - splat<C>(h.hi), splat<C>(h.rs), splat<C>(h.t));
    else v = v * splat<C>(h.rs);
    if constexpr (Weighted) d = d * wv;
    return fma(d, splat<C>(h.rs), fma(v, splat<C>(k.a), splat<C>(k.b)));
  }
  __attribute__((always_inline)) inline V get(int64_t i) const {
    V wv{};
    if constexpr (Weighted) wv = Cells<C, C>::load(w + i);
    return apply(Cells<C, T>::load(dy + i), Cells<C, T>::load(x + i), wv);
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    V wv{};
    if constexpr (Weighted) wv = Cells<C, C>::load_n(w + i, n, C(0));
    return apply(Cells<C, T>::load_n(dy + i, n, C(0)), Cells<C, T>::load_n(x + i, n, h.hi), wv);
  }
};

// The same maps with a table of coefficients, one per column.

// y = fma(x - hi, s, t)
template <class C, class T> struct TableAffineOp {
  static constexpr int fetch = 3;
  const T* x;
  const C *hi, *s, *t;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V get(int64_t i) const {
    return fma(Cells<C, T>::load(x + i) - Cells<C, C>::load(hi + i), Cells<C, C>::load(s + i),
               Cells<C, C>::load(t + i));
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    return fma(Cells<C, T>::load_n(x + i, n, C(0)) - Cells<C, C>::load_n(hi + i, n, C(0)),
               Cells<C, C>::load_n(s + i, n, C(0)), Cells<C, C>::load_n(t + i, n, C(0)));
  }
};

// y = xhat*w + b, one w and b for the row of the matrix
template <class C, class T, bool Center> struct TableHatOp {
  static constexpr int fetch = 3;
  const T* x;
  const C *hi, *rs, *t;
  C w, b;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V apply(V v, V h, V r, V u) const {
    if constexpr (Center) v = fma(v - h, r, u);
    else v = v * r;
    return fma(v, splat<C>(w), splat<C>(b));
  }
  __attribute__((always_inline)) inline V get(int64_t i) const {
    return apply(Cells<C, T>::load(x + i), Cells<C, C>::load(hi + i), Cells<C, C>::load(rs + i),
                 Cells<C, C>::load(t + i));
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    return apply(Cells<C, T>::load_n(x + i, n, C(0)), Cells<C, C>::load_n(hi + i, n, C(0)),
                 Cells<C, C>::load_n(rs + i, n, C(0)), Cells<C, C>::load_n(t + i, n, C(0)));
  }
};

// dx = fma(dy, p, fma(x - hi, q, t))
template <class C, class T> struct TableGradientOp {
  static constexpr int fetch = 2;
  const T *dy, *x;
  const C *hi, *p, *q, *t;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V get(int64_t i) const {
    const V v =
        fma(Cells<C, T>::load(x + i) - Cells<C, C>::load(hi + i), Cells<C, C>::load(q + i), Cells<C, C>::load(t + i));
    return fma(Cells<C, T>::load(dy + i), Cells<C, C>::load(p + i), v);
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    const V v = fma(Cells<C, T>::load_n(x + i, n, C(0)) - Cells<C, C>::load_n(hi + i, n, C(0)),
                    Cells<C, C>::load_n(q + i, n, C(0)), Cells<C, C>::load_n(t + i, n, C(0)));
    return fma(Cells<C, T>::load_n(dy + i, n, C(0)), Cells<C, C>::load_n(p + i, n, C(0)), v);
  }
};

// dx = fma(g, rs, fma(xhat, a, b)) with g = dy*w, one w for the row of the matrix
template <class C, class T, bool Center> struct TableHatGradientOp {
  static constexpr int fetch = 2;
  const T *dy, *x;
  const C *hi, *rs, *t, *a, *b;
  C w;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V apply(V d, V v, V h, V r, V u, V ka, V kb) const {
    if constexpr (Center) v = fma(v - h, r, u);
    else v = v * r;
    return fma(d * splat<C>(w), r, fma(v, ka, kb));
  }
  __attribute__((always_inline)) inline V get(int64_t i) const {
    return apply(Cells<C, T>::load(dy + i), Cells<C, T>::load(x + i), Cells<C, C>::load(hi + i),
                 Cells<C, C>::load(rs + i), Cells<C, C>::load(t + i), Cells<C, C>::load(a + i),
                 Cells<C, C>::load(b + i));
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n) const {
    const auto k = [&](const C* p) { return Cells<C, C>::load_n(p + i, n, C(0)); };
    return apply(Cells<C, T>::load_n(dy + i, n, C(0)), Cells<C, T>::load_n(x + i, n, C(0)), k(hi), k(rs), k(t), k(a),
                 k(b));
  }
};

}  // namespace
}  // namespace nf
