// SPDX-License-Identifier: BSD-3-Clause
// Sums down the columns of a matrix, in the order of sums.h: the same bits as if each column had been a row.
//
// Sixteen columns (eight in double) lie in a vector; lane j of the canonical order is the rows j, j + L, j + 2 L, ...
// Ways to the same sums:
//
//   tall      A window of 4 L rows gives every lane one chain of four, four windows are a group, in tables of lanes. A
//             strip of neighbouring vectors goes down together, chain by chain: four rows are read side by side, each
//             in the order in which it lies in memory, while the next group is brought into the second-level cache.
//   resident  Rows that are there already: lane by lane, a group of each for a few vectors at once, in registers.
//   short     Columns of at most one group: the same without tables, which would cost more than the cells.
//   narrow    Matrices whose rows are no whole vectors: sixteen rows, as they lie in memory, are.
#pragma once

#include <type_traits>

#include "column_terms.h"

namespace nf {
namespace {

template <class C> struct GroupSums {
  Vec<C> s[Lanes<C>::n], q[Lanes<C>::n];
};
template <class C> struct LaneTables {
  static constexpr int L = Lanes<C>::n;
  GroupSums<C> group, block;
  F64 s[8][L / 8], q[8][L / 8];  // eight double lanes, each of L columns
};

NF_INLINE void widen_to(F64 (&out)[2], F32 v) { out[0] = lower(v), out[1] = upper(v); }
NF_INLINE void widen_to(F64 (&out)[1], F64 v) { out[0] = v; }

// A chain of one lane: the rows o, o + L, ... below `end`, four of them or fewer.
template <class C, bool Whole, class Column>
NF_INLINE void chain(const Column& f, int64_t o, int64_t end, bool opens, Vec<C>& s2, Vec<C>& q2, Ahead2& ahead,
                     int64_t line) {
  constexpr int64_t L = Lanes<C>::n;
  Vec<C> a, b, c;
  f.get(o, a, b, c);
  Vec<C> s1 = a, q1 = b * c;
#pragma GCC unroll 4
  for (int64_t i = 1; i < 4; ++i) {
    if (!Whole && o + i * L >= end) break;
    f.get(o + i * L, a, b, c);
    s1 = s1 + a, q1 = fma(b, c, q1);
  }
  if constexpr (Whole) {
    if (ahead.first.at != nullptr) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) ahead.first.step(line);
      if (ahead.second.at != nullptr) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) ahead.second.step(line);
      }
    }
  }
  const Vec<C> zero = splat<C>(0);  // added, so that no sum is -0
  s2 = (opens ? zero : s2) + s1, q2 = (opens ? zero : q2) + q1;
}

template <class C> NF_INLINE void close_group(LaneTables<C>& t, bool opens) {
  for (int j = 0; j < Lanes<C>::n; ++j) {
    t.block.s[j] = opens ? t.group.s[j] : t.block.s[j] + t.group.s[j];
    t.block.q[j] = opens ? t.group.q[j] : t.block.q[j] + t.group.q[j];
  }
}

template <class C> NF_INLINE void close_block(LaneTables<C>& t, bool opens) {
  constexpr int L = Lanes<C>::n;
  for (int j = 0; j < 8; ++j) {
    F64 s[L / 8], q[L / 8];
    widen_to(s, t.block.s[j]), widen_to(q, t.block.q[j]);
    if constexpr (L == 16) {
      F64 s8[2], q8[2];
      widen_to(s8, t.block.s[j + 8]), widen_to(q8, t.block.q[j + 8]);
      for (int h = 0; h < 2; ++h) s[h] = s[h] + s8[h], q[h] = q[h] + q8[h];
    }
#pragma GCC unroll 2
    for (int h = 0; h < L / 8; ++h) {
      t.s[j][h] = opens ? s[h] : t.s[j][h] + s[h];
      t.q[j][h] = opens ? q[h] : t.q[j][h] + q[h];
    }
  }
}

NF_INLINE F64 fold8(const F64 (&v)[8]) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// One lane of V vectors of columns through one group, the rows o, o + L, ... below `end`, in registers.
template <class C, int V, class Column>
NF_INLINE void group_lane(const Column (&f)[V], int64_t o, int64_t end, Vec<C> (&s2)[V], Vec<C> (&q2)[V]) {
  constexpr int64_t L = Lanes<C>::n;
  Vec<C> a, b, c, s1[V], q1[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s2[v] = q2[v] = splat<C>(0);
  for (; o + 3 * L < end; o += 4 * L) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) f[v].get(o, a, b, c), s1[v] = a, q1[v] = b * c;
#pragma GCC unroll 4
    for (int64_t i = 1; i < 4; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) f[v].get(o + i * L, a, b, c), s1[v] = s1[v] + a, q1[v] = fma(b, c, q1[v]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s2[v] = s2[v] + s1[v], q2[v] = q2[v] + q1[v];
  }
  if (o >= end) return;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s1[v] = q1[v] = splat<C>(0);
  for (; o < end; o += L)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) f[v].get(o, a, b, c), s1[v] = s1[v] + a, q1[v] = fma(b, c, q1[v]);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s2[v] = s2[v] + s1[v], q2[v] = q2[v] + q1[v];
}

// `each` for the vectors of the columns [from, to): V of them, while as many are left, then one by one.
template <class C, int V, class Term, class Each>
NF_INLINE void for_vectors(const Term& f, int64_t from, int64_t to, const Each& each) {
  constexpr int64_t L = Lanes<C>::n;
  using Column = decltype(f.column(0, 0));
  if constexpr (V > 1) {
    for (; from + V * L <= to; from += V * L) {
      Column columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) columns[v] = f.column(from + v * L, int(L));
      each(columns, from, int(L));
    }
  }
  for (; from + L <= to; from += L) {
    const Column column[1] = {f.column(from, int(L))};
    each(column, from, int(L));
  }
  if (from == to) return;
  const Column column[1] = {f.column(from, int(to - from))};
  each(column, from, int(to - from));
}

// Folds the eight double lanes of L columns, of which `k` are wanted.
template <class C>
NF_INLINE void fold_columns(const F64 (&s)[8][Lanes<C>::n / 8], const F64 (&q)[8][Lanes<C>::n / 8], int64_t k,
                            double* s_out, double* q_out) {
  for (int h = 0; 8 * h < int(Lanes<C>::n) && 8 * h < k; ++h) {
    F64 vs[8], vq[8];
    for (int j = 0; j < 8; ++j) vs[j] = s[j][h], vq[j] = q[j][h];
    const int some = int(k - 8 * h < 8 ? k - 8 * h : 8);
    Cells<double, double>::store_n(s_out + 8 * h, fold8(vs), some);
    Cells<double, double>::store_n(q_out + 8 * h, fold8(vq), some);
  }
}

// All rows, of V vectors of columns; k columns are wanted of the last one.
template <class C, int V, class Column>
NF_INLINE void short_columns(const Column (&f)[V], int64_t begin, int64_t end, int k, double* s_out, double* q_out) {
  constexpr int L = Lanes<C>::n;
  F64 s[V][8][L / 8], q[V][8][L / 8];
  for (int j = 0; j < 8; ++j) {
    Vec<C> s2[V], q2[V];
    group_lane<C>(f, begin + j, end, s2, q2);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) widen_to(s[v][j], s2[v]), widen_to(q[v][j], q2[v]);
    if constexpr (L == 16) {
      group_lane<C>(f, begin + j + 8, end, s2, q2);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        F64 s8[2], q8[2];
        widen_to(s8, s2[v]), widen_to(q8, q2[v]);
        for (int h = 0; h < 2; ++h) s[v][j][h] = s[v][j][h] + s8[h], q[v][j][h] = q[v][j][h] + q8[h];
      }
    }
  }
  for (int v = 0; v < V; ++v) fold_columns<C>(s[v], q[v], V == 1 ? k : L, s_out + v * L, q_out + v * L);
}

// The rows [o, end) of a strip, one group of it, window by window.
template <class C, class Term>
NF_INLINE void group_by_chains(const Term& f, int64_t o, int64_t end, int64_t from, int64_t to, Ahead2 ahead,
                               LaneTables<C> (&tables)[Term::strip]) {
  constexpr int64_t L = Lanes<C>::n;
  if (end - o < L)  // lanes without a row, which no chain opens
    for (LaneTables<C>& t : tables) std::memset(static_cast<void*>(&t.group), 0, sizeof t.group);
  for (int64_t w = o; w < end; w += 4 * L)
    for (int64_t j = 0; j < L && w + j < end; ++j) {
      const auto add = [&](auto whole, int64_t c, int k, LaneTables<C>& t) __attribute__((always_inline)) {
        chain<C, whole>(f.column(c, k), w + j, end, w == o, t.group.s[j], t.group.q[j], ahead, f.line());
      };
      LaneTables<C>* t = tables;
      int64_t c = from;
      if (w + j + 3 * L < end) {
        for (; c + L <= to; c += L) add(std::true_type{}, c, int(L), *t++);
        if (c < to) add(std::true_type{}, c, int(to - c), *t);
      } else {
        for (; c < to; c += L) add(std::false_type{}, c, to - c < L ? int(to - c) : int(L), *t++);
      }
    }
}

// The same lane by lane.
template <class C, class Term>
NF_INLINE void group_by_lanes(const Term& f, int64_t o, int64_t end, int64_t from, int64_t to,
                              LaneTables<C> (&tables)[Term::strip]) {
  for_vectors<C, Term::at_once>(f, from, to, [&](const auto& columns, int64_t c, int) __attribute__((always_inline)) {
    constexpr int V = std::extent_v<std::remove_reference_t<decltype(columns)>>;
    LaneTables<C>* t = tables + (c - from) / Lanes<C>::n;
    for (int j = 0; j < Lanes<C>::n; ++j) {
      Vec<C> s[V], q[V];
      group_lane<C>(columns, o + j, end, s, q);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) t[v].group.s[j] = s[v], t[v].group.q[j] = q[v];
    }
  });
}

// A strip of columns of more rows, group by group.
template <class C, class Term>
NF_INLINE void tall_columns(const Term& f, int64_t begin, int64_t end, int64_t from, int64_t to, bool resident,
                            LaneTables<C> (&tables)[Term::strip]) {
  constexpr int64_t L = Lanes<C>::n, group_rows = 16 * L;
  int groups = 0;
  for (int64_t o = begin; o < end; o += group_rows, ++groups) {
    const int64_t group_end = o + group_rows < end ? o + group_rows : end;
    const bool last = group_end == end;
    if (Term::at_once > 1 && resident) group_by_lanes<C>(f, o, group_end, from, to, tables);
    else group_by_chains<C>(f, o, group_end, from, to, last ? Ahead2{} : f.ahead(o + group_rows, from, to), tables);
    LaneTables<C>* t = tables;
    for (int64_t c = from; c < to; c += L, ++t) {
      close_group(*t, groups % 4 == 0);
      if (groups % 4 == 3 || last) close_block(*t, groups < 4);
    }
  }
}

// The sums of one chunk, rows [begin, end), of all columns of a narrow matrix. The tables of column_chunk, laid out by
// laps: lane j of column c at j*width + c.
template <class C, class Laps>
__attribute__((noinline)) void narrow_chunk(const Laps& f, int64_t begin, int64_t end, int64_t width, double* s,
                                            double* q) {
  constexpr int64_t L = Lanes<C>::n;
  const int64_t lap = L * width, from = begin * width, to = end * width;
  C group_s[L * narrow_width], group_q[L * narrow_width], block_s[L * narrow_width], block_q[L * narrow_width];
  double lanes_s[8 * narrow_width + 8] = {}, lanes_q[8 * narrow_width + 8] = {};
  const auto clear_cells = [lap](C* p) { std::memset(static_cast<void*>(p), 0, size_t(lap) * sizeof(C)); };
  const auto add_to = [](C* sums, Vec<C> v) { Cells<C, C>::store(sums, Cells<C, C>::load(sums) + v); };
  const auto close = [width](const C* block, double* lanes) {
    for (int64_t i = 0; i < 8 * width; i += 8) {
      F64 v = Cells<double, C>::load(block + i);
      if constexpr (L == 16) v = v + Cells<double, C>::load(block + i + 8 * width);
      store(lanes + i, Cells<double, double>::load(lanes + i) + v);
    }
  };
  clear_cells(block_s), clear_cells(block_q);
  int64_t groups = 0;
  for (int64_t o = from; o < to; o += 16 * lap) {
    const int64_t group_end = o + 16 * lap < to ? o + 16 * lap : to;
    clear_cells(group_s), clear_cells(group_q);
    for (int64_t w = o; w < group_end; w += 4 * lap)
      for (int64_t p = 0; p < lap; p += L) {
        Vec<C> a, b, c, s1, q1;
        if (w + 4 * lap <= group_end) {
          f.get(w + p, p, int(L), a, b, c);
          s1 = a, q1 = b * c;
#pragma GCC unroll 4
          for (int64_t i = 1; i < 4; ++i) {
            f.get(w + i * lap + p, p, int(L), a, b, c);
            s1 = s1 + a, q1 = fma(b, c, q1);
          }
        } else {
          s1 = q1 = splat<C>(0);
          for (int64_t i = w + p; i < group_end && i < w + 4 * lap; i += lap) {
            f.get(i, p, int(group_end - i < L ? group_end - i : L), a, b, c);
            s1 = s1 + a, q1 = fma(b, c, q1);
          }
        }
        add_to(group_s + p, s1), add_to(group_q + p, q1);
      }
    for (int64_t p = 0; p < lap; p += L)
      add_to(block_s + p, Cells<C, C>::load(group_s + p)), add_to(block_q + p, Cells<C, C>::load(group_q + p));
    if (++groups % 4 == 0 || group_end == to) {
      close(block_s, lanes_s), close(block_q, lanes_q);
      clear_cells(block_s), clear_cells(block_q);
    }
  }
  for (int64_t c = 0; c < width; c += 8) {
    F64 vs[8], vq[8];
    for (int64_t j = 0; j < 8; ++j) load(vs[j], lanes_s + j * width + c), load(vq[j], lanes_q + j * width + c);
    const int k = int(width - c < 8 ? width - c : 8);
    Cells<double, double>::store_n(s + c, fold8(vs), k);
    Cells<double, double>::store_n(q + c, fold8(vq), k);
  }
}

// The sums of one chunk, rows [begin, end), of the columns [c0, c1), into s[0..] and q[0..]. `resident`: they lie in
// the second-level cache.
template <class C, class Term>
__attribute__((noinline)) void column_chunk(const Term& f, int64_t begin, int64_t end, int64_t c0, int64_t c1,
                                            bool resident, double* s, double* q) {
  constexpr int64_t L = Lanes<C>::n, group_rows = 16 * L;
  if constexpr (Term::by_laps) {
    if (c1 - c0 == f.pitch && is_narrow<C>(f.pitch)) {
      C laps[L * narrow_width];
      return narrow_chunk<C>(f.along(laps), begin, end, f.pitch, s, q);
    }
  }
  if (end - begin <= group_rows) {
    const auto sum = [&](const auto& columns, int64_t c, int k) __attribute__((always_inline)) {
      short_columns<C>(columns, begin, end, k, s + (c - c0), q + (c - c0));
    };
    return Term::at_once > 1 && resident ? for_vectors<C, Term::at_once>(f, c0, c1, sum)
                                         : for_vectors<C, 1>(f, c0, c1, sum);
  }
  constexpr int64_t width = Term::strip * L;
  LaneTables<C> tables[Term::strip];
  for (int64_t from = c0; from < c1; from += width) {
    const int64_t to = from + width < c1 ? from + width : c1;
    tall_columns(f, begin, end, from, to, resident, tables);
    for (int64_t c = from; c < to; c += L) {
      const LaneTables<C>& t = tables[(c - from) / L];
      fold_columns<C>(t.s, t.q, to - c < L ? to - c : L, s + (c - c0), q + (c - c0));
    }
  }
}

// pilot() of sums.h for V vectors of columns, of which the last one has k, down at least L rows.
template <class C, int V, class T> NF_INLINE void tall_pilots(const T* x, int64_t pitch, int64_t n, int k, C* out) {
  constexpr int L = Lanes<C>::n;
  const int64_t last = n - L, starts[4] = {0, last / 3, 2 * last / 3, last};
  const Vec<C> quarter = splat<C>(C(0.25));
  F64 sums[V][L / 8][8];
  for (int lane = 0; lane < L; ++lane) {
    Vec<C> p[V];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const T* row = x + (starts[i] + lane) * pitch;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<C> cells = cells_at<C>(row + v * L, V == 1 ? k : L);
        p[v] = i == 0 ? cells * quarter : fma(cells, quarter, p[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      F64 wide[L / 8];
      widen_to(wide, p[v]);
#pragma GCC unroll 2
      for (int h = 0; h < L / 8; ++h) {
        F64& sum = sums[v][h][lane % 8];
        sum = lane < 8 ? wide[h] : sum + wide[h];
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    double mean[L];
#pragma GCC unroll 2
    for (int h = 0; h < L / 8; ++h) store(mean + 8 * h, fold8(sums[v][h]));
    C pilots[L];
    for (int i = 0; i < L; ++i) pilots[i] = static_cast<C>(mean[i] * (1.0 / L));
    std::memcpy(out + v * L, pilots, size_t(V == 1 ? k : L) * sizeof(C));
  }
}

// The same for the columns [c0, c1) of `n` rows.
template <class C, class T>
__attribute__((noinline)) void column_pilots(const T* x, int64_t pitch, int64_t n, int64_t c0, int64_t c1, C* out) {
  constexpr int64_t L = Lanes<C>::n;
  x += c0;
  int64_t left = c1 - c0;
  if (n < L) {  // the mean itself, from differences
    for (int64_t c = 0; c < left; ++c) {
      const C first = Cast<T>::get(x[c]);
      C cells[L] = {};
      for (int64_t o = 0; o < n; ++o) cells[o] = Cast<T>::get(x[o * pitch + c]) - first;
      out[c] = few_pilot(first, sum_lanes(Cells<C, C>::load(cells)), n);
    }
    return;
  }
  constexpr int V = vectors_at_once;
  if constexpr (V > 1)
    for (; left >= V * L; x += V * L, out += V * L, left -= V * L) tall_pilots<C, V>(x, pitch, n, int(L), out);
  for (; left > 0; x += L, out += L, left -= L) tall_pilots<C, 1>(x, pitch, n, left < L ? int(left) : int(L), out);
}

}  // namespace
}  // namespace nf
