// SPDX-License-Identifier: BSD-3-Clause
// The affine maps that every norm ends with, cell by cell: a loop for cells that each have their own coefficients
// (`map_cells`), one for runs that share theirs (`map_runs`), one for rows that share a table (`map_table`), and what
// they compute.
#pragma once

#include "../formula.h"
#include "vec.h"

namespace nf {
namespace {

// Memory that will be needed next, brought into the cache while a loop of the same length writes, so that reading and
// writing overlap. Null: nothing. An operation says how near (Op::fetch: 3 the first-level cache, 2 the second-level),
// by measurement: with a weight and a bias per cell the first level has no room.
// `share`: one in so many cells is fetched here, the others elsewhere, beside the sums.
template <int share> struct AheadOf {
  const void *first = nullptr, *second = nullptr;
  template <class T> __attribute__((always_inline)) static inline AheadOf at(const T* next, int64_t i) {
    return {next != nullptr ? next + i / share : nullptr};
  }
  template <class T, int64_t cells, int near> __attribute__((always_inline)) inline void fetch(int64_t i) const {
    fetch_lines<cells / share, near>(static_cast<const T*>(first) + i / share);
    if (second != nullptr) fetch_lines<cells / share, near>(static_cast<const T*>(second) + i / share);
  }
};
using Ahead = AheadOf<1>;
using HalfAhead = AheadOf<2>;

// Streaming stores write whole cache lines of y: of n cells from y on, `before` lie before the first such line, and the
// last one ends at `end`. Lines of which only a part is streamed would be read, changed and written by the memory.
// Without streaming stores, whole vectors from the first cell on.
template <class C, bool Stream, class T> struct WholeLines {
  static constexpr int64_t unit = Stream ? 64 / int64_t(sizeof(T)) : Lanes<C>::n;
  int64_t before = 0, end;
  __attribute__((always_inline)) inline WholeLines(const T* y, int64_t n) {
    if constexpr (Stream) before = int64_t(-reinterpret_cast<uintptr_t>(y) / sizeof(T) % uintptr_t(unit));
    if (before > n) before = n;
    end = before + (n - before) / unit * unit;
  }
  // Are there no others?
  __attribute__((always_inline)) static inline bool only(const T* y, int64_t n) {
    return n % unit == 0 && (!Stream || reinterpret_cast<uintptr_t>(y) % 64 == 0);
  }
};

template <class T> NF_INLINE int64_t cells_past_line(const T* y) {
  return int64_t(reinterpret_cast<uintptr_t>(y) % 64 / sizeof(T));
}

// The line of y in which one row ends and the next begins, where rows stream one after the other: its cells wait here
// until all are there. Ordinary stores would have memory read it first, and all that is written later wait for that.
template <class T> struct SharedLine {
  static constexpr int64_t unit = 64 / int64_t(sizeof(T));
  struct Line {
    alignas(64) T cells[2 * unit];  // as in y; and room for the end of a vector
  } lines[2];
  int now = 0;                         // the line that is being filled; the other one, when full, goes to `full`
  T *next = nullptr, *full = nullptr;  // next: where in y the cells that wait end
  int64_t from = 0, to = 0;            // which cells wait
  // y[0..k) are the first cells of v, of one line of y.
  template <class C> __attribute__((always_inline)) inline void put(T* y, Vec<C> v, int64_t k) {
    stream_full();
    go_to(y);
    Cells<C, T>::store(lines[now].cells + to, v);
    went_on(k);
  }
  // y[0..k) are these cells, of one line of y.
  void put(T* y, const T* v, int64_t k) {
    stream_full();
    go_to(y);
    std::memcpy(lines[now].cells + to, v, size_t(k) * sizeof(T));
    went_on(k);
  }
  __attribute__((always_inline)) inline void go_to(T* y) {
    if (y != next) finish(), next = y, from = to = cells_past_line(y);
  }
  __attribute__((always_inline)) inline void went_on(int64_t k) {
    to += k, next += k;
    if (to < unit) return;
    // Not streamed at once: a load of what has just been stored in pieces waits for all stores before it.
    if (from == 0) full = next - unit, now = 1 - now, to = 0;
    else finish(), from = to = 0;
  }
  __attribute__((always_inline)) inline void stream_full() {
    if (full != nullptr) stream_line(full, lines[1 - now].cells), full = nullptr;
  }
  // Nothing more will come.
  __attribute__((always_inline)) inline void finish() {
    stream_full();
    if (from != to) store_rest();
  }
  __attribute__((noinline)) void store_rest() {
    std::memcpy(next - (to - from), lines[now].cells + from, size_t(to - from) * sizeof(T));
    to = from;
  }
};

// Where there is no such line, or only now and then: cells that are no whole line are stored at once.
template <class T> struct NoSharedLine {
  template <class C> __attribute__((always_inline)) static inline void put(T* y, Vec<C> v, int64_t k) {
    Cells<C, T>::store_n(y, v, int(k));
  }
};

// y[i] = op(i) for i in [0, n). An operation has get(i), the L cells from i, and get_n(i, k), the k <= L cells from i.
// For the first and the last cells memory is fetched, too: a single line left out of every row takes as long as memory
// takes to answer. `Whole`: there are none of these (asked once for many short rows).
template <class C, bool Stream, bool Whole, class T, class A, class Op, class Line>
NF_INLINE void map_cells(T* y, int64_t n, A ahead, const Op& op, Line& shared) {
  constexpr int64_t L = Lanes<C>::n;
  const WholeLines<C, Stream, T> lines(y, n);
  const int64_t end = Whole ? n : lines.end;
  int64_t i = 0;
  const auto store_until = [&i, y, ahead, &op, &shared](int64_t to) __attribute__((always_inline)) {
    while (i < to) {
      const int64_t m = to - i < L ? to - i : L;
      if (ahead.first != nullptr) ahead.template fetch<T, L, Op::fetch>(i);
      if constexpr (Stream) shared.template put<C>(y + i, op.get_n(i, int(m)), m);
      else Cells<C, T>::store_n(y + i, op.get_n(i, int(m)), int(m));
      i += m;
    }
  };
  // The last cells as a whole vector, some of them for the second time: from x as it still is if y is the same memory.
  const bool twice = !Stream && !Whole && end < n && n > L;
  Vec<C> last{};
  if (twice) last = op.get(n - L);
  if constexpr (Stream && !Whole) store_until(lines.before);
  if (ahead.first != nullptr) {
    for (; i + 4 * L <= end; i += 4 * L) {
      ahead.template fetch<T, 4 * L, Op::fetch>(i);
#pragma GCC unroll 4
      for (int64_t j = i; j < i + 4 * L; j += L) put<Stream, C>(y + j, op.get(j));
    }
    for (; i < end; i += L) {
      ahead.template fetch<T, L, Op::fetch>(i);
      put<Stream, C>(y + i, op.get(i));
    }
  }
  for (; i < end; i += L) put<Stream, C>(y + i, op.get(i));
  if (twice) {
    if (ahead.first != nullptr) ahead.template fetch<T, L, Op::fetch>(i);
    Cells<C, T>::store(y + n - L, last);
  } else if constexpr (!Whole) {
    store_until(n);
  }
}

// y[i] = from[i] for i in [0, n).
template <class T> __attribute__((noinline)) void stream_cells(T* y, const T* from, int64_t n, SharedLine<T>& shared) {
  const WholeLines<float, true, T> lines(y, n);
  if (lines.before > 0) shared.put(y, from, lines.before);
  for (int64_t i = lines.before; i < lines.end; i += SharedLine<T>::unit) stream_line(y + i, from + i);
  if (lines.end < n) shared.put(y + lines.end, from + lines.end, n - lines.end);
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
template <class C, bool Stream, class T, class A, class Op, class Line>
NF_INLINE void map_runs(T* y, int64_t n, int64_t lead, int64_t span, A ahead, Op op, Line& shared) {
  constexpr int64_t L = Lanes<C>::n;
  const WholeLines<C, Stream, T> lines(y, n);
  int64_t i = 0, r = 0, run_end = lead;
  auto k = op.run(0);
  // The next m <= L cells, of whole lines or not. Goes on to the next run where this one ends.
  const auto some = [&, ahead, op, y, span](int64_t m, auto whole) __attribute__((always_inline)) {
    if (ahead.first != nullptr) ahead.template fetch<T, L, Op::fetch>(i);
    auto mine = k;
    if (i + m > run_end) {
      k = op.run(++r);
      mine = Op::join(int(run_end - i), mine, k);
      run_end += span;
    }
    if constexpr (Stream && !whole) shared.template put<C>(y + i, op.get_n(i, int(m), mine), m);
    else if (m == L) put<Stream, C>(y + i, op.get(i, mine));
    else Cells<C, T>::store_n(y + i, op.get_n(i, int(m), mine), int(m));
    i += m;
  };
  const auto store_until = [&i, &some](int64_t to) __attribute__((always_inline)) {
    while (i < to) some(to - i < L ? to - i : L, std::false_type{});
  };
  if constexpr (Stream) store_until(lines.before);
  while (i < lines.end) {
    const int64_t whole = run_end < lines.end ? run_end : lines.end;
    const auto here = k;  // copies, which stay in registers
    int64_t j = i;
    if (ahead.first != nullptr) {
      for (; j + 4 * L <= whole; j += 4 * L) {
        ahead.template fetch<T, 4 * L, Op::fetch>(j);
#pragma GCC unroll 4
        for (int64_t v = j; v < j + 4 * L; v += L) put<Stream, C>(y + v, op.get(v, here));
      }
      for (; j + L <= whole; j += L) {
        ahead.template fetch<T, L, Op::fetch>(j);
        put<Stream, C>(y + j, op.get(j, here));
      }
    } else {
      for (; j + L <= whole; j += L) put<Stream, C>(y + j, op.get(j, here));
    }
    i = j;
    if (i < lines.end) some(L, std::true_type{});
  }
  store_until(n);
}
template <class C, bool Stream, class T, class A, class Op>
NF_INLINE void map_runs(T* y, int64_t n, int64_t lead, int64_t span, A ahead, Op op) {
  NoSharedLine<T> none;
  map_runs<C, Stream>(y, n, lead, span, ahead, op, none);
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

// ---- rows that share a table of coefficients, one per column --------------------------------------------------------

// y[r*pitch + i] = op(r, i) for R rows of n cells each. An operation has at(i), what the table holds for the L columns
// from i, which is loaded once for all R rows; row(r), what belongs to row r, which stays in registers; get(w, j, k),
// the cells from j = r*pitch + i with that w and k; and at_n and get_n for k <= L of them.
template <class C, bool Stream, int R, class T, class Op>
NF_INLINE void map_rows_at_once(T* y, int64_t row, int64_t n, int64_t pitch, const Op& op) {
  constexpr int64_t L = Lanes<C>::n;
  typename Op::Row rows[R];
  for (int j = 0; j < R; ++j) rows[j] = op.row(row + j);
  const WholeLines<C, Stream, T> lines(y + row * pitch, n);
  int64_t i = 0;
  const auto store_until = [&](int64_t to) __attribute__((always_inline)) {
    while (i < to) {
      const int m = int(to - i < L ? to - i : L);
      const auto k = op.at_n(i, m);
      for (int j = 0; j < R; ++j) {
        const int64_t cell = (row + j) * pitch + i;
        Cells<C, T>::store_n(y + cell, op.get_n(rows[j], cell, m, k), m);
      }
      i += m;
    }
  };
  if constexpr (Stream) store_until(lines.before);
  for (; i < lines.end; i += L) {
    const auto k = op.at(i);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      const int64_t cell = (row + j) * pitch + i;
      put<Stream, C>(y + cell, op.get(rows[j], cell, k));
    }
  }
  store_until(n);
}

// Op::together says how many rows the registers have room for. Streaming stores go out row by row: several rows at once
// took half as long again.
template <class C, bool Stream, class T, class Op>
NF_INLINE void map_table(T* y, int64_t rows, int64_t n, int64_t pitch, const Op& op) {
  constexpr int R = Op::together;
  int64_t r = 0;
  if constexpr (!Stream && R > 1)
    for (; r + R <= rows; r += R) map_rows_at_once<C, Stream, R>(y, r, n, pitch, op);
  for (; r < rows; ++r) map_rows_at_once<C, Stream, 1>(y, r, n, pitch, op);
}

// The table of a forward map.
template <class C> struct AffineTable {
  const C *hi, *s, *t;
  struct K {
    Vec<C> hi, s, t;
  };
  __attribute__((always_inline)) inline K at(int64_t i) const {
    return {Cells<C, C>::load(hi + i), Cells<C, C>::load(s + i), Cells<C, C>::load(t + i)};
  }
  __attribute__((always_inline)) inline K at_n(int64_t i, int n) const {
    const auto some = [i, n](const C* p) { return Cells<C, C>::load_n(p + i, n, C(0)); };
    return {some(hi), some(s), some(t)};
  }
};

// y = fma(x - hi, s, t)
template <class C, class T> struct TableAffineOp : AffineTable<C> {
  static constexpr int together = sizeof(T) == sizeof(C) ? 4 : 1;
  const T* x;
  using V = Vec<C>;
  struct Row {};
  using K = typename AffineTable<C>::K;
  __attribute__((always_inline)) inline Row row(int64_t) const { return {}; }
  __attribute__((always_inline)) inline V get(Row, int64_t i, const K& k) const {
    return fma(Cells<C, T>::load(x + i) - k.hi, k.s, k.t);
  }
  __attribute__((always_inline)) inline V get_n(Row, int64_t i, int n, const K& k) const {
    return fma(Cells<C, T>::load_n(x + i, n, C(0)) - k.hi, k.s, k.t);
  }
};

// y = xhat*w + b, one w and b for each row of the matrix, null for ones and zeros
template <class C, class T, bool Center> struct TableHatOp : AffineTable<C> {
  static constexpr int together = 2;
  const T* x;
  const C *w, *b;
  using V = Vec<C>;
  using K = typename AffineTable<C>::K;
  struct Row {
    V w, b;
  };
  __attribute__((always_inline)) static inline Row join(int n, const Row& a, const Row& b) {
    return {first_n(n, a.w, b.w), first_n(n, a.b, b.b)};
  }
  __attribute__((always_inline)) inline Row row(int64_t r) const {
    return {splat<C>(w != nullptr ? w[r] : C(1)), splat<C>(b != nullptr ? b[r] : C(0))};
  }
  __attribute__((always_inline)) inline V apply(const Row& r, V v, const K& k) const {
    if constexpr (Center) v = fma(v - k.hi, k.s, k.t);
    else v = v * k.s;
    return fma(v, r.w, r.b);
  }
  __attribute__((always_inline)) inline V get(const Row& r, int64_t i, const K& k) const {
    return apply(r, Cells<C, T>::load(x + i), k);
  }
  __attribute__((always_inline)) inline V get_n(const Row& r, int64_t i, int n, const K& k) const {
    return apply(r, Cells<C, T>::load_n(x + i, n, C(0)), k);
  }
};

// dx = fma(dy, p, fma(x - hi, q, t))
template <class C, class T> struct TableGradientOp {
  static constexpr int together = sizeof(T) == sizeof(C) ? 4 : 1;
  const T *dy, *x;
  const C *hi, *p, *q, *t;
  using V = Vec<C>;
  struct Row {};
  struct K {
    V hi, p, q, t;
  };
  __attribute__((always_inline)) inline K at(int64_t i) const {
    return {Cells<C, C>::load(hi + i), Cells<C, C>::load(p + i), Cells<C, C>::load(q + i), Cells<C, C>::load(t + i)};
  }
  __attribute__((always_inline)) inline K at_n(int64_t i, int n) const {
    const auto some = [i, n](const C* from) { return Cells<C, C>::load_n(from + i, n, C(0)); };
    return {some(hi), some(p), some(q), some(t)};
  }
  __attribute__((always_inline)) inline Row row(int64_t) const { return {}; }
  __attribute__((always_inline)) inline V get(Row, int64_t i, const K& k) const {
    return fma(Cells<C, T>::load(dy + i), k.p, fma(Cells<C, T>::load(x + i) - k.hi, k.q, k.t));
  }
  __attribute__((always_inline)) inline V get_n(Row, int64_t i, int n, const K& k) const {
    return fma(Cells<C, T>::load_n(dy + i, n, C(0)), k.p, fma(Cells<C, T>::load_n(x + i, n, C(0)) - k.hi, k.q, k.t));
  }
};

// dx = fma(g, rs, fma(xhat, a, b)) with g = dy*w, one w for each row of the matrix
template <class C, class T, bool Center> struct TableHatGradientOp {
  static constexpr int together = 2;
  const T *dy, *x;
  const C *hi, *rs, *t, *a, *b, *w;
  using V = Vec<C>;
  struct K {
    V hi, rs, t, a, b;
  };
  using Row = V;
  __attribute__((always_inline)) static inline Row join(int n, const Row& a, const Row& b) { return first_n(n, a, b); }
  __attribute__((always_inline)) inline Row row(int64_t r) const { return splat<C>(w != nullptr ? w[r] : C(1)); }
  __attribute__((always_inline)) inline K at(int64_t i) const {
    const auto all = [i](const C* p) { return Cells<C, C>::load(p + i); };
    return {all(hi), all(rs), all(t), all(a), all(b)};
  }
  __attribute__((always_inline)) inline K at_n(int64_t i, int n) const {
    const auto some = [i, n](const C* p) { return Cells<C, C>::load_n(p + i, n, C(0)); };
    return {some(hi), some(rs), some(t), some(a), some(b)};
  }
  __attribute__((always_inline)) inline V apply(const Row& weight, V d, V v, const K& k) const {
    if constexpr (Center) v = fma(v - k.hi, k.rs, k.t);
    else v = v * k.rs;
    return fma(d * weight, k.rs, fma(v, k.a, k.b));
  }
  __attribute__((always_inline)) inline V get(const Row& r, int64_t i, const K& k) const {
    return apply(r, Cells<C, T>::load(dy + i), Cells<C, T>::load(x + i), k);
  }
  __attribute__((always_inline)) inline V get_n(const Row& r, int64_t i, int n, const K& k) const {
    return apply(r, Cells<C, T>::load_n(dy + i, n, C(0)), Cells<C, T>::load_n(x + i, n, C(0)), k);
  }
};

// Whole rows that are no whole vectors, as runs one behind the other: no row begins or ends with a part of a vector.
// The L cells that lie in two rows take what belongs to a row from both. The table holds `repeats` rows, a power of
// two, and goes on behind its end, where wrap_table has put its first L entries once more; with as many as make whole
// vectors every vector of the table begins on a cache line.
template <class C, class Op> struct RowsAsRuns {
  static constexpr int fetch = 2;
  Op op;
  int64_t width, repeats;
  struct K {
    typename Op::Row row;
    int64_t start;
  };
  using V = Vec<C>;
  __attribute__((always_inline)) inline K run(int64_t r) const { return {op.row(r), (r & -repeats) * width}; }
  __attribute__((always_inline)) static inline K join(int n, const K& a, const K& b) {
    return {Op::join(n, a.row, b.row), a.start};
  }
  __attribute__((always_inline)) inline V get(int64_t i, const K& k) const {
    return op.get(k.row, i, op.at(i - k.start));
  }
  __attribute__((always_inline)) inline V get_n(int64_t i, int n, const K& k) const {
    return op.get_n(k.row, i, n, op.at(i - k.start));
  }
};
template <class C> NF_INLINE bool wraps(int64_t tile, int64_t width) {
  return tile == width && width >= Lanes<C>::n && width % Lanes<C>::n != 0;
}
template <class C> NF_INLINE void wrap_table(C* table, int64_t n) {
  Cells<C, C>::store(table + n, Cells<C, C>::load(table));
}

}  // namespace
}  // namespace nf
