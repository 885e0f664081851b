// SPDX-License-Identifier: BSD-3-Clause
// Columns: the cells of one statistic lie apart (batch norm; channels-last instance and group norm; layer norm over a
// middle axis).
//
//   forward    mean, var of each channel;  y = (x - mean)*rstd*weight + bias
//   traffic    a unit that fits the cache: x is read once, y is written once, 2 s bytes per cell of size s;
//              otherwise x is read twice, 3 s
//
// How an array is cut into units: columns.h. Backward: columns_backward.cpp.
#include "columns.h"

namespace nf {
namespace {

template <class T> struct Forward {
  using C = typename TypeOf<T>::compute;
  const ColumnsForward& a;
  Columns g;
  MatrixCut matrix{};
  PlaneCut planes{};
  bool is_planes = false, streaming = false, ahead = false;
  int64_t chunks = 1, repeats = 1;
  char* work = nullptr;  // of each slot
  int64_t work_bytes = 0;
  int threads = 1;
};

// The workspace of one unit.
template <class T> struct Unit {
  using C = typename TypeOf<T>::compute;
  int64_t b, c0, c1;  // batch item, columns
  C* shift;           // per column
  double* sums;       // [2][columns] of one chunk, or [chunks][2][columns] where chunks are shared out
  ChunkTotal* total;  // per column (planes: per channel)
  double *mean, *mean_lo, *var, *rstd;  // per channel
  double* wide_shift;                   // per column
  F64* lanes;                           // planes: [2] per channel
  C *hi, *s, *t;
};

template <class T>
NF_INLINE int64_t carve(const Forward<T>& f, char* base, Unit<T>* u, int64_t columns, int64_t channels, bool shared) {
  using C = typename TypeOf<T>::compute;
  Unit<T> none;
  if (u == nullptr) u = &none;
  Carver k{base};
  const int64_t per = f.is_planes ? channels : columns;
  u->shift = k.take<C>(per);
  u->sums = k.take<double>(2 * per * (shared ? (f.is_planes ? f.planes.chunks : f.chunks) : 1));
  u->total = k.take<ChunkTotal>(per);
  u->mean = k.take<double>(channels), u->mean_lo = k.take<double>(channels), u->var = k.take<double>(channels),
  u->rstd = k.take<double>(channels);
  u->wide_shift = k.take<double>(per);
  u->lanes = k.take<F64>(f.is_planes ? 2 * channels : 0);
  const int64_t table = table_size<C>(f.g, columns, f.repeats);
  u->hi = k.take<C>(table), u->s = k.take<C>(table), u->t = k.take<C>(table);
  return k.used;
}

template <class T> NF_INLINE const T* item(const Forward<T>& f, int64_t b) {
  return static_cast<const T*>(f.a.x) + b * f.g.outer * f.g.channels * f.g.span;
}

// ---- matrix: sums down the columns ----------------------------------------------------------------------------------

template <class T> void find_shifts(const Forward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  const int64_t width = f.matrix.width, span = f.g.span;
  if (f.g.any_order) batch_pilots<C>(item(f, u.b), width, f.g.outer, u.c0, u.c1, u.shift, u.sums);
  else column_pilots<C>(item(f, u.b), width, f.g.outer, u.c0, u.c1, u.shift);
  if (span == 1) return;
  // Columns of one channel share a shift: the average, formed so that equal pilots stay what they are.
  for (int64_t c = 0; c < u.c1 - u.c0; c += span) {
    const double first = double(u.shift[c]);
    double rest = 0;
    for (int64_t i = 1; i < span; ++i) rest += double(u.shift[c + i]) - first;
    const C k = C(first + rest / double(span));
    for (int64_t i = 0; i < span; ++i) u.shift[c + i] = k;
  }
}

// Sums of chunk `index` for the unit's columns [c0, c1).
template <class T, class C>
NF_INLINE void sum_chunk(const Forward<T>& f, const Unit<T>& u, const C* shift, int64_t index, int64_t c0, int64_t c1,
                         double* s, double* q) {
  const int64_t begin = index * chunk_rows<C>(f.g), end = smaller(begin + chunk_rows<C>(f.g), f.g.outer);
  const T* x = item(f, u.b);
  if (f.g.any_order)
    batch_chunk<C>(ColumnShifted<C, T>{x, f.matrix.width, shift - u.c0}, begin, end, c0, c1,
                   f.ahead ? Reading::fetched : Reading::cached, s, q);
  else if (f.a.center)
    column_chunk<C>(ColumnShifted<C, T>{x, f.matrix.width, shift - u.c0}, begin, end, c0, c1, f.matrix.resident, s, q);
  else column_chunk<C>(ColumnSquared<C, T>{x, f.matrix.width}, begin, end, c0, c1, f.matrix.resident, s, q);
}

// The same in double, for every column of [c0, c1), into u.total.
template <class T> void sum_carefully(const Forward<T>& f, const Unit<T>& u, int64_t c0, int64_t c1) {
  const int64_t columns = u.c1 - u.c0;
  for (int64_t c = c0; c < c1; ++c) u.total[c - u.c0] = {};
  for (int64_t i = 0; i < ceil_div(f.g.outer, chunk_rows<double>(f.g)); ++i) {
    sum_chunk<T, double>(f, u, u.wide_shift, i, c0, c1, u.sums, u.sums + columns);
    for (int64_t c = c0; c < c1; ++c) u.total[c - u.c0].add({u.sums[c - c0], u.sums[columns + c - c0]});
  }
}

template <class T> NF_INLINE Sums channel_sums(const Unit<T>& u, int64_t column, int64_t span) {
  ChunkTotal all = u.total[column];
  for (int64_t i = 1; i < span; ++i) all.join(u.total[column + i]);
  return all.total();
}

template <class T> NF_INLINE void keep(Unit<T>& u, int64_t i, const Moments& m) {
  u.mean[i] = m.mean, u.mean_lo[i] = m.mean_lo, u.var[i] = m.var;
}

// The sums of each channel are those of its only chunk.
template <class T> NF_INLINE bool one_chunk(const Forward<T>& f) {
  if (f.g.outer * f.g.span <= few_cells) return false;
  return f.is_planes ? f.planes.by_unit && f.planes.chunks == 1 : f.matrix.by_unit && f.g.span == 1 && f.chunks == 1;
}

// Moments of n columns from the sums of their only chunk: a loop that compilers turn into vectors. False if there are
// columns that have to be done again.
template <class C>
__attribute__((noinline)) bool column_moments(int64_t n, int64_t cells, bool center, const double* __restrict s,
                                              const double* __restrict q, const C* __restrict shift,
                                              double* __restrict mean, double* __restrict mean_lo,
                                              double* __restrict var) {
  int bad = 0;
  if (center) {
    for (int64_t i = 0; i < n; ++i) {
      const Moments m = quick_moments<C>({s[i], q[i]}, double(shift[i]), cells, true);
      mean[i] = m.mean, mean_lo[i] = m.mean_lo, var[i] = m.var, bad |= !m.good;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Moments m = quick_moments<C>({s[i], q[i]}, 0, cells, false);
      mean[i] = mean_lo[i] = 0, var[i] = m.var, bad |= !m.good;
    }
  }
  return bad == 0;
}

// Turns totals into moments; channels that float could not do are summed again, twice, in double.
template <class T> void find_moments(const Forward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  const int64_t span = f.g.span, channels = (u.c1 - u.c0) / span, n = f.g.outer * span;
  if (one_chunk(f)) {
    if (column_moments<C>(channels, n, f.a.center, u.sums, u.sums + channels, u.shift, u.mean, u.mean_lo, u.var))
      return;
    clear_totals(u, channels);
    for (int64_t c = 0; c < channels; ++c) u.total[c].add({u.sums[c], u.sums[channels + c]});
  }
  int64_t first_bad = -1, last_bad = -1;
  for (int64_t i = 0; i < channels; ++i) {
    if (n > few_cells) {
      const Moments m = quick_moments<C>(channel_sums(u, i * span, span), f.a.center ? double(u.shift[i * span]) : 0.0,
                                         n, f.a.center);
      keep(u, i, m);
      if (m.good) continue;
    }
    u.var[i] = -1;  // marks it
    if (first_bad < 0) first_bad = i;
    last_bad = i;
  }
  if (first_bad < 0) return;
  const int64_t c0 = u.c0 + first_bad * span, c1 = u.c0 + (last_bad + 1) * span;
  const T* x = item(f, u.b);
  for (int64_t c = c0; c < c1; ++c) u.wide_shift[c - u.c0] = Cast<T>::get(x[c / span * span]);
  if (f.a.center && !(few_in_one_pass<T> && n <= few_cells)) {
    sum_carefully(f, u, c0, c1);
    for (int64_t i = first_bad; i <= last_bad; ++i) {
      const double k = u.wide_shift[i * span];
      const double mean = k + channel_sums(u, i * span, span).s / double(n);
      for (int64_t j = 0; j < span; ++j) u.wide_shift[i * span + j] = mean;
    }
  }
  sum_carefully(f, u, c0, c1);
  for (int64_t i = first_bad; i <= last_bad; ++i) {
    if (u.var[i] != -1) continue;
    const Sums t = channel_sums(u, i * span, span);
    if (f.a.center) keep(u, i, moments_from_sums(t.s, t.q, u.wide_shift[i * span], double(n), false));
    else keep(u, i, Moments{0, 0, t.q / double(n), true});
  }
}

// Loops that compilers turn into vectors.
template <class T> __attribute__((noinline)) void write_stats(const Forward<T>& f, Unit<T>& u) {
  using S = typename TypeOf<T>::stat;
  const int64_t channels = (u.c1 - u.c0) / f.g.span, at = u.b * f.g.channels + u.c0 / f.g.span;
  const double* __restrict mean = u.mean, * __restrict var = u.var, eps = f.a.eps;
  double* __restrict rstd = u.rstd;
  for (int64_t i = 0; i < channels; ++i) rstd[i] = rstd_of(var[i], eps);
  if (f.a.batch_mean != nullptr) {
    double* __restrict mean_out = f.a.batch_mean + at, * __restrict var_out = f.a.batch_var + at;
    for (int64_t i = 0; i < channels; ++i) mean_out[i] = mean[i], var_out[i] = not_negative(var[i]);
  }
  if (f.a.mean != nullptr) {
    S* __restrict out = static_cast<S*>(f.a.mean) + at;
    for (int64_t i = 0; i < channels; ++i) out[i] = static_cast<S>(mean[i]);
  }
  if (f.a.rstd != nullptr) {
    S* __restrict out = static_cast<S*>(f.a.rstd) + at;
    for (int64_t i = 0; i < channels; ++i) out[i] = static_cast<S>(rstd[i]);
  }
}

template <class T> NF_INLINE ForwardMap<T> map_of(const Forward<T>& f, const Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  ForwardMap<T> m{};
  m.g = f.g;
  m.x = item(f, u.b);
  m.y = static_cast<T*>(f.a.y) + (m.x - static_cast<const T*>(f.a.x));
  m.w = static_cast<const C*>(f.a.weight), m.b = static_cast<const C*>(f.a.bias);
  m.mean = u.mean, m.mean_lo = u.mean_lo, m.var = u.var, m.rstd = u.rstd;
  m.first = u.c0 / f.g.span;
  m.hi = u.hi, m.s = u.s, m.t = u.t;
  m.tile = u.c1 - u.c0, m.repeats = f.repeats;
  m.center = f.a.center, m.streaming = f.streaming;
  m.extreme = any_extreme<C>(u.mean, u.rstd, m.tile / f.g.span, false);
  build_tables(m);
  return m;
}

template <class T> void matrix_units(void* context, int64_t begin, int64_t end, int slot) {
  using C = typename TypeOf<T>::compute;
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  Unit<T> u{};
  carve(f, f.work + slot * f.work_bytes, &u, f.matrix.tile, f.matrix.tile / f.g.span, false);
  for (int64_t index = begin; index < end; ++index) {
    set_unit(f, u, index);
    const int64_t columns = u.c1 - u.c0;
    const bool quick = f.g.outer * f.g.span > few_cells;
    if (f.ahead && !f.g.any_order) {
      if (f.matrix.one_stream) read_stream(item(f, u.b), f.g.outer * f.matrix.width);
      else fetch_columns(item(f, u.b), f.g.outer, f.matrix.width, u.c0, u.c1);
    }
    if (f.a.center && quick) find_shifts(f, u);
    if (!one_chunk(f)) clear_totals(u, columns);
    for (int64_t i = 0; quick && i < f.chunks; ++i) {
      sum_chunk<T, C>(f, u, u.shift, i, u.c0, u.c1, u.sums, u.sums + columns);
      for (int64_t c = 0; !one_chunk(f) && c < columns; ++c) u.total[c].add({u.sums[c], u.sums[columns + c]});
    }
    find_moments(f, u);
    write_stats(f, u);
    map_unit(map_of(f, u), 0, f.g.outer, u.c0, 0);
  }
}

// One unit, all threads: chunks of rows and stretches of columns for the sums, rows for the map.
template <class T> struct Shared {
  const Forward<T>& f;
  Unit<T>& u;
  const ForwardMap<T>* map;
  Stretches stretches;
  int64_t rows_at_once, pieces;
};

template <class T> void shared_sums(void* context, int64_t begin, int64_t end, int) {
  using C = typename TypeOf<T>::compute;
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  const int64_t columns = s.u.c1 - s.u.c0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = i / s.stretches.count, c0 = i % s.stretches.count * s.stretches.width;
    const int64_t c1 = smaller(c0 + s.stretches.width, columns);
    double* out = s.u.sums + chunk * 2 * columns + c0;
    sum_chunk<T, C>(s.f, s.u, s.u.shift, chunk, c0, c1, out, out + columns);
  }
}

template <class T> void shared_map(void* context, int64_t begin, int64_t end, int) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = i * s.rows_at_once, to = smaller(from + s.rows_at_once, s.f.g.outer);
    map_unit(*s.map, from, to, s.u.c0, 0);
  }
}

template <class T> void matrix_shared(Forward<T>& f) {
  Unit<T> u{};
  carve(f, f.work, &u, f.matrix.width, f.g.channels, true);
  const int64_t columns = f.matrix.width, row_bytes = columns * int64_t(sizeof(T));
  for (u.b = 0; u.b < f.g.batch; ++u.b) {
    u.c0 = 0, u.c1 = columns;
    if (f.a.center) find_shifts(f, u);
    Shared<T> s{f, u, nullptr, {}, 0, 0};
    s.stretches = stretch_columns(columns, f.chunks, f.threads);
    parallel_for(f.chunks * s.stretches.count, 1, shared_sums<T>, &s, f.threads);
    clear_totals(u, columns);
    for (int64_t i = 0; i < f.chunks; ++i)
      for (int64_t c = 0; c < columns; ++c)
        u.total[c].add({u.sums[i * 2 * columns + c], u.sums[(i * 2 + 1) * columns + c]});
    find_moments(f, u);
    write_stats(f, u);
    const ForwardMap<T> map = map_of(f, u);
    s.map = &map;
    s.rows_at_once = map_rows(row_bytes, f.repeats, piece_bytes(f.g.outer * row_bytes, f.threads));
    s.pieces = ceil_div(f.g.outer, s.rows_at_once);
    parallel_for(s.pieces, 1, shared_map<T>, &s, f.threads, Direction::backwards);
  }
}

// ---- planes: sums along runs ----------------------------------------------------------------------------------------

template <class T> NF_INLINE const T* plane(const Forward<T>& f, int64_t o, int64_t c) {
  return static_cast<const T*>(f.a.x) + (o * f.g.channels + c) * f.g.span;
}

// Values near the channels' means, from up to four planes of each; exact for constant data.
template <class T>
__attribute__((noinline)) void plane_shifts(const Forward<T>& f, int64_t first, int64_t channels,
                                            typename TypeOf<T>::compute* shift) {
  using C = typename TypeOf<T>::compute;
  const int64_t last = f.g.outer - 1, n = f.g.span;
  // The average of four numbers that belong to four planes, or the only one.
  const auto average = [last](const auto& of, auto quarter) __attribute__((always_inline)) {
    if (last == 0) return of(0);
    return (of(0) * quarter + of(last) * quarter) + (of(last / 3) * quarter + of(2 * last / 3) * quarter);
  };
  const auto lanes = [&](int64_t c) __attribute__((always_inline)) {
    return BlockSums<C>::widen(average([&](int64_t o)
                                           __attribute__((always_inline)) { return pilot_lanes<C>(plane(f, o, c), n); },
                                       splat<C>(C(0.25))));
  };
  constexpr int64_t L = Lanes<C>::n;
  for (int64_t c = 0; c < channels;) {
    if (n < L) {
      shift[c] = average([&](int64_t o) { return pilot<C>(plane(f, o, first + c), n); }, C(0.25));
      ++c;
    } else if (c + 8 <= channels) {  // eight channels at once
      F64 v[8];
      double sums[8];
      for (int i = 0; i < 8; ++i) v[i] = lanes(first + c + i);
      store(sums, sum_lanes8(v));
      for (int i = 0; i < 8; ++i) shift[c + i] = static_cast<C>(sums[i] / double(L));
      c += 8;
    } else {
      shift[c] = static_cast<C>(sum_lanes(lanes(first + c)) / double(L));
      ++c;
    }
  }
}

// The planes of one chunk, channels [first, first + channels).
template <class T>
__attribute__((noinline)) void plane_chunk(const Forward<T>& f, int64_t index, int64_t first, int64_t channels,
                                           const typename TypeOf<T>::compute* shift, F64* lanes, double* s, double* q) {
  using C = typename TypeOf<T>::compute;
  const int64_t begin = index * f.planes.chunk_planes, planes = smaller(f.planes.chunk_planes, f.g.outer - begin);
  const T* x = static_cast<const T*>(f.a.x);
  sum_planes<C>(f.g, begin, planes, first, channels, lanes, s, q,
                [&](int64_t at, int64_t i) { return Shifted<C, T>{x + at, shift[i]}; });
}

template <class T> __attribute__((noinline)) Moments careful_channel(const Forward<T>& f, int64_t c) {
  const double n = double(f.g.outer) * double(f.g.span);
  double shift = Cast<T>::get(plane(f, 0, c)[0]);
  const bool one_pass = few_in_one_pass<T> && n <= double(few_cells);
  for (int pass = one_pass ? 1 : 0;; ++pass) {
    ChunkTotal total;
    for (int64_t o = 0; o < f.g.outer; ++o)
      total.add(run_sums<double>(Shifted<double, T>{plane(f, o, c), shift}, f.g.span));
    const Sums t = total.total();
    if (pass == 1) return moments_from_sums(t.s, t.q, shift, n, false);
    shift += t.s / n;
  }
}

template <class T> void plane_moments(const Forward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  const int64_t channels = (u.c1 - u.c0) / f.g.span, first = u.c0 / f.g.span, n = f.g.outer * f.g.span;
  if (one_chunk(f)) {
    if (column_moments<C>(channels, n, true, u.sums, u.sums + channels, u.shift, u.mean, u.mean_lo, u.var)) return;
    clear_totals(u, channels);
    for (int64_t c = 0; c < channels; ++c) u.total[c].add({u.sums[c], u.sums[channels + c]});
  }
  for (int64_t i = 0; i < channels; ++i) {
    Moments m = quick_moments<C>(u.total[i].total(), double(u.shift[i]), n, true);
    if (!m.good || n <= few_cells) m = careful_channel(f, first + i);
    keep(u, i, m);
  }
}

template <class T> void plane_units(void* context, int64_t begin, int64_t end, int slot) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  Unit<T> u{};
  carve(f, f.work + slot * f.work_bytes, &u, f.planes.block * f.g.span, f.planes.block, false);
  for (int64_t index = begin; index < end; ++index) {
    set_unit(f, u, index);
    const int64_t first = u.c0 / f.g.span, channels = (u.c1 - u.c0) / f.g.span;
    plane_shifts(f, first, channels, u.shift);
    if (!one_chunk(f)) clear_totals(u, channels);
    for (int64_t i = 0; i < f.planes.chunks; ++i) {
      plane_chunk(f, i, first, channels, u.shift, u.lanes, u.sums, u.sums + channels);
      for (int64_t c = 0; !one_chunk(f) && c < channels; ++c) u.total[c].add({u.sums[c], u.sums[channels + c]});
    }
    plane_moments(f, u);
    write_stats(f, u);
    const bool more = f.ahead && in_runs(f.g) && u.c1 + (u.c1 - u.c0) <= f.g.channels * f.g.span;
    map_unit(map_of(f, u), 0, f.g.outer, u.c0, more ? u.c1 - u.c0 : 0);
  }
}

template <class T> void shared_plane_sums(void* context, int64_t begin, int64_t end, int slot) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  const Forward<T>& f = s.f;
  F64* lanes = reinterpret_cast<F64*>(f.work + f.work_bytes) + slot * 2 * f.planes.block;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = i / f.planes.blocks, first = i % f.planes.blocks * f.planes.block;
    const int64_t channels = smaller(f.planes.block, f.g.channels - first);
    double* out = s.u.sums + chunk * 2 * f.g.channels + first;
    plane_chunk(f, chunk, first, channels, s.u.shift + first, lanes, out, out + f.g.channels);
  }
}

template <class T> void planes_shared(Forward<T>& f) {
  Unit<T> u{};
  carve(f, f.work, &u, f.g.channels * f.g.span, f.g.channels, true);
  u.b = 0, u.c0 = 0, u.c1 = f.g.channels * f.g.span;
  plane_shifts(f, 0, f.g.channels, u.shift);
  Shared<T> s{f, u, nullptr, {}, 0, 0};
  parallel_for(f.planes.chunks * f.planes.blocks, 1, shared_plane_sums<T>, &s, f.threads);
  clear_totals(u, f.g.channels);
  for (int64_t i = 0; i < f.planes.chunks; ++i)
    for (int64_t c = 0; c < f.g.channels; ++c) {
      const double* sums = u.sums + i * 2 * f.g.channels + c;
      u.total[c].add({sums[0], sums[f.g.channels]});
    }
  plane_moments(f, u);
  write_stats(f, u);
  const ForwardMap<T> map = map_of(f, u);
  s.map = &map;
  const int64_t row_bytes = (u.c1 - u.c0) * int64_t(sizeof(T));
  s.rows_at_once = map_rows(row_bytes, 1, piece_bytes(f.g.outer * row_bytes, f.threads));
  s.pieces = ceil_div(f.g.outer, s.rows_at_once);
  parallel_for(s.pieces, 1, shared_map<T>, &s, f.threads, Direction::backwards);
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T> bool forward(const ColumnsForward& a) {
  using C = typename TypeOf<T>::compute;
  Forward<T> f{a, a.g};
  const Columns& g = a.g;
  const int64_t bytes = g.batch * g.outer * g.channels * g.span * int64_t(sizeof(T));
  f.is_planes = is_planes(g) && a.center;
  f.threads = threads_for(f.is_planes ? bytes * plane_work : bytes);
  f.streaming = use_streaming(size_t(2 * bytes)) && streamable(static_cast<const T*>(a.y));
  f.chunks = ceil_div(g.outer, chunk_rows<C>(g));
  int64_t units, lanes_bytes = 0;
  bool by_unit;
  f.ahead = bytes > int64_t(cache_sizes().l2);
  if (f.is_planes) {
    f.planes = cut_planes(g, int64_t(sizeof(T)), f.threads);
    by_unit = f.planes.by_unit, units = f.planes.blocks;
    f.work_bytes = by_unit ? carve<T>(f, nullptr, nullptr, f.planes.block * g.span, f.planes.block, false)
                           : carve<T>(f, nullptr, nullptr, g.channels * g.span, g.channels, true);
    if (!by_unit) lanes_bytes = f.threads * 2 * f.planes.block * int64_t(sizeof(F64));
  } else {
    f.matrix = cut_matrix<T>(g, 1, f.threads);
    f.repeats = table_repeats<C>(g, f.matrix.tile, f.matrix.width);
    by_unit = f.matrix.by_unit, units = g.batch * f.matrix.tiles;
    f.work_bytes = by_unit ? carve<T>(f, nullptr, nullptr, f.matrix.tile, f.matrix.tile / g.span, false)
                           : carve<T>(f, nullptr, nullptr, f.matrix.width, g.channels, true);
  }
  Work<char> work(by_unit ? f.work_bytes * f.threads : f.work_bytes + lanes_bytes);
  if (work.failed()) return false;
  f.work = work.p;
  if (by_unit) {
    const int64_t grain = larger(1, smaller(units / (4 * f.threads), 8));
    parallel_for(units, f.threads == 1 ? units : grain, f.is_planes ? plane_units<T> : matrix_units<T>, &f, f.threads);
  } else if (f.is_planes) {
    planes_shared(f);
  } else {
    matrix_shared(f);
  }
  return true;
}

}  // namespace

void NF_NAME(fill_columns_forward)(Kernels& k) {
  k.columns_forward[int(DType::f64)] = forward<double>;
  k.columns_forward[int(DType::f32)] = forward<float>;
  k.columns_forward[int(DType::f16)] = forward<f16>;
  k.columns_forward[int(DType::bf16)] = forward<bf16>;
}

}  // namespace nf
