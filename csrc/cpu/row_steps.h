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
// Rows so short that the first-level cache holds a group of them from the first step to the second.
constexpr int64_t short_row_bytes = 512;

template <class T> struct Backward {
  using C = typename TypeOf<T>::compute;
  const RowsBackward& a;
  Rows g;           // after expansion of short spans
  const C* w;       // likewise
  int64_t n;        // cells of a row
  double per_cell;  // 1 / n: a division per row would be felt where rows are short
  bool wants_params, extreme, streaming;
  bool in_groups = false;  // rows whose sums are found a group at a time, which looks for extreme rows by itself
  // Rows of one phase (r % period) share their parameters; they are cut into blocks, blocks into groups.
  int64_t phase_rows = 0, block_rows = 0, blocks = 0;
  bool short_rows = false;       // the second step goes down the columns, not along the rows
  int at_once = group_rows;      // rows between the two steps: fewer where sixteen would leave the cache
  int64_t next = 0;              // how many cells from here is the row that is fetched meanwhile? 0: none is
  double* block_sums = nullptr;  // [period][blocks][2][n]
  C* group_sums = nullptr;       // [slot][2][n], when at_once < group_rows
  T* saved = nullptr;            // [slot][group_rows][n], when extreme
  T* staged = nullptr;           // [slot][at_once][n], when dx streams, but its rows are no whole lines
  double* run_sums = nullptr;    // [count][channels][2], run form
  int threads = 1;
};

template <class T> NF_INLINE double mean_of(const Backward<T>& f, int64_t r) {
  return f.a.mean != nullptr ? double(static_cast<const typename TypeOf<T>::stat*>(f.a.mean)[r]) : 0.0;
}
template <class T> NF_INLINE double rstd_of_row(const Backward<T>& f, int64_t r) {
  return double(static_cast<const typename TypeOf<T>::stat*>(f.a.rstd)[r]);
}

// ---- every cell its own weight --------------------------------------------------------------------------------------

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
  const T *dy, *x;  // of the first row
  T* dx;
  int dx_row = 0;              // of which row that is
  int64_t first, step, pitch;  // pitch: cells from row to row
  RowCoefficients<C> k;
  int rows;
  const C* w;
  double *dweight, *dbias;  // the block's sums; null where this group is all there is, and its sums are the gradients
  C *sums_w, *sums_b;       // of the chains so far, column by column, where a group is done in parts
  int64_t past_line = 0;    // if dx streams: cells by which rows begin behind the start of a cache line
  bool stream_gradients = false;
};

// A row that float cannot hold: dx in double into `out`, its share of dweight straight into the block's sums.
template <class T> __attribute__((noinline)) void extreme_row(const Backward<T>& f, const Group<T>& u, int i, T* out) {
  const int64_t r = u.first + i * u.step;
  const T *dy = u.dy + i * u.pitch, *x = u.x + i * u.pitch;
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

// The rows that come next (f.next, if any) are fetched in both steps, half of each beside its sums and half while dx is
// written, so that memory never rests.

// `sum` of the terms of row i.
template <class T, bool Center, class Sum>
NF_INLINE auto slope_sums(const Backward<T>& f, const Group<T>& u, int i, Hat<typename TypeOf<T>::compute> h,
                          const Sum& sum) {
  using C = typename TypeOf<T>::compute;
  const T *dy = u.dy + i * u.pitch, *x = u.x + i * u.pitch;
  const auto fetching = [&](const auto& term) __attribute__((always_inline)) {
    using Term = std::decay_t<decltype(term)>;
    return f.next != 0 ? sum(Fetching<Term, T>{term, dy + f.next, x + f.next}) : sum(term);
  };
  return u.w != nullptr ? fetching(WeightedSlopes<C, T, true, Center>{dy, x, u.w, h})
                        : fetching(WeightedSlopes<C, T, false, Center>{dy, x, nullptr, h});
}

// In step two: how far from a cell in column c lies what is fetched beside it, and how much of it beside so many cells.
// Without dx there is no step one, and all are fetched here.
template <bool Dx, class T> NF_INLINE int64_t next_at(const Backward<T>& f, int64_t c) {
  return Dx ? f.next + f.n / 2 + c / 2 - c : f.next;
}
template <bool Dx> constexpr int64_t next_share(int64_t cells) { return Dx ? cells / 2 : cells; }

// Step one: the two sums of row i, and its coefficients.
template <class T, bool Center>
__attribute__((noinline)) void row_sums(const Backward<T>& f, Group<T>& u, int i, T* saved) {
  using C = typename TypeOf<T>::compute;
  const int64_t r = u.first + i * u.step;
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
  const Sums s = slope_sums<T, Center>(
      f, u, i, h, [&f](const auto& term) __attribute__((always_inline)) { return run_sums<C>(term, f.n); });
  u.k.set(i, h, slope<C>(rstd, Center ? s.s * f.per_cell : 0.0, s.q * f.per_cell));
}

// Step one of a whole group of short rows, with the bits of row_sums: what is done once per row, the folding of lanes
// and the arithmetic in double, would otherwise cost as much as the cells. False, and nothing done, if there is a row
// that float cannot hold.
enum class RowLength { part_of_vector, vector, longer };
template <class T, bool Center, RowLength length>
__attribute__((noinline)) bool group_sums(const Backward<T>& f, Group<T>& u) {
  using C = typename TypeOf<T>::compute;
  using V = Vec<C>;
  double mean[group_rows], rstd[group_rows];
  int extreme = 0;
  for (int i = 0; i < u.rows; ++i)
    mean[i] = mean_of(f, u.first + i * u.step), rstd[i] = rstd_of_row(f, u.first + i * u.step);
  for (int i = u.rows; i < group_rows; ++i) mean[i] = 0, rstd[i] = 1;
  for (int i = 0; i < group_rows; ++i) extreme |= !fits_single_backward(mean[i], rstd[i]);
  if (sizeof(C) == 4 && extreme != 0) return false;
  for (int i = 0; i < group_rows; ++i) {
    const Hat<C> h = hat<C>(mean[i], 0, 0, rstd[i]);
    u.k.hi[i] = h.hi, u.k.rs[i] = h.rs, u.k.t[i] = h.t;
  }
  const int n = int(f.n);
  V w = splat<C>(1);
  if (length != RowLength::longer && u.w != nullptr)
    w = length == RowLength::vector ? Cells<C, C>::load(u.w) : Cells<C, C>::load_n(u.w, n, C(0));
  double s1[group_rows], s2[group_rows];
  for (int i0 = 0; i0 < group_rows; i0 += 8) {
    F64 s[8], q[8];
    for (int j = 0; j < 8; ++j) {
      const int i = i0 + j < u.rows ? i0 + j : 0;
      const Hat<C> h{u.k.hi[i], u.k.rs[i], u.k.t[i]};
      if constexpr (length == RowLength::longer) {
        slope_sums<T, Center>(f, u, i, h, [&](const auto& term) __attribute__((always_inline)) {
          return add_run<C, true>(term, n, s[j], q[j]);
        });
      } else {
        const WeightedSlopes<C, T, false, Center> cells{u.dy + i * u.pitch, u.x + i * u.pitch, nullptr, h};
        V d, same, xhat;
        if constexpr (length == RowLength::vector) cells.get(0, d, same, xhat);
        else cells.get_n(0, n, d, same, xhat);
        d = d * w;
        s[j] = BlockSums<C>::widen(d), q[j] = BlockSums<C>::widen(d * xhat);
      }
    }
    store(s1 + i0, sum_lanes8(s)), store(s2 + i0, sum_lanes8(q));
  }
  for (int i = 0; i < group_rows; ++i) {
    const Slope<C> k = slope<C>(rstd[i], Center ? s1[i] * f.per_cell : 0.0, s2[i] * f.per_cell);
    u.k.a[i] = k.a, u.k.b[i] = k.b;
  }
  return true;
}
template <class T, bool Center> NF_INLINE bool group_sums(const Backward<T>& f, Group<T>& u) {
  constexpr int64_t L = Lanes<typename TypeOf<T>::compute>::n;
  return f.n > L    ? group_sums<T, Center, RowLength::longer>(f, u)
         : f.n == L ? group_sums<T, Center, RowLength::vector>(f, u)
                    : group_sums<T, Center, RowLength::part_of_vector>(f, u);
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

// The sums of L columns from c on (of which k are wanted) down all rows of the group: they go to the block, or are the
// gradients.
template <class T, bool Stream>
NF_INLINE void finish_columns(const Backward<T>& f, const Group<T>& u, int64_t c,
                              Vec<typename TypeOf<T>::compute> sum_w, Vec<typename TypeOf<T>::compute> sum_b, int k) {
  using C = typename TypeOf<T>::compute;
  if (u.dweight != nullptr && k < Lanes<C>::n) {  // not one more: its owner may be another thread
    C w[Lanes<C>::n], b[Lanes<C>::n];
    store(w, sum_w), store(b, sum_b);
    for (int i = 0; i < k; ++i) u.dweight[c + i] += double(w[i]), u.dbias[c + i] += double(b[i]);
  } else if (u.dweight != nullptr) {
    add_wide(u.dweight + c, sum_w), add_wide(u.dbias + c, sum_b);
  } else {
    const bool past = Stream && u.stream_gradients;
    put_gradients<C>(f.a.gradient_type, f.a.dweight, c, sum_w, k, past);
    put_gradients<C>(f.a.gradient_type, f.a.dbias, c, sum_b, k, past);
  }
}

// Step two of short rows: column by column, width*L cells from c on (or the last `k`), down all rows of the group.
template <class T, int width, bool Center, bool Stream, bool Dx, bool Fetch, bool Partial>
NF_INLINE void columns_step(const Backward<T>& f, const Group<T>& u, int64_t c, int k) {
  using C = typename TypeOf<T>::compute;
  using V = Vec<C>;
  constexpr int64_t L = Lanes<C>::n;
  // Of single vectors only every second one fetches: half of one is no line.
  constexpr int64_t fetched = Dx && width == 1 ? 2 * L : width * L;
  const bool fetches = Fetch && (fetched == width * L || c / L % 2 == 0);
  const int64_t next = next_at<Dx>(f, c);
  V w[width], sum_w[width], sum_b[width], chain_w[width], chain_b[width];
#pragma GCC unroll 4
  for (int j = 0; j < width; ++j) {
    if (u.w == nullptr) w[j] = splat<C>(1);
    else if constexpr (Partial) w[j] = Cells<C, C>::load_n(u.w + c, k, C(0));
    else w[j] = Cells<C, C>::load(u.w + c + j * L);
    sum_w[j] = sum_b[j] = splat<C>(0);
  }
  const int64_t pitch = u.pitch;
  const T *dy = u.dy + c, *x = u.x + c;
  T* dx = Dx ? u.dx + c : nullptr;
  const auto row = [&](int i) __attribute__((always_inline)) {
    if (fetches) fetch_lines<next_share<Dx>(fetched), 2>(dy + next), fetch_lines<next_share<Dx>(fetched), 2>(x + next);
    const V hi = splat<C>(u.k.hi[i]), rs = splat<C>(u.k.rs[i]), t = splat<C>(u.k.t[i]), a = splat<C>(u.k.a[i]),
            b = splat<C>(u.k.b[i]);
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) {
      V d, v;
      if constexpr (Partial) {
        d = Cells<C, T>::load_n(dy, k, C(0));
        v = Cells<C, T>::load_n(x, k, u.k.hi[i]);
      } else {
        d = Cells<C, T>::load(dy + j * L);
        v = Cells<C, T>::load(x + j * L);
      }
      if constexpr (Center) v = fma(v - hi, rs, t);
      else v = v * rs;
      if constexpr (Dx) {
        const V out = fma(d * w[j], rs, fma(v, a, b));
        if constexpr (Partial) Cells<C, T>::store_n(dx, out, k);
        else put<Stream, C>(dx + j * L, out);
      }
      chain_w[j] = fma(d, v, chain_w[j]);
      chain_b[j] = chain_b[j] + d;
    }
    dy += pitch, x += pitch;
    if constexpr (Dx) dx += pitch;
  };
  for (int i = 0; i < u.rows; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) chain_w[j] = chain_b[j] = splat<C>(0);
    if (i + 4 <= u.rows) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) row(i + r);
    } else {
      for (int r = i; r < u.rows; ++r) row(r);
    }
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) sum_w[j] = sum_w[j] + chain_w[j], sum_b[j] = sum_b[j] + chain_b[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < width; ++j) finish_columns<T, Stream>(f, u, c + j * L, sum_w[j], sum_b[j], Partial ? k : int(L));
}

// Registers decide how many vectors go down the rows together; the bits do not depend on it.
#if defined(__AVX512F__)
constexpr int step_width = 4;
#else
constexpr int step_width = 1;
#endif

template <class T, bool Center, bool Stream, bool Dx, bool Fetch>
__attribute__((noinline)) void columns_steps(const Backward<T>& f, const Group<T>& u) {
  using C = typename TypeOf<T>::compute;
  constexpr int64_t L = Lanes<C>::n;
  const WholeLines<C, Stream, T> lines(u.dx, f.n);
  int64_t c = 0;
  const auto store_until = [&](int64_t to) __attribute__((always_inline)) {
    for (int64_t k; c < to; c += k) {
      k = to - c < L ? to - c : L;
      columns_step<T, 1, Center, false, Dx, Fetch, true>(f, u, c, int(k));
    }
  };
  if constexpr (Stream) store_until(lines.before);
  for (; c + step_width * L <= lines.end; c += step_width * L)
    columns_step<T, step_width, Center, Stream, Dx, Fetch, false>(f, u, c, 0);
  for (; c < lines.end; c += L) columns_step<T, 1, Center, Stream, Dx, Fetch, false>(f, u, c, 0);
  store_until(f.n);
}

// Step two of long rows: R of them at a time, along a strip of columns, with the sums of the chains in the first-level
// cache. Column by column, four rows would be twelve places in memory at once, which rows a multiple of a page long put
// into the same few lines of the cache. `starts`: these rows start a chain; `ends`: they are its last.
constexpr int64_t strip_columns = 512;
template <class C> struct Strip {
  C chains_w[strip_columns], chains_b[strip_columns], sums_w[strip_columns], sums_b[strip_columns];
};
template <class T, int R, bool Center, bool Stream, bool Dx>
__attribute__((noinline)) void strip_rows(const Backward<T>& f, const Group<T>& u, int i, int64_t begin, int64_t end,
                                          bool starts, bool ends, Strip<typename TypeOf<T>::compute>& strip) {
  using C = typename TypeOf<T>::compute;
  using V = Vec<C>;
  using P = Cells<C, C>;
  constexpr int64_t L = Lanes<C>::n;
  const int64_t pitch = u.pitch;
  const T *dy = u.dy + i * pitch, *x = u.x + i * pitch;
  T* dx = Dx ? u.dx + (i - u.dx_row) * pitch : nullptr;
  const C* w = u.w;
  C *sums_w = strip.sums_w, *sums_b = strip.sums_b;
  if (u.sums_w != nullptr) sums_w = u.sums_w + begin, sums_b = u.sums_b + begin;
  // Not one structure of five vectors for each row, shared with columns_step: that took 6 to 11 % longer.
  V hi[R], rs[R], t[R], a[R], b[R];
  for (int r = 0; r < R; ++r)
    hi[r] = splat<C>(u.k.hi[i + r]), rs[r] = splat<C>(u.k.rs[i + r]), t[r] = splat<C>(u.k.t[i + r]),
    a[r] = splat<C>(u.k.a[i + r]), b[r] = splat<C>(u.k.b[i + r]);
  // The vector of columns from c on; not `whole`: k of them. Beside it, what belongs to `fetched` cells is fetched.
  const auto step = [&](int64_t c, auto whole, int k, auto fetched) __attribute__((always_inline)) {
    V weight = splat<C>(1), chain_w = splat<C>(0), chain_b = chain_w;
    if (Dx && w != nullptr) weight = whole ? P::load(w + c) : P::load_n(w + c, k, C(0));
    const auto get = [=](const C* p) { return whole ? P::load(p + (c - begin)) : P::load_n(p + (c - begin), k, C(0)); };
    const auto set = [=](C* p, V v) { whole ? P::store(p + (c - begin), v) : P::store_n(p + (c - begin), v, k); };
    if (!starts) chain_w = get(strip.chains_w), chain_b = get(strip.chains_b);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * pitch + c;
      if constexpr (fetched != 0) {
        constexpr int64_t share = next_share<Dx>(fetched);
        fetch_lines<share, 2>(dy + at + next_at<Dx>(f, c)), fetch_lines<share, 2>(x + at + next_at<Dx>(f, c));
      }
      const V d = whole ? Cells<C, T>::load(dy + at) : Cells<C, T>::load_n(dy + at, k, C(0));
      V v = whole ? Cells<C, T>::load(x + at) : Cells<C, T>::load_n(x + at, k, u.k.hi[i + r]);
      if constexpr (Center) v = fma(v - hi[r], rs[r], t[r]);
      else v = v * rs[r];
      if constexpr (Dx) {
        const V out = fma(d * weight, rs[r], fma(v, a[r], b[r]));
        if constexpr (whole) put<Stream, C>(dx + at, out);
        else Cells<C, T>::store_n(dx + at, out, k);
      }
      chain_w = fma(d, v, chain_w), chain_b = chain_b + d;
    }
    if (ends) set(sums_w, get(sums_w) + chain_w), set(sums_b, get(sums_b) + chain_b);
    else set(strip.chains_w, chain_w), set(strip.chains_b, chain_b);
  };
  constexpr std::integral_constant<int64_t, 0> none{};
  constexpr std::integral_constant<int64_t, 2 * L> two{};
  const WholeLines<C, Stream, T> lines(Stream ? dx + begin : nullptr, end - begin);
  int64_t c = begin;
  const auto store_until = [&](int64_t to) __attribute__((always_inline)) {
    for (int64_t k; c < to; c += k) k = to - c < L ? to - c : L, step(c, std::false_type{}, int(k), none);
  };
  if constexpr (Stream) store_until(begin + lines.before);
  const int64_t last = begin + lines.end;
  if (f.next != 0)
    for (; c < last; c += 2 * L) {
      step(c, std::true_type{}, int(L), two);
      if (c + L < last) step(c + L, std::true_type{}, int(L), none);
    }
  for (; c < last; c += L) step(c, std::true_type{}, int(L), none);
  c = last;
  store_until(end);
  if (f.next != 0 && end == f.n)  // the last line, which no half of a vector may have been on
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * pitch + f.next + f.n - 1;
      fetch_lines<1, 2>(dy + at), fetch_lines<1, 2>(x + at);
    }
}

// The columns [begin, end) of rows [i0, i1); i0 is a multiple of four.
template <class T, bool Center, bool Stream, bool Dx>
__attribute__((noinline)) void strips(const Backward<T>& f, const Group<T>& u, int i0, int i1, int64_t begin,
                                      int64_t end) {
  using C = typename TypeOf<T>::compute;
  constexpr int64_t L = Lanes<C>::n;
  constexpr int R = 2;
  Strip<C> strip;
  for (int64_t from = begin, to; from < end; from = to) {
    // Where dx does not begin on a cache line, strips do nevertheless.
    to = from + strip_columns - (from == begin ? u.past_line : 0);
    if (to > end) to = end;
    C *sums_w = strip.sums_w, *sums_b = strip.sums_b;
    if (u.sums_w != nullptr) sums_w = u.sums_w + from, sums_b = u.sums_b + from;
    if (i0 == 0) {
      const size_t bytes = size_t(to - from) * sizeof(C);
      std::memset(sums_w, 0, bytes), std::memset(sums_b, 0, bytes);
    }
    for (int i = i0; i < i1;) {
      const int chain_end = i / 4 * 4 + 4 < i1 ? i / 4 * 4 + 4 : i1;
      const auto some =
          i + R <= chain_end ? strip_rows<T, R, Center, Stream, Dx> : strip_rows<T, 1, Center, Stream, Dx>;
      const int rows = i + R <= chain_end ? R : 1;
      some(f, u, i, from, to, i % 4 == 0, i + rows == chain_end, strip);
      i += rows;
    }
    if (i1 < u.rows) continue;
    int64_t c = 0;
    for (; c + L <= to - from; c += L)
      finish_columns<T, Stream>(f, u, from + c, Cells<C, C>::load(sums_w + c), Cells<C, C>::load(sums_b + c), int(L));
    if (const int k = int(to - from - c); k > 0)
      finish_columns<T, Stream>(f, u, from + c, Cells<C, C>::load_n(sums_w + c, k, C(0)),
                                Cells<C, C>::load_n(sums_b + c, k, C(0)), k);
  }
}

// Step two, for the columns [begin, end) of rows [i0, i1); of short rows always all. Whoever calls this for the last
// time fences the streaming stores, not each call: after a few rows it would wait longer than they take.
template <class T, bool Center>
__attribute__((noinline)) void columns_range(const Backward<T>& f, const Group<T>& u, int i0, int i1, int64_t begin,
                                             int64_t end) {
  if (!f.short_rows) {
    const auto steps = f.a.dx == nullptr ? strips<T, Center, false, false>
                       : f.streaming     ? strips<T, Center, true, true>
                                         : strips<T, Center, false, true>;
    return steps(f, u, i0, i1, begin, end);
  }
  const auto steps = f.next != 0 ? (f.a.dx == nullptr ? columns_steps<T, Center, false, false, true>
                                    : f.streaming     ? columns_steps<T, Center, true, true, true>
                                                      : columns_steps<T, Center, false, true, true>)
                                 : (f.a.dx == nullptr ? columns_steps<T, Center, false, false, false>
                                    : f.streaming     ? columns_steps<T, Center, true, true, false>
                                                      : columns_steps<T, Center, false, true, false>);
  steps(f, u);
}

}  // namespace
}  // namespace nf
