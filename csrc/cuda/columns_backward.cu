// SPDX-License-Identifier: BSD-3-Clause
// Reductions over cells that lie apart (see columns.cu), backward. With g = dy*weight, xhat = (x - mean)*rstd and
// averages over the n cells of a statistic:
//
//   dx = rstd*(g - mean(g) - xhat*mean(g*xhat));   dweight = sum(dy*xhat), dbias = sum(dy)
//   traffic    dy and x are read twice, the second time from the L2 cache if they fit there; dx is written once
//
// Sums of slices of the rows, their total per column and per statistic, the map, and the total per parameter. Where the
// parameters go along the rows (layer norm over a middle axis), the map sums dy and dy*xhat of each row besides.
#include "maps.cuh"
#include "runs.cuh"

namespace nf::cuda {
namespace {

constexpr int group_rows = 4;

template <class T> struct Sums {
  Columns g;
  const T *dy, *x;
  Given mean, rstd, weight;
  Two* partial;  // [matrix][slice][column]
  int64_t width, tiles, slice;
  int lanes;
  bool aligned;
  Divider by_tiles, by_span;
};

// The shift of the sums of dy*(x - shift), and what it leaves of the mean.
template <class C> __device__ __forceinline__ C shift_of(double mean, double rstd) {
  return slope_shift<C>(mean, usable(rstd));
}
__device__ __forceinline__ bool in_single(double mean, double rstd) { return fits_single_backward(mean, rstd); }

template <class T, class C>
__device__ __forceinline__ void slice_rows(const Sums<T>& f, int64_t b, int64_t column, int k, int part,
                                           Two (&total)[vector_cells<T>]) {
  constexpr int V = vector_cells<T>;
  const int64_t from = blockIdx.y * f.slice, past = from + f.slice, to = past < f.g.outer ? past : f.g.outer;
  const int64_t start = b * f.g.outer * f.width + column;
  C shift[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t i = b * f.g.channels + f.by_span.divide(j < k ? column + j : column);
    shift[j] = shift_of<C>(param_or<double>(f.mean, i, 0.0), param<double>(f.rstd, i));
  }
  for (int64_t o0 = from + part; o0 < to; o0 += group_rows * sum_parts) {
    Bits16 dy[group_rows], x[group_rows];
    C w[group_rows];
#pragma unroll
    for (int i = 0; i < group_rows; ++i) {
      const int64_t o = o0 + int64_t(i) * sum_parts;
      dy[i] = x[i] = Bits16{};
      w[i] = C(1);
      if (o >= to) continue;
      dy[i] = load_cells(f.dy + start + o * f.width, k, f.aligned);
      x[i] = load_cells(f.x + start + o * f.width, k, f.aligned);
      if (f.g.param_span == 0) w[i] = param_or<C>(f.weight, o, C(1));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      C s[group_rows], q[group_rows];
#pragma unroll
      for (int i = 0; i < group_rows; ++i) {
        C d[V], v[V];
        unpack<T>(dy[i], d);
        unpack<T>(x[i], v);
        const bool inside = o0 + int64_t(i) * sum_parts < to;
        s[i] = inside ? d[j] * w[i] : C(0);
        q[i] = inside ? s[i] * (v[j] - shift[j]) : C(0);
      }
      total[j].a += tree_sum(s), total[j].b += tree_sum(q);
    }
  }
}

template <class T> __global__ void __launch_bounds__(map_threads, 1) slice_sums(const __grid_constant__ Sums<T> f) {
  constexpr int V = vector_cells<T>;
  const int lane = int(threadIdx.x) % f.lanes, y = int(threadIdx.x) / f.lanes, rows = int(blockDim.x) / f.lanes;
  const int64_t b = f.by_tiles.divide(blockIdx.x), tile = blockIdx.x - b * f.tiles;
  const int64_t column = (tile * f.lanes + lane) * V;
  const int k = column >= f.width ? 0 : f.width - column < V ? int(f.width - column) : V;
  unsigned careful = 0;  // columns that float32 cannot hold; the others keep the bits that they have without these
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (sizeof(T) == 8 || j >= k) continue;
    const int64_t i = b * f.g.channels + f.by_span.divide(column + j);
    if (!in_single(param_or<double>(f.mean, i, 0.0), param<double>(f.rstd, i))) careful |= 1u << j;
  }
  Two* place = reinterpret_cast<Two*>(shared_memory());  // [cell][part][lane]
  for (int part = y; part < sum_parts; part += rows) {
    Two total[V];
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] = {0, 0};
    if (k > 0) slice_rows<T, Compute<T>>(f, b, column, k, part, total);
    if (sizeof(T) != 8 && careful != 0) {
      Two wide[V];
#pragma unroll
      for (int j = 0; j < V; ++j) wide[j] = {0, 0};
      slice_rows<T, double>(f, b, column, k, part, wide);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (careful >> j & 1) total[j] = wide[j];
    }
#pragma unroll
    for (int j = 0; j < V; ++j) place[(j * sum_parts + part) * f.lanes + lane] = total[j];
  }
  __syncthreads();
  for (int index = int(threadIdx.x); index < f.lanes * V; index += int(blockDim.x)) {
    const int at = index / V, j = index % V;
    const int64_t c = (tile * f.lanes + at) * V + j;
    if (c >= f.width) continue;
    Two all{0, 0};
    for (int part = 0; part < sum_parts; ++part) {
      const Two t = place[(j * sum_parts + part) * f.lanes + at];
      all.a += t.a, all.b += t.b;
    }
    f.partial[(b * gridDim.y + blockIdx.y) * f.width + c] = all;
  }
}

struct Finish {
  Columns g;
  Given mean, rstd, weight;
  const Two* partial;
  Two* column_sums;  // [matrix][column]: of dy and dy*xhat, or null
  Averages* table;   // [statistic], or null
  int64_t width, slices;
  bool center, frozen, single;
};

// A few threads for each statistic: the slices of a column, as in columns.cu, then the columns of its span.
__global__ void __launch_bounds__(finish_threads) finish_sums(const __grid_constant__ Finish f) {
  const int at = int(threadIdx.x) % finish_columns, y = int(threadIdx.x) / finish_columns;
  const int64_t i = int64_t(blockIdx.x) * finish_columns + at;
  const bool inside = i < f.g.batch * f.g.channels;
  const int64_t b = i / f.g.channels, c0 = i % f.g.channels * f.g.span;
  const double mean = inside ? param_or<double>(f.mean, i, 0.0) : 0.0, rstd = inside ? param<double>(f.rstd, i) : 1.0;
  const double n = double(f.g.outer * f.g.span);
  const bool single = f.single && in_single(mean, rstd);
  const double shift = single ? double(shift_of<float>(mean, rstd)) : shift_of<double>(mean, rstd);
  Two* place = reinterpret_cast<Two*>(shared_memory());
  Two all{0, 0};
  for (int64_t c = c0; c < c0 + f.g.span; ++c) {
    Two t{0, 0};
    if (inside)
      for (int64_t s = y; s < f.slices; s += sum_parts) {
        const Two one = f.partial[(b * f.slices + s) * f.width + c];
        t.a += one.a, t.b += one.b;
      }
    place[threadIdx.x] = t;
    __syncthreads();
    if (y == 0 && inside) {
      for (int part = 1; part < sum_parts; ++part) {
        const Two one = place[part * finish_columns + at];
        t.a += one.a, t.b += one.b;
      }
      t.b = (t.b - (mean - shift) * t.a) * usable(rstd);
      if (f.center && !f.frozen && n == 1) t.b *= 0;  // xhat is exactly 0
      if (f.column_sums != nullptr) f.column_sums[b * f.width + c] = t;
      const double w = f.g.param_span == 0 ? 1.0 : param_or<double>(f.weight, c / f.g.param_span, 1.0);
      all.a += w * t.a, all.b += w * t.b;
    }
    __syncthreads();  // before the next column's sums take their place
  }
  if (y == 0 && inside && f.table != nullptr) f.table[i] = {f.center ? all.a / n : 0.0, all.b / n};
}

// A warp for each parameter: sums[(i*rows + p*each + j)] over i < count and j < each, in order.
struct Totals {
  const Two* sums;
  int64_t params, each, row, count;
  Wanted dweight, dbias;
};
__global__ void __launch_bounds__(256) total_sums(const __grid_constant__ Totals f) {
  const int64_t p = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (p >= f.params) return;
  Two t{0, 0};
  for (int64_t i = threadIdx.x % 32; i < f.count * f.each; i += 32) {
    const Two one = f.sums[i / f.each * f.row + p * f.each + i % f.each];
    t.a += one.a, t.b += one.b;
  }
  t = {lane_sum(t.a, 32), lane_sum(t.b, 32)};
  if (threadIdx.x % 32 != 0) return;
  if (f.dweight.p != nullptr) put(f.dweight, p, t.b);
  if (f.dbias.p != nullptr) put(f.dbias, p, t.a);
}

template <class T> struct BackwardStats {
  Given mean, rstd, weight;
  const Averages* table;  // null: no gradient through the statistics
  bool alone;             // one cell to a statistic: its output does not depend on it

  template <class C> struct Coefficients {
    C hi, p, q, t, rs, shift;
    __device__ __forceinline__ C xhat(C x) const { return fused(x - hi, rs, shift); }
  };
  template <class C> __device__ __forceinline__ Coefficients<C> at(int64_t i, int64_t p, bool along_rows) const {
    const double m = param_or<double>(mean, i, 0.0), r = param<double>(rstd, i);
    const Averages a = table != nullptr ? table[i] : Averages{0, 0};
    Gradient<C> k = gradient<C>(m, r, along_rows ? 1.0 : param_or<double>(weight, p, 1.0), a.g, a.g_xhat);
    Hat<C> h = hat<C>(m, 0, 0, r);
    if (alone) k.p = k.q = k.t = h.rs = h.t = C(0);
    return {k.hi, k.p, k.q, k.t, h.rs, h.t};
  }
  __device__ __forceinline__ bool fits(int64_t i) const {
    return in_single(param_or<double>(mean, i, 0.0), param<double>(rstd, i));
  }
  template <class C> __device__ __forceinline__ C apply(C x, C dy, const Coefficients<C>& k) const {
    return table != nullptr ? fused(dy, k.p, fused(x - k.hi, k.q, k.t)) : dy * k.p;
  }
  __device__ __forceinline__ void write(int64_t) const {}
};

bool wants_params(const ColumnsBackward& a) { return a.dweight.p != nullptr || a.dbias.p != nullptr; }

// A block takes a statistic's runs of cells. Not where a run holds several parameters whose gradients are wanted.
bool as_runs(const ColumnsBackward& a) {
  const int64_t bytes = a.g.span * (a.type == DType::f64 ? 8 : a.type == DType::f32 ? 4 : 2);
  return a.center && a.g.span > 1 && bytes >= 32 &&
         (a.g.param_span == a.g.span || (a.g.param_span == 1 && !wants_params(a)));
}
RunsBackward runs_call(const ColumnsBackward& a) {
  return {runs_of(a.g), a.type,    a.dy,    a.x,      a.mean,   a.rstd, a.weight,
          a.dx,         a.dweight, a.dbias, a.center, a.frozen, a.work, a.stream};
}

template <class T> struct Plan {
  SumCut<T> cut;
  bool along_rows, sums;
  size_t table, partial, params;  // bytes of each part of the workspace

  explicit Plan(const ColumnsBackward& a)
      : cut(a.g), along_rows(a.g.param_span == 0), sums(false), table(0), partial(0), params(0) {
    const auto whole = [](int64_t count, size_t size) { return (size_t(count) * size + 255) / 256 * 256; };
    sums = (a.dx != nullptr && !a.frozen) || (wants_params(a) && !along_rows);
    if (sums) {
      table = whole(a.g.batch * a.g.channels, sizeof(Averages));
      partial = whole(a.g.batch * cut.slices * cut.width, sizeof(Two));
    }
    if (wants_params(a))
      params = along_rows ? whole(a.g.batch * MatrixCut<T>(a.g, 16, 65535).tiles * a.g.outer, sizeof(Two))
                          : whole(a.g.batch * cut.width, sizeof(Two));
  }
};

template <class T> int backward(const ColumnsBackward& a) {
  constexpr int V = vector_cells<T>;
  const Columns& g = a.g;
  const Plan<T> plan(a);
  char* work = static_cast<char*>(a.work);
  Averages* table = reinterpret_cast<Averages*>(work);
  Two* partial = reinterpret_cast<Two*>(work + plan.table);
  Two* params = wants_params(a) ? reinterpret_cast<Two*>(work + plan.table + plan.partial) : nullptr;
  const bool cells = g.batch * g.outer * plan.cut.width > 0;
  int error = 0;
  if (cells && plan.sums) {
    const Sums<T> f{g,
                    static_cast<const T*>(a.dy),
                    static_cast<const T*>(a.x),
                    a.mean,
                    a.rstd,
                    a.weight,
                    partial,
                    plan.cut.width,
                    plan.cut.tiles,
                    plan.cut.slice,
                    plan.cut.lanes,
                    aligned16(a.dy) && aligned16(a.x) && plan.cut.width % V == 0,
                    Divider(plan.cut.tiles, g.batch * plan.cut.tiles),
                    Divider(g.span, plan.cut.width)};
    error = launch(slice_sums<T>,
                   Shape{dim3(unsigned(g.batch * plan.cut.tiles), unsigned(plan.cut.slices)), plan.cut.threads, 1,
                         size_t(V * sum_parts * plan.cut.lanes) * sizeof(Two), a.stream},
                   f);
    if (error != 0) return error;
    const Finish last{g,     a.mean,         a.rstd,          a.weight, partial,  plan.along_rows ? nullptr : params,
                      table, plan.cut.width, plan.cut.slices, a.center, a.frozen, sizeof(T) != 8};
    error = launch(finish_sums,
                   Shape{dim3(unsigned(ceil_div(g.batch * g.channels, finish_columns))), finish_threads, 1,
                         finish_threads * sizeof(Two), a.stream},
                   last);
    if (error != 0) return error;
  }
  Two* row_sums = plan.along_rows ? params : nullptr;
  if (cells && (a.dx != nullptr || row_sums != nullptr)) {
    const BackwardStats<T> stats{a.mean, a.rstd, a.weight, a.frozen ? nullptr : table,
                                 a.center && !a.frozen && g.outer * g.span == 1};
    // Without dx the table is not made, and not asked for either: only xhat is.
    BackwardStats<T> only_xhat = stats;
    if (!plan.sums) only_xhat.table = nullptr;
    error = launch_map<T, BackwardStats<T>, true>(g, only_xhat, a.x, a.dy, a.dx, a.weight, {}, a.stream, row_sums);
    if (error != 0) return error;
  }
  if (!wants_params(a)) return 0;  // without cells they are zero, and no workspace was asked for
  Totals t{params, 0, 1, 0, 0, a.dweight, a.dbias};
  if (plan.along_rows) {
    t.params = t.row = g.outer;
    t.count = cells ? g.batch * MatrixCut<T>(g, 16, 65535).tiles : 0;
  } else {
    t.each = g.param_span, t.row = plan.cut.width;
    t.params = g.param_span == g.span ? g.channels : plan.cut.width / g.param_span;
    t.count = cells ? g.batch : 0;
  }
  return launch(total_sums, Shape{dim3(unsigned(ceil_div(t.params, 8))), 256, 1, 0, a.stream}, t);
}

}  // namespace

size_t columns_backward_workspace(const ColumnsBackward& a) {
  if (as_runs(a)) return runs_backward_workspace(runs_call(a));
  return with_type(a.type, [&](auto t) {
    const Plan<decltype(t)> plan(a);
    return plan.table + plan.partial + plan.params;
  });
}

int columns_backward(const ColumnsBackward& a) {
  if (as_runs(a)) return runs_backward(runs_call(a));
  return with_type(a.type, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace nf::cuda
