// SPDX-License-Identifier: BSD-3-Clause
// What the forward, backward and evaluation kernels of Columns share: how the matrix is cut into units of work, and
// the tables of coefficients, one per column.
//
// Two ways through the same array. `Planes` (batch norm, channels first): each statistic owns runs of `span` cells;
// a unit is a block of channels. `Matrix` (everything else): rows of channels*span cells, sums go down the columns; a
// unit is a stretch of columns of one batch item. A unit that fits the cache is the work of one thread, from the sums
// to the map; larger ones are shared out, sums first, then the map, back to front.
#pragma once

#include "batch_sums.h"
#include "column_sums.h"
#include "kernels.h"
#include "maps.h"
#include "tables.h"
#include "threads.h"

namespace nf {
namespace {

NF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Runs at least this long are summed as runs; shorter ones lie across a vector and are summed down the columns.
constexpr int64_t plane_span = 8;
NF_INLINE bool is_planes(const Columns& g) { return g.any_order && g.span >= plane_span; }

// Cells that share a parameter in runs at least this long are mapped run by run; others through tables, cell by cell.
NF_INLINE bool in_runs(const Columns& g) { return g.param_span >= 16; }
// Where the coefficients of column c stand, and how many entries `columns` of them have.
NF_INLINE int64_t entry(const Columns& g, int64_t c) { return in_runs(g) ? c / g.param_span : c; }

struct PlaneCut {
  int64_t block;  // channels of a unit
  int64_t blocks;
  int64_t chunk_planes;  // planes whose sums are added in lanes before they are folded
  int64_t chunks;
  bool by_unit;  // a unit per thread, or each unit shared by all
};

// `cell_bytes`: of all arrays that are read.
NF_INLINE PlaneCut cut_planes(const Columns& g, int64_t cell_bytes, int threads) {
  PlaneCut cut;
  // Neighbouring channels, so that the runs are long: about 50 KiB in each image; 6 KiB where tables must stay in the
  // first-level cache beside them. If possible a multiple of 16 planes, which ends on a whole vector.
  int64_t block = larger(1, (in_runs(g) ? 12800 : 1600) / g.span);
  if (block >= 16) block = block / 16 * 16;
  // What the caches hold anyhow is cut finer, for all threads to have some.
  const int64_t share = g.channels / (4 * threads);
  if (threads > 1 && g.outer * g.channels * g.span <= int64_t(1) << 20 && share > 0 && share < block)
    block = share >= 16 ? share / 16 * 16 : share;
  cut.block = smaller(block, g.channels);
  cut.blocks = ceil_div(g.channels, cut.block);
  cut.chunk_planes = larger(1, 65536 / g.span);
  cut.chunks = ceil_div(g.outer, cut.chunk_planes);
  // Each thread's block and one that is fetched meanwhile stay in the cache from the sums to the map. Where they would
  // not, the whole array is read twice, as it lies in memory: nothing is faster than that.
  const int64_t held = (threads + 1) * g.outer * cut.block * g.span * cell_bytes;
  cut.by_unit = (threads == 1 || cut.blocks >= 4 * threads) && held <= int64_t(cache_sizes().last) * 3 / 8;
  if (!cut.by_unit) {
    // As few blocks as keep the threads busy, and the lanes of their channels in the second-level cache.
    const int64_t least = threads == 1 ? 1 : ceil_div(4 * threads, cut.chunks);
    cut.block = ceil_div(g.channels, larger(least, ceil_div(g.channels, 2048)));
    if (cut.block >= 16) cut.block = ceil_div(cut.block, 16) * 16;
    cut.blocks = ceil_div(g.channels, cut.block);
  }
  return cut;
}

// Small planes take more time than as many bytes in rows do: each has its statistics. Large ones have many bytes.
constexpr int64_t plane_work = 2;

struct MatrixCut {
  int64_t width;  // columns of a row
  int64_t tile;   // columns of a unit
  int64_t tiles;
  bool by_unit;
  bool resident;    // a unit lies in the second-level cache, or comes there from the last one in time
  bool one_stream;  // the second-level cache holds a unit, which is one piece of memory
};

constexpr int64_t row_segment = 512;

template <class T> NF_INLINE MatrixCut cut_matrix(const Columns& g, int arrays, int threads) {
  MatrixCut cut;
  cut.width = g.channels * g.span;
  const int64_t column_bytes = g.outer * int64_t(sizeof(T)) * arrays;
  const int64_t l2 = int64_t(cache_sizes().l2), budget = l2 * 3 / 8;  // results take as much again
  int64_t tile = cut.width;
  // Narrower than this, the runs of a row are too short for the memory system. A single array has its rows whole if it
  // can, and with them one stream, which memory answers at twice the rate of pieces.
  const int64_t least = smaller(cut.width, 512);
  if (tile * column_bytes > (arrays == 1 ? 2 : 1) * budget) tile = larger(least, budget / column_bytes);
  // Where columns are short, their tables are larger than their cells.
  tile = smaller(tile, 8192);
  // What the caches hold anyhow is cut finer, for all threads to have some.
  if (threads > 1 && cut.width * column_bytes <= 4 * l2)
    tile = smaller(tile, larger(narrow_batch, ceil_div(cut.width, ceil_div(2 * threads, g.batch))));
  // Whole channels and, if possible, whole vectors.
  // Layer norm over a middle axis sums dweight over segments of the row: tiles hold whole ones.
  const int64_t step = g.param_span == 0  ? row_segment
                       : g.span % 16 == 0 ? g.span
                                          : g.span * (g.span % 8 == 0   ? 2
                                                      : g.span % 4 == 0 ? 4
                                                      : g.span % 2 == 0 ? 8
                                                                        : 16);
  cut.tiles = ceil_div(cut.width, tile);
  tile = ceil_div(ceil_div(cut.width, cut.tiles), step) * step;
  cut.tile = smaller(tile, cut.width);
  cut.tiles = ceil_div(cut.width, cut.tile);
  const bool fits = cut.tile * column_bytes <= 4 * budget;
  cut.by_unit = fits && (threads == 1 || g.batch * cut.tiles >= 2 * threads);
  const bool small = cut.by_unit && cut.tile * column_bytes < 2 * budget;
  cut.one_stream = small && arrays == 1 && cut.tile == cut.width;
  cut.resident = small && (cut.one_stream || g.batch * cut.width * column_bytes <= int64_t(cache_sizes().last) / 3);
  if (!cut.by_unit) cut.tile = cut.width, cut.tiles = 1;
  return cut;
}

// How often a table of coefficients is repeated, for rows that are no whole vectors to end on one together; rows of few
// columns are mapped several at a time anyhow. Rows with a parameter each (RowsAsRuns) only up to what the first-level
// cache holds.
template <class C> NF_INLINE int64_t table_repeats(const Columns& g, int64_t tile, int64_t width) {
  if (in_runs(g) || tile != width) return 1;
  const int64_t whole = width % 16 == 0 ? 1 : width % 8 == 0 ? 2 : width % 4 == 0 ? 4 : width % 2 == 0 ? 8 : 16;
  if (g.param_span == 0) return whole * width * int64_t(sizeof(C)) <= 4096 && 8 * whole <= g.outer ? whole : 1;
  if (width >= 256) return 1;
  return ceil_div(smaller(ceil_div(512, width), g.outer), whole) * whole;
}

// The `repeats` of one table; `wrapped` ones go on with their beginning (RowsAsRuns).
template <class C> NF_INLINE void repeat_table(C* table, int64_t tile, int64_t repeats, bool wrapped) {
  for (int64_t r = 1; r < repeats; ++r) std::memcpy(table + r * tile, table, size_t(tile) * sizeof(C));
  if (wrapped) wrap_table(table, repeats * tile);
}

NF_INLINE int64_t padded64(int64_t n) { return (n + 63) / 64 * 64; }

// Unit `index` of a pass F (forward or backward): its batch item and its columns.
template <class F, class U> NF_INLINE void set_unit(const F& f, U& u, int64_t index) {
  const int64_t tiles = f.is_planes ? f.planes.blocks : f.matrix.tiles;
  const int64_t tile = f.is_planes ? f.planes.block * f.g.span : f.matrix.tile;
  u.b = index / tiles;
  u.c0 = index % tiles * tile;
  u.c1 = smaller(u.c0 + tile, f.g.channels * f.g.span);
}

template <class U> NF_INLINE void clear_totals(U& u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) u.total[i] = {};
}

// The rows that are summed as one chunk, whoever does it.
template <class C> NF_INLINE int64_t chunk_rows(const Columns& g) {
  return g.any_order ? batch_chunk_rows(g.outer, g.channels * g.span) : chunk_cells<C>;
}

// How the sums of one unit are shared out between threads: chunks of rows times stretches of columns, as few
// stretches as keep the threads busy, since long runs of a row suit the memory system. Matrices that batch norm sums
// several rows at a time stay whole.
struct Stretches {
  int64_t width, count;
};
NF_INLINE Stretches stretch_columns(int64_t columns, int64_t chunks, int threads) {
  const int64_t wanted = ceil_div(threads > 1 ? 4 * threads : 1, chunks);
  const int64_t width = larger(narrow_batch, ceil_div(ceil_div(columns, wanted), 64) * 64);
  return {width, ceil_div(columns, width)};
}

// Planes: the sums of `planes` runs of g.span cells from plane `from` on, g.channels apart, of each of n channels.
// `term` makes the term of a run from its first cell and its channel; lanes has room for [2] of each channel.
template <class C, class MakeTerm>
NF_INLINE void sum_planes(const Columns& g, int64_t from, int64_t planes, int64_t first, int64_t n, F64* lanes,
                          double* s, double* q, const MakeTerm& term) {
  const F64 zero = splat<double>(0);
  for (int64_t o = from; o < from + planes; ++o)
    for (int64_t i = 0; i < n; ++i) {
      const auto f = term((o * g.channels + first + i) * g.span, i);
      F64 ls = o == from ? zero : lanes[2 * i], lq = o == from ? zero : lanes[2 * i + 1];
      add_run<C, false>(f, g.span, ls, lq);
      lanes[2 * i] = ls, lanes[2 * i + 1] = lq;
    }
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {  // four channels at once
    double t[8];
    store(t, sum_lanes8(lanes + 2 * i));
    for (int j = 0; j < 4; ++j) s[i + j] = t[2 * j], q[i + j] = t[2 * j + 1];
  }
  for (; i < n; ++i) s[i] = sum_lanes(lanes[2 * i]), q[i] = sum_lanes(lanes[2 * i + 1]);
}

// Lanes go down the columns, where the hardware sees no stream: first a unit is brought into the second-level cache in
// the order in which it lies in memory. One piece of memory is read, since the processor drops prefetch instructions
// while too many lines are on their way; of columns [c0, c1) alone, pieces that it does not foresee, reading is the
// slower way.
template <class T> NF_INLINE void read_stream(const T* x, int64_t cells) {
  for (int64_t i = 0; i < cells; i += 64 / int64_t(sizeof(T)))
    static_cast<void>(*reinterpret_cast<const volatile char*>(x + i));
}
template <class T> NF_INLINE void fetch_columns(const T* x, int64_t rows, int64_t width, int64_t c0, int64_t c1) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t o = 0; o < rows; ++o)
    for (int64_t c = c0; c < c1; c += line) __builtin_prefetch(x + o * width + c, 0, 2);
}

// Rows of the matrix in one piece of a shared map, whose pieces are large enough to be worth a claim.
NF_INLINE int64_t piece_bytes(int64_t bytes, int threads) {
  return smaller(int64_t(1) << 17, larger(int64_t(1) << 14, bytes / (4 * threads)));
}
NF_INLINE int64_t map_rows(int64_t row_bytes, int64_t repeats, int64_t piece) {
  return ceil_div(larger(1, piece / row_bytes), repeats) * repeats;
}

// Carves arrays out of one piece of workspace; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T> __attribute__((always_inline)) inline T* take(int64_t n) {
    T* p = base != nullptr ? reinterpret_cast<T*>(base + used) : nullptr;
    used += padded64(n * int64_t(sizeof(T)));
    return p;
  }
};

// Is there a coefficient in [0, n) that float cannot hold?
template <class C> NF_INLINE bool any_extreme(const double* mean, const double* rstd, int64_t n, bool backward) {
  if (sizeof(C) == 8) return false;
  int extreme = 0;  // without a way out of the loop, several at a time
  if (backward) {
    for (int64_t i = 0; i < n; ++i) extreme |= !fits_single_backward(mean[i], rstd[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) extreme |= !fits_single(mean[i], rstd[i]);
  }
  return extreme != 0;
}

// ---- the forward map, shared with batch norm in evaluation ----------------------------------------------------------

// What the map of one unit needs: statistics of its channels (from channel `first`), and its tables.
template <class T> struct ForwardMap {
  using C = typename TypeOf<T>::compute;
  Columns g;
  const T* x;  // of the batch item
  T* y;
  const C *w, *b;
  const double *mean, *rstd;    // per channel of the unit
  const double *mean_lo, *var;  // likewise; null in evaluation
  int64_t first;                // the unit's first channel
  C *hi, *s, *t;                // per run, or from the unit's first column, `repeats` times
  int64_t tile, repeats;        // columns of the unit
  bool center, extreme, streaming;
};

template <class T> NF_INLINE double param(const typename TypeOf<T>::compute* p, int64_t i, double otherwise) {
  return p != nullptr ? double(p[i]) : otherwise;
}

// The coefficients of n channels that take one entry each, with parameters of their own (affine) or without (hat).
// These are loops that compilers turn into vectors; `Given`: mean_lo and var are zero.
template <class C, bool Given, bool Weighted, bool Biased>
__attribute__((noinline)) void affine_columns(int64_t n, const double* __restrict mean,
                                              const double* __restrict mean_lo, const double* __restrict var,
                                              const double* __restrict rstd, const C* __restrict w,
                                              const C* __restrict b, C* __restrict hi, C* __restrict s,
                                              C* __restrict t) {
  for (int64_t i = 0; i < n; ++i) {
    const Affine<C> k = affine<C>(mean[i], Given ? 0.0 : mean_lo[i], Given ? 0.0 : var[i], rstd[i],
                                  Weighted ? double(w[i]) : 1.0, Biased ? double(b[i]) : 0.0);
    hi[i] = k.hi, s[i] = k.s, t[i] = k.t;
  }
}
template <class C>
__attribute__((noinline)) void hat_columns(int64_t n, const double* __restrict mean, const double* __restrict mean_lo,
                                           const double* __restrict var, const double* __restrict rstd,
                                           C* __restrict hi, C* __restrict s, C* __restrict t) {
  for (int64_t i = 0; i < n; ++i) {
    const Hat<C> h = hat<C>(mean[i], mean_lo[i], var[i], rstd[i]);
    hi[i] = h.hi, s[i] = h.rs, t[i] = h.t;
  }
}
template <class T, bool Given> NF_INLINE void column_coefficients(ForwardMap<T>& f) {
  using C = typename TypeOf<T>::compute;
  const C *w = f.w != nullptr ? f.w + f.first : nullptr, *b = f.b != nullptr ? f.b + f.first : nullptr;
  const auto loop =
      w != nullptr ? (b != nullptr ? affine_columns<C, Given, true, true> : affine_columns<C, Given, true, false>)
                   : (b != nullptr ? affine_columns<C, Given, false, true> : affine_columns<C, Given, false, false>);
  loop(f.tile / f.g.span, f.mean, f.mean_lo, f.var, f.rstd, w, b, f.hi, f.s, f.t);
}

// Channels of several cells: one entry per run, or per cell.
template <class T> void spread_coefficients(ForwardMap<T>& f) {
  using C = typename TypeOf<T>::compute;
  const Columns& g = f.g;
  const int64_t each = g.span / g.param_span;  // parameters of a channel
  for (int64_t i = 0; i * g.span < f.tile; ++i) {
    const double lo = f.mean_lo != nullptr ? f.mean_lo[i] : 0.0, var = f.var != nullptr ? f.var[i] : 0.0;
    for (int64_t j = 0; j < each; ++j) {
      const int64_t p = (f.first + i) * each + j, c = entry(g, (i * each + j) * g.param_span);
      const Affine<C> k = affine<C>(f.mean[i], lo, var, f.rstd[i], param<T>(f.w, p, 1.0), param<T>(f.b, p, 0.0));
      for (int64_t s = c; s < c + (in_runs(g) ? 1 : g.param_span); ++s) f.hi[s] = k.hi, f.s[s] = k.s, f.t[s] = k.t;
    }
  }
}

template <class T> void build_tables(ForwardMap<T>& f) {
  using C = typename TypeOf<T>::compute;
  const Columns& g = f.g;
  if (g.param_span == 0) {  // span is 1
    hat_columns<C>(f.tile, f.mean, f.mean_lo, f.var, f.rstd, f.hi, f.s, f.t);
  } else if (entry(g, g.span) == 1) {
    f.mean_lo != nullptr ? column_coefficients<T, false>(f) : column_coefficients<T, true>(f);
  } else {
    spread_coefficients(f);
  }
  const bool wrapped = g.param_span == 0 && wraps<C>(f.tile, g.channels * g.span);
  C* const tables[3] = {f.hi, f.s, f.t};
  for (C* table : tables) repeat_table(table, f.tile, f.repeats, wrapped);
}

// Cells of one row of the unit whose channel float cannot hold are computed in double; the others as the vectors do.
template <class T>
__attribute__((noinline)) void map_row_carefully(const ForwardMap<T>& f, int64_t o, const T* x, T* y) {
  using C = typename TypeOf<T>::compute;
  const Columns& g = f.g;
  for (int64_t c = 0; c < f.tile; ++c) {
    const int64_t i = c / g.span;
    const bool rows = g.param_span == 0;
    const int64_t p = rows ? o : (f.first * g.span + c) / g.param_span;
    const double w = param<T>(f.w, p, 1.0), b = param<T>(f.b, p, 0.0);
    if (fits_single(f.mean[i], f.rstd[i])) {
      const float v = Cast<T>::get(x[c]);
      float out;
      if (rows) {
        const float h = f.center ? fma1f(v - float(f.hi[c]), float(f.s[c]), float(f.t[c])) : v * float(f.s[c]);
        out = fma1f(h, float(w), float(b));
      } else {
        const int64_t e = entry(g, c);
        out = fma1f(v - float(f.hi[e]), float(f.s[e]), float(f.t[e]));
      }
      y[c] = Cast<T>::from(C(out));
    } else {
      const Hat<double> h = hat<double>(f.mean[i], f.mean_lo != nullptr ? f.mean_lo[i] : 0.0, 0, f.rstd[i]);
      y[c] = Cast<T>::from(fma1(fma1(double(Cast<T>::get(x[c])) - h.hi, h.rs, h.t), w, b));
    }
  }
}

// Rows [begin, end) of `tile` columns through tables: rows of few columns lie together, `repeats` of them to a row of
// the table. `op` gives the operation for the cells from row o on.
template <class C, bool Stream, class T, class MakeOp>
NF_INLINE void map_tables(T* y, int64_t begin, int64_t end, int64_t tile, int64_t width, int64_t repeats,
                          const MakeOp& op) {
  const int64_t whole = (end - begin) / repeats, left = (end - begin) % repeats, last = end - left;
  map_table<C, Stream>(y + begin * width, whole, repeats * tile, repeats * width, op(begin));
  if (left > 0) map_table<C, Stream>(y + last * width, 1, left * tile, 0, op(last));
}

// The same with a parameter for each row.
template <class C, bool Stream, class T, class MakeOp>
NF_INLINE void map_weighted_rows(T* y, int64_t begin, int64_t end, int64_t tile, int64_t width, int64_t repeats,
                                 const MakeOp& op) {
  if (!wraps<C>(tile, width)) return map_tables<C, Stream>(y, begin, end, tile, width, 1, op);
  const auto first = op(begin);
  map_runs<C, Stream>(y + begin * width, (end - begin) * width, width, width, Ahead{},
                      RowsAsRuns<C, std::decay_t<decltype(first)>>{first, width, repeats});
}
// What a table of n columns takes.
template <class C> NF_INLINE int64_t table_size(const Columns& g, int64_t n, int64_t repeats) {
  return entry(g, n) * repeats + (g.param_span == 0 ? Lanes<C>::n : 0);
}

// Rows [begin, end) of the unit whose first column is c0; `next`: cells ahead of x that will be needed next (for runs;
// 0 for none).
template <class T, bool Stream, bool Center>
void map_matrix(const ForwardMap<T>& f, int64_t begin, int64_t end, int64_t c0, int64_t next) {
  using C = typename TypeOf<T>::compute;
  const int64_t width = f.g.channels * f.g.span;
  const T* x = f.x + c0;
  T* y = f.y + c0;
  if (f.extreme) {
    for (int64_t o = begin; o < end; ++o) map_row_carefully(f, o, x + o * width, y + o * width);
  } else if (f.g.param_span == 0) {
    map_weighted_rows<C, Stream>(y, begin, end, f.tile, width, f.repeats, [&](int64_t o) {
      return TableHatOp<C, T, Center>{
          {f.hi, f.s, f.t}, x + o * width, f.w != nullptr ? f.w + o : nullptr, f.b != nullptr ? f.b + o : nullptr};
    });
  } else if (in_runs(f.g)) {
    for (int64_t o = begin; o < end; ++o)
      map_runs<C, Stream>(y + o * width, f.tile, f.g.param_span, f.g.param_span,
                          Ahead{next != 0 ? x + o * width + next : nullptr},
                          RunAffineOp<C, T>{x + o * width, f.hi, f.s, f.t});
  } else {
    map_tables<C, Stream>(y, begin, end, f.tile, width, f.repeats,
                          [&](int64_t o) { return TableAffineOp<C, T>{{f.hi, f.s, f.t}, x + o * width}; });
  }
  stream_fence(Stream);
}

template <class T>
__attribute__((noinline)) void map_unit(const ForwardMap<T>& f, int64_t begin, int64_t end, int64_t c0, int64_t next) {
  if (f.g.param_span == 0 && !f.center)
    f.streaming ? map_matrix<T, true, false>(f, begin, end, c0, next)
                : map_matrix<T, false, false>(f, begin, end, c0, next);
  else
    f.streaming ? map_matrix<T, true, true>(f, begin, end, c0, next)
                : map_matrix<T, false, true>(f, begin, end, c0, next);
}

}  // namespace
}  // namespace nf
