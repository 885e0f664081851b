// SPDX-License-Identifier: BSD-3-Clause
// The two steps of Rows, backward, where every cell has its own weight: the sums of a row, and then, down a group of
// sixteen rows, dx and the share of dweight and dbias. rows_backward.cpp says which rows and columns go where.
#pragma once

#include "kernels.h"
#include "maps.h"
#include "sums.h"
#include "tables.h"

namespace nf {
namespace {

constexpr int group_rows = 16;

template <class T> struct Backward {
  using C = typename TypeOf<T>::compute;
  const RowsBackward& a;
  Rows g;           // after expansion of short spans
  const C* w;       // likewise
  int64_t n;        // cells of a row
  double per_cell;  // 1 / n: a division per row would be felt where rows are short
  bool wants_params, extreme, streaming, ahead;
  bool one_vector = false;  // rows of one vector or less; looks for extreme rows by itself
  // Rows of one phase (r % period) share their parameters; they are cut into blocks, blocks into groups.
  int64_t phase_rows = 0, block_rows = 0, blocks = 0;
  int at_once = group_rows;      // rows between the two steps: fewer where sixteen would leave the cache
  double* block_sums = nullptr;  // [period][blocks][2][n]
  C* chain_sums = nullptr;       // [slot][2][n], when at_once < group_rows
  T* saved = nullptr;            // [slot][group_rows][n], when extreme
  double* run_sums = nullptr;    // [count][channels][2], run form
  int threads = 1;
};

template <class T> NF_INLINE double mean_of(const Backward<T>& f, int64_t r) {
  return f.a.mean != nullptr ? double(static_cast<const typename TypeOf<T>::stat*>(f.a.mean)[r]) : 0.0;
}
template <class T> NF_INLINE double rstd_of_row(const Backward<T>& f, int64_t r) {
  return double(static_cast<const typename TypeOf<T>::stat*>(f.a.rstd)[r]);
}

// ---- every cell its own weight ---------------------------------------------------------------------------------------

// Of each row of a group: its map to xhat and the constants of dx (formula.h).
template <class C> struct RowCoefficients {
  C hi[group_rows], rs[group_rows], t[group_rows], a[group_rows], b[group_rows];
  __attribute__((always_inline)) inline void set(int i, const Hat<C>& h, const Slope<C>& k) {
    hi[i] = h.hi, rs[i] = h.rs, t[i] = h.t, a[i] = k.a, b[i] = k.b;
  }
};

// One group: rows first, first + step, ... (`rows` of them), all of one phase.
template <class T> struct Group {
  using C = typename TypeOf<T>::compute;
  const T *dy[group_rows], *x[group_rows];
  T* dx[group_rows];
  int64_t index[group_rows];
  RowCoefficients<C> k;
  int rows;
  const C* w;
  double *dweight, *dbias;  // the block's sums; null where this group is all there is, and its sums are the gradients
  C *chain_w, *chain_b;     // sums of the chains so far, when the group is done in parts
  int64_t next = 0;         // cells from a row to the one whose turn is next, 0: nothing to fetch
  bool stream_gradients = false;
};

// A row that float cannot hold: dx in double into `out`, its share of dweight straight into the block's sums.
template <class T> __attribute__((noinline)) void extreme_row(const Backward<T>& f, const Group<T>& u, int i, T* out) {
  const int64_t r = u.index[i];
  const T *dy = u.dy[i], *x = u.x[i];
  const double mean = mean_of(f, r), rstd = rstd_of_row(f, r);
  double s1 = 0, s2 = 0;
  for (int64_t c = 0; c < f.n; ++c) {
    const double d = Cast<T>::get(dy[c]), xhat = (double(Cast<T>::get(x[c])) - mean) * rstd;
    const double g = u.w != nullptr ? d * double(u.w[c]) : d;
    s1 += g, s2 = fma1(g, xhat, s2);
    if (u.dweight != nullptr) u.dweight[c] = fma1(d, xhat, u.dweight[c]);
  }
  if (out == nullptr) return;
  const double c1 = f.a.center ? s1 / double(f.n) : 0.0, c2 = s2 / double(f.n);
  for (int64_t c = 0; c < f.n; ++c) {
    const double d = Cast<T>::get(dy[c]), xhat = (double(Cast<T>::get(x[c])) - mean) * rstd;
    const double g = u.w != nullptr ? d * double(u.w[c]) : d;
    out[c] = Cast<T>::from(rstd * (g - c1 - xhat * c2));
  }
}

// Step one: the two sums of row i, and its coefficients.
template <class T, bool Center>
__attribute__((noinline)) void row_sums(const Backward<T>& f, Group<T>& u, int i, T* saved) {
  using C = typename TypeOf<T>::compute;
  const int64_t r = u.index[i];
  const double mean = mean_of(f, r), rstd = rstd_of_row(f, r);
  if (f.extreme && sizeof(C) == 4 && !fits_single_backward(mean, rstd)) {
    extreme_row(f, u, i, f.a.dx != nullptr ? saved + i * f.n : nullptr);
    u.k.set(i, {}, {});  // contributes nothing in the second step
    return;
  }
  Hat<C> h = hat<C>(mean, 0, 0, rstd);
  if (Center && f.n == 1) h.rs = h.t = 0;  // the output does not depend on x: exactly no gradient
  u.k.set(i, h, {});
  if (f.a.dx == nullptr) return;
  const Sums s = u.w != nullptr ? run_sums<C>(WeightedSlopes<C, T, true, Center>{u.dy[i], u.x[i], u.w, h}, f.n)
                                : run_sums<C>(WeightedSlopes<C, T, false, Center>{u.dy[i], u.x[i], u.w, h}, f.n);
  u.k.set(i, h, slope<C>(rstd, Center ? s.s * f.per_cell : 0.0, s.q * f.per_cell));
}

// Step one of a whole group of rows of one vector, with the bits of row_sums: what is done once per row, the folding of
// lanes and the arithmetic in double, would otherwise cost more than the cells. False, and nothing done, if there is a
// row that float cannot hold.
template <class T, bool Center, bool Whole>
__attribute__((noinline)) bool short_sums(const Backward<T>& f, Group<T>& u) {
  using C = typename TypeOf<T>::compute;
  using V = Vec<C>;
  double mean[group_rows], rstd[group_rows];
  int extreme = 0;
  for (int i = 0; i < u.rows; ++i) mean[i] = mean_of(f, u.index[i]), rstd[i] = rstd_of_row(f, u.index[i]);
  for (int i = u.rows; i < group_rows; ++i) mean[i] = 0, rstd[i] = 1;
  for (int i = 0; i < group_rows; ++i) extreme |= !fits_single_backward(mean[i], rstd[i]);
  if (sizeof(C) == 4 && extreme != 0) return false;
  for (int i = 0; i < group_rows; ++i) {
    const Hat<C> h = hat<C>(mean[i], 0, 0, rstd[i]);
    u.k.hi[i] = h.hi, u.k.rs[i] = h.rs, u.k.t[i] = h.t;
  }
  const int n = int(f.n);
  V w = splat<C>(1);
  if (u.w != nullptr) w = Whole ? Cells<C, C>::load(u.w) : Cells<C, C>::load_n(u.w, n, C(0));
  double s1[group_rows], s2[group_rows];
  for (int i0 = 0; i0 < group_rows; i0 += 8) {
    F64 s[8], q[8];
    for (int j = 0; j < 8; ++j) {
      const int i = i0 + j < u.rows ? i0 + j : 0;
      V d = Whole ? Cells<C, T>::load(u.dy[i]) : Cells<C, T>::load_n(u.dy[i], n, C(0));
      V x = Whole ? Cells<C, T>::load(u.x[i]) : Cells<C, T>::load_n(u.x[i], n, u.k.hi[i]);
      if constexpr (Center) x = fma(x - splat<C>(u.k.hi[i]), splat<C>(u.k.rs[i]), splat<C>(u.k.t[i]));
      else x = x * splat<C>(u.k.rs[i]);
      d = d * w;
      s[j] = BlockSums<C>::widen(d), q[j] = BlockSums<C>::widen(d * x);
    }
    store(s1 + i0, sum_lanes8(s)), store(s2 + i0, sum_lanes8(q));
  }
  for (int i = 0; i < group_rows; ++i) {
    const Slope<C> k = slope<C>(rstd[i], Center ? s1[i] * f.per_cell : 0.0, s2[i] * f.per_cell);
    u.k.a[i] = k.a, u.k.b[i] = k.b;
  }
  return true;
}

// The gradients of the k columns from `at` on, whose sums these are; streamed past the cache if that is wanted.
template <class C, class G> NF_INLINE void put_gradients_as(void* out, int64_t at, Vec<C> sums, int k, bool stream) {
  G* to = static_cast<G*>(out) + at;
  if constexpr (sizeof(C) > sizeof(float) &&
                sizeof(G) < sizeof(C)) {  // cell by cell: float64 x with narrower parameters
    C cells[Lanes<C>::n];
    store(cells, sums);
    for (int i = 0; i < k; ++i) to[i] = Cast<G>::from(cells[i]);
  } else if (k < Lanes<C>::n) Cells<C, G>::store_n(to, sums, k);
  else if (stream) Cells<C, G>::stream(to, sums);
  else Cells<C, G>::store(to, sums);
}
template <class C> NF_INLINE void put_gradients(DType type, void* out, int64_t at, Vec<C> sums, int k, bool stream) {
  if (out == nullptr) return;
  switch (type) {
    case DType::f64: return put_gradients_as<C, double>(out, at, sums, k, stream);
    case DType::f32: return put_gradients_as<C, float>(out, at, sums, k, stream);
    case DType::f16: return put_gradients_as<C, f16>(out, at, sums, k, stream);
    case DType::bf16: return put_gradients_as<C, bf16>(out, at, sums, k, stream);
  }
}

// Step two for the cells [c, c + width*L) of rows [i0, i1) (or the last `k` cells). i0 is a multiple of four. Meanwhile
// the rows that come next are fetched, so that reading and writing overlap.
template <class T, int width, bool Center, bool Stream, bool Dx, bool Partial>
NF_INLINE void columns_step(const Backward<T>& f, const Group<T>& u, int i0, int i1, int64_t c, int k) {
  using C = typename TypeOf<T>::compute;
  using V = Vec<C>;
  constexpr int64_t L = Lanes<C>::n;
  V w[width], sum_w[width], sum_b[width];
  const bool in_parts = u.chain_w != nullptr;
#pragma GCC unroll 4
  for (int j = 0; j < width; ++j) {
    if (u.w == nullptr) w[j] = splat<C>(1);
    else if constexpr (Partial) w[j] = Cells<C, C>::load_n(u.w + c, k, C(0));
    else w[j] = Cells<C, C>::load(u.w + c + j * L);
    sum_w[j] = sum_b[j] = splat<C>(0);
    if (in_parts && i0 > 0) {  // the workspace is padded to whole vectors
      sum_w[j] = Cells<C, C>::load(u.chain_w + c + j * L);
      sum_b[j] = Cells<C, C>::load(u.chain_b + c + j * L);
    }
  }
  for (int i = i0; i < i1;) {
    const int chain_end = i + 4 < i1 ? i + 4 : i1;
    V chain_w[width], chain_b[width];
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) chain_w[j] = chain_b[j] = splat<C>(0);
    for (; i < chain_end; ++i) {
      if (u.next != 0) {
#pragma GCC unroll 4
        for (int j = 0; j < width; ++j) {
          __builtin_prefetch(u.dy[i] + u.next + c + j * L, 0, 2);
          __builtin_prefetch(u.x[i] + u.next + c + j * L, 0, 2);
        }
      }
      const V hi = splat<C>(u.k.hi[i]), rs = splat<C>(u.k.rs[i]), t = splat<C>(u.k.t[i]), a = splat<C>(u.k.a[i]),
              b = splat<C>(u.k.b[i]);
#pragma GCC unroll 4
      for (int j = 0; j < width; ++j) {
        V d, x;
        if constexpr (Partial) {
          d = Cells<C, T>::load_n(u.dy[i] + c, k, C(0));
          x = Cells<C, T>::load_n(u.x[i] + c, k, u.k.hi[i]);
        } else {
          d = Cells<C, T>::load(u.dy[i] + c + j * L);
          x = Cells<C, T>::load(u.x[i] + c + j * L);
        }
        if constexpr (Center) x = fma(x - hi, rs, t);
        else x = x * rs;
        if constexpr (Dx) {
          const V dx = fma(d * w[j], rs, fma(x, a, b));
          if constexpr (Partial) Cells<C, T>::store_n(u.dx[i] + c, dx, k);
          else put<Stream, C>(u.dx[i] + c + j * L, dx);
        }
        chain_w[j] = fma(d, x, chain_w[j]);
        chain_b[j] = chain_b[j] + d;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) sum_w[j] = sum_w[j] + chain_w[j], sum_b[j] = sum_b[j] + chain_b[j];
  }
  if (in_parts && i1 < u.rows) {
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) {
      Cells<C, C>::store(u.chain_w + c + j * L, sum_w[j]);
      Cells<C, C>::store(u.chain_b + c + j * L, sum_b[j]);
    }
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < width; ++j) {
    if (u.dweight == nullptr) {
      const int64_t at = c + j * L;
      const bool past = Stream && u.stream_gradients;
      put_gradients<C>(f.a.gradient_type, f.a.dweight, at, sum_w[j], Partial ? k : int(L), past);
      put_gradients<C>(f.a.gradient_type, f.a.dbias, at, sum_b[j], Partial ? k : int(L), past);
      continue;
    }
    add_wide(u.dweight + c + j * L, sum_w[j]);
    add_wide(u.dbias + c + j * L, sum_b[j]);
  }
}

// Registers decide how many vectors go down the rows together; the bits do not depend on it.
#if defined(__AVX512F__)
constexpr int step_width = 4;
#else
constexpr int step_width = 1;
#endif

template <class T, bool Center, bool Stream, bool Dx>
NF_INLINE void columns_steps(const Backward<T>& f, const Group<T>& u, int i0, int i1, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<typename TypeOf<T>::compute>::n;
  int64_t c = begin;
  for (; c + step_width * L <= end; c += step_width * L)
    columns_step<T, step_width, Center, Stream, Dx, false>(f, u, i0, i1, c, 0);
  for (; c + L <= end; c += L) columns_step<T, 1, Center, Stream, Dx, false>(f, u, i0, i1, c, 0);
  if (c < end) columns_step<T, 1, Center, false, Dx, true>(f, u, i0, i1, c, int(end - c));
  stream_fence(Stream);
}

template <class T, bool Center>
__attribute__((noinline)) void columns_range(const Backward<T>& f, const Group<T>& u, int i0, int i1, int64_t begin,
                                             int64_t end) {
  if (f.a.dx == nullptr) columns_steps<T, Center, false, false>(f, u, i0, i1, begin, end);
  else if (f.streaming) columns_steps<T, Center, true, true>(f, u, i0, i1, begin, end);
  else columns_steps<T, Center, false, true>(f, u, i0, i1, begin, end);
}

}  // namespace
}  // namespace nf
