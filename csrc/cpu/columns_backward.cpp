// SPDX-License-Identifier: BSD-3-Clause
// Columns, backward. With g = dy*weight, xhat = (x - mean)*rstd and averages over the n cells of a statistic:
//
//   dx = rstd*(g - mean(g) - xhat*mean(g*xhat));   dweight = sum(dy*xhat), dbias = sum(dy)
//
// Parameters along the channels: everything follows from A = sum(dy) and B = sum(dy*(x - mean)) of each column.
// Parameters along the rows (layer norm over a middle axis): the sums of g and g*xhat of each column give dx, and a
// pass along the rows gives dweight and dbias.
//
//   traffic    as forward, with dy beside x: 3 s bytes per cell of size s from the cache on, 5 s beyond it
#include "columns_gradient.h"

namespace nf {
namespace {

// ---- one unit, one thread -------------------------------------------------------------------------------------------

template <class T> void matrix_units(void* context, int64_t begin, int64_t end, int slot) {
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  Unit<T> u{};
  carve(f, f.work + slot * f.work_bytes, &u, f.matrix.tile, f.matrix.tile / f.g.span, false);
  for (int64_t index = begin; index < end; ++index) {
    set_unit(f, u, index);
    const int64_t columns = u.c1 - u.c0;
    begin_unit(f, u);
    if (f.needs_sums) {
      if (f.ahead && !f.g.any_order) {
        fetch_columns(item(f, f.a.dy, u.b), f.g.outer, f.matrix.width, u.c0, u.c1);
        fetch_columns(item(f, f.a.x, u.b), f.g.outer, f.matrix.width, u.c0, u.c1);
      }
      if (!one_chunk(f, u)) clear_totals(u, columns);
      for (int64_t i = 0; i < f.chunks; ++i) {
        sum_chunk(f, u, i, u.c0, u.c1, u.sums, u.sums + columns);
        for (int64_t c = 0; !one_chunk(f, u) && c < columns; ++c) u.total[c].add({u.sums[c], u.sums[columns + c]});
      }
      find_averages(f, u);
    }
    if (f.row_sums != nullptr) sum_rows(f, u, 0, f.g.outer);
    if (f.a.dx == nullptr) continue;
    build_tables(f, u);
    map_unit(f, u, 0, f.g.outer, 0);
  }
}

template <class T>
__attribute__((noinline)) void plane_chunk(const Backward<T>& f, int64_t index, int64_t first, int64_t channels,
                                           const typename TypeOf<T>::compute* shift, F64* lanes, double* s, double* q) {
  using C = typename TypeOf<T>::compute;
  const int64_t begin = index * f.planes.chunk_planes, planes = smaller(f.planes.chunk_planes, f.g.outer - begin);
  const T *dy = static_cast<const T*>(f.a.dy), *x = static_cast<const T*>(f.a.x);
  sum_planes<C>(f.g, begin, planes, first, channels, lanes, s, q,
                [&](int64_t at, int64_t i) { return Slopes<C, T>{dy + at, x + at, shift[i]}; });
}

template <class T> void plane_units(void* context, int64_t begin, int64_t end, int slot) {
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  Unit<T> u{};
  carve(f, f.work + slot * f.work_bytes, &u, f.planes.block * f.g.span, f.planes.block, false);
  for (int64_t index = begin; index < end; ++index) {
    set_unit(f, u, index);
    const int64_t first = u.c0 / f.g.span, channels = (u.c1 - u.c0) / f.g.span;
    begin_unit(f, u);
    if (f.needs_sums) {
      if (!one_chunk(f, u)) clear_totals(u, channels);
      for (int64_t i = 0; i < f.planes.chunks; ++i) {
        plane_chunk(f, i, first, channels, u.shift, u.lanes, u.sums, u.sums + channels);
        for (int64_t c = 0; !one_chunk(f, u) && c < channels; ++c) u.total[c].add({u.sums[c], u.sums[channels + c]});
      }
      find_averages(f, u);
    }
    if (f.a.dx == nullptr) continue;
    build_tables(f, u);
    const bool more = f.ahead && in_runs(f.g) && u.c1 + (u.c1 - u.c0) <= f.g.channels * f.g.span;
    map_unit(f, u, 0, f.g.outer, more ? u.c1 - u.c0 : 0);
  }
}

// ---- one unit, all threads ------------------------------------------------------------------------------------------

template <class T> struct Shared {
  const Backward<T>& f;
  Unit<T>& u;
  Stretches stretches;
  int64_t rows_at_once, pieces;
};

template <class T> void shared_sums(void* context, int64_t begin, int64_t end, int) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  const int64_t columns = s.u.c1 - s.u.c0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = i / s.stretches.count, c0 = i % s.stretches.count * s.stretches.width;
    const int64_t c1 = smaller(c0 + s.stretches.width, columns);
    double* out = s.u.sums + chunk * 2 * columns + c0;
    sum_chunk(s.f, s.u, chunk, c0, c1, out, out + columns);
  }
}

template <class T> void shared_plane_sums(void* context, int64_t begin, int64_t end, int slot) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  const Backward<T>& f = s.f;
  F64* lanes = reinterpret_cast<F64*>(f.work + f.work_bytes) + slot * 2 * f.planes.block;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = i / f.planes.blocks, first = i % f.planes.blocks * f.planes.block;
    const int64_t channels = smaller(f.planes.block, f.g.channels - first);
    double* out = s.u.sums + chunk * 2 * f.g.channels + first;
    plane_chunk(f, chunk, first, channels, s.u.shift + first, lanes, out, out + f.g.channels);
  }
}

template <class T> void shared_rows(void* context, int64_t begin, int64_t end, int) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = i * s.rows_at_once, to = smaller(from + s.rows_at_once, s.f.g.outer);
    if (s.f.row_sums != nullptr) sum_rows(s.f, s.u, from, to);
    if (s.f.a.dx != nullptr) map_unit(s.f, s.u, from, to, 0);
  }
}

template <class T> void shared_units(Backward<T>& f) {
  Unit<T> u{};
  const int64_t columns = f.g.channels * f.g.span, per = f.is_planes ? f.g.channels : columns;
  carve(f, f.work, &u, columns, f.g.channels, true);
  u.c0 = 0, u.c1 = columns;
  const int64_t row_bytes = 2 * columns * int64_t(sizeof(T));
  Shared<T> s{f, u, stretch_columns(columns, f.chunks, f.threads),
              map_rows(row_bytes, f.repeats, piece_bytes(f.g.outer * row_bytes, f.threads)), 0};
  s.pieces = ceil_div(f.g.outer, s.rows_at_once);
  const int64_t chunks = f.is_planes ? f.planes.chunks : f.chunks;
  for (u.b = 0; u.b < f.g.batch; ++u.b) {
    begin_unit(f, u);
    if (f.needs_sums) {
      if (f.is_planes) parallel_for(chunks * f.planes.blocks, 1, shared_plane_sums<T>, &s, f.threads);
      else parallel_for(chunks * s.stretches.count, 1, shared_sums<T>, &s, f.threads);
      clear_totals(u, per);
      for (int64_t i = 0; i < chunks; ++i)
        for (int64_t c = 0; c < per; ++c) {
          const double* sums = u.sums + i * 2 * per;
          u.total[c].add({sums[c], sums[per + c]});
        }
      find_averages(f, u);
    }
    if (f.a.dx != nullptr) build_tables(f, u);
    if (f.a.dx != nullptr || f.row_sums != nullptr)
      parallel_for(s.pieces, 1, shared_rows<T>, &s, f.threads, Direction::backwards);
  }
}

// ---- parameter gradients --------------------------------------------------------------------------------------------

// w and b of n parameters, to each of which belong `each` neighbouring pairs of sums.
__attribute__((noinline)) void add_pairs(int n, int64_t each, const double* __restrict sums, double* __restrict w,
                                         double* __restrict b) {
  if (each == 1) {  // a loop that compilers turn into vectors
    for (int i = 0; i < n; ++i) b[i] += sums[2 * i], w[i] += sums[2 * i + 1];
    return;
  }
  for (int i = 0; i < n; ++i)
    for (int64_t c = i * each; c < (i + 1) * each; ++c) b[i] += sums[2 * c], w[i] += sums[2 * c + 1];
}

template <class T> void sum_params(const Backward<T>& f) {
  const Columns& g = f.g;
  GradientWriter out(f.a.gradient_type, f.a.dweight, f.a.dbias);
  if (f.row_sums != nullptr) {
    for (int64_t o = 0; o < g.outer; ++o) {
      double w = 0, b = 0;
      for (int64_t i = 0; i < g.batch * f.segments; ++i) {
        const double* sums = f.row_sums + (i * g.outer + o) * 2;
        b += sums[0], w += sums[1];
      }
      out.add(w, b);
    }
    out.flush();
    return;
  }
  const int64_t row = f.is_planes ? g.channels : f.matrix.width, each = f.is_planes ? 1 : g.param_span;
  for (int64_t p = 0; p < row / each; p += GradientWriter::size) {
    const int n = int(smaller(GradientWriter::size, row / each - p));
    out.add_some(n, [&](double* w, double* b) {
      for (int64_t i = 0; i < g.batch; ++i) add_pairs(n, each, f.column_sums + (i * row + p * each) * 2, w, b);
    });
  }
}

template <class T> bool backward(const ColumnsBackward& a) {
  using C = typename TypeOf<T>::compute;
  Backward<T> f{a, a.g};
  const Columns& g = a.g;
  const int64_t bytes = g.batch * g.outer * g.channels * g.span * int64_t(sizeof(T));
  f.w = static_cast<const C*>(a.weight);
  f.wants_params = a.dweight != nullptr || a.dbias != nullptr;
  f.needs_sums = (a.dx != nullptr && !a.frozen) || (f.wants_params && g.param_span != 0);
  f.is_planes = is_planes(g) && a.center;
  f.threads = threads_for(f.is_planes ? bytes * plane_work : bytes);
  f.streaming = use_streaming(size_t(3 * bytes)) && streamable(static_cast<const T*>(a.dx));
  f.chunks = ceil_div(g.outer, chunk_rows<C>(g));
  int64_t units, lanes_bytes = 0;
  bool by_unit;
  f.ahead = 2 * bytes > int64_t(cache_sizes().l2);
  // What the last-level cache keeps a part of from one call to the next is fetched faster than read in order.
  const bool far = 2 * bytes > 3 * int64_t(cache_sizes().last);
  if (f.ahead) f.reading = far ? Reading::in_order : Reading::fetched;
  if (f.is_planes) {
    f.planes = cut_planes(g, 2 * int64_t(sizeof(T)), f.threads);
    by_unit = f.planes.by_unit, units = f.planes.blocks;
    f.work_bytes = by_unit ? carve<T>(f, nullptr, nullptr, f.planes.block * g.span, f.planes.block, false)
                           : carve<T>(f, nullptr, nullptr, g.channels * g.span, g.channels, true);
    if (!by_unit) lanes_bytes = f.threads * 2 * f.planes.block * int64_t(sizeof(F64));
  } else {
    f.matrix = cut_matrix<T>(g, 2, f.threads);
    f.repeats = table_repeats<C>(g, f.matrix.tile, f.matrix.width);
    by_unit = f.matrix.by_unit, units = g.batch * f.matrix.tiles;
    f.work_bytes = by_unit ? carve<T>(f, nullptr, nullptr, f.matrix.tile, f.matrix.tile / g.span, false)
                           : carve<T>(f, nullptr, nullptr, f.matrix.width, g.channels, true);
  }
  f.segments = ceil_div(g.channels * g.span, row_segment);
  const bool along_rows = f.wants_params && g.param_span == 0, along_columns = f.wants_params && !along_rows;
  Work<char> work(by_unit ? f.work_bytes * f.threads : f.work_bytes + lanes_bytes);
  Work<double> row_sums(along_rows ? g.batch * f.segments * g.outer * 2 : 0);
  Work<double> column_sums(along_columns ? g.batch * (f.is_planes ? g.channels : f.matrix.width) * 2 : 0);
  if (work.failed() || row_sums.failed() || column_sums.failed()) return false;
  f.work = work.p, f.row_sums = row_sums.p, f.column_sums = column_sums.p;
  if (!by_unit) shared_units(f);
  else {
    const int64_t grain = larger(1, smaller(units / (4 * f.threads), 8));
    parallel_for(units, f.threads == 1 ? units : grain, f.is_planes ? plane_units<T> : matrix_units<T>, &f, f.threads);
  }
  if (f.wants_params) sum_params(f);
  return true;
}

}  // namespace

void NF_NAME(fill_columns_backward)(Kernels& k) {
  k.columns_backward[int(DType::f64)] = backward<double>;
  k.columns_backward[int(DType::f32)] = backward<float>;
  k.columns_backward[int(DType::f16)] = backward<f16>;
  k.columns_backward[int(DType::bf16)] = backward<bf16>;
}

}  // namespace nf
