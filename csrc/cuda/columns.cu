// SPDX-License-Identifier: BSD-3-Clause
// Reductions over cells that lie apart: batch and instance norm channels last, batch norm of (N, C), group norm
// channels last with few channels to a group, layer and RMS norm over a middle axis. Where the cells of a reduction
// form runs, it is left to rows.cu, which reads x once.
//
//   forward    partial moments of slices of the rows; their merger; y = (x - mean)*rstd*weight + bias (affine.cu)
//   traffic    x is read twice, the second time from the L2 cache if it fits there; y is written once: 2 to 3 s bytes
//
// A thread keeps its columns and takes eight rows at a time: their mean and the squares about it in float32, which are
// merged (Chan et al.) in double. No sum of squares is ever taken about a far point.
#include "maps.cuh"
#include "runs.cuh"

namespace nf::cuda {
namespace {

// The first two moments of some cells of a column, the mean relative to the column's first cell. Without mean (RMS
// norm) `squares` is about zero.
struct Partial {
  double mean, squares;
};
struct Merged {
  double n, mean, squares;
  __device__ __forceinline__ void add(double n2, double mean2, double squares2, bool center) {
    if (n2 == 0) return;
    const double all = n + n2, apart = mean2 - mean;
    if (center) {
      mean += apart * (n2 / all);
      squares += squares2 + apart * apart * (n * n2 / all);
    } else {
      squares += squares2;
    }
    n = all;
  }
};

constexpr int group_rows = 8;

template <class T> struct Forward {
  Columns g;
  const T* x;
  Partial* partial;  // [matrix][slice][column]
  int64_t width, tiles, slice;
  int lanes;
  bool aligned, center;
  Divider by_tiles, by_span;
};

// Some rows of one column of cells: mean and squares, in C, or in double where float32 cannot hold the squares.
template <class C> __device__ __forceinline__ Partial group_moments(const C (&d)[group_rows], int rows, bool center) {
  Partial t{0, 0};
  C s = C(0);
#pragma unroll
  for (int i = 0; i < group_rows; ++i) s += i < rows ? d[i] : C(0);
  const C mean = center ? s / C(rows) : C(0);
  C rest = C(0), q = C(0);
#pragma unroll
  for (int i = 0; i < group_rows; ++i) {
    const C e = i < rows ? d[i] - mean : C(0);
    rest += e, q = fused(e, e, q);
  }
  if (!center) return {0, double(q)};
  const double off = double(rest) / double(rows);  // what rounding left of the mean
  t.mean = double(mean) + off;
  t.squares = double(q) - off * double(rest);
  return t;
}

template <class T>
__global__ void __launch_bounds__(map_threads, 1) slice_moments(const __grid_constant__ Forward<T> f) {
  using C = Compute<T>;
  constexpr int V = vector_cells<T>;
  const int lane = int(threadIdx.x) % f.lanes, y = int(threadIdx.x) / f.lanes, rows = int(blockDim.x) / f.lanes;
  const int64_t b = f.by_tiles.divide(blockIdx.x), tile = blockIdx.x - b * f.tiles;
  const int64_t column = (tile * f.lanes + lane) * V;
  const int k = column >= f.width ? 0 : f.width - column < V ? int(f.width - column) : V;
  const T* x = f.x + b * f.g.outer * f.width + column;
  const int64_t from = blockIdx.y * f.slice, past = from + f.slice, to = past < f.g.outer ? past : f.g.outer;
  C first[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    first[j] = C(0);
    // The first cell of the statistic: its columns are merged with each other later.
    if (f.center && j < k) first[j] = C(widen(load1(x - column + f.by_span.divide(column + j) * f.g.span)));
  }
  Partial* place = reinterpret_cast<Partial*>(shared_memory());  // [cell][part][lane]
  for (int part = y; part < sum_parts; part += rows) {
    Merged total[V];
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] = {0, 0, 0};
    for (int64_t o0 = from + part; o0 < to && k > 0; o0 += group_rows * sum_parts) {
      const int64_t left = (to - o0 + sum_parts - 1) / sum_parts;
      const int count = left < group_rows ? int(left) : group_rows;
      Bits16 bits[group_rows];
#pragma unroll
      for (int i = 0; i < group_rows; ++i) {
        bits[i] = Bits16{};
        if (i < count) bits[i] = load_cells(x + (o0 + int64_t(i) * sum_parts) * f.width, k, f.aligned);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        C d[group_rows];
#pragma unroll
        for (int i = 0; i < group_rows; ++i) {
          C v[V];
          unpack<T>(bits[i], v);
          d[i] = v[j] - first[j];
        }
        Partial t = group_moments(d, count, f.center);
        if (sizeof(C) == 4 && !(t.squares >= 0x1p-90 && t.squares <= 0x1p+100)) {
          double wide[group_rows];
#pragma unroll
          for (int i = 0; i < group_rows; ++i) {
            C v[V];
            unpack<T>(bits[i], v);
            wide[i] = double(v[j]) - double(first[j]);
          }
          t = group_moments(wide, count, f.center);
        }
        total[j].add(double(count), t.mean, t.squares, f.center);
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) place[(j * sum_parts + part) * f.lanes + lane] = {total[j].mean, total[j].squares};
  }
  __syncthreads();
  // The parts of each column, in order.
  for (int index = int(threadIdx.x); index < f.lanes * V; index += int(blockDim.x)) {
    const int at = index / V, j = index % V;
    const int64_t c = (tile * f.lanes + at) * V + j;
    if (c >= f.width) continue;
    Merged all{0, 0, 0};
    for (int part = 0; part < sum_parts; ++part) {
      const int64_t o = from + part, count = o < to ? (to - o + sum_parts - 1) / sum_parts : 0;
      const Partial t = place[(j * sum_parts + part) * f.lanes + at];
      all.add(double(count), t.mean, t.squares, f.center);
    }
    f.partial[(b * gridDim.y + blockIdx.y) * f.width + c] = {all.mean, all.squares};
  }
}

template <class T> struct Finish {
  Columns g;
  const T* x;
  const Partial* partial;
  Statistic* table;
  void *mean, *rstd;
  Running running;
  double eps;
  int64_t width, slices, slice;
  bool center;
};

template <class T>
__global__ void __launch_bounds__(finish_threads) finish_moments(const __grid_constant__ Finish<T> f) {
  const int at = int(threadIdx.x) % finish_columns, y = int(threadIdx.x) / finish_columns;
  const int64_t i = int64_t(blockIdx.x) * finish_columns + at;
  const int64_t b = i / f.g.channels, c = i % f.g.channels;
  Merged all{0, 0, 0};
  if (i < f.g.batch * f.g.channels)
    for (int64_t s = y; s < f.slices; s += sum_parts) {
      const int64_t from = s * f.slice, to = from + f.slice < f.g.outer ? from + f.slice : f.g.outer;
      for (int64_t j = 0; j < f.g.span; ++j) {
        const Partial t = f.partial[(b * f.slices + s) * f.width + c * f.g.span + j];
        all.add(double(to - from), t.mean, t.squares, f.center);
      }
    }
  Merged* place = reinterpret_cast<Merged*>(shared_memory());
  place[threadIdx.x] = all;
  __syncthreads();
  if (y != 0 || i >= f.g.batch * f.g.channels) return;
  for (int part = 1; part < sum_parts; ++part) {
    const Merged t = place[part * finish_columns + at];
    all.add(t.n, t.mean, t.squares, f.center);
  }
  Exact mean{0, 0};
  if (f.center) mean = two_sum(double(widen(load1(f.x + b * f.g.outer * f.width + c * f.g.span))), all.mean);
  const double var = all.squares / all.n, rstd = rstd_of(var, f.eps);
  f.table[i] = {mean.sum, mean.error, var, rstd};
  write_stat<T>(f.mean, i, mean.sum), write_stat<T>(f.rstd, i, rstd);
  if (f.running.mean.p == nullptr) return;
  const Given old_mean{f.running.mean.p, f.running.mean.type}, old_var{f.running.var.p, f.running.var.type};
  put(f.running.mean, i, running_average(param<double>(old_mean, i), mean.sum, f.running.weight));
  put(f.running.var, i,
      running_average(param<double>(old_var, i), sample_variance(not_negative(var), all.n, f.running.ddof),
                      f.running.weight));
}

bool as_runs(const Columns& g, DType type, bool center) {
  const int64_t bytes = g.span * (type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2);
  const bool known = g.param_span == 1 || g.param_span == g.span;  // see runs_of
  return center && known && g.span > 1 && bytes >= 32;
}

template <class T> size_t table_bytes(const Columns& g) {
  return (size_t(g.batch * g.channels) * sizeof(Statistic) + 255) / 256 * 256;
}

template <class T> int forward(const ColumnsForward& a) {
  constexpr int V = vector_cells<T>;
  const Columns& g = a.g;
  const SumCut<T> cut(g);
  Statistic* table = static_cast<Statistic*>(a.work);
  Partial* partial = reinterpret_cast<Partial*>(static_cast<char*>(a.work) + table_bytes<T>(g));
  const Forward<T> f{g,
                     static_cast<const T*>(a.x),
                     partial,
                     cut.width,
                     cut.tiles,
                     cut.slice,
                     cut.lanes,
                     aligned16(a.x) && cut.width % V == 0,
                     a.center,
                     Divider(cut.tiles, g.batch * cut.tiles),
                     Divider(g.span, cut.width)};
  int error = launch(slice_moments<T>,
                     Shape{dim3(unsigned(g.batch * cut.tiles), unsigned(cut.slices)), cut.threads, 1,
                           size_t(V * sum_parts * cut.lanes) * sizeof(Partial), a.stream},
                     f);
  if (error != 0) return error;
  const Finish<T> last{g,         f.x,   partial,   table,      a.mean,    a.rstd,
                       a.running, a.eps, cut.width, cut.slices, cut.slice, a.center};
  error = launch(finish_moments<T>,
                 Shape{dim3(unsigned(ceil_div(g.batch * g.channels, finish_columns))), finish_threads, 1,
                       finish_threads * sizeof(Merged), a.stream},
                 last);
  if (error != 0) return error;
  return map_forward({g, a.type, a.x, a.y, a.weight, a.bias, table, {}, {}, nullptr, nullptr, a.eps, a.stream});
}

bool empty(const Columns& g) { return g.batch * g.outer * g.channels * g.span == 0; }

}  // namespace

size_t columns_forward_workspace(const ColumnsForward& a) {
  if (empty(a.g) || as_runs(a.g, a.type, a.center)) return 0;
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    const SumCut<T> cut(a.g);
    return table_bytes<T>(a.g) + size_t(a.g.batch * cut.slices * cut.width) * sizeof(Partial);
  });
}

int columns_forward(const ColumnsForward& a) {
  if (empty(a.g)) return 0;
  if (as_runs(a.g, a.type, a.center))
    return runs_forward(
        {runs_of(a.g), a.type, a.x, a.y, a.weight, a.bias, a.mean, a.rstd, a.running, a.eps, a.center, a.stream});
  return with_type(a.type, [&](auto t) { return forward<decltype(t)>(a); });
}

}  // namespace nf::cuda
