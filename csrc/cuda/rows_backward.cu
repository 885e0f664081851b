// SPDX-License-Identifier: BSD-3-Clause
// Reductions over runs of neighbouring cells, backward. With g = dy*weight, xhat = (x - mean)*rstd and averages over
// the reduction:
//
//   dx = rstd*(g - mean(g) - xhat*mean(g*xhat));   dweight = sum(dy*xhat), dbias = sum(dy)
//   traffic    dy and x are read once, dx is written once: 3 s bytes per cell, while a reduction fits on the chip
//
// The gradients of parameters that a row shares with other rows come from row_params.cu where every cell has its own
// (layer, RMS norm). Here, where a parameter covers a run of cells (group, instance, batch norm): each block writes its
// sums per channel, and a second kernel adds those of one channel up in order.
#include "runs.cuh"

namespace nf::cuda {
namespace {

template <class T> struct Backward {
  RunVectors<T> v;
  const T *dy, *x;
  Given mean, rstd, weight;
  T* dx;
  Two* channel_sums;  // [reduction][block of its cluster][channel]
  bool center, frozen;
  int lanes;
  int64_t share, keep;
};

// What a reduction's backward needs of its statistics, in the type it is computed in.
template <class C> struct Stats {
  double mean, rstd;  // rstd of constant data (inf) counts as 0
  C shift;            // near the mean; see slope_shift
  double rest;        // mean - shift
};
template <class C> __device__ __forceinline__ Stats<C> stats_of(double mean, double rstd) {
  const C shift = slope_shift<C>(mean, usable(rstd));
  return {mean, usable(rstd), shift, mean - double(shift)};
}

// The two sums over this thread's vectors: of g and of g*xhat (or, without weight, of dy and dy*xhat).
template <class T, class C, class Each>
__device__ __forceinline__ Two slope_sums(const Backward<T>& f, Each each, const Stats<C>& s, int64_t first,
                                          bool weighted) {
  constexpr int V = vector_cells<T>;
  Two t{0, 0};
  each([&](Bits16 dy_bits, Bits16 x_bits, const auto& at) {
    C d[V], x[V], w[V];
    unpack<T>(dy_bits, d);
    unpack<T>(x_bits, x);
    if (weighted) f.v.params_at(f.weight, first, at, w, C(1));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      d[i] = i < at.k ? (weighted ? d[i] * w[i] : d[i]) : C(0);
      x[i] = i < at.k ? d[i] * (x[i] - s.shift) : C(0);
    }
    t.a += tree_sum(d), t.b += tree_sum(x);
  });
  t.b = (t.b - s.rest * t.a) * s.rstd;
  return t;
}

template <class T, class C, class Each>
__device__ __forceinline__ void map_gradient(const Backward<T>& f, Each each, int64_t r, const Stats<C>& s, Two mean) {
  constexpr int V = vector_cells<T>;
  const int64_t first = f.v.first_param(r);
  T* dx = f.dx + f.v.base(r);
  Gradient<C> k = gradient<C>(s.mean, s.rstd, 1.0, mean.a, mean.b);
  if (f.v.g.n == 1 && !f.frozen && f.center) k = {};  // the output does not depend on x: exactly no gradient
  each([&](Bits16 dy_bits, Bits16 x_bits, const auto& at) {
    C d[V], x[V], w[V];
    unpack<T>(dy_bits, d);
    unpack<T>(x_bits, x);
    f.v.params_at(f.weight, first, at, w, C(1));
#pragma unroll
    for (int i = 0; i < V; ++i) d[i] = fused(d[i] * w[i], k.p, f.frozen ? C(0) : fused(x[i] - k.hi, k.q, k.t));
    store_cells(dx + at.at, at.k, f.v.aligned, pack<T>(d));
  });
}

// Everything that follows from the statistics of one reduction, in C. `sum` adds over its threads.
template <class T, class C, class Each, class Sum>
__device__ __forceinline__ void reduction_backward(const Backward<T>& f, Each each, Sum& sum, int64_t r, bool inside,
                                                   double mean, double rstd) {
  const Stats<C> s = stats_of<C>(mean, rstd);
  const int64_t first = inside ? f.v.first_param(r) : 0;
  const bool one_channel = f.v.g.channels == 1;
  Two t{0, 0};
  if ((f.dx != nullptr && !f.frozen) || (f.channel_sums != nullptr && one_channel)) {
    t = sum(slope_sums<T, C>(f, each, s, first, !one_channel));
    if (f.v.g.n == 1 && f.center && !f.frozen) t.b *= 0;  // xhat is exactly 0
    if (one_channel) {
      if (f.channel_sums != nullptr && sum.first() && inside) f.channel_sums[r] = t;
      const double w = inside ? param_or<double>(f.weight, first, 1.0) : 1.0;
      t.a *= w, t.b *= w;
    }
  }
  if (f.dx == nullptr || !inside) return;
  const double n = double(f.v.g.n);
  map_gradient<T, C>(f, each, r, s, f.frozen ? Two{0, 0} : Two{f.center ? t.a / n : 0.0, t.b / n});
}

template <class T, int vectors>
__global__ void __launch_bounds__(128, 4) lanes_backward(const __grid_constant__ Backward<T> f) {
  const int lane = int(threadIdx.x) % f.lanes, rows = 128 / f.lanes;
  const int64_t r = (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * rows + int(threadIdx.x) / f.lanes;
  const bool inside = r < f.v.g.count;
  const int64_t base = inside ? r * f.v.g.n : 0;
  Bits16 dy[vectors], x[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int64_t index = lane + int64_t(i) * f.lanes;
    dy[i] = x[i] = Bits16{};
    if (inside && index < f.v.all) {
      const auto at = f.v.place(index);
      dy[i] = load_cells(f.dy + base + at.at, at.k, f.v.aligned);
      x[i] = load_cells(f.x + base + at.at, at.k, f.v.aligned);
    }
  }
  const double mean = inside ? param_or<double>(f.mean, r, 0.0) : 0.0, rstd = inside ? param<double>(f.rstd, r) : 1.0;
  bool now = inside;
  const auto each = [&](auto use) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int64_t index = lane + int64_t(i) * f.lanes;
      if (now && index < f.v.all) use(dy[i], x[i], f.v.place(index));
    }
  };
  LaneSum sum{f.lanes};
  // A row goes its own way, whatever the others of its warp need; but the sums need all lanes.
  const bool fits = sizeof(T) == 8 || fits_single_backward(mean, rstd);
  if (sum.any(fits)) {
    now = inside && fits;
    reduction_backward<T, Compute<T>>(f, each, sum, r, now, mean, rstd);
  }
  if (sizeof(T) != 8 && sum.any(!fits)) {
    now = inside && !fits;
    reduction_backward<T, double>(f, each, sum, r, now, mean, rstd);
  }
}

constexpr size_t backward_reserve = (sum_bytes + 127) / 128 * 128;

// Sums per channel of this block's share: a warp takes every `warps`-th channel.
template <class T>
__device__ __forceinline__ void sum_channels(const Backward<T>& f, int64_t r, int64_t begin, int64_t end,
                                             int64_t middle, const char* kept, double mean, double rstd) {
  constexpr int V = vector_cells<T>;
  const Runs& g = f.v.g;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  const T *dy = f.dy + f.v.base(r), *x = f.x + f.v.base(r);
  const T* kept_dy = reinterpret_cast<const T*>(kept);
  const T* kept_x = kept_dy + f.keep * V;
  Two* out = f.channel_sums + (r * cluster_size() + cluster_rank()) * g.channels;
  for (int64_t c = warp; c < g.channels; c += warps) {
    int64_t from = c * g.span, to = from + g.span;
    if (from < begin * V) from = begin * V;
    if (to > end * V) to = end * V;
    double a = 0, b = 0;
    for (int64_t j = from + lane; j < to; j += 32) {
      const bool near = j < middle * V;
      const double d = double(widen(near ? kept_dy[j - begin * V] : load1(dy + j)));
      const double xhat = (double(widen(near ? kept_x[j - begin * V] : load1(x + j))) - mean) * rstd;
      a += d, b = fma(d, xhat, b);
    }
    a = lane_sum(a, 32), b = lane_sum(b, 32);
    if (lane == 0) out[c] = {a, b};
  }
}

template <class T> __global__ void __launch_bounds__(512) cluster_backward(const __grid_constant__ Backward<T> f) {
  const int64_t r = reduction_index();
  if (r >= f.v.g.count) return;
  char* kept = shared_memory() + backward_reserve;
  const int64_t base = f.v.base(r);
  const T *dy = f.dy + base, *x = f.x + base;
  const int64_t begin = cluster_rank() * f.share, past = begin + f.share;
  const int64_t end = past < f.v.all ? past : f.v.all > begin ? f.v.all : begin;
  const int64_t middle = begin + f.keep < end ? begin + f.keep : end;
  for (int64_t i = begin + threadIdx.x; i < middle; i += blockDim.x) {
    const auto at = f.v.place(i);
    char *to_dy = kept + (i - begin) * 16, *to_x = to_dy + f.keep * 16;
    if (f.v.aligned && at.k == vector_cells<T>) {
      copy_async16(to_dy, dy + at.at);
      copy_async16(to_x, x + at.at);
    } else {
      store16_shared(to_dy, load_cells(dy + at.at, at.k, false));
      store16_shared(to_x, load_cells(x + at.at, at.k, false));
    }
  }
  copy_async_commit();
  const double mean = param_or<double>(f.mean, r, 0.0), rstd = param<double>(f.rstd, r);
  copy_async_wait<0>();
  const auto each = [&](auto use) {
    for (int64_t i = begin + threadIdx.x; i < middle; i += blockDim.x) {
      const char* own = kept + (i - begin) * 16;
      use(load16_shared(own), load16_shared(own + f.keep * 16), f.v.place(i));
    }
#pragma unroll 2
    for (int64_t i = middle + threadIdx.x; i < end; i += blockDim.x) {
      const auto at = f.v.place(i);
      use(load_cells(dy + at.at, at.k, f.v.aligned), load_cells(x + at.at, at.k, f.v.aligned), at);
    }
  };
  if (f.channel_sums != nullptr && f.v.g.channels > 1) {
    __syncthreads();  // cells of other threads
    sum_channels(f, r, begin, end, middle, kept, mean, usable(rstd));
    // In place, dx goes where cells are still to be read.
    if (f.keep < f.share && f.dx != nullptr) __syncthreads();
  }
  ClusterSum sum{reinterpret_cast<Two*>(shared_memory())};
  if (sizeof(T) == 8 || !fits_single_backward(mean, rstd))
    reduction_backward<T, double>(f, each, sum, r, true, mean, rstd);
  else reduction_backward<T, Compute<T>>(f, each, sum, r, true, mean, rstd);
  if (cluster_size() > 1) cluster_sync();  // a block whose sums are still being read must not end
}

// dweight and dbias of one channel: its sums in all reductions of its phase, in order.
struct ChannelTotals {
  const Two* sums;
  int64_t params, channels, period, count;
  int blocks;
  Wanted dweight, dbias;
};
__global__ void __launch_bounds__(256) total_channels(const __grid_constant__ ChannelTotals f) {
  const int64_t p = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (p >= f.params) return;
  const int64_t phase = p / f.channels, c = p % f.channels, of_phase = f.count / f.period;
  double a = 0, b = 0;
  for (int64_t i = threadIdx.x % 32; i < of_phase * f.blocks; i += 32) {
    const int64_t r = (i / f.blocks) * f.period + phase;
    const Two t = f.sums[(r * f.blocks + i % f.blocks) * f.channels + c];
    a += t.a, b += t.b;
  }
  a = lane_sum(a, 32), b = lane_sum(b, 32);
  if (threadIdx.x % 32 != 0) return;
  if (f.dweight.p != nullptr) put(f.dweight, p, b);
  if (f.dbias.p != nullptr) put(f.dbias, p, a);
}

// Rows short enough to be held by the lanes of a warp, unless several channels' sums are wanted.
inline bool by_lanes(const RunsBackward& a, int64_t vectors) {
  const bool sums = a.dweight.p != nullptr || a.dbias.p != nullptr;
  return a.g.n == a.g.run && a.g.inner == 1 && vectors <= 128 && !(sums && a.g.channels > 1);
}
template <class T> Sharing sharing_of(const RunsBackward& a) {
  const int64_t vectors = ceil_div(a.g.run, vector_cells<T>) * (a.g.n / a.g.run);
  Sharing s{};
  s.cluster = 1;
  return by_lanes(a, vectors) ? s : share_out(vectors, 2, backward_reserve);
}

template <class T> int backward(const RunsBackward& a) {
  const bool sums = a.dweight.p != nullptr || a.dbias.p != nullptr;
  const bool moved = aligned16(a.dy) && aligned16(a.x) && (a.dx == nullptr || aligned16(a.dx));
  Backward<T> f{RunVectors<T>(a.g, moved),
                static_cast<const T*>(a.dy),
                static_cast<const T*>(a.x),
                a.mean,
                a.rstd,
                a.weight,
                static_cast<T*>(a.dx),
                sums ? static_cast<Two*>(a.work) : nullptr,
                a.center,
                a.frozen,
                32,
                0,
                0};
  const Sharing s = sharing_of<T>(a);
  int error;
  if (by_lanes(a, f.v.all)) {
    while (f.lanes > 1 && f.lanes / 2 >= f.v.all) f.lanes /= 2;
    const Shape shape{grid_of(ceil_div(a.g.count, 128 / f.lanes), 1), 128, 1, 0, a.stream};
    error = f.v.all <= 32   ? launch(lanes_backward<T, 1>, shape, f)
            : f.v.all <= 64 ? launch(lanes_backward<T, 2>, shape, f)
                            : launch(lanes_backward<T, 4>, shape, f);
  } else {
    f.share = s.share, f.keep = s.keep;
    error = launch(
        cluster_backward<T>,
        Shape{grid_of(a.g.count, s.cluster), s.threads, s.cluster, s.shared_bytes(backward_reserve, 2), a.stream}, f);
  }
  if (error != 0 || !sums) return error;
  const int blocks = a.g.channels == 1 ? 1 : s.cluster;
  const ChannelTotals t{
      f.channel_sums, a.g.period * a.g.channels, a.g.channels, a.g.period, a.g.count, blocks, a.dweight, a.dbias};
  return launch(total_channels, Shape{dim3(unsigned(ceil_div(t.params, 8))), 256, 1, 0, a.stream}, t);
}

}  // namespace

size_t runs_backward_workspace(const RunsBackward& a) {
  if (a.dweight.p == nullptr && a.dbias.p == nullptr) return 0;
  const int cluster = a.g.channels == 1 || a.g.count == 0
                          ? 1
                          : with_type(a.type, [&](auto t) { return sharing_of<decltype(t)>(a).cluster; });
  return size_t(a.g.count * cluster * a.g.channels) * sizeof(Two);
}

int runs_backward(const RunsBackward& a) {
  return with_type(a.type, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace nf::cuda
