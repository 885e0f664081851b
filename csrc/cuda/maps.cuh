// SPDX-License-Identifier: BSD-3-Clause
// The maps that end the norms of columns.cu and batch norm in evaluation, as one kernel: a thread keeps its columns and
// goes down the rows, so that what there is one of per column is computed once.
//
//   cell (b, o, c, s) lies at ((b*outer + o)*channels + c)*span + s: column c*span + s of row o of matrix b
#pragma once

#include "warp.cuh"

namespace nf::cuda {

// What columns.cu finds of one statistic forward, and backward (averages of g and g*xhat).
struct Statistic {
  double mean, mean_lo, var, rstd;
};
struct Averages {
  double g, g_xhat;
};

struct ForwardMap {
  Columns g;
  DType type;
  const void* x;
  void* y;
  Given weight, bias;
  const Statistic* table;  // or null, and then:
  Given mean, var;
  void *mean_out, *rstd_out;
  double eps;
  Stream stream;
};
int map_forward(const ForwardMap&);

namespace {

constexpr int map_threads = 256, rows_at_once = 4;

// How a matrix is cut into blocks; by its shape and type alone.
template <class T> struct MatrixCut {
  int64_t width, tiles;
  int lanes, rows;        // threads along a row, and down
  int64_t slices, slice;  // blocks down a column, and rows of each

  MatrixCut(const Columns& g, int64_t rows_of_thread, int64_t most_slices) {
    constexpr int V = vector_cells<T>;
    width = g.channels * g.span;
    const int64_t vectors = ceil_div(width, V);
    lanes = 32;
    while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
    rows = map_threads / lanes;
    tiles = ceil_div(vectors, lanes);
    slices = ceil_div(g.outer, rows * rows_of_thread);
    if (slices > most_slices) slices = most_slices;
    if (slices < 1) slices = 1;
    slice = ceil_div(g.outer, slices);
    slices = slice > 0 ? ceil_div(g.outer, slice) : 1;
  }
};

// The sums down the columns of a matrix. Their order depends on the number of rows alone, not on how many columns lie
// side by side: rows are cut into slices, and in each slice row o belongs to the part o % sum_parts. A block has as
// many threads to a column as fit, and each of them takes its parts one after the other.
constexpr int sum_parts = 16;
template <class T> struct SumCut {
  int64_t width, tiles, slice, slices;
  int lanes, threads;

  explicit SumCut(const Columns& g) {
    constexpr int V = vector_cells<T>;
    width = g.channels * g.span;
    const int64_t vectors = ceil_div(width, V);
    lanes = 32;
    while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
    threads = lanes * sum_parts < 32 ? 32 : lanes * sum_parts > map_threads ? map_threads : lanes * sum_parts;
    tiles = ceil_div(vectors, lanes);
    const int64_t share = ceil_div(ceil_div(g.outer, 512), sum_parts) * sum_parts;
    slice = share < 128 ? 128 : share;
    slices = g.outer > 0 ? ceil_div(g.outer, slice) : 1;
  }
};

// The threads that add the slices of one statistic up: thread y takes every sum_parts-th, then they meet in order.
constexpr int finish_threads = 256, finish_columns = finish_threads / sum_parts;

template <class T, class Stats> struct MapArguments {
  Columns g;
  Stats stats;
  const T *x, *dy;
  T* out;
  Given weight, bias;  // along the rows
  Two* row_sums;       // [matrix][tile][row]: of dy and dy*xhat, or null
  int64_t width, tiles, slice;
  int lanes;
  bool aligned;
  Divider by_tiles, by_span, by_param_span;
};

// `chosen`: a bit for each column of this thread that is mapped now; `rest`: the others have been before.
template <class T, class C, bool gradient, class Stats, class K>
__device__ __forceinline__ void map_rows(const MapArguments<T, Stats>& f, int64_t b, int64_t tile, int64_t column,
                                         int k, const K (&coefficients)[vector_cells<T>], unsigned chosen, bool rest) {
  constexpr int V = vector_cells<T>;
  const int lane = int(threadIdx.x) % f.lanes, y = int(threadIdx.x) / f.lanes, rows = map_threads / f.lanes;
  const int64_t from = blockIdx.y * f.slice, past = from + f.slice, to = past < f.g.outer ? past : f.g.outer;
  const int64_t start = b * f.g.outer * f.width + column;
  const bool along_rows = f.g.param_span == 0;
  // The same number of rounds for all threads: sums over a row need its whole warp.
  for (int64_t o0 = from; o0 < to; o0 += rows_at_once * rows) {
    Bits16 x[rows_at_once], dy[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int64_t o = o0 + i * rows + y;
      x[i] = dy[i] = Bits16{};
      if (o >= to || k == 0) continue;
      x[i] = load_cells(f.x + start + o * f.width, k, f.aligned);
      if constexpr (gradient) dy[i] = load_cells(f.dy + start + o * f.width, k, f.aligned);
    }
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int64_t o = o0 + i * rows + y;
      const bool inside = o < to && k > 0;
      C v[V], d[V];
      unpack<T>(x[i], v);
      unpack<T>(dy[i], d);
      if constexpr (gradient) {
        if (f.row_sums != nullptr) {
          Two t{0, 0};
          if (inside) {
            C terms[V], products[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const bool counts = (chosen >> j & 1) != 0;
              products[j] = counts ? d[j] * coefficients[j].xhat(v[j]) : C(0);
              terms[j] = counts ? d[j] : C(0);
            }
            t = {tree_sum(terms), tree_sum(products)};
          }
          t = {lane_sum(t.a, f.lanes), lane_sum(t.b, f.lanes)};
          Two* sums = f.row_sums + (b * f.tiles + tile) * f.g.outer + o;
          if (lane == 0 && o < to) *sums = rest ? Two{sums->a + t.a, sums->b + t.b} : t;
        }
      }
      if (!inside || f.out == nullptr) continue;
      const C w = along_rows ? param_or<C>(f.weight, o, C(1)) : C(1);
      const C shift = along_rows && !gradient ? param_or<C>(f.bias, o, C(0)) : C(0);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if constexpr (gradient) {
          v[j] = f.stats.template apply<C>(v[j], along_rows ? d[j] * w : d[j], coefficients[j]);
        } else {
          v[j] = f.stats.template apply<C>(v[j], C(0), coefficients[j]);
          if (along_rows) v[j] = fused(v[j], w, shift);
        }
      }
      const Bits16 bits = pack<T>(v);
      if (chosen == (1u << k) - 1u) store_cells(f.out + start + o * f.width, k, f.aligned, bits);
      else store_chosen(f.out + start + o * f.width, chosen, bits);
    }
  }
}

// Statistics offer fits(i), at<C>(i, p, along_rows), apply<C>(x, dy, coefficients) and write(i).
template <class T, class Stats, bool gradient>
__global__ void __launch_bounds__(map_threads) map_columns(const __grid_constant__ MapArguments<T, Stats> f) {
  using C = Compute<T>;
  constexpr int V = vector_cells<T>;
  const int64_t b = f.by_tiles.divide(blockIdx.x), tile = blockIdx.x - b * f.tiles;
  const int64_t column = (tile * f.lanes + int(threadIdx.x) % f.lanes) * V;
  const int k = column >= f.width ? 0 : f.width - column < V ? int(f.width - column) : V;
  const auto fill = [&](auto zero, auto& out) {
    using K = decltype(zero);
    int64_t before_i = -1, before_p = -1;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t last = j < k ? column + j : column + k - 1;
      const int64_t c = k > 0 ? f.by_span.divide(last) : 0;
      const int64_t i = b * f.g.channels + c;
      const int64_t p = f.g.param_span == 0 || k == 0 ? 0 : f.by_param_span.divide(last);
      if (j > 0 && i == before_i && p == before_p) out[j] = out[j > 0 ? j - 1 : 0];
      else out[j] = f.stats.template at<K>(i, p, f.g.param_span == 0);
      before_i = i, before_p = p;
    }
  };
  unsigned careful = 0;  // columns that float32 cannot hold
  if constexpr (sizeof(C) == 4) {
    int64_t before = -1;
    bool fits = true;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= k) continue;
      const int64_t i = b * f.g.channels + f.by_span.divide(column + j);
      if (i != before) fits = f.stats.fits(i);
      if (!fits) careful |= 1u << j;
      before = i;
    }
  }
  if (blockIdx.y == 0 && int(threadIdx.x) < f.lanes)
    for (int j = 0; j < k; ++j) {
      const int64_t c = f.by_span.divide(column + j);
      if (c * f.g.span == column + j) f.stats.write(b * f.g.channels + c);
    }
  const unsigned all = (1u << k) - 1u;
  typename Stats::template Coefficients<C> coefficients[V];
  fill(C(0), coefficients);
  map_rows<T, C, gradient>(f, b, tile, column, k, coefficients, all & ~careful, false);
  // What float32 cannot hold is done by itself, and changes nothing for its neighbours. The sums of a row need its
  // warp.
  if (sizeof(C) == 4 && __any_sync(all_lanes, careful != 0)) {
    typename Stats::template Coefficients<double> wide[V];
    fill(0.0, wide);
    map_rows<T, double, gradient>(f, b, tile, column, k, wide, careful, true);
  }
}

template <class T, class Stats, bool gradient>
int launch_map(const Columns& g, const Stats& stats, const void* x, const void* dy, void* out, Given weight, Given bias,
               Stream stream, Two* row_sums = nullptr) {
  constexpr int V = vector_cells<T>;
  const MatrixCut<T> cut(g, 16, 65535);
  if (g.batch * cut.width == 0) return 0;
  const bool moved = aligned16(x) && (dy == nullptr || aligned16(dy)) && (out == nullptr || aligned16(out));
  MapArguments<T, Stats> f{g,
                           stats,
                           static_cast<const T*>(x),
                           static_cast<const T*>(dy),
                           static_cast<T*>(out),
                           weight,
                           bias,
                           row_sums,
                           cut.width,
                           cut.tiles,
                           cut.slice,
                           cut.lanes,
                           moved && cut.width % V == 0,
                           Divider(cut.tiles, g.batch * cut.tiles),
                           Divider(g.span, cut.width),
                           Divider(g.param_span, cut.width)};
  return launch(map_columns<T, Stats, gradient>,
                Shape{dim3(unsigned(g.batch * cut.tiles), unsigned(cut.slices)), map_threads, 1, 0, stream}, f);
}

}  // namespace
}  // namespace nf::cuda
