// SPDX-License-Identifier: BSD-3-Clause
// Rows, backward. With g = dy*weight, xhat = (x - mean)*rstd and averages over the row:
//
//   dx = rstd*(g - mean(g) - xhat*mean(g*xhat));   dweight = sum(dy*xhat), dbias = sum(dy) over the rows
//
//   traffic    dy and x are read from memory once and again from the cache, dx is written once: 3 s bytes per cell
//
// Two forms. Where every cell has its own weight (layer, RMS norm), sixteen rows at a time: first the two sums of each
// row, then, column by column down the sixteen rows, dx and the column's share of dweight and dbias, so that weight and
// both gradients stay in registers. Where a channel covers a run of cells (group, instance norm), the two sums of each
// run give everything else.
//
// dweight and dbias: four rows are added in a chain, four chains to a group of sixteen rows, groups in double within a
// block of rows, blocks in order. Which rows form a block depends on the shape alone.
#include "row_steps.h"
#include "threads.h"

namespace nf {
namespace {

template <class T> NF_INLINE int64_t padded(int64_t n) {
  constexpr int64_t L = Lanes<typename TypeOf<T>::compute>::n;
  return (n + L - 1) / L * L;
}

// Whole lines for each thread.
template <class T> NF_INLINE int64_t staged_cells(const Backward<T>& f) { return (f.at_once * f.n + 63) / 64 * 64; }

// Rows of so many bytes stream dx wherever it begins; shorter ones only from the start of a cache line.
constexpr int64_t least_off_lines = 256;

// Does the array start on a cache line? (One that nobody wants, null, counts as if it did.)
NF_INLINE bool on_lines(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <class T>
NF_INLINE void fill_group(const Backward<T>& f, Group<T>& u, int64_t phase, int64_t block, int64_t first, int64_t end,
                          int slot) {
  u.rows = int(end - first < group_rows ? end - first : group_rows);
  u.first = first * f.g.period + phase, u.step = f.g.period, u.pitch = f.g.period * f.n;
  u.dy = static_cast<const T*>(f.a.dy) + u.first * f.n;
  u.x = static_cast<const T*>(f.a.x) + u.first * f.n;
  u.dx = f.a.dx != nullptr ? static_cast<T*>(f.a.dx) + u.first * f.n : nullptr;
  const int64_t width = padded<T>(f.n);
  u.w = f.w != nullptr ? f.w + phase * f.n : nullptr;
  u.dweight = u.dbias = nullptr;
  if (f.block_sums != nullptr) {
    u.dweight = f.block_sums + (phase * f.blocks + block) * 2 * width;
    u.dbias = u.dweight + width;
  }
  u.dx_row = 0;
  u.past_line = f.streaming ? cells_past_line(u.dx) : 0;
  u.stream_gradients = u.past_line == 0 && on_lines(f.a.dweight) && on_lines(f.a.dbias);
  u.sums_w = f.group_sums != nullptr ? f.group_sums + slot * 2 * width : nullptr;
  u.sums_b = f.group_sums != nullptr ? u.sums_w + width : nullptr;
}

template <class T>
NF_INLINE void restore_extreme(const Backward<T>& f, const Group<T>& u, int i0, int i1, const T* saved) {
  if (f.a.dx == nullptr) return;
  for (int i = i0; i < i1; ++i)
    if (!fits_single_backward(mean_of(f, u.first + i * u.step), rstd_of_row(f, u.first + i * u.step)))
      std::memcpy(u.dx + (i - u.dx_row) * u.pitch, saved + i * f.n, size_t(f.n) * sizeof(T));
}

// A whole group of short rows.
template <class T, bool Center> __attribute__((noinline)) void extreme_group(const Backward<T>& f, Group<T>& u) {
  Backward<T> careful = f;
  careful.extreme = true;
  T saved[group_rows * short_row_bytes / sizeof(T)];
  for (int j = 0; j < u.rows; ++j) row_sums<T, Center>(careful, u, j, saved);
  columns_range<T, Center>(careful, u, 0, u.rows, 0, f.n);
  restore_extreme(careful, u, 0, u.rows, saved);
}
template <class T, bool Center> NF_INLINE void short_group(const Backward<T>& f, Group<T>& u) {
  if (__builtin_expect(group_sums<T, Center>(f, u), 1)) columns_range<T, Center>(f, u, 0, u.rows, 0, f.n);
  else extreme_group<T, Center>(f, u);
}

// Items are blocks; a block belongs to one thread.
template <class T, bool Center> void block_backward(void* context, int64_t begin, int64_t end, int slot) {
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  T* saved = f.saved != nullptr ? f.saved + slot * group_rows * f.n : nullptr;
  T* const staged = f.staged != nullptr ? f.staged + slot * staged_cells(f) : nullptr;
  Group<T> u;
  SharedLine<T> line;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t phase = item / f.blocks, block = item % f.blocks;
    const int64_t from = block * f.block_rows;
    const int64_t to = from + f.block_rows < f.phase_rows ? from + f.block_rows : f.phase_rows;
    for (int64_t first = from; first < to; first += group_rows) {
      fill_group(f, u, phase, block, first, to, slot);
      if (first == from) std::memset(u.dweight, 0, size_t(2 * padded<T>(f.n)) * sizeof(double));
      for (int i = 0; i < u.rows; i += f.at_once) {
        const int i1 = i + f.at_once < u.rows ? i + f.at_once : u.rows;
        if (staged != nullptr) u.dx = staged, u.dx_row = i;
        if (f.in_groups) {
          short_group<T, Center>(f, u);
        } else {
          for (int j = i; j < i1; ++j) row_sums<T, Center>(f, u, j, saved);
          columns_range<T, Center>(f, u, i, i1, 0, f.n);
          if (f.extreme) restore_extreme(f, u, i, i1, saved);
        }
        if (staged != nullptr)
          stream_cells(static_cast<T*>(f.a.dx) + (u.first + i) * f.n, staged, (i1 - i) * f.n, line);
      }
    }
  }
  line.finish();
  stream_fence(f.streaming || staged != nullptr);
}

// Few blocks of wide rows, or a single group: the threads share the rows of the first step and the columns of the
// second.
template <class T> struct Shared {
  const Backward<T>& f;
  Group<T>& u;
  int64_t width;
  int i0, i1;
};
template <class T, bool Center> void shared_sums(void* context, int64_t begin, int64_t end, int) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  for (int64_t i = begin; i < end; ++i) row_sums<T, Center>(s.f, s.u, s.i0 + int(i), s.f.saved);
}
// Columns of a piece: whole strips, a few pieces for each thread.
constexpr int64_t most_shared = 4096;
NF_INLINE int64_t shared_width(int64_t n, int threads) {
  const int64_t width = (n / (4 * threads) + strip_columns - 1) / strip_columns * strip_columns;
  return width < strip_columns ? strip_columns : width < most_shared ? width : most_shared;
}
template <class T, bool Center> void shared_columns(void* context, int64_t begin, int64_t end, int) {
  Shared<T>& s = *static_cast<Shared<T>*>(context);
  const int64_t last = end * s.width;
  columns_range<T, Center>(s.f, s.u, s.i0, s.i1, begin * s.width, last < s.f.n ? last : s.f.n);
  stream_fence(s.f.streaming);
}
template <class T, bool Center> void shared_backward(Backward<T>& f) {
  // Extreme rows add to the shared sums in the first step: one thread then.
  const int threads = f.extreme ? 1 : f.threads;
  Group<T> u;
  Shared<T> s{f, u, shared_width(f.n, threads), 0, 0};
  for (int64_t item = 0; item < f.g.period * f.blocks; ++item) {
    const int64_t phase = item / f.blocks, block = item % f.blocks;
    const int64_t from = block * f.block_rows;
    const int64_t to = from + f.block_rows < f.phase_rows ? from + f.block_rows : f.phase_rows;
    for (int64_t first = from; first < to; first += group_rows) {
      fill_group(f, u, phase, block, first, to, 0);
      if (first == from && u.dweight != nullptr) std::memset(u.dweight, 0, size_t(2 * padded<T>(f.n)) * sizeof(double));
      for (int i = 0; i < u.rows; i += f.at_once) {
        s.i0 = i, s.i1 = i + f.at_once < u.rows ? i + f.at_once : u.rows;
        parallel_for(s.i1 - s.i0, 1, shared_sums<T, Center>, &s, threads);
        parallel_for((f.n + s.width - 1) / s.width, 1, shared_columns<T, Center>, &s, threads);
        if (f.extreme) restore_extreme(f, u, s.i0, s.i1, f.saved);
      }
    }
  }
}

// dx alone: rows are independent.
template <class T, bool Center, bool Stream> void dx_rows(void* context, int64_t begin, int64_t end, int) {
  using C = typename TypeOf<T>::compute;
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  Group<T> u;
  u.rows = 1, u.dweight = u.dbias = nullptr;
  SharedLine<T> line;
  for (int64_t r = begin; r < end; ++r) {
    u.first = r, u.step = 1, u.pitch = f.n;
    u.dy = static_cast<const T*>(f.a.dy) + r * f.n;
    u.x = static_cast<const T*>(f.a.x) + r * f.n;
    u.w = f.w != nullptr ? f.w + (r % f.g.period) * f.n : nullptr;
    T* dx = static_cast<T*>(f.a.dx) + r * f.n;
    // In place is fine here: the extreme row reads each cell before it writes it.
    if (f.extreme && sizeof(C) == 4 && !fits_single_backward(mean_of(f, r), rstd_of_row(f, r))) {
      extreme_row(f, u, 0, dx);
      continue;
    }
    row_sums<T, Center>(f, u, 0, nullptr);
    const Hat<C> hat{u.k.hi[0], u.k.rs[0], u.k.t[0]};
    const Slope<C> k{u.k.a[0], u.k.b[0]};
    HalfAhead ahead;
    if (f.next != 0) ahead = {u.dy + f.next + f.n / 2, u.x + f.next + f.n / 2};
    if (u.w != nullptr)
      map_cells<C, Stream, false>(dx, f.n, ahead, HatGradientOp<C, T, Center, true>{u.dy, u.x, hat, k, u.w}, line);
    else map_cells<C, Stream, false>(dx, f.n, ahead, HatGradientOp<C, T, Center, false>{u.dy, u.x, hat, k, u.w}, line);
  }
  line.finish();
  stream_fence(Stream);
}

// The same for short rows, a group of them at a time. Of rows so short that are no whole lines, by way of the cache.
constexpr int64_t staged_row_bytes = 128;
template <class T, bool Center, bool Stream> void dx_groups(void* context, int64_t begin, int64_t end, int slot) {
  using C = typename TypeOf<T>::compute;
  constexpr int64_t L = Lanes<C>::n;
  Backward<T> f = *static_cast<const Backward<T>*>(context);
  f.extreme = true;  // for rows that go one by one: nobody has looked
  Group<T> u;
  u.rows = group_rows, u.step = 1, u.pitch = f.n, u.w = f.w, u.dweight = u.dbias = nullptr;
  SharedLine<T> line;
  const auto map_as = [&f, &u, &line](T* dx, auto weighted, auto stream, auto whole) __attribute__((always_inline)) {
    for (int i = 0; i < group_rows; ++i) {
      const Hat<C> hat{u.k.hi[i], u.k.rs[i], u.k.t[i]};
      const HatGradientOp<C, T, Center, weighted> op{u.dy + i * f.n, u.x + i * f.n, hat, {u.k.a[i], u.k.b[i]}, u.w};
      HalfAhead ahead;
      if (f.next != 0) ahead = {op.dy + f.next + f.n / 2, op.x + f.next + f.n / 2};
      if (f.n > L) map_cells<C, stream, whole>(dx + i * f.n, f.n, ahead, op, line);
      else if (f.n < L) Cells<C, T>::store_n(dx + i * f.n, op.get_n(0, int(f.n)), int(f.n));
      else put<stream, C>(dx + i * f.n, op.get(0));
    }
  };
  const auto map = [&f, &map_as, &line](T* dx, auto weighted) __attribute__((always_inline)) {
    constexpr std::true_type yes{};
    constexpr std::false_type no{};
    constexpr std::bool_constant<Stream> streams{};
    if (WholeLines<C, Stream, T>::only(dx, f.n)) return map_as(dx, weighted, streams, yes);
    if (f.n < L) return map_as(dx, weighted, no, no);
    if (!Stream || f.n * int64_t(sizeof(T)) > staged_row_bytes) return map_as(dx, weighted, streams, no);
    alignas(64) T staged[group_rows * staged_row_bytes / sizeof(T)];
    map_as(staged, weighted, no, no);
    stream_cells(dx, staged, group_rows * f.n, line);
  };
  int64_t r = begin;
  for (; r + group_rows <= end; r += group_rows) {
    u.first = r, u.dy = static_cast<const T*>(f.a.dy) + r * f.n, u.x = static_cast<const T*>(f.a.x) + r * f.n;
    T* dx = static_cast<T*>(f.a.dx) + r * f.n;
    if (!group_sums<T, Center>(f, u)) dx_rows<T, Center, Stream>(&f, r, r + group_rows, slot);
    else if (f.w != nullptr) map(dx, std::true_type{});
    else map(dx, std::false_type{});
  }
  line.finish();
  if (r < end) return dx_rows<T, Center, Stream>(&f, r, end, slot);
  stream_fence(Stream);
}

// Adds the blocks of each column up, in order, and folds the cells of a channel.
template <class T> void sum_blocks(const Backward<T>& f) {
  const int64_t width = padded<T>(f.n), span = f.a.g.span, channels = f.a.g.channels;
  if (span == 1) {  // in place, several columns at a time
    for (int64_t phase = 0; phase < f.g.period; ++phase) {
      double* __restrict sums = f.block_sums + phase * f.blocks * 2 * width;
      for (int64_t block = 1; block < f.blocks; ++block) {
        const double* __restrict more = sums + block * 2 * width;
        for (int64_t i = 0; i < 2 * width; ++i) sums[i] += more[i];
      }
      round_gradients(f.a.gradient_type, f.a.dweight, phase * f.n, sums, f.n);
      round_gradients(f.a.gradient_type, f.a.dbias, phase * f.n, sums + width, f.n);
    }
    return;
  }
  GradientWriter out(f.a.gradient_type, f.a.dweight, f.a.dbias);
  for (int64_t phase = 0; phase < f.g.period; ++phase)
    for (int64_t c = 0; c < channels; ++c) {
      double w = 0, b = 0;
      for (int64_t s = 0; s < span; ++s)
        for (int64_t block = 0; block < f.blocks; ++block) {
          const double* sums = f.block_sums + (phase * f.blocks + block) * 2 * width + c * span + s;
          w += sums[0], b += sums[width];
        }
      out.add(w, b);
    }
  out.flush();
}

// One group of rows and no more: its sums are the gradients, and there are no blocks.
template <class T, bool Center> bool one_group_backward(Backward<T>& f) {
  Work<typename TypeOf<T>::compute> group_sums(f.phase_rows > f.at_once ? 2 * padded<T>(f.n) : 0);
  if (group_sums.failed()) return false;
  f.group_sums = group_sums.p;
  shared_backward<T, Center>(f);
  return true;
}

template <class T, bool Center> bool backward_cells(Backward<T>& f) {
  const int64_t row_bytes = f.n * int64_t(sizeof(T));
  // Rows of one vector lost by it.
  const bool vector = f.n <= Lanes<typename TypeOf<T>::compute>::n;
  const int64_t ahead = vector ? 0 : rows_ahead(row_bytes, 2 * f.g.count * row_bytes);
  if (!f.wants_params) {
    f.next = ahead * f.n;
    const int64_t least = (int64_t(1) << 14) / row_bytes + 1, share = f.g.count / (8 * f.threads);
    const int64_t cap = (int64_t(1) << 18) / row_bytes;
    int64_t grain = share < cap ? share : cap;
    if (grain < least) grain = least;
    if (f.threads == 1) grain = f.g.count;
    const auto rows = f.in_groups ? (f.streaming ? dx_groups<T, Center, true> : dx_groups<T, Center, false>)
                                  : (f.streaming ? dx_rows<T, Center, true> : dx_rows<T, Center, false>);
    parallel_for(f.g.count, grain, rows, &f, f.threads);
    return true;
  }
  f.phase_rows = f.g.count / f.g.period;
  const int64_t share = (f.phase_rows + 31) / 32;
  f.block_rows = share < 64 ? 64 : (share + group_rows - 1) / group_rows * group_rows;
  f.blocks = (f.phase_rows + f.block_rows - 1) / f.block_rows;
  // Down the rows, what does not lie on whole lines is written otherwise: all rows alike, and little of a row.
  const bool direct = row_bytes % 64 == 0 && (on_lines(f.a.dx) || row_bytes >= least_off_lines);
  bool stages = f.streaming && !direct && f.g.period == 1;
  f.streaming = f.streaming && direct;
  // Long rows: four at once, one link of the chains, which the caches hold from the first step to the second.
  f.short_rows = row_bytes <= short_row_bytes;
  const int64_t items = f.g.period * f.blocks;
  // Threads that share a group of rows meet twice for it: only where rows are wide, or blocks too few for the threads
  // and each has enough of a group. A whole group at once, if their caches hold it.
  const int64_t group_bytes = group_rows * 2 * row_bytes;
  const bool shared = f.threads > 1 && ((f.n >= 8192 && items < 2 * f.threads) ||
                                        (items < f.threads && group_bytes >= f.threads * (int64_t(1) << 17)));
  const bool group = shared && group_bytes <= int64_t(cache_sizes().l2);
  f.at_once = f.short_rows || f.a.dx == nullptr || group ? group_rows : 4;
  f.next = (ahead + f.at_once - 1) / f.at_once * f.at_once * f.g.period * f.n;  // whole groups
  if (f.g.period == 1 && f.phase_rows <= group_rows && f.a.g.span == 1 && !f.extreme && !f.in_groups) {
    // Sums kept between parts of the group take eight bytes a column: not where that is nearly as much as x.
    if (f.phase_rows * int64_t(sizeof(T)) < 20) f.at_once = group_rows;
    if (f.phase_rows <= f.at_once) f.next = 0;  // nothing comes after
    return one_group_backward<T, Center>(f);
  }
  const int64_t width = padded<T>(f.n);
  Work<double> block_sums(items * 2 * width);
  const int64_t slots = items == 1 ? 1 : f.threads;
  Work<typename TypeOf<T>::compute> group_sums(f.at_once < group_rows ? slots * 2 * width : 0);
  Work<T> saved(f.extreme ? f.threads * group_rows * f.n : 0);
  stages = stages && !shared && 3 * f.at_once * row_bytes <= int64_t(cache_sizes().l2);
  Work<T> staged(stages ? f.threads * staged_cells(f) : 0);
  if (block_sums.failed() || group_sums.failed() || saved.failed() || staged.failed()) return false;
  f.block_sums = block_sums.p, f.group_sums = group_sums.p, f.saved = saved.p, f.staged = staged.p;
  if (shared) shared_backward<T, Center>(f);
  else parallel_for(items, f.threads == 1 ? items : 1, block_backward<T, Center>, &f, f.threads);
  sum_blocks(f);
  return true;
}

// ---- a channel is a run of cells ------------------------------------------------------------------------------------

// The sums of up to four neighbouring runs; where they are short, the folding of their lanes is shared.
template <class C, class T>
NF_INLINE void four_slopes(const T* dy, const T* x, C shift, int64_t span, int64_t some, double (&out)[8]) {
  if (some == 4 && span > Lanes<C>::n && span <= chunk_cells<C>) {
    F64 v[8];
    for (int j = 0; j < 4; ++j) {
      F64 s, q;  // in registers
      add_run<C, true>(Slopes<C, T>{dy + j * span, x + j * span, shift}, span, s, q);
      v[j] = s, v[4 + j] = q;
    }
    store(out, sum_lanes8(v));
    return;
  }
  for (int64_t j = 0; j < some; ++j) {
    const Sums s = run_sums<C>(Slopes<C, T>{dy + j * span, x + j * span, shift}, span);
    out[j] = s.s, out[4 + j] = s.q;
  }
}

template <class T, bool Stream> void run_rows(void* context, int64_t begin, int64_t end, int) {
  using C = typename TypeOf<T>::compute;
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  const int64_t channels = f.g.channels, span = f.g.span;
  SharedLine<T> line;
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(f.a.dy) + r * f.n;
    const T* x = static_cast<const T*>(f.a.x) + r * f.n;
    const double mean = mean_of(f, r), rstd = rstd_of_row(f, r), scale = usable(rstd);
    const bool single = sizeof(C) == 4 && !(f.extreme && !fits_single_backward(mean, rstd));
    const C* w = f.w != nullptr ? f.w + (r % f.g.period) * channels : nullptr;
    const double hi = double(slope_shift<C>(mean, scale)), lo = mean - hi;
    double* sums = f.run_sums + r * channels * 2;
    double s1 = 0, s2 = 0;
    for (int64_t c = 0; c < channels; c += 4) {
      const int64_t some = channels - c < 4 ? channels - c : 4;
      double t[8];  // four first sums, four second sums
      if (single || sizeof(C) == 8) {
        four_slopes<C>(dy + c * span, x + c * span, C(hi), span, some, t);
        for (int64_t j = 0; j < some; ++j) t[4 + j] -= lo * t[j];
      } else {
        for (int64_t j = 0; j < some; ++j) {
          const Sums s = run_sums<double>(Slopes<double, T>{dy + (c + j) * span, x + (c + j) * span, mean}, span);
          t[j] = s.s, t[4 + j] = s.q;
        }
      }
      for (int64_t j = 0; j < some; ++j) {
        if (f.n == 1) t[4 + j] *= 0;  // xhat is exactly 0
        double* keep = sums + 2 * (c + j);
        keep[0] = t[j], keep[1] = t[4 + j] * scale;
        const double wc = w != nullptr ? double(w[c + j]) : 1.0;
        s1 += wc * keep[0], s2 += wc * keep[1];
      }
    }
    if (f.a.dx == nullptr) continue;
    const double c1 = s1 / double(f.n), c2 = s2 / double(f.n);
    T* dx = static_cast<T*>(f.a.dx) + r * f.n;
    if (single || sizeof(C) == 8) {
      const int64_t run = w == nullptr ? f.n : span;
      // Of the coefficients, only the first depends on the weight.
      const Gradient<C> k = f.n == 1 ? Gradient<C>{} : gradient<C>(mean, rstd, 1.0, c1, c2);
      constexpr int64_t some = 64;  // runs whose coefficients are computed together
      C his[some], p[some], q[some], t[some];
      for (int64_t i = 0; i < f.n; i += some * run) {
        const int64_t end = i + some * run < f.n ? i + some * run : f.n;
        const int64_t first = i / run;
        for (int64_t j = 0; i + j * run < end; ++j) {
          his[j] = k.hi, q[j] = k.q, t[j] = k.t;
          p[j] = f.n == 1 ? C(0) : C((w == nullptr ? 1.0 : double(w[first + j])) * scale);
        }
        map_runs<C, Stream>(dx + i, end - i, run, run, Ahead{}, RunGradientOp<C, T>{dy + i, x + i, his, p, q, t}, line);
      }
    } else {
      for (int64_t i = 0; i < f.n; ++i) {
        const double d = Cast<T>::get(dy[i]), xhat = (double(Cast<T>::get(x[i])) - mean) * rstd;
        dx[i] = Cast<T>::from(rstd * (d * (w != nullptr ? double(w[i / span]) : 1.0) - c1 - xhat * c2));
      }
    }
  }
  line.finish();
  stream_fence(Stream);
}

template <class T> bool backward_runs(Backward<T>& f) {
  const int64_t row_bytes = f.n * int64_t(sizeof(T));
  Work<double> sums(f.g.count * f.g.channels * 2);
  if (sums.failed()) return false;
  f.run_sums = sums.p;
  int64_t grain = (int64_t(1) << 15) / row_bytes;
  const int64_t share = f.g.count / (8 * f.threads);
  if (grain < share) grain = share < (int64_t(1) << 18) / row_bytes ? share : grain;
  if (grain < 1) grain = 1;
  if (f.threads == 1) grain = f.g.count;
  parallel_for(f.g.count, grain, f.streaming ? run_rows<T, true> : run_rows<T, false>, &f, f.threads);
  if (!f.wants_params) return true;
  const int64_t params = f.g.period * f.g.channels;
  GradientWriter out(f.a.gradient_type, f.a.dweight, f.a.dbias);
  for (int64_t p = 0; p < params; ++p) {
    double w = 0, b = 0;
    for (int64_t i = p; i < f.g.count * f.g.channels; i += params) b += f.run_sums[2 * i], w += f.run_sums[2 * i + 1];
    out.add(w, b);
  }
  out.flush();
  return true;
}

template <class T> __attribute__((noinline)) bool any_extreme_row(const Backward<T>& f) {
  using S = typename TypeOf<T>::stat;
  const S *mean = static_cast<const S*>(f.a.mean), *rstd = static_cast<const S*>(f.a.rstd);
  int extreme = 0;  // without a way out of the loops, several at a time
  if (mean != nullptr)
    for (int64_t r = 0; r < f.g.count; ++r) extreme |= !fits_single_backward(double(mean[r]), double(rstd[r]));
  else
    for (int64_t r = 0; r < f.g.count; ++r) extreme |= !fits_single_backward(0.0, double(rstd[r]));
  return extreme != 0;
}

template <class T> bool backward(const RowsBackward& a) {
  using C = typename TypeOf<T>::compute;
  Backward<T> f{a,
                a.g,
                static_cast<const C*>(a.weight),
                a.g.channels * a.g.span,
                1.0 / double(a.g.channels * a.g.span),
                a.dweight != nullptr || a.dbias != nullptr,
                false,
                false};
  f.threads = threads_for(a.g.count * a.g.channels * a.g.span * int64_t(sizeof(T)));
  const int64_t row_bytes = f.n * int64_t(sizeof(T));
  const bool by_runs = a.center && (a.g.channels == 1 || a.g.span >= 16);
  // (A single group has its own way, which needs no blocks: better for all but the shortest rows.)
  f.in_groups = !by_runs && (f.wants_params || a.g.period == 1) && a.dx != nullptr && f.n > 1 &&
                row_bytes <= short_row_bytes && (f.n <= Lanes<C>::n || a.g.count > group_rows);
  if (sizeof(C) == 4 && !f.in_groups) f.extreme = any_extreme_row(f);
  f.streaming =
      a.dx != nullptr && use_streaming(size_t(3 * a.g.count * row_bytes)) && streamable(static_cast<const T*>(a.dx));
  if (by_runs) return backward_runs(f);
  const bool expand = a.g.span > 1 && f.w != nullptr;
  Work<C> w_cells(expand ? a.g.period * f.n : 0);
  if (w_cells.failed()) return false;
  if (expand) f.w = expand_params(f.w, w_cells.p, a.g.period * a.g.channels, a.g.span);
  f.g.channels = f.n, f.g.span = 1;
  return a.center ? backward_cells<T, true>(f) : backward_cells<T, false>(f);
}

}  // namespace

void NF_NAME(fill_rows_backward)(Kernels& k) {
  k.rows_backward[int(DType::f64)] = backward<double>;
  k.rows_backward[int(DType::f32)] = backward<float>;
  k.rows_backward[int(DType::f16)] = backward<f16>;
  k.rows_backward[int(DType::bf16)] = backward<bf16>;
}

}  // namespace nf
