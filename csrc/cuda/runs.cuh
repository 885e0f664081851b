// SPDX-License-Identifier: BSD-3-Clause
// The geometry in which a block, or a cluster of blocks, computes one reduction: its cells are runs of neighbours.
//
//   cell j of reduction r lies at (r / inner)*outer_step + (r % inner)*inner_step + (j / run)*pitch + j % run
//   its parameter is (r % period)*channels + (cyclic ? j % run : j / span)
//
//   rows (all norms of rows.cu)      one run of n cells
//   batch norm, channels first       N runs of H*W cells, period = C, channels = 1
//   group norm, channels last        H*W runs of C/G cells, period = G, cyclic
#pragma once

#include "warp.cuh"

namespace nf::cuda {

struct Runs {
  int64_t count, n, run, pitch;
  int64_t inner, outer_step, inner_step;
  int64_t channels, span, period;
  bool cyclic;
};

inline Runs runs_of(const Rows& g) {
  const int64_t n = g.channels * g.span;
  return {g.count, n, n, n, 1, n, 0, g.channels, g.span, g.period, false};
}
// A statistic per (batch, channel): all planes of a channel.
inline Runs runs_of(const Columns& g) {
  const int64_t width = g.channels * g.span, n = g.outer * g.span;
  const bool each = g.param_span == 1 && g.span > 1;  // a parameter for each column
  return {g.batch * g.channels,  n,          g.span, width, g.channels, g.outer * width, g.span, each ? g.span : 1,
          each ? int64_t(1) : n, g.channels, each};
}

struct RunsForward {
  Runs g;
  DType type;
  const void* x;
  void* y;
  Given weight, bias;
  void *mean, *rstd;
  Running running;
  double eps;
  bool center;
  Stream stream;
};
int runs_forward(const RunsForward&);

struct RunsBackward {
  Runs g;
  DType type;
  const void *dy, *x;
  Given mean, rstd, weight;
  void* dx;
  Wanted dweight, dbias;
  bool center, frozen;
  void* work;
  Stream stream;
};
int runs_backward(const RunsBackward&);
size_t runs_backward_workspace(const RunsBackward&);

namespace {

// What the kernels need of a geometry: vectors of cells, none across the end of a run.
template <class T> struct RunVectors {
  Runs g;
  int64_t per_run, all;  // vectors of a run, of a reduction
  bool aligned;          // whole vectors may be moved at once
  Divider by_per_run, by_inner, by_span, by_period;

  explicit RunVectors(const Runs& runs, bool pointers_aligned) : g(runs) {
    constexpr int V = vector_cells<T>;
    per_run = ceil_div(g.run, V), all = per_run * (g.n / g.run);
    const bool whole = g.n == g.run || (g.run % V == 0 && g.pitch % V == 0);
    aligned = pointers_aligned && whole && g.outer_step % V == 0 && g.inner_step % V == 0;
    by_per_run = Divider(per_run, all), by_inner = Divider(g.inner, g.count);
    by_span = Divider(g.span, g.n), by_period = Divider(g.period, g.count);
  }
  __device__ __forceinline__ int64_t base(int64_t r) const {
    const int64_t o = by_inner.divide(r);
    return o * g.outer_step + (r - o * g.inner) * g.inner_step;
  }
  __device__ __forceinline__ int64_t first_param(int64_t r) const {
    return (r - by_period.divide(r) * g.period) * g.channels;
  }
  struct Place {
    int64_t at, j;  // from the base of the reduction; index of the first cell
    int k;          // cells
    int64_t in_run;
  };
  __device__ __forceinline__ Place place(int64_t i) const {
    constexpr int V = vector_cells<T>;
    int64_t o = 0;
    if (g.n != g.run) o = by_per_run.divide(i);
    const int64_t s = (i - o * per_run) * V, rest = g.run - s;
    return {o * g.pitch + s, o * g.run + s, rest < V ? int(rest) : V, s};
  }
  // The parameters of the cells of a vector.
  template <class C>
  __device__ __forceinline__ void params_at(Given p, int64_t first, const Place& at, C (&out)[vector_cells<T>],
                                            C otherwise) const {
    constexpr int V = vector_cells<T>;
    if (p.p == nullptr || g.channels == 1) {
      const C one = p.p == nullptr ? otherwise : param<C>(p, first);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = one;
    } else if (g.cyclic) {
      params<V>(p, first + at.in_run, at.k, out, otherwise);
    } else if (g.span == 1) {
      params<V>(p, first + at.j, at.k, out, otherwise);
    } else {
      const int64_t c = by_span.divide(at.j), left = (c + 1) * g.span - at.j;
      const C one = param<C>(p, first + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        out[i] = one;
        if (i >= left && i < at.k) out[i] = param<C>(p, first + by_span.divide(at.j + i));
      }
    }
  }
};

// How a reduction is shared: blocks of a cluster, vectors of each, vectors that stay in shared memory. By its length
// and the device alone, so that the bits do not depend on how many reductions there are.
struct Sharing {
  int cluster, threads;
  int64_t share, keep;
  size_t shared_bytes(size_t reserve, int arrays) const { return reserve + size_t(keep) * 16 * size_t(arrays); }
};
inline Sharing share_out(int64_t vectors, int arrays, size_t reserve) {
  Sharing s;
  s.cluster = 1;
  const int64_t bytes = vectors * 16 * arrays;
  while (s.cluster < max_cluster() && bytes > int64_t(s.cluster) * (32 << 10)) s.cluster *= 2;
  s.share = ceil_div(vectors, s.cluster);
  // Few threads, so that several blocks fit beside each other: one computes while the others' copies are under way.
  s.threads = s.share <= 1024 ? 128 : s.share <= 4096 ? 256 : 512;
  // Two blocks to a multiprocessor, one loading while the other writes; one alone where that keeps a reduction on chip.
  const int64_t whole = max_shared() - int64_t(reserve), half = whole / 2 - 1024;
  const int64_t need = s.share * 16 * arrays, room = need <= half || need > whole ? half : whole;
  s.keep = s.share * 16 * arrays <= room ? s.share : room / (16 * arrays);
  return s;
}
// A grid with a cluster for each reduction.
inline dim3 grid_of(int64_t count, int cluster) {
  const int64_t across = most_blocks / cluster;
  const int64_t rows = count < across ? 1 : ceil_div(count, across);
  return dim3(unsigned(ceil_div(count, rows) * cluster), unsigned(rows));
}
__device__ __forceinline__ int64_t reduction_index() {
  return int64_t(blockIdx.y) * (gridDim.x / unsigned(cluster_size())) + blockIdx.x / unsigned(cluster_size());
}

}  // namespace
}  // namespace nf::cuda
