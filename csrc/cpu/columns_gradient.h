// SPDX-License-Identifier: BSD-3-Clause
// Columns, backward: what happens to one unit - its sums, its averages, its tables and its map. columns_backward.cpp
// has the mathematics, and says which thread takes which unit.
#pragma once

#include "columns.h"

namespace nf {
namespace {

template <class T> struct Backward {
  using C = typename TypeOf<T>::compute;
  const ColumnsBackward& a;
  Columns g;
  MatrixCut matrix{};
  PlaneCut planes{};
  bool is_planes = false, streaming = false, ahead = false, wants_params = false, needs_sums = true;
  Reading reading = Reading::cached;
  int64_t chunks = 1, repeats = 1;
  const C* w = nullptr;
  char* work = nullptr;
  int64_t work_bytes = 0;
  double* column_sums = nullptr;  // [batch][columns or, for planes, channels][2]: A and B*rstd
  double* row_sums = nullptr;     // [batch][segments][outer][2]
  int64_t segments = 0;
  int threads = 1;
};

template <class T> struct Unit {
  using C = typename TypeOf<T>::compute;
  int64_t b, c0, c1;
  C* shift;      // per column (planes: channel): the mean, rounded
  double* sums;  // of one chunk, or of all chunks
  ChunkTotal* total;
  double* wide_shift;
  double *c1_of, *c2_of;  // per channel
  double* kept;           // the sums for the parameter gradients, where nobody wants them
  F64* lanes;
  C *hi, *p, *q, *t, *b_of;  // tables; for parameters along the rows: hi, rs, a, t, b
  bool extreme;
};

template <class T>
NF_INLINE int64_t carve(const Backward<T>& f, char* base, Unit<T>* u, int64_t columns, int64_t channels, bool shared) {
  using C = typename TypeOf<T>::compute;
  Unit<T> none;
  if (u == nullptr) u = &none;
  Carver k{base};
  const int64_t per = f.is_planes ? channels : columns;
  u->shift = k.take<C>(per);
  u->sums = k.take<double>(2 * per * (shared ? (f.is_planes ? f.planes.chunks : f.chunks) : 1));
  u->total = k.take<ChunkTotal>(per);
  u->wide_shift = k.take<double>(per);
  u->c1_of = k.take<double>(channels), u->c2_of = k.take<double>(channels);
  u->lanes = k.take<F64>(f.is_planes ? 2 * channels : 0);
  u->kept = k.take<double>(f.column_sums == nullptr ? 2 * channels : 0);
  const int64_t table = table_size<C>(f.g, columns, f.repeats);
  u->hi = k.take<C>(table), u->p = k.take<C>(table), u->q = k.take<C>(table), u->t = k.take<C>(table);
  u->b_of = k.take<C>(f.g.param_span == 0 ? table : 0);
  return k.used;
}

template <class T> NF_INLINE const T* item(const Backward<T>& f, const void* p, int64_t b) {
  return static_cast<const T*>(p) + b * f.g.outer * f.g.channels * f.g.span;
}
template <class T> NF_INLINE double mean_of(const Backward<T>& f, const Unit<T>& u, int64_t i) {
  using S = typename TypeOf<T>::stat;
  return f.a.mean != nullptr ? double(static_cast<const S*>(f.a.mean)[u.b * f.g.channels + u.c0 / f.g.span + i]) : 0.0;
}
template <class T> NF_INLINE double rstd_at(const Backward<T>& f, const Unit<T>& u, int64_t i) {
  using S = typename TypeOf<T>::stat;
  return double(static_cast<const S*>(f.a.rstd)[u.b * f.g.channels + u.c0 / f.g.span + i]);
}
template <class T> NF_INLINE bool by_rows(const Backward<T>& f) { return f.g.param_span == 0; }
template <class T> NF_INLINE bool fits(const Backward<T>& f, const Unit<T>& u, int64_t i) {
  return sizeof(typename TypeOf<T>::compute) == 8 || fits_single_backward(mean_of(f, u, i), rstd_at(f, u, i));
}

// One cell to a statistic: the output does not depend on x, and there is exactly no gradient.
template <class T> NF_INLINE bool single_cell(const Backward<T>& f) {
  return f.a.center && !f.a.frozen && f.g.outer * f.g.span == 1;
}

// ---- per channel: loops that compilers turn into vectors ------------------------------------------------------------

// Shifts for the sums of n channels. False: float cannot hold all of them.
template <class C, class S>
__attribute__((noinline)) bool column_shifts(int64_t n, const S* __restrict mean, const S* __restrict rstd,
                                             C* __restrict shift) {
  int extreme = 0;
  for (int64_t i = 0; i < n; ++i) {
    extreme |= sizeof(C) == 4 && !fits_single_backward(double(mean[i]), double(rstd[i]));
    shift[i] = slope_shift<C>(double(mean[i]), usable(double(rstd[i])));
  }
  return extreme == 0;
}

// Averages of n channels, from the sums of their only chunk.
template <class C, class S, bool Weighted>
__attribute__((noinline)) void column_averages(int64_t n, double cells, const double* __restrict s,
                                               const double* __restrict q, const C* __restrict shift,
                                               const S* __restrict mean, const S* __restrict rstd,
                                               const C* __restrict w, double* __restrict c1, double* __restrict c2,
                                               double* __restrict keep) {
  for (int64_t i = 0; i < n; ++i) {
    const double lo = double(mean[i]) - double(shift[i]);
    const double b = (q[i] - lo * s[i]) * usable(double(rstd[i])), weight = Weighted ? double(w[i]) : 1.0;
    // 0.0 +: a sum that is zero has the sign that it has where several are added.
    c1[i] = (0.0 + weight * s[i]) / cells, c2[i] = (0.0 + weight * b) / cells;
    keep[2 * i] = s[i], keep[2 * i + 1] = b;
  }
}

template <class C, class S, bool Weighted>
__attribute__((noinline)) void gradient_columns(int64_t n, const S* __restrict mean, const S* __restrict rstd,
                                                const C* __restrict w, const double* __restrict c1,
                                                const double* __restrict c2, C* __restrict hi, C* __restrict p,
                                                C* __restrict q, C* __restrict t) {
  for (int64_t i = 0; i < n; ++i) {
    const Gradient<C> k = gradient<C>(double(mean[i]), double(rstd[i]), Weighted ? double(w[i]) : 1.0, c1[i], c2[i]);
    hi[i] = k.hi, p[i] = k.p, q[i] = k.q, t[i] = k.t;
  }
}

// Do these loops serve? Channels with one shift, one parameter and one entry of the tables each.
template <class T> NF_INLINE bool plain_columns(const Backward<T>& f) {
  return !by_rows(f) && (f.g.span == 1 || f.is_planes) && entry(f.g, f.g.span) == 1 && f.a.mean != nullptr &&
         !single_cell(f) && !f.a.frozen;
}
template <class T> NF_INLINE int64_t first_channel(const Backward<T>& f, const Unit<T>& u) {
  return u.b * f.g.channels + u.c0 / f.g.span;
}

// Their sums are then those of their only chunk.
template <class T> NF_INLINE bool one_chunk(const Backward<T>& f, const Unit<T>& u) {
  const bool one = f.is_planes ? f.planes.by_unit && f.planes.chunks == 1 : f.matrix.by_unit && f.chunks == 1;
  return one && plain_columns(f) && !u.extreme && f.a.center;
}

// The rounded means (and, for parameters along the rows, the rest of xhat's coefficients) before anything is summed.
template <class T> void begin_unit(const Backward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  using S = typename TypeOf<T>::stat;
  const int64_t span = f.g.span, channels = (u.c1 - u.c0) / span;
  if (plain_columns(f)) {
    const int64_t at = first_channel(f, u);
    u.extreme = !column_shifts<C, S>(channels, static_cast<const S*>(f.a.mean) + at,
                                     static_cast<const S*>(f.a.rstd) + at, u.shift);
    return;
  }
  u.extreme = false;
  for (int64_t i = 0; i < channels; ++i) {
    const bool good = fits(f, u, i);
    u.extreme = u.extreme || !good;
    if (by_rows(f)) {
      const Hat<C> h = good && !single_cell(f) ? hat<C>(mean_of(f, u, i), 0, 0, rstd_at(f, u, i)) : Hat<C>{};
      u.hi[i] = h.hi, u.p[i] = h.rs, u.t[i] = h.t;
    }
    const C shift = good ? slope_shift<C>(mean_of(f, u, i), usable(rstd_at(f, u, i))) : C(0);
    for (int64_t j = 0; j < (f.is_planes ? 1 : span); ++j) u.shift[f.is_planes ? i : i * span + j] = shift;
  }
}

// ---- sums -----------------------------------------------------------------------------------------------------------

template <class T>
NF_INLINE void sum_chunk(const Backward<T>& f, const Unit<T>& u, int64_t index, int64_t c0, int64_t c1, double* s,
                         double* q) {
  using C = typename TypeOf<T>::compute;
  const int64_t begin = index * chunk_rows<C>(f.g), end = smaller(begin + chunk_rows<C>(f.g), f.g.outer),
                width = f.matrix.width;
  const T *dy = item(f, f.a.dy, u.b), *x = item(f, f.a.x, u.b);
  if (f.g.any_order)
    batch_chunk<C>(ColumnSlopes<C, T>{dy, x, width, u.shift - u.c0}, begin, end, c0, c1, f.reading, s, q);
  else if (!by_rows(f))
    column_chunk<C>(ColumnSlopes<C, T>{dy, x, width, u.shift - u.c0}, begin, end, c0, c1, f.matrix.resident, s, q);
  else if (f.a.center)
    column_chunk<C>(ColumnWeighted<C, T, true>{dy, x, width, f.w, u.hi - u.c0, u.p - u.c0, u.t - u.c0}, begin, end, c0,
                    c1, f.matrix.resident, s, q);
  else
    column_chunk<C>(ColumnWeighted<C, T, false>{dy, x, width, f.w, u.hi - u.c0, u.p - u.c0, u.t - u.c0}, begin, end, c0,
                    c1, f.matrix.resident, s, q);
}

// One column (planes: channel) that float cannot hold, cell by cell in double: A and B*rstd, weighted where the
// parameters go along the rows.
template <class T>
__attribute__((noinline)) Sums extreme_column(const Backward<T>& f, const Unit<T>& u, int64_t c, double mean,
                                              double rstd) {
  const int64_t width = f.g.channels * f.g.span, run = f.is_planes ? f.g.span : 1;
  const int64_t at = u.c0 + (f.is_planes ? c * f.g.span : c);
  const T *dy = item(f, f.a.dy, u.b) + at, *x = item(f, f.a.x, u.b) + at;
  ChunkTotal total;
  for (int64_t o = 0; o < f.g.outer; ++o)
    for (int64_t j = 0; j < run; ++j) {
      const int64_t i = o * width + j;
      const double d = double(Cast<T>::get(dy[i])) * (by_rows(f) && f.w != nullptr ? double(f.w[o]) : 1.0);
      total.add({d, d * ((double(Cast<T>::get(x[i])) - mean) * usable(rstd))});
    }
  return total.total();
}

// From the totals to the two averages of each channel; keeps A and B*rstd for the parameter gradients.
template <class T> void find_averages(const Backward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  using S = typename TypeOf<T>::stat;
  const int64_t span = f.g.span, channels = (u.c1 - u.c0) / span;
  const double n = double(f.g.outer) * double(span);
  if (one_chunk(f, u)) {
    const int64_t at = first_channel(f, u);
    const auto loop = f.w != nullptr ? column_averages<C, S, true> : column_averages<C, S, false>;
    double* keep = f.column_sums != nullptr ? f.column_sums + at * 2 : u.kept;
    loop(channels, n, u.sums, u.sums + channels, u.shift, static_cast<const S*>(f.a.mean) + at,
         static_cast<const S*>(f.a.rstd) + at, f.w != nullptr ? f.w + u.c0 / span : nullptr, u.c1_of, u.c2_of, keep);
    return;
  }
  const int64_t per = f.is_planes ? 1 : span;  // totals per channel
  for (int64_t i = 0; i < channels; ++i) {
    const double mean = mean_of(f, u, i), rstd = rstd_at(f, u, i);
    const double lo = mean - double(u.shift[i * per]);
    const bool good = fits(f, u, i);
    double s1 = 0, s2 = 0;
    for (int64_t j = 0; j < per; ++j) {
      const int64_t c = i * per + j;
      Sums t;
      if (!good) t = extreme_column(f, u, c, mean, rstd);
      else {
        t = u.total[c].total();
        if (!by_rows(f)) t.q = (t.q - lo * t.s) * usable(rstd);
      }
      if (single_cell(f)) t.q *= 0;  // xhat is exactly 0
      if (f.column_sums != nullptr) {
        const int64_t row = f.is_planes ? f.g.channels : f.matrix.width;
        double* keep = f.column_sums + (u.b * row + (f.is_planes ? u.c0 / span : u.c0) + c) * 2;
        keep[0] = t.s, keep[1] = t.q;
      }
      double w = 1;
      if (!by_rows(f) && f.w != nullptr) w = double(f.w[f.is_planes ? u.c0 / span + i : (u.c0 + c) / f.g.param_span]);
      s1 += w * t.s, s2 += w * t.q;
    }
    u.c1_of[i] = f.a.center ? s1 / n : 0.0, u.c2_of[i] = s2 / n;
  }
}

// ---- map ------------------------------------------------------------------------------------------------------------

template <class T> void build_tables(const Backward<T>& f, Unit<T>& u) {
  using C = typename TypeOf<T>::compute;
  using S = typename TypeOf<T>::stat;
  const int64_t span = f.g.span, tile = u.c1 - u.c0;
  const bool plain = plain_columns(f) && !u.extreme;
  if (plain) {
    const int64_t at = first_channel(f, u);
    const auto loop = f.w != nullptr ? gradient_columns<C, S, true> : gradient_columns<C, S, false>;
    loop(tile / span, static_cast<const S*>(f.a.mean) + at, static_cast<const S*>(f.a.rstd) + at,
         f.w != nullptr ? f.w + u.c0 / span : nullptr, u.c1_of, u.c2_of, u.hi, u.p, u.q, u.t);
  }
  for (int64_t i = 0; !plain && i * span < tile; ++i) {
    const bool good = fits(f, u, i);
    const double mean = mean_of(f, u, i), rstd = rstd_at(f, u, i);
    if (by_rows(f)) {
      const Slope<C> k = good && !single_cell(f) ? slope<C>(rstd, u.c1_of[i], u.c2_of[i]) : Slope<C>{};
      u.q[i] = k.a, u.b_of[i] = k.b;
      continue;
    }
    const int64_t each = span / f.g.param_span;  // parameters of a channel
    for (int64_t j = 0; j < each; ++j) {
      Gradient<C> k{};
      if (good && !single_cell(f)) {
        const double w = f.w != nullptr ? double(f.w[(u.c0 / span + i) * each + j]) : 1.0;
        k = f.a.frozen ? Gradient<C>{0, C(usable(rstd) * w), 0, 0} : gradient<C>(mean, rstd, w, u.c1_of[i], u.c2_of[i]);
      }
      const int64_t c = entry(f.g, (i * each + j) * f.g.param_span);
      for (int64_t s = c; s < c + (in_runs(f.g) ? 1 : f.g.param_span); ++s)
        u.hi[s] = k.hi, u.p[s] = k.p, u.q[s] = k.q, u.t[s] = k.t;
    }
  }
  C* const tables[5] = {u.hi, u.p, u.q, u.t, u.b_of};
  const int count = by_rows(f) ? 5 : 4;
  const bool wrapped = by_rows(f) && wraps<C>(tile, f.matrix.width);
  for (int i = 0; i < count; ++i) repeat_table(tables[i], tile, f.repeats, wrapped);
}

// One row of a unit in which float cannot hold some channel: those in double, the others as the vectors do.
template <class T>
__attribute__((noinline)) void map_row_carefully(const Backward<T>& f, const Unit<T>& u, int64_t o, const T* dy,
                                                 const T* x, T* dx) {
  const int64_t span = f.g.span;
  for (int64_t c = 0; c < u.c1 - u.c0; ++c) {
    const int64_t i = c / span;
    const int64_t e = entry(f.g, c);
    const double w = f.w == nullptr ? 1.0 : double(f.w[by_rows(f) ? o : (u.c0 + c) / f.g.param_span]);
    if (!fits(f, u, i)) {
      const double d = double(Cast<T>::get(dy[c])) * w, rstd = rstd_at(f, u, i);
      const double xhat = (double(Cast<T>::get(x[c])) - mean_of(f, u, i)) * rstd;
      dx[c] = Cast<T>::from(f.a.frozen ? rstd * d : rstd * (d - u.c1_of[i] - xhat * u.c2_of[i]));
      continue;
    }
    const float d = Cast<T>::get(dy[c]), v = Cast<T>::get(x[c]);
    float out;
    if (by_rows(f)) {
      const float rs = float(u.p[c]), h = f.a.center ? fma1f(v - float(u.hi[c]), rs, float(u.t[c])) : v * rs;
      out = fma1f(d * float(w), rs, fma1f(h, float(u.q[c]), float(u.b_of[c])));
    } else if (f.a.frozen) {
      out = fma1f(d - 0.0f, float(u.p[e]), 0.0f);
    } else {
      out = fma1f(d, float(u.p[e]), fma1f(v - float(u.hi[e]), float(u.q[e]), float(u.t[e])));
    }
    dx[c] = Cast<T>::from(typename TypeOf<T>::compute(out));
  }
}

template <class T, bool Stream>
void map_matrix(const Backward<T>& f, const Unit<T>& u, int64_t begin, int64_t end, int64_t next) {
  using C = typename TypeOf<T>::compute;
  const int64_t width = f.g.channels * f.g.span, tile = u.c1 - u.c0;
  const T *dy = item(f, f.a.dy, u.b) + u.c0, *x = item(f, f.a.x, u.b) + u.c0;
  T* dx = const_cast<T*>(item(f, f.a.dx, u.b)) + u.c0;
  const auto through_tables = [&](const auto& op) {
    map_tables<C, Stream>(dx, begin, end, tile, width, f.repeats, op);
  };
  if (u.extreme) {
    for (int64_t o = begin; o < end; ++o) map_row_carefully(f, u, o, dy + o * width, x + o * width, dx + o * width);
  } else if (by_rows(f)) {
    const auto weights = [&](int64_t o) { return f.w != nullptr ? f.w + o : nullptr; };
    const auto map = [&](auto center) {
      map_weighted_rows<C, Stream>(dx, begin, end, tile, width, f.repeats, [&](int64_t o) {
        return TableHatGradientOp<C, T, center>{dy + o * width, x + o * width, u.hi, u.p, u.t, u.q, u.b_of, weights(o)};
      });
    };
    f.a.center ? map(std::true_type{}) : map(std::false_type{});
  } else if (in_runs(f.g)) {
    const int64_t run = f.g.param_span;
    for (int64_t o = begin; o < end; ++o) {
      const T *d = dy + o * width, *v = x + o * width;
      Ahead ahead;
      if (next != 0) ahead = {d + next, v + next};
      if (f.a.frozen) map_runs<C, Stream>(dx + o * width, tile, run, run, ahead, RunAffineOp<C, T>{d, u.hi, u.p, u.t});
      else map_runs<C, Stream>(dx + o * width, tile, run, run, ahead, RunGradientOp<C, T>{d, v, u.hi, u.p, u.q, u.t});
    }
  } else if (f.a.frozen) {
    through_tables([&](int64_t o) { return TableAffineOp<C, T>{{u.hi, u.p, u.t}, dy + o * width}; });
  } else {
    through_tables(
        [&](int64_t o) { return TableGradientOp<C, T>{dy + o * width, x + o * width, u.hi, u.p, u.q, u.t}; });
  }
  stream_fence(Stream);
}

template <class T>
__attribute__((noinline)) void map_unit(const Backward<T>& f, const Unit<T>& u, int64_t begin, int64_t end,
                                        int64_t next) {
  f.streaming ? map_matrix<T, true>(f, u, begin, end, next) : map_matrix<T, false>(f, u, begin, end, next);
}

// (dy, dy*xhat) along a row
template <class C, class T, bool Center> struct RowSlopes {
  const T *dy, *x;
  const C *hi, *rs, *t;
  using V = Vec<C>;
  __attribute__((always_inline)) inline V xhat(V v, V h, V r, V u) const {
    if constexpr (Center) return fma(v - h, r, u);
    else return v * r;
  }
  __attribute__((always_inline)) inline void get(int64_t i, V& a, V& b, V& c) const {
    a = b = Cells<C, T>::load(dy + i);
    c = xhat(Cells<C, T>::load(x + i), Cells<C, C>::load(hi + i), Cells<C, C>::load(rs + i), Cells<C, C>::load(t + i));
  }
  __attribute__((always_inline)) inline void get_n(int64_t i, int n, V& a, V& b, V& c) const {
    a = b = Cells<C, T>::load_n(dy + i, n, C(0));
    c = xhat(Cells<C, T>::load_n(x + i, n, C(0)), Cells<C, C>::load_n(hi + i, n, C(0)),
             Cells<C, C>::load_n(rs + i, n, C(0)), Cells<C, C>::load_n(t + i, n, C(0)));
  }
};

// Parameters along the rows: the sums of rows [begin, end) over each segment of the unit's columns.
template <class T>
__attribute__((noinline)) void sum_rows(const Backward<T>& f, const Unit<T>& u, int64_t begin, int64_t end) {
  using C = typename TypeOf<T>::compute;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t c = u.c0; c < u.c1; c += row_segment) {
      const int64_t n = smaller(row_segment, u.c1 - c), at = o * f.matrix.width + c, i = c - u.c0;
      const T *dy = item(f, f.a.dy, u.b) + at, *x = item(f, f.a.x, u.b) + at;
      Sums s;
      if (f.a.center) s = run_sums<C>(RowSlopes<C, T, true>{dy, x, u.hi + i, u.p + i, u.t + i}, n);
      else s = run_sums<C>(RowSlopes<C, T, false>{dy, x, u.hi + i, u.p + i, u.t + i}, n);
      if (u.extreme)  // these columns have zero coefficients, so they are missing from the second sum
        for (int64_t j = 0; j < n; ++j)
          if (!fits(f, u, i + j))
            s.q += double(Cast<T>::get(dy[j])) *
                   ((double(Cast<T>::get(x[j])) - mean_of(f, u, i + j)) * rstd_at(f, u, i + j));
      double* out = f.row_sums + ((u.b * f.segments + c / row_segment) * f.g.outer + o) * 2;
      out[0] = s.s, out[1] = s.q;
    }
}

}  // namespace
}  // namespace nf
