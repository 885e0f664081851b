// SPDX-License-Identifier: BSD-3-Clause
// Layer and RMS norm backward where dweight or dbias is wanted: each cell of a row has its own parameter.
//
//   traffic    dy and x are read once, dx is written once: 3 s bytes per cell; and 16 bytes per block and parameter
//
// A fixed number of blocks, or clusters of blocks where rows are wide, takes the rows in turn. A thread keeps the same
// columns throughout: weight and the columns' sums stay in its registers, sixteen rows in a chain, and are then added in
// double to its place in shared memory. Each cluster writes its sums; a second kernel adds them up in order. Rows too wide
// for that (see `held`) take dx from rows_backward.cu, and a pass down the columns for the parameters.
#include "runs.cuh"

namespace nf::cuda {
namespace {

constexpr int chain_rows = 16;

template <class T> struct RowsWithParams {
  const T *dy, *x;
  Given mean, rstd, weight;
  T* dx;
  Compute<T>* partial;  // [block][dweight, dbias][n]
  int64_t count, n, vectors;
  int lanes;  // threads of a row: of a warp, or of the whole cluster
  bool aligned, center;
};

// Over the threads of a row: lanes of a warp, or the cluster. Two places take turns: one barrier a row.
struct RowSum {
  int lanes;
  Two* place;
  int turn = 0;
  __device__ __forceinline__ Two operator()(Two v) {
    if (lanes <= 32) return {lane_sum(v.a, lanes), lane_sum(v.b, lanes)};
    ClusterSum sum{place + turn * (most_warps + 1)};
    turn ^= 1;
    return sum(v);
  }
  __device__ __forceinline__ bool any(bool p) const { return lanes <= 32 ? __any_sync(all_lanes, p) != 0 : p; }
};

// The sums of this thread's columns: [dweight, dbias][cell], a double for each thread.
template <int cells> struct OwnSums {
  double* at;
  int stride;
  __device__ __forceinline__ double& operator()(int which, int cell) const {
    return at[(which * cells + cell) * int64_t(stride)];
  }
};

// A row that float32 cannot hold, in double, read again. All threads of a warp come here together. Returns whose turn
// it is after its sum: by reference the caller's own would live in memory.
template <class T, int vectors>
__device__ NF_NOINLINE int careful_row(const RowsWithParams<T>& f, int64_t r, bool inside, int lane, RowSum sum,
                                       OwnSums<vectors * vector_cells<T>> own) {
  constexpr int V = vector_cells<T>;
  const double mean = inside ? param_or<double>(f.mean, r, 0.0) : 0.0;
  const double rstd = inside ? usable(param<double>(f.rstd, r)) : 0.0;
  const int64_t base = inside ? r * f.n : 0;
  const auto each = [&](auto use) {
    for (int i = 0; i < vectors; ++i)
      for (int j = 0; j < V; ++j) {
        const int64_t c = (lane + int64_t(i) * f.lanes) * V + j;
        if (!inside || c >= f.n) continue;
        const double d = double(widen(load1(f.dy + base + c)));
        const double xhat = f.n == 1 && f.center ? 0.0 : (double(widen(load1(f.x + base + c))) - mean) * rstd;
        use(d, xhat, d * param_or<double>(f.weight, c, 1.0), c, i * V + j);
      }
  };
  Two t{0, 0};
  each([&](double, double xhat, double g, int64_t, int) { t.a += g, t.b = fma(g, xhat, t.b); });
  t = sum(t);
  const double c1 = f.center ? t.a / double(f.n) : 0.0, c2 = t.b / double(f.n);
  each([&](double d, double xhat, double g, int64_t c, int cell) {
    own(0, cell) += d * xhat, own(1, cell) += d;
    const double v = f.n == 1 && f.center ? 0.0 : rstd * (g - c1 - xhat * c2);
    if (f.dx != nullptr) store1(f.dx + base + c, Cast<T>::from(v));
  });
  return sum.turn;
}

template <class T, int vectors>
__global__ void __launch_bounds__(512) held_rows(const __grid_constant__ RowsWithParams<T> f) {
  using C = Compute<T>;
  constexpr int V = vector_cells<T>, cells = vectors * V;
  const bool whole = f.lanes > 32;  // all threads share a row
  const int lane = whole ? cluster_rank() * int(blockDim.x) + int(threadIdx.x) : int(threadIdx.x) % f.lanes;
  const int group = whole ? 0 : int(threadIdx.x) / f.lanes, groups = whole ? 1 : int(blockDim.x) / f.lanes;
  const int64_t block = blockIdx.x / cluster_size(), blocks = gridDim.x / cluster_size();
  Two* place = reinterpret_cast<Two*>(shared_memory());
  double* sums = reinterpret_cast<double*>(shared_memory() + 2 * sum_bytes);
  const OwnSums<cells> own{sums + threadIdx.x, int(blockDim.x)};
  RowSum sum{f.lanes, place};

  // This thread's weights stay in shared memory: in registers they would cost others their place.
  C* weights = reinterpret_cast<C*>(sums + 2 * cells * int64_t(blockDim.x)) + threadIdx.x;
  const auto w = [&](int i, int j) { return weights[(i * V + j) * int64_t(blockDim.x)]; };
  C chain_w[vectors][V], chain_b[vectors][V];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int64_t c = (lane + int64_t(i) * f.lanes) * V;
    C given[V];
    params<V>(f.weight, c, c < f.n ? (f.n - c < V ? int(f.n - c) : V) : 0, given, C(1));
#pragma unroll
    for (int j = 0; j < V; ++j) {
      chain_w[i][j] = chain_b[i][j] = C(0);
      own(0, i * V + j) = own(1, i * V + j) = 0;
      weights[(i * V + j) * int64_t(blockDim.x)] = given[j];
    }
  }
  const auto load = [&](const T* p, int64_t r, int i) {
    const int64_t c = (lane + int64_t(i) * f.lanes) * V;
    if (r >= f.count || c >= f.n) return Bits16{};
    return load_cells(p + r * f.n + c, f.n - c < V ? int(f.n - c) : V, f.aligned);
  };
  const int64_t step = blocks * groups;
  int64_t r = block * groups + group;
  const int64_t rounds = (f.count - block * groups + step - 1) / step;  // the same for the whole block
  Bits16 dy[vectors], x[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i) dy[i] = load(f.dy, r, i), x[i] = load(f.x, r, i);
  for (int64_t round = 0; round < rounds; ++round, r += step) {
    const bool inside = r < f.count;
    Bits16 next_dy[vectors], next_x[vectors];  // under way while this row is worked on
#pragma unroll
    for (int i = 0; i < vectors; ++i) next_dy[i] = load(f.dy, r + step, i), next_x[i] = load(f.x, r + step, i);
    const double mean = inside ? param_or<double>(f.mean, r, 0.0) : 0.0, rstd = inside ? param<double>(f.rstd, r) : 1.0;
    // A row goes its own way, whatever the others of its warp need; but the sums need all lanes.
    const bool fits = sizeof(C) == 8 || fits_single_backward(mean, rstd), now = inside && fits;
    if (sizeof(C) == 4 && sum.any(!fits)) sum.turn = careful_row<T, vectors>(f, r, inside && !fits, lane, sum, own);
    if (sizeof(C) == 8 || sum.any(fits)) {
      Hat<C> h = hat<C>(mean, 0, 0, rstd);
      if (f.n == 1 && f.center) h.rs = h.t = 0;  // the output does not depend on x: exactly no gradient
      Two t{0, 0};
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        C d[V], v[V];
        unpack<T>(dy[i], d);
        unpack<T>(x[i], v);
        const int64_t c = (lane + int64_t(i) * f.lanes) * V;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const bool counts = now && c + j < f.n;
          d[j] = counts ? d[j] * w(i, j) : C(0);
          v[j] = counts ? d[j] * fused(v[j] - h.hi, h.rs, h.t) : C(0);
        }
        t.a += tree_sum(d), t.b += tree_sum(v);
      }
      t = f.dx != nullptr ? sum(t) : t;
      const double n = double(f.n);
      const Slope<C> k = slope<C>(rstd, f.center ? t.a / n : 0.0, t.b / n);
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        C d[V], v[V];
        unpack<T>(dy[i], d);
        unpack<T>(x[i], v);
        const int64_t c = (lane + int64_t(i) * f.lanes) * V;
        if (!now || c >= f.n) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const C xhat = fused(v[j] - h.hi, h.rs, h.t);
          chain_w[i][j] = fused(d[j], xhat, chain_w[i][j]);
          chain_b[i][j] = chain_b[i][j] + d[j];
          d[j] = fused(d[j] * w(i, j), h.rs, fused(xhat, k.a, k.b));
        }
        if (f.dx != nullptr) store_cells(f.dx + r * f.n + c, f.n - c < V ? int(f.n - c) : V, f.aligned, pack<T>(d));
      }
    }
    if (round % chain_rows == chain_rows - 1 || round == rounds - 1)
#pragma unroll
      for (int i = 0; i < vectors; ++i)
#pragma unroll
        for (int j = 0; j < V; ++j) {
          own(0, i * V + j) += double(chain_w[i][j]), own(1, i * V + j) += double(chain_b[i][j]);
          chain_w[i][j] = chain_b[i][j] = C(0);
        }
#pragma unroll
    for (int i = 0; i < vectors; ++i) dy[i] = next_dy[i], x[i] = next_x[i];
  }
  cluster_sync();  // the sums of the other groups; and a block whose sums are still being read must not end
  if (group != 0) return;
  C* out = f.partial + block * 2 * f.n;
#pragma unroll 1
  for (int cell = 0; cell < cells; ++cell) {
    const int64_t c = (lane + int64_t(cell / V) * f.lanes) * V + cell % V;
    if (c >= f.n) continue;
    for (int which = 0; which < 2; ++which) {
      double s = 0;
      for (int g = 0; g < groups; ++g)
        s += sums[(which * cells + cell) * int64_t(blockDim.x) + g * f.lanes + int(threadIdx.x) % f.lanes];
      out[which * f.n + c] = static_cast<C>(s);
    }
  }
}

// Wide rows: down the columns, a slice of the rows for each block.
constexpr int wide_rows = 8;  // threads of a column
template <class T> __global__ void __launch_bounds__(256) wide_params(const __grid_constant__ RowsWithParams<T> f) {
  using C = Compute<T>;
  constexpr int V = vector_cells<T>;
  const int lane = int(threadIdx.x) % 32, y = int(threadIdx.x) / 32;
  const int64_t c = (int64_t(blockIdx.x) * 32 + lane) * V;
  const int k = c >= f.n ? 0 : f.n - c < V ? int(f.n - c) : V;
  const int64_t slice = ceil_div(f.count, gridDim.y), from = blockIdx.y * slice;
  const int64_t to = from + slice < f.count ? from + slice : f.count;
  double* sums = reinterpret_cast<double*>(shared_memory());  // [which][cell][thread]
  double total_w[V], total_b[V];
#pragma unroll
  for (int j = 0; j < V; ++j) total_w[j] = total_b[j] = 0;
  for (int64_t r = from + y; r < to; r += wide_rows) {
    const double mean = param_or<double>(f.mean, r, 0.0), rstd = param<double>(f.rstd, r);
    if (k == 0) continue;
    C d[V], v[V];
    unpack<T>(load_cells(f.dy + r * f.n + c, k, f.aligned), d);
    unpack<T>(load_cells(f.x + r * f.n + c, k, f.aligned), v);
    const Hat<C> h = hat<C>(mean, 0, 0, rstd);
    const bool fits = sizeof(C) == 8 || fits_single_backward(mean, rstd);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      total_b[j] += double(d[j]);
      total_w[j] +=
          fits ? double(d[j] * fused(v[j] - h.hi, h.rs, h.t)) : double(d[j]) * ((double(v[j]) - mean) * usable(rstd));
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sums[j * 256 + threadIdx.x] = total_w[j];
    sums[(V + j) * 256 + threadIdx.x] = total_b[j];
  }
  __syncthreads();
  if (y != 0) return;
  for (int j = 0; j < k; ++j)
    for (int which = 0; which < 2; ++which) {
      double s = 0;
      for (int i = 0; i < wide_rows; ++i) s += sums[(which * V + j) * 256 + i * 32 + lane];
      f.partial[(int64_t(blockIdx.y) * 2 + which) * f.n + c + j] = static_cast<C>(s);
    }
}

// Adds the blocks of each column up: eight threads take every eighth block, then their sums in order.
template <class C> struct ParamTotals {
  const C* partial;
  int64_t n, blocks;
  Wanted dweight, dbias;
};
template <class C> __global__ void __launch_bounds__(256) total_params(const __grid_constant__ ParamTotals<C> f) {
  const int lane = int(threadIdx.x) % 32, y = int(threadIdx.x) / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  double* sums = reinterpret_cast<double*>(shared_memory());
  double w = 0, b = 0;
  if (c < f.n)
#pragma unroll 4
    for (int64_t i = y; i < f.blocks; i += 8) {
      w += double(f.partial[i * 2 * f.n + c]);
      b += double(f.partial[(i * 2 + 1) * f.n + c]);
    }
  sums[threadIdx.x] = w, sums[256 + threadIdx.x] = b;
  __syncthreads();
  if (y != 0 || c >= f.n) return;
  w = b = 0;
  for (int i = 0; i < 8; ++i) w += sums[i * 32 + lane], b += sums[256 + i * 32 + lane];
  if (f.dweight.p != nullptr) put(f.dweight, c, w);
  if (f.dbias.p != nullptr) put(f.dbias, c, b);
}

// How the rows are taken: by the width, the type and, for the number of blocks, the count of rows; never by the device.
struct Cut {
  bool held;
  int vectors, lanes, threads, cluster;
  int64_t blocks;
};
template <class T> Cut cut_rows(int64_t count, int64_t n) {
  const int64_t all = ceil_div(n, vector_cells<T>);
  constexpr int vectors = sizeof(T) == 2 ? 1 : 2;  // eight columns a thread (four of float64): more would spill
  Cut cut{true, vectors, 32, 256, 1, 1};
  if (all <= 32) {
    cut.vectors = 1;
    while (cut.lanes > 1 && cut.lanes / 2 >= all) cut.lanes /= 2;
  } else if (all > 32 * vectors) {
    while (cut.cluster < 8 && ceil_div(all, vectors) > int64_t(cut.cluster) * 512) cut.cluster *= 2;
    cut.threads = int(ceil_div(ceil_div(ceil_div(all, vectors), cut.cluster), 32) * 32);
    cut.lanes = cut.threads * cut.cluster;
    cut.held = cut.threads <= 512 && cut.cluster <= max_cluster();
  }
  if (!cut.held) {
    const int64_t tiles = ceil_div(all, 32), slices = ceil_div(count, 64), most = tiles < 1024 ? 1024 / tiles : 1;
    cut.blocks = slices < most ? slices : most;
    if (cut.blocks < 1) cut.blocks = 1;
    return cut;
  }
  const int64_t full = 128 * 1024 / cut.lanes, most = full < 1 ? 1 : full < 512 ? full : 512;
  const int64_t rows = cut.lanes <= 32 ? count * cut.lanes / (4 * cut.threads) : count / 4;  // some rows for each block
  cut.blocks = rows < 1 ? 1 : rows < most ? rows : most;
  return cut;
}

template <class T> int backward(const RowsBackward& a) {
  using C = Compute<T>;
  constexpr int V = vector_cells<T>;
  const int64_t n = a.g.channels;
  const Cut cut = cut_rows<T>(a.g.count, n);
  RowsWithParams<T> f{static_cast<const T*>(a.dy),
                      static_cast<const T*>(a.x),
                      a.mean,
                      a.rstd,
                      a.weight,
                      cut.held ? static_cast<T*>(a.dx) : nullptr,
                      static_cast<C*>(a.work),
                      a.g.count,
                      n,
                      ceil_div(n, V),
                      cut.lanes,
                      aligned16(a.dy) && aligned16(a.x) && (a.dx == nullptr || aligned16(a.dx)) && n % V == 0,
                      a.center};
  int error = 0;
  if (a.g.count == 0) {
  } else if (cut.held) {
    const Shape shape{dim3(unsigned(cut.blocks * cut.cluster)), cut.threads, cut.cluster,
                      size_t(2 * sum_bytes) + size_t(cut.vectors * V * cut.threads) * (2 * sizeof(double) + sizeof(C)),
                      a.stream};
    if (cut.vectors == 1) error = launch(held_rows<T, 1>, shape, f);
    else if constexpr (sizeof(T) > 2) error = launch(held_rows<T, 2>, shape, f);
  } else {
    const int64_t tiles = ceil_div(f.vectors, 32);
    error = launch(
        wide_params<T>,
        Shape{dim3(unsigned(tiles), unsigned(cut.blocks)), 256, 1, size_t(2 * V * 256) * sizeof(double), a.stream}, f);
    if (error == 0 && a.dx != nullptr)  // after the parameters: dx may lie over dy or x
      error = runs_backward({runs_of(a.g),
                             a.type,
                             a.dy,
                             a.x,
                             a.mean,
                             a.rstd,
                             a.weight,
                             a.dx,
                             {},
                             {},
                             a.center,
                             false,
                             nullptr,
                             a.stream});
  }
  if (error != 0) return error;
  const ParamTotals<C> t{f.partial, n, a.g.count == 0 ? 0 : cut.blocks, a.dweight, a.dbias};
  return launch(total_params<C>, Shape{dim3(unsigned(ceil_div(n, 32))), 256, 1, 512 * sizeof(double), a.stream}, t);
}

bool cells_with_params(const RowsBackward& a) {
  return (a.dweight.p != nullptr || a.dbias.p != nullptr) && a.g.span == 1 && a.g.period == 1 && a.g.channels > 1;
}
RunsBackward as_runs(const RowsBackward& a) {
  return {runs_of(a.g), a.type,    a.dy,    a.x,      a.mean, a.rstd, a.weight,
          a.dx,         a.dweight, a.dbias, a.center, false,  a.work, a.stream};
}

}  // namespace

size_t rows_backward_workspace(const RowsBackward& a) {
  if (!cells_with_params(a)) return runs_backward_workspace(as_runs(a));
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    return size_t(cut_rows<T>(a.g.count, a.g.channels).blocks * 2 * a.g.channels) * sizeof(Compute<T>);
  });
}

int rows_backward(const RowsBackward& a) {
  if (!cells_with_params(a)) return runs_backward(as_runs(a));
  return with_type(a.type, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace nf::cuda
