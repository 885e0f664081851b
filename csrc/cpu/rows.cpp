// SPDX-License-Identifier: BSD-3-Clause
// Rows: the cells of one statistic are one contiguous run (layer, RMS, group and instance norm, channels first).
//
//   forward    mean, var of each row;  y = (x - mean)*rstd*weight + bias
//   traffic    x is read from memory once and again from the cache, y is written once: 2 s bytes per cell of size s
//
// Backward is in rows_backward.cpp. A row is the work of one thread, unless there are too few rows for the threads:
// then its chunks (sums.h) are shared out, with the same bits.
#include "kernels.h"
#include "maps.h"
#include "memory.h"
#include "sums.h"
#include "tables.h"
#include "threads.h"

namespace nf {
namespace {

// Cells whose parameters differ from neighbour to neighbour are mapped with vectors of parameters; where a channel
// covers a longer run, its coefficients are computed once per run. Short runs are expanded to the first form.
constexpr int64_t short_span = 16;

template <class T> struct Forward {
  using C = typename TypeOf<T>::compute;
  using S = typename TypeOf<T>::stat;
  const RowsForward& a;
  Rows g;          // after expansion of short spans
  const C *w, *b;  // likewise
  int64_t n;       // cells of a row
  bool per_cell;   // parameters per cell, not per run
  bool streaming;
  int64_t ahead;  // how many rows from here is the one that is fetched meanwhile? 0: none is
  // Split rows only:
  int64_t chunks = 0;
  Sums* partial = nullptr;
  double* pilots = nullptr;
  Moments* moments = nullptr;
};

template <class T> NF_INLINE void write_stats(const Forward<T>& f, int64_t r, const Moments& m, double rstd) {
  using S = typename TypeOf<T>::stat;
  if (f.a.mean != nullptr) static_cast<S*>(f.a.mean)[r] = static_cast<S>(m.mean);
  if (f.a.rstd != nullptr) static_cast<S*>(f.a.rstd)[r] = static_cast<S>(rstd);
}

template <class T, bool Stream, bool Center, bool Whole, class A, class Line>
NF_INLINE void map_hat(const Forward<T>& f, const T* x, T* y, int64_t n, A ahead, int64_t param,
                       Hat<typename TypeOf<T>::compute> h, Line& line) {
  using C = typename TypeOf<T>::compute;
  if (f.b != nullptr)
    map_cells<C, Stream, Whole>(y, n, ahead, HatOp<C, T, Center, true, true>{x, h, f.w + param, f.b + param}, line);
  else if (f.w != nullptr)
    map_cells<C, Stream, Whole>(y, n, ahead, HatOp<C, T, Center, true, false>{x, h, f.w + param, nullptr}, line);
  else map_cells<C, Stream, Whole>(y, n, ahead, HatOp<C, T, Center, false, false>{x, h, nullptr, nullptr}, line);
}

// The map of a row whose coefficients float cannot hold, in double, one cell at a time.
template <class T>
__attribute__((noinline)) void map_carefully(const Forward<T>& f, int64_t r, int64_t i0, int64_t i1, const Moments& m,
                                             double rstd) {
  const T* x = static_cast<const T*>(f.a.x) + r * f.n;
  T* y = static_cast<T*>(f.a.y) + r * f.n;
  const int64_t first = (r % f.g.period) * f.g.channels;
  const Hat<double> h = hat<double>(m.mean, m.mean_lo, m.var, rstd);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t p = first + i / f.g.span;
    const double xhat = fma1(double(Cast<T>::get(x[i])) - h.hi, h.rs, h.t);
    y[i] = Cast<T>::from(fma1(xhat, f.w != nullptr ? double(f.w[p]) : 1.0, f.b != nullptr ? double(f.b[p]) : 0.0));
  }
}

// Cells [i0, i1) of row r. `next`: what is fetched meanwhile, at the pace of A, null for nothing.
template <class T, bool Stream, bool Center, class A, class Line>
NF_INLINE void map_row(const Forward<T>& f, int64_t r, int64_t i0, int64_t i1, const Moments& m, double rstd,
                       const T* next, Line& line) {
  using C = typename TypeOf<T>::compute;
  if (sizeof(C) == 4 && __builtin_expect(!fits_single(m.mean, rstd), 0)) return map_carefully(f, r, i0, i1, m, rstd);
  const T* x = static_cast<const T*>(f.a.x) + r * f.n;
  T* y = static_cast<T*>(f.a.y) + r * f.n;
  const int64_t first = f.g.period == 1 ? 0 : (r % f.g.period) * f.g.channels;
  if (f.per_cell) {
    map_hat<T, Stream, Center, false>(f, x + i0, y + i0, i1 - i0, A::at(next, i0), first + i0,
                                      hat<C>(m.mean, m.mean_lo, m.var, rstd), line);
    return;
  }
  const int64_t span = f.w == nullptr && f.b == nullptr ? f.n : f.g.span;
  constexpr int64_t some = 64;  // runs whose coefficients are computed together
  C hi[some], s[some], t[some];
  for (int64_t i = i0; i < i1;) {
    const int64_t c = i / span, end = (c + some) * span < i1 ? (c + some) * span : i1;
    for (int64_t j = 0; (c + j) * span < end; ++j) {
      const double w = f.w != nullptr ? double(f.w[first + c + j]) : 1.0;
      const Affine<C> k =
          affine<C>(m.mean, m.mean_lo, m.var, rstd, w, f.b != nullptr ? double(f.b[first + c + j]) : 0.0);
      hi[j] = k.hi, s[j] = k.s, t[j] = k.t;
    }
    map_runs<C, Stream>(y + i, end - i, (c + 1) * span - i, span, A::at(next, i), RunAffineOp<C, T>{x + i, hi, s, t},
                        line);
    i = end;
  }
}

// The sums of one row, and its statistics.
template <class T> struct RowStats {
  Moments m;
  double rstd;
};
template <class T, bool Center, bool Fetch>
NF_INLINE RowStats<T> find_stats(const Forward<T>& f, int64_t r, const T* next) {
  RowStats<T> s;
  s.m = run_moments<T, Center, Fetch>(static_cast<const T*>(f.a.x) + r * f.n, f.n, next);
  s.rstd = rstd_of(s.m.var, f.a.eps);
  write_stats(f, r, s.m, s.rstd);
  return s;
}

template <class T, bool Center, bool Stream> void forward_rows(void* context, int64_t begin, int64_t end, int) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  const T* x = static_cast<const T*>(f.a.x);
  SharedLine<T> line;
  for (int64_t r = begin; r < end; ++r) {
    const bool more = f.ahead != 0 && r + f.ahead < f.g.count;
    const T* next = more ? x + (r + f.ahead) * f.n : nullptr;
    const RowStats<T> s = find_stats<T, Center, false>(f, r, nullptr);
    map_row<T, Stream, Center, Ahead>(f, r, 0, f.n, s.m, s.rstd, next, line);
  }
  line.finish();
  stream_fence(Stream);
}

// Rows so long that memory would rest during their sums: half of the next row is fetched then, and half during the map.
constexpr int64_t long_row_bytes = 8192;

template <class T, bool Center, bool Stream> void forward_long_rows(void* context, int64_t begin, int64_t end, int) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  const T* x = static_cast<const T*>(f.a.x);
  NoSharedLine<T> line;
  for (int64_t r = begin; r < end; ++r) {
    const T* next = x + (r + (r + f.ahead < f.g.count ? f.ahead : 0)) * f.n;
    const RowStats<T> s = find_stats<T, Center, true>(f, r, next);
    map_row<T, Stream, Center, HalfAhead>(f, r, 0, f.n, s.m, s.rstd, next + f.n / 2, line);
  }
  stream_fence(Stream);
}

// ---- rows of few cells: sixteen at a time ------------------------------------------------------------------------

// What is done once per row - folding lanes, square root, divisions - outweighs the cells: here it is done for several
// rows at once. The bits are those of few_moments and map_row.
constexpr int short_group = 16;

// The sums of the cells less the row's shift, if there is one, and of their squares, unless nobody wants them.
template <class T, bool Center, bool Whole, bool Squares = true>
NF_INLINE void short_sums(const T* x, int n, const double* shift, double* s, double* q) {
  for (int i = 0; i < short_group; i += 8) {
    F64 v[8], w[8];
    for (int j = 0; j < 8; ++j) {
      const FewCells<T, Whole, Center> row(x + (i + j) * int64_t(n), n, Center ? shift[i + j] : 0.0);
      if constexpr (Squares) w[j] = fma(row.b, row.b, row.a * row.a);
      if constexpr (Center) v[j] = row.a + row.b;
    }
    if constexpr (Squares) store(q + i, sum_lanes8(w));
    if constexpr (Center) store(s + i, sum_lanes8(v));
  }
}

template <class T, bool Stream, bool Center, bool Whole>
__attribute__((noinline)) void forward_group(const Forward<T>& f, int64_t first) {
  using C = typename TypeOf<T>::compute;
  constexpr int L = int(Lanes<C>::n);
  const int n = Whole ? int(few_cells) : int(f.n);
  const double cells = double(n);
  const T* x = static_cast<const T*>(f.a.x) + first * n;
  double shift[short_group], s[short_group], q[short_group];
  double mean[short_group], mean_lo[short_group], var[short_group], rstd[short_group];
  C hi[short_group], rs[short_group], t[short_group];
  if constexpr (Center)
    for (int i = 0; i < short_group; ++i) shift[i] = double(Cast<T>::get(x[i * n]));
  if constexpr (Center && !few_in_one_pass<T>) {
    short_sums<T, Center, Whole, false>(x, n, shift, s, q);
    for (int i = 0; i < short_group; ++i) shift[i] = shift[i] + s[i] / cells;
  }
  short_sums<T, Center, Whole>(x, n, shift, s, q);
  // Loops that compilers turn into vectors.
  int extreme = 0;
  for (int i = 0; i < short_group; ++i) {
    const Moments m =
        Center ? moments_from_sums(s[i], q[i], shift[i], cells, false) : Moments{0, 0, q[i] / cells, true};
    mean[i] = m.mean, mean_lo[i] = m.mean_lo, var[i] = m.var;
  }
  for (int i = 0; i < short_group; ++i) rstd[i] = rstd_of(var[i], f.a.eps);
  for (int i = 0; i < short_group; ++i) {
    const Hat<C> h = hat<C>(mean[i], mean_lo[i], var[i], rstd[i]);
    hi[i] = h.hi, rs[i] = h.rs, t[i] = h.t;
    extreme |= sizeof(C) == 4 && !fits_single(mean[i], rstd[i]);
  }
  const auto moments = [&](int i) { return Moments{mean[i], mean_lo[i], var[i], true}; };
  if (f.a.mean != nullptr || f.a.rstd != nullptr)
    for (int i = 0; i < short_group; ++i) write_stats(f, first + i, moments(i), rstd[i]);
  if (__builtin_expect(extreme != 0, 0)) {
    NoSharedLine<T> line;
    for (int i = 0; i < short_group; ++i)
      map_row<T, Stream, Center, Ahead>(f, first + i, 0, n, moments(i), rstd[i], nullptr, line);
    return;
  }
  // The map of HatOp, with weight and bias in registers; row by row, so that y is written as it lies in memory.
  using P = Cells<C, T>;
  using W = Cells<C, C>;
  T* y = static_cast<T*>(f.a.y) + first * n;
  const bool stream = Stream && Whole && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  const bool more = stream && f.ahead != 0 && first + f.ahead + short_group <= f.g.count;
  const T* next = more ? x + f.ahead * n : nullptr;
  constexpr int vectors = int(few_cells) / L;
  Vec<C> w[vectors], b[vectors];
  const auto some = [=](int c) { return Whole || n - c > L ? L : n - c; };
  for (int v = 0; v < vectors && v * L < n; ++v) {
    const int k = some(v * L);
    w[v] = splat<C>(1), b[v] = splat<C>(0);
    if (f.w != nullptr) w[v] = k == L ? W::load(f.w + v * L) : W::load_n(f.w + v * L, k, 0);
    if (f.b != nullptr) b[v] = k == L ? W::load(f.b + v * L) : W::load_n(f.b + v * L, k, 0);
  }
  for (int i = 0; i < short_group; ++i)
#pragma GCC unroll 2
    for (int o = 0; o < vectors; ++o) {
      if (o * L >= n) break;
      const int64_t at = i * n + o * L;
      const int k = some(o * L);
      if (next != nullptr) fetch_lines<1, 3>(next + at);
      Vec<C> v = k == L ? P::load(x + at) : P::load_n(x + at, k, 0);
      if constexpr (Center) v = fma(v - splat<C>(hi[i]), splat<C>(rs[i]), splat<C>(t[i]));
      else v = v * splat<C>(rs[i]);
      if (f.b != nullptr) v = fma(v, w[o], b[o]);
      else if (f.w != nullptr) v = v * w[o];
      if (k < L) P::store_n(y + at, v, k);
      else if (stream) P::stream(y + at, v);
      else P::store(y + at, v);
    }
}

template <class T, bool Center, bool Stream> void forward_short(void* context, int64_t begin, int64_t end, int slot) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  int64_t r = begin;
  for (; r + short_group <= end; r += short_group) {
    if (f.n == few_cells) forward_group<T, Stream, Center, true>(f, r);
    else forward_group<T, Stream, Center, false>(f, r);
  }
  if (r < end) return forward_rows<T, Center, Stream>(context, r, end, slot);
  stream_fence(Stream);
}

// ---- rows of some vectors: eight or sixteen at a time --------------------------------------------------------------

// Likewise, where the first-level cache holds eight rows, of one chunk each: beyond, the map would wait for the second.
// Cells have their own parameters, the same in all rows, or a row is one run (instance norm). The bits are those of
// run_moments and map_row.
constexpr int64_t some_bytes = 4096;
// Longer rows that come from memory arrive more evenly one by one; not of 16-bit cells, where arithmetic decides.
constexpr int64_t some_bytes_streaming = 1024;
// Groups of rows so short are as many streams as memory follows by itself.
constexpr int64_t some_bytes_unfetched = 256;
// Of rows so short sixteen go at a time: a group waits for one division after the other, and there are half as many.
// Sixteen that are no whole lines stream by way of the cache.
constexpr int64_t some_bytes_sixteen = 512;

template <class T, bool Stream, bool Center, int rows>
__attribute__((noinline)) void forward_some(const Forward<T>& f, int64_t first, SharedLine<T>& line) {
  using C = typename TypeOf<T>::compute;
  const int64_t n = f.n;
  const T* x = static_cast<const T*>(f.a.x) + first * n;
  T* y = static_cast<T*>(f.a.y) + first * n;
  double shift[rows] = {}, s[rows], q[rows];
  double mean[rows], mean_lo[rows], var[rows], rstd[rows];
  F64 v[rows], w[rows];
  if constexpr (Center) {
    for (int i = 0; i < rows; ++i) v[i] = BlockSums<C>::widen(pilot_lanes<C>(x + i * n, n));
    for (int i = 0; i < rows; i += 8) store(s + i, sum_lanes8(v + i));
    for (int i = 0; i < rows; ++i) shift[i] = double(static_cast<C>(s[i] / double(Lanes<C>::n)));
  }
  for (int i = 0; i < rows; ++i) {
    F64 si, qi;  // in registers
    if constexpr (Center) add_run<C, true>(Shifted<C, T>{x + i * n, C(shift[i])}, n, si, qi);
    else add_run<C, true>(Squared<C, T>{x + i * n}, n, si, qi);
    v[i] = si, w[i] = qi;
  }
  for (int i = 0; i < rows; i += 8) store(s + i, sum_lanes8(v + i)), store(q + i, sum_lanes8(w + i));
  // Loops that compilers turn into vectors.
  int special = 0;
  for (int i = 0; i < rows; ++i) {
    const Moments m = quick_moments<C>({s[i], q[i]}, shift[i], n, Center);
    mean[i] = m.mean, mean_lo[i] = m.mean_lo, var[i] = m.var, special |= !m.good;
  }
  for (int i = 0; i < rows; ++i) {
    rstd[i] = rstd_of(var[i], f.a.eps);
    special |= sizeof(C) == 4 && !fits_single(mean[i], rstd[i]);
  }
  if (__builtin_expect(special != 0, 0)) {
    for (int i = 0; i < rows; ++i) {
      const RowStats<T> one = find_stats<T, Center, false>(f, first + i, nullptr);
      map_row<T, Stream, Center, Ahead>(f, first + i, 0, n, one.m, one.rstd, nullptr, line);
    }
    return;
  }
  if (f.a.mean != nullptr || f.a.rstd != nullptr)
    for (int i = 0; i < rows; ++i) write_stats(f, first + i, Moments{mean[i], mean_lo[i], var[i], true}, rstd[i]);
  C hi[rows], scale[rows], t[rows];
  if (f.per_cell) {
    for (int i = 0; i < rows; ++i) {
      const Hat<C> h = hat<C>(mean[i], mean_lo[i], var[i], rstd[i]);
      hi[i] = h.hi, scale[i] = h.rs, t[i] = h.t;
    }
    const auto map = [&](T* to, auto stream, auto whole) __attribute__((always_inline)) {
      for (int i = 0; i < rows; ++i) {
        const bool more = f.ahead != 0 && first + i + f.ahead < f.g.count;
        const Ahead ahead{more ? x + (i + f.ahead) * n : nullptr};
        map_hat<T, stream, Center, whole>(f, x + i * n, to + i * n, n, ahead, 0, Hat<C>{hi[i], scale[i], t[i]}, line);
      }
    };
    constexpr std::true_type yes{};
    constexpr std::false_type no{};
    constexpr std::bool_constant<Stream> streams{};
    if (WholeLines<C, Stream, T>::only(y, n)) return map(y, streams, yes);
    if constexpr (!Stream || rows < 16) return map(y, streams, no);
    alignas(64) T staged[rows * some_bytes_sixteen / sizeof(T)];
    map(staged, no, no);
    return stream_cells(y, staged, rows * n, line);
  }
  // Every row is one run: they are mapped in one go, and no row begins or ends with a part of a vector.
  for (int i = 0; i < rows; ++i) {
    const int64_t p = f.g.period == 1 ? 0 : (first + i) % f.g.period;
    const Affine<C> k = affine<C>(mean[i], mean_lo[i], var[i], rstd[i], f.w != nullptr ? double(f.w[p]) : 1.0,
                                  f.b != nullptr ? double(f.b[p]) : 0.0);
    hi[i] = k.hi, scale[i] = k.s, t[i] = k.t;
  }
  const bool more = f.ahead != 0 && first + f.ahead + rows <= f.g.count;
  map_runs<C, Stream>(y, rows * n, n, n, Ahead{more ? x + f.ahead * n : nullptr}, RunAffineOp<C, T>{x, hi, scale, t},
                      line);
}

template <class T, bool Center, bool Stream> void forward_somes(void* context, int64_t begin, int64_t end, int slot) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  SharedLine<T> line;
  int64_t r = begin;
  if (f.n * int64_t(sizeof(T)) <= some_bytes_sixteen)
    for (; r + 16 <= end; r += 16) forward_some<T, Stream, Center, 16>(f, r, line);
  for (; r + 8 <= end; r += 8) forward_some<T, Stream, Center, 8>(f, r, line);
  line.finish();
  if (r < end) return forward_rows<T, Center, Stream>(context, r, end, slot);
  stream_fence(Stream);
}

// ---- few long rows: the chunks of a row are shared out -----------------------------------------------------------

template <class T, bool Center> void split_sums(void* context, int64_t begin, int64_t end, int) {
  using C = typename TypeOf<T>::compute;
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = i / f.chunks, from = (i % f.chunks) * chunk_cells<C>;
    const T* x = static_cast<const T*>(f.a.x) + r * f.n;
    const int64_t to = from + chunk_cells<C> < f.n ? from + chunk_cells<C> : f.n;
    if constexpr (Center) f.partial[i] = chunk_sums<C>(Shifted<C, T>{x, C(f.pilots[r])}, from, to);
    else f.partial[i] = chunk_sums<C>(Squared<C, T>{x}, from, to);
  }
}

template <class T, bool Stream, bool Center> void split_map(void* context, int64_t begin, int64_t end, int) {
  using C = typename TypeOf<T>::compute;
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  NoSharedLine<T> line;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = i / f.chunks, from = (i % f.chunks) * chunk_cells<C>;
    const int64_t to = from + chunk_cells<C> < f.n ? from + chunk_cells<C> : f.n;
    map_row<T, Stream, Center, Ahead>(f, r, from, to, f.moments[r], rstd_of(f.moments[r].var, f.a.eps), nullptr, line);
  }
  stream_fence(Stream);
}

template <class T, bool Center> bool forward_split(Forward<T>& f, int threads) {
  using C = typename TypeOf<T>::compute;
  f.chunks = chunk_count<C>(f.n);
  Work<Sums> partial(f.chunks);
  Work<double> pilots(1);
  Work<Moments> moments(f.g.count);
  if (partial.failed() || pilots.failed() || moments.failed()) return false;
  f.partial = partial.p, f.pilots = pilots.p, f.moments = moments.p;
  // One row after the other, so that the second pass finds it in the cache.
  const int64_t rows = f.g.count;
  const RowsForward all = f.a;
  for (int64_t r = 0; r < rows; ++r) {
    RowsForward one = all;
    one.x = static_cast<const T*>(all.x) + r * f.n;
    one.y = static_cast<T*>(all.y) + r * f.n;
    Forward<T> row{one, f.g, f.w, f.b, f.n, f.per_cell, f.streaming, 0};
    const int64_t first = (r % f.g.period) * f.g.channels;
    row.g.period = 1;
    row.w = f.w != nullptr ? f.w + first : nullptr;
    row.b = f.b != nullptr ? f.b + first : nullptr;
    row.chunks = f.chunks, row.partial = f.partial, row.pilots = f.pilots, row.moments = f.moments + r;
    const T* x = static_cast<const T*>(one.x);
    if constexpr (Center) f.pilots[0] = double(pilot<C>(x, f.n));
    else f.pilots[0] = 0;
    parallel_for(f.chunks, 1, split_sums<T, Center>, &row, threads);
    ChunkTotal total;
    for (int64_t i = 0; i < f.chunks; ++i) total.add(f.partial[i]);
    Moments m = quick_moments<C>(total.total(), f.pilots[0], f.n, Center);
    if (!m.good) m = careful_moments<T, Center>(x, f.n);
    f.moments[r] = m;
    write_stats(f, r, m, rstd_of(m.var, f.a.eps));
    parallel_for(f.chunks, 1, f.streaming ? split_map<T, true, Center> : split_map<T, false, Center>, &row, threads);
  }
  return true;
}

template <class T> bool forward(const RowsForward& a) {
  using C = typename TypeOf<T>::compute;
  const Rows& g = a.g;
  Forward<T> f{a,     g, static_cast<const C*>(a.weight), static_cast<const C*>(a.bias), g.channels * g.span, false,
               false, 0};
  // A bias without a weight is rare: it gets a weight of ones.
  const int64_t params = g.period * g.channels;
  Work<C> ones(f.b != nullptr && f.w == nullptr ? params : 0);
  if (ones.failed()) return false;
  if (ones.wanted) f.w = fill_params(ones.p, params, C(1));
  const bool expand = g.span > 1 && g.span < short_span && g.channels > 1 && (f.w != nullptr || f.b != nullptr);
  Work<C> w_cells(expand && f.w != nullptr ? g.period * f.n : 0),
      b_cells(expand && f.b != nullptr ? g.period * f.n : 0);
  if (w_cells.failed() || b_cells.failed()) return false;
  if (expand) {
    f.w = expand_params(f.w, w_cells.p, params, g.span);
    f.b = expand_params(f.b, b_cells.p, params, g.span);
    f.g.channels = f.n, f.g.span = 1;
  }
  f.per_cell = f.g.span == 1 && f.g.channels > 1;
  const int64_t row_bytes = f.n * int64_t(sizeof(T));
  const int threads = threads_for(g.count * row_bytes);
  f.streaming = use_streaming(size_t(2 * g.count * row_bytes)) && streamable(static_cast<const T*>(a.y));
  f.ahead = rows_ahead(row_bytes, g.count * row_bytes);
  if (threads > 1 && f.n >= 4 * chunk_cells<C> && g.count < 4 * threads)
    return a.center ? forward_split<T, true>(f, threads) : forward_split<T, false>(f, threads);
  // A piece is large enough to be worth a claim and small enough to share out.
  const int64_t share = g.count / (8 * threads), cap = (int64_t(1) << 18) / row_bytes;
  int64_t grain = share < cap ? share : cap;
  if (grain * row_bytes < (1 << 14)) grain = (1 << 14) / row_bytes;
  if (grain < 1) grain = 1;
  if (grain > short_group) grain = grain / short_group * short_group;
  if (threads == 1) grain = g.count;
  if (f.n <= few_cells && g.span == 1 && g.period == 1) {
    const Body body = a.center ? (f.streaming ? forward_short<T, true, true> : forward_short<T, true, false>)
                               : (f.streaming ? forward_short<T, false, true> : forward_short<T, false, false>);
    parallel_for(g.count, grain, body, &f, threads);
    return true;
  }
  // Rows that are one run each gain more by it: their map begins and ends once.
  const bool one_run = !f.per_cell && g.channels == 1 && f.n > few_cells;
  const int64_t most = f.streaming && (one_run || sizeof(T) != 2) ? some_bytes_streaming : some_bytes;
  if (row_bytes <= most && (one_run || (f.per_cell && g.period == 1))) {
    if (f.streaming && (one_run || row_bytes <= some_bytes_unfetched)) f.ahead = 0;
    else if (f.ahead != 0 && f.ahead < 8) f.ahead = 8;  // sixteen rows are shorter than what is fetched ahead
    const Body body = a.center ? (f.streaming ? forward_somes<T, true, true> : forward_somes<T, true, false>)
                               : (f.streaming ? forward_somes<T, false, true> : forward_somes<T, false, false>);
    parallel_for(g.count, grain, body, &f, threads);
    return true;
  }
  const bool is_long = f.ahead != 0 && row_bytes > long_row_bytes;
  const Body body = a.center ? (f.streaming ? forward_rows<T, true, true> : forward_rows<T, true, false>)
                             : (f.streaming ? forward_rows<T, false, true> : forward_rows<T, false, false>);
  const Body body_long = a.center
                             ? (f.streaming ? forward_long_rows<T, true, true> : forward_long_rows<T, true, false>)
                             : (f.streaming ? forward_long_rows<T, false, true> : forward_long_rows<T, false, false>);
  parallel_for(g.count, grain, is_long ? body_long : body, &f, threads);
  return true;
}

}  // namespace

void NF_NAME(fill_rows_forward)(Kernels& k) {
  k.rows_forward[int(DType::f64)] = forward<double>;
  k.rows_forward[int(DType::f32)] = forward<float>;
  k.rows_forward[int(DType::f16)] = forward<f16>;
  k.rows_forward[int(DType::bf16)] = forward<bf16>;
}

}  // namespace nf
