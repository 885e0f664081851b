// SPDX-License-Identifier: BSD-3-Clause
// Sums down the columns of a matrix for batch norm, row by row as they lie in memory.
//
// The other norms owe a column the bits that it would have as a row (column_sums.h), and pay with a table of sixteen
// lanes for each. Batch norm owes that to nobody: here neighbouring rows are added, four in a chain, four chains in a
// group, four groups in a block, blocks in double, so that no float32 sum has more than four terms here either. Chains
// stay in registers; a group and a block take four floats and two doubles of each column. Strips are so wide that the
// first-level cache holds those that every chain needs, a group's, and a row of one is up to a page of memory. Half the
// time of lanes in the caches, and what memory allows beyond them.
#pragma once

#include "column_sums.h"

namespace nf {
namespace {

// Matrices narrower than this are summed several rows at a time, as if those were one row: a loop over one or two
// vectors would be all start and end.
constexpr int64_t narrow_batch = 128;
NF_INLINE int64_t rows_together(int64_t width, int64_t lanes) {
  int64_t rows = 1;  // a power of two, which divides chunks
  if (width < narrow_batch)
    while (rows * width < narrow_batch || rows * width % lanes != 0) rows *= 2;
  return rows;
}
constexpr int64_t most_together = narrow_batch * 16;  // columns of such a row

// The rows that are summed as one chunk. Threads share a matrix by rows, which suit the memory system better than
// columns: where rows are few, chunks are shorter, for each thread to have some.
NF_INLINE int64_t batch_chunk_rows(int64_t rows, int64_t width) {
  return rows > 32768 || width < narrow_batch ? 4096 : 1024;
}

template <class C> struct BatchTables {
  static constexpr int64_t width = 64 * Lanes<C>::n;
  C group_s[width], group_q[width], block_s[width], block_q[width];
  double s[width], q[width];
};

// How cells come to be summed: the four rows of a chain side by side, from the second-level cache or while those below
// are fetched by instructions; or, from memory, which then needs none, one row after the other with the chains in
// tables.
enum class Reading { cached, fetched, in_order };

// The last is for two arrays of short rows (by measurement: wider rows are streams by themselves, and where cells must
// be converted the tables cost more than memory gives).
constexpr int64_t in_order_bytes = 1536;
template <class C, class Term> NF_INLINE bool suits_order(const Term& f, int64_t columns) {
  return Term::arrays == 2 && f.line() == 64 && columns == f.pitch && columns * int64_t(sizeof(C)) <= in_order_bytes;
}

// To a new group if a chain `opens` one.
template <class C> NF_INLINE void add_chain(Vec<C> s, Vec<C> q, bool opens, int64_t at, BatchTables<C>& t) {
  if (!opens) s = Cells<C, C>::load(t.group_s + at) + s, q = Cells<C, C>::load(t.group_q + at) + q;
  Cells<C, C>::store(t.group_s + at, s), Cells<C, C>::store(t.group_q + at, q);
}

// Adds a chain of up to four rows from row o, over the columns [from, to). `ahead` rows below are brought into the
// second-level cache; 0: none.
template <class C, class Term>
NF_INLINE void add_rows(const Term& f, int64_t o, int64_t rows, int64_t from, int64_t to, bool opens, int64_t ahead,
                        BatchTables<C>& t) {
  constexpr int64_t L = Lanes<C>::n;
  const auto some = [&](int64_t c, int k) __attribute__((always_inline)) {
    const auto column = f.column(c, k);
    if (ahead != 0)
      for (int64_t i = 0; i < rows; ++i) f.fetch(o + i + ahead, c);
    Vec<C> a, b, d;
    column.get(o, a, b, d);
    Vec<C> s = a, q = b * d;
#pragma GCC unroll 4
    for (int64_t i = 1; i < rows; ++i) {
      column.get(o + i, a, b, d);
      s = s + a, q = fma(b, d, q);
    }
    add_chain<C>(s, q, opens, c - from, t);
  };
  int64_t c = from;
  for (; c + L <= to; c += L) some(c, int(L));
  if (c < to) some(c, int(to - c));
}

// The same for four rows, one after the other.
template <class C, class Term>
NF_INLINE void add_rows_in_order(const Term& f, int64_t o, int64_t from, int64_t to, bool opens, BatchTables<C>& t) {
  constexpr int64_t L = Lanes<C>::n;
  C chain_s[in_order_bytes / int64_t(sizeof(C)) + L], chain_q[in_order_bytes / int64_t(sizeof(C)) + L];
  const auto add = [&](int64_t row, auto first, auto last) __attribute__((always_inline)) {
    const auto some = [&](int64_t c, int k) __attribute__((always_inline)) {
      C *chain_s_at = chain_s + (c - from), *chain_q_at = chain_q + (c - from);
      Vec<C> a, b, d;
      f.column(c, k).get(row, a, b, d);
      const Vec<C> s = first ? a : Cells<C, C>::load(chain_s_at) + a,
                   q = first ? b * d : fma(b, d, Cells<C, C>::load(chain_q_at));
      if (last) add_chain<C>(s, q, opens, c - from, t);
      else Cells<C, C>::store(chain_s_at, s), Cells<C, C>::store(chain_q_at, q);
    };
    int64_t c = from;
    for (; c + L <= to; c += L) some(c, int(L));
    if (c < to) some(c, int(to - c));
  };
  add(o, std::true_type{}, std::false_type{});
  add(o + 1, std::false_type{}, std::false_type{});
  add(o + 2, std::false_type{}, std::false_type{});
  add(o + 3, std::false_type{}, std::true_type{});
}

template <class D, class C> NF_INLINE void add_table(const C* from, D* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Lanes<D>::n)
    Cells<D, D>::store(to + i, Cells<D, D>::load(to + i) + Cells<D, C>::load(from + i));
}

// The sums of the rows [begin, end) and the columns [from, to), at most one table of them, into t.s and t.q.
template <class C, Reading reading, class Term>
__attribute__((noinline)) void batch_tables(const Term& f, int64_t begin, int64_t end, int64_t from, int64_t to,
                                            BatchTables<C>& t) {
  const int64_t columns = to - from;
  // Far enough for memory to answer, and not on the lines that are being read where rows lie a page apart.
  const int64_t ahead = reading == Reading::fetched ? ((4096 + columns - 1) / columns + 3) / 4 * 4 : 0;
  const size_t whole = size_t((columns + 15) / 16 * 16);  // tables are added in whole vectors
  const auto clear = [whole](auto* p) { std::memset(static_cast<void*>(p), 0, whole * sizeof *p); };
  const auto add_four = [&](int64_t o, bool opens) __attribute__((always_inline)) {
    if constexpr (reading == Reading::in_order) add_rows_in_order<C>(f, o, from, to, opens, t);
    else add_rows<C>(f, o, 4, from, to, opens, ahead, t);
  };
  clear(t.block_s), clear(t.block_q), clear(t.s), clear(t.q);
  for (int64_t block = begin; block < end; block += 64) {
    const int64_t block_end = block + 64 < end ? block + 64 : end;
    for (int64_t o = block; o < block_end; o += 16) {
      const int64_t group_end = o + 16 < end ? o + 16 : end;
      int64_t r = o;
      if (r + 4 <= group_end) add_four(r, true), r += 4;
      for (; r + 4 <= group_end; r += 4) add_four(r, false);
      if (r < group_end) add_rows<C>(f, r, group_end - r, from, to, r == o, 0, t);
      add_table(t.group_s, t.block_s, columns), add_table(t.group_q, t.block_q, columns);
    }
    add_table(t.block_s, t.s, columns), add_table(t.block_q, t.q, columns);
    clear(t.block_s), clear(t.block_q);
  }
}

// The sums of the rows [begin, end) of the columns [c0, c1), into s[0..] and q[0..].
template <class C, class Term>
NF_INLINE void batch_strips(const Term& f, int64_t begin, int64_t end, int64_t c0, int64_t c1, Reading reading,
                            double* s, double* q) {
  BatchTables<C> t;
  for (int64_t from = c0; from < c1; from += t.width) {
    const int64_t to = from + t.width < c1 ? from + t.width : c1;
    const bool in_order = reading == Reading::in_order && suits_order<C>(f, to - from);
    if (reading == Reading::cached) batch_tables<C, Reading::cached>(f, begin, end, from, to, t);
    else if (in_order) batch_tables<C, Reading::in_order>(f, begin, end, from, to, t);
    else batch_tables<C, Reading::fetched>(f, begin, end, from, to, t);
    std::memcpy(s + (from - c0), t.s, size_t(to - from) * sizeof(double));
    std::memcpy(q + (from - c0), t.q, size_t(to - from) * sizeof(double));
  }
}

template <class C, class Term>
__attribute__((noinline)) void batch_chunk(const Term& f, int64_t begin, int64_t end, int64_t c0, int64_t c1,
                                           Reading reading, double* s, double* q) {
  const int64_t together = c1 - c0 == f.pitch ? rows_together(f.pitch, Lanes<C>::n) : 1;
  if (together == 1 || end - begin < together) return batch_strips<C>(f, begin, end, c0, c1, reading, s, q);
  C shifts[most_together];
  double more_s[most_together], more_q[most_together];
  const Term wide = f.together(together, shifts);
  const int64_t whole = (end - begin) / together, left = (end - begin) % together, first = begin / together;
  batch_strips<C>(wide, first, first + whole, 0, together * f.pitch, reading, more_s, more_q);
  batch_strips<C>(f, end - left, end, 0, f.pitch, Reading::cached, s, q);
  for (int64_t half = together / 2 * f.pitch; half >= f.pitch; half /= 2)
    for (int64_t i = 0; i < half; ++i) more_s[i] += more_s[half + i], more_q[i] += more_q[half + i];
  for (int64_t c = 0; c < f.pitch; ++c) s[c] += more_s[c], q[c] += more_q[c];
}

// Values near the means of the columns [c0, c1): of all rows where they are few, otherwise of four times sixteen of
// them. As differences from the first row, so that they are exact for constant data. `sums` has room for two of each
// column.
template <class C, class T>
__attribute__((noinline)) void batch_pilots(const T* x, int64_t pitch, int64_t rows, int64_t c0, int64_t c1, C* out,
                                            double* sums) {
  constexpr int64_t L = Lanes<C>::n;
  const int64_t n = c1 - c0;
  int64_t i = 0;
  for (; i + L <= n; i += L) Cells<C, C>::store(out + i, Cells<C, T>::load(x + c0 + i));
  for (; i < n; ++i) out[i] = C(Cast<T>::get(x[c0 + i]));
  const ColumnShifted<C, T> f{x, pitch, out - c0};
  if (rows <= 64) {
    batch_chunk<C>(f, 0, rows, c0, c1, Reading::cached, sums, sums + n);
    for (i = 0; i < n; ++i) out[i] = C(double(out[i]) + sums[i] / double(rows));
    return;
  }
  const int64_t last = rows - 16, starts[4] = {0, last / 3, 2 * last / 3, last};
  double some[2 * BatchTables<C>::width];
  for (int64_t from = 0; from < n; from += BatchTables<C>::width) {
    const int64_t k = n - from < BatchTables<C>::width ? n - from : BatchTables<C>::width;
    for (i = 0; i < k; ++i) sums[i] = 0;
    for (const int64_t start : starts) {
      batch_strips<C>(f, start, start + 16, c0 + from, c0 + from + k, Reading::cached, some, some + k);
      for (i = 0; i < k; ++i) sums[i] += some[i];
    }
    for (i = 0; i < k; ++i) out[from + i] = C(double(out[from + i]) + sums[i] / 64);
  }
}

}  // namespace
}  // namespace nf
