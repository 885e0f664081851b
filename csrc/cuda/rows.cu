// SPDX-License-Identifier: BSD-3-Clause
// Reductions over runs of neighbouring cells, forward: layer, RMS, group and instance norm, and batch norm channels
// first.
//
//   forward    mean, var of each reduction;  y = (x - mean)*rstd*weight + bias
//   traffic    x is read once, y is written once: 2 s bytes per cell of size s, while a reduction fits on the chip
//
// Up to 4 KiB: some lanes of a warp hold a row in registers. Longer: a block, or a cluster of up to eight, holds it in
// shared memory, brought there by asynchronous copies; what does not fit is read again. Statistics take two passes over
// the cells on the chip.
#include "runs.cuh"

namespace nf::cuda {
namespace {

template <class T> struct Forward {
  RunVectors<T> v;
  const T* x;
  T* y;
  Given weight, bias;
  void *mean, *rstd;
  Running running;
  double eps;
  bool center;
  int lanes;
  int64_t share, keep;
};

// One thread of a reduction writes what there is one of.
template <class T>
__device__ __forceinline__ void write_stats(const Forward<T>& f, int64_t r, const Moments& m, double rstd) {
  write_stat<T>(f.mean, r, m.mean);
  write_stat<T>(f.rstd, r, rstd);
  if (f.running.mean.p == nullptr) return;
  const Given mean{f.running.mean.p, f.running.mean.type}, var{f.running.var.p, f.running.var.type};
  const double n = double(f.v.g.n), biased = not_negative(m.var);
  put(f.running.mean, r, running_average(param<double>(mean, r), m.mean, f.running.weight));
  put(f.running.var, r,
      running_average(param<double>(var, r), sample_variance(biased, n, f.running.ddof), f.running.weight));
}

template <class T, class C>
__device__ __forceinline__ Bits16 map_as(const Forward<T>& f, Bits16 bits, const typename RunVectors<T>::Place& at,
                                         int64_t first, const Hat<C>& h) {
  constexpr int V = vector_cells<T>;
  C v[V], w[V], b[V];
  unpack<T>(bits, v);
  f.v.params_at(f.weight, first, at, w, C(1));
  f.v.params_at(f.bias, first, at, b, C(0));
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = fused(fused(v[i] - h.hi, h.rs, h.t), w[i], b[i]);
  return pack<T>(v);
}

// `each(f)` as in chip_moments, with the place of the vector besides.
template <class T, class Each>
__device__ __forceinline__ void map_all(const Forward<T>& f, Each each, int64_t r, const Moments& m, double rstd) {
  using C = Compute<T>;
  const int64_t first = f.v.first_param(r);
  T* y = f.y + f.v.base(r);
  if (sizeof(C) == 8 || fits_single(m.mean, rstd)) {
    const Hat<C> h = hat<C>(m.mean, m.mean_lo, m.var, rstd);
    each([&](Bits16 bits, const auto& at) {
      store_cells(y + at.at, at.k, f.v.aligned, map_as<T>(f, bits, at, first, h));
    });
  } else {
    const Hat<double> h = hat<double>(m.mean, m.mean_lo, m.var, rstd);
    each([&](Bits16 bits, const auto& at) {
      store_cells(y + at.at, at.k, f.v.aligned, map_as<T>(f, bits, at, first, h));
    });
  }
}

// `lanes` neighbouring lanes hold a row, `vectors` vectors each.
template <class T, int vectors>
__global__ void __launch_bounds__(128, 4) lanes_forward(const __grid_constant__ Forward<T> f) {
  const int lane = int(threadIdx.x) % f.lanes, rows = 128 / f.lanes;
  const int64_t r = (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * rows + int(threadIdx.x) / f.lanes;
  const bool inside = r < f.v.g.count;
  const T* x = f.x + (inside ? r * f.v.g.n : 0);
  Bits16 cells[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int64_t index = lane + int64_t(i) * f.lanes;
    cells[i] = Bits16{};
    if (inside && index < f.v.all) {
      const auto at = f.v.place(index);
      cells[i] = load_cells(x + at.at, at.k, f.v.aligned);
    }
  }
  const double pilot = double(widen(load1(x)));
  const auto each = [&](auto use) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int64_t index = lane + int64_t(i) * f.lanes;
      if (inside && index < f.v.all) use(cells[i], f.v.place(index));
    }
  };
  LaneSum sum{f.lanes};
  const Moments m = chip_moments<T>([&](auto use) { each([&](Bits16 bits, const auto& at) { use(bits, at.k); }); }, sum,
                                    pilot, double(f.v.g.n), f.center);
  if (!inside) return;
  const double rstd = rstd_of(m.var, f.eps);
  if (lane == 0) write_stats(f, r, m, rstd);
  map_all(f, each, r, m, rstd);
}

constexpr size_t forward_reserve = (moment_sums * sum_bytes + 127) / 128 * 128;

// A cluster holds a reduction.
template <class T> __global__ void __launch_bounds__(512, 1) cluster_forward(const __grid_constant__ Forward<T> f) {
  const int64_t r = reduction_index();
  if (r >= f.v.g.count) return;
  char* kept = shared_memory() + forward_reserve;
  const T* x = f.x + f.v.base(r);
  const int64_t begin = cluster_rank() * f.share, past = begin + f.share, end = past < f.v.all ? past : f.v.all;
  const int64_t middle = begin + f.keep < end ? begin + f.keep : end;
  for (int64_t i = begin + threadIdx.x; i < middle; i += blockDim.x) {
    const auto at = f.v.place(i);
    char* to = kept + (i - begin) * 16;
    if (f.v.aligned && at.k == vector_cells<T>) copy_async16(to, x + at.at);
    else store16_shared(to, load_cells(x + at.at, at.k, false));
  }
  copy_async_commit();
  const double pilot = double(widen(load1(x)));
  copy_async_wait<0>();
  // A thread reads what it copied itself: no barrier. Of what is not kept, the part read last comes first again.
  const auto each = [&](auto use) {
    for (int64_t i = begin + threadIdx.x; i < middle; i += blockDim.x)
      use(load16_shared(kept + (i - begin) * 16), f.v.place(i));
#pragma unroll 4
    for (int64_t i = middle + threadIdx.x; i < end; i += blockDim.x) {
      const auto at = f.v.place(i);
      use(load_cells(x + at.at, at.k, f.v.aligned), at);
    }
  };
  ClusterSum sum{reinterpret_cast<Two*>(shared_memory())};
  const Moments m = chip_moments<T>([&](auto use) { each([&](Bits16 bits, const auto& at) { use(bits, at.k); }); }, sum,
                                    pilot, double(f.v.g.n), f.center);
  const double rstd = rstd_of(m.var, f.eps);
  if (cluster_rank() == 0 && threadIdx.x == 0) write_stats(f, r, m, rstd);
  map_all(f, each, r, m, rstd);
  if (cluster_size() > 1) cluster_sync();  // a block whose sums are still being read must not end
}

template <class T> int forward(const RunsForward& a) {
  Forward<T> f{RunVectors<T>(a.g, aligned16(a.x) && aligned16(a.y)),
               static_cast<const T*>(a.x),
               static_cast<T*>(a.y),
               a.weight,
               a.bias,
               a.mean,
               a.rstd,
               a.running,
               a.eps,
               a.center,
               32,
               0,
               0};
  const Runs& g = a.g;
  if (g.n == g.run && g.inner == 1 && f.v.all <= 256) {
    while (f.lanes > 1 && f.lanes / 2 >= f.v.all) f.lanes /= 2;
    Shape shape{grid_of(ceil_div(g.count, 128 / f.lanes), 1), 128, 1, 0, a.stream};
    if (f.v.all <= 32) return launch(lanes_forward<T, 1>, shape, f);
    if (f.v.all <= 64) return launch(lanes_forward<T, 2>, shape, f);
    if (f.v.all <= 128) return launch(lanes_forward<T, 4>, shape, f);
    return launch(lanes_forward<T, 8>, shape, f);
  }
  const Sharing s = share_out(f.v.all, 1, forward_reserve);
  f.share = s.share, f.keep = s.keep;
  return launch(cluster_forward<T>,
                Shape{grid_of(g.count, s.cluster), s.threads, s.cluster, s.shared_bytes(forward_reserve, 1), a.stream},
                f);
}

}  // namespace

int runs_forward(const RunsForward& a) {
  if (a.g.count == 0 || a.g.n == 0) return 0;
  return with_type(a.type, [&](auto t) { return forward<decltype(t)>(a); });
}

int rows_forward(const RowsForward& a) {
  return runs_forward(
      {runs_of(a.g), a.type, a.x, a.y, a.weight, a.bias, a.mean, a.rstd, Running{}, a.eps, a.center, a.stream});
}

}  // namespace nf::cuda
