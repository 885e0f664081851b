// SPDX-License-Identifier: BSD-3-Clause
// What the kernels share: vectors of cells, parameters of any type, sums over warps, blocks and clusters in a fixed
// order, and the moments of cells that lie on the chip.
#pragma once

#include "platform.cuh"

namespace nf::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;

// ---- vectors of cells -----------------------------------------------------------------------------------------------
// A thread handles cells in vectors of 16 bytes. Which cells form a vector depends on the geometry alone; whether it is
// moved by one access or cell by cell depends on the alignment, and changes no bit.

template <class T> constexpr int vector_cells = int(16 / sizeof(T));
template <class T> using Compute = typename TypeOf<T>::compute;

template <class T> __device__ __forceinline__ Compute<T> widen(T v) {
  if constexpr (sizeof(T) == 8) return v;
  else return to_f32(v);
}

template <class T, class C> __device__ __forceinline__ void unpack(Bits16 bits, C (&v)[vector_cells<T>]) {
  T cells[vector_cells<T>];
  memcpy(cells, &bits, 16);
#pragma unroll
  for (int i = 0; i < vector_cells<T>; ++i) v[i] = C(widen(cells[i]));
}

// One rounding, also from double to 16 bits.
template <class T> __device__ __forceinline__ Bits16 pack(const float (&v)[vector_cells<T>]) {
  Bits16 bits;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits.w[i] = pack_f32<T>(v[2 * i], v[2 * i + 1]);
  } else {
    T cells[vector_cells<T>];
#pragma unroll
    for (int i = 0; i < vector_cells<T>; ++i) cells[i] = static_cast<T>(v[i]);
    memcpy(&bits, cells, 16);
  }
  return bits;
}
template <class T> __device__ __forceinline__ Bits16 pack(const double (&v)[vector_cells<T>]) {
  T cells[vector_cells<T>];
#pragma unroll
  for (int i = 0; i < vector_cells<T>; ++i) cells[i] = Cast<T>::from(v[i]);
  Bits16 bits;
  memcpy(&bits, cells, 16);
  return bits;
}

// The first k cells at p; the others are zero bits.
template <class T> __device__ __forceinline__ Bits16 load_cells(const T* p, int k, bool aligned) {
  if (aligned && k == vector_cells<T>) return load16(p);
  T cells[vector_cells<T>];
#pragma unroll
  for (int i = 0; i < vector_cells<T>; ++i) {
    cells[i] = T{};
    if (i < k) cells[i] = load1(p + i);
  }
  Bits16 bits;
  memcpy(&bits, cells, 16);
  return bits;
}
template <class T> __device__ __forceinline__ void store_cells(T* p, int k, bool aligned, Bits16 bits) {
  if (aligned && k == vector_cells<T>) return store16(p, bits);
  T cells[vector_cells<T>];
  memcpy(cells, &bits, 16);
#pragma unroll
  for (int i = 0; i < vector_cells<T>; ++i)
    if (i < k) store1(p + i, cells[i]);
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

template <class T> __device__ __forceinline__ void store_chosen(T* p, unsigned chosen, Bits16 bits) {
  T cells[vector_cells<T>];
  memcpy(cells, &bits, 16);
#pragma unroll
  for (int i = 0; i < vector_cells<T>; ++i)
    if ((chosen >> i & 1) != 0) store1(p + i, cells[i]);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- parameters and statistics of any type --------------------------------------------------------------------------

template <class C> __device__ __forceinline__ C param(Given g, int64_t i) {
  switch (g.type) {
    case DType::f64: return C(load_param(static_cast<const double*>(g.p) + i));
    case DType::f32: return C(load_param(static_cast<const float*>(g.p) + i));
    case DType::f16: return C(to_f32(load_param(static_cast<const f16*>(g.p) + i)));
    default: return C(to_f32(load_param(static_cast<const bf16*>(g.p) + i)));
  }
}
template <class C> __device__ __forceinline__ C param_or(Given g, int64_t i, C otherwise) {
  return g.p != nullptr ? param<C>(g, i) : otherwise;
}

template <int V, class P, class C>
__device__ __forceinline__ void params_of(const void* p, int64_t i, int k, C (&out)[V]) {
  const P* at = static_cast<const P*>(p) + i;
  constexpr int pieces = int(V * sizeof(P) / 16);
  if constexpr (pieces > 0) {
    if (k == V && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      P cells[V];
#pragma unroll
      for (int j = 0; j < pieces; ++j) {
        const Bits16 bits = load16_param(reinterpret_cast<const char*>(at) + 16 * j);
        memcpy(reinterpret_cast<char*>(cells) + 16 * j, &bits, 16);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = C(widen(cells[j]));
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (j < k) out[j] = C(widen(load_param(at + j)));
}
// Parameters i .. i + k - 1; the rest of `out` and, without parameters, all of it is `otherwise`.
template <int V, class C> __device__ __forceinline__ void params(Given g, int64_t i, int k, C (&out)[V], C otherwise) {
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = otherwise;
  if (g.p == nullptr) return;
  switch (g.type) {
    case DType::f64: return params_of<V, double>(g.p, i, k, out);
    case DType::f32: return params_of<V, float>(g.p, i, k, out);
    case DType::f16: return params_of<V, f16>(g.p, i, k, out);
    default: return params_of<V, bf16>(g.p, i, k, out);
  }
}

__device__ __forceinline__ void put(Wanted w, int64_t i, double v) {
  switch (w.type) {
    case DType::f64: static_cast<double*>(w.p)[i] = v; break;
    case DType::f32: static_cast<float*>(w.p)[i] = static_cast<float>(v); break;
    case DType::f16: static_cast<f16*>(w.p)[i] = Cast<f16>::from(v); break;
    default: static_cast<bf16*>(w.p)[i] = Cast<bf16>::from(v); break;
  }
}

template <class T> __device__ __forceinline__ void write_stat(void* p, int64_t i, double v) {
  using S = typename TypeOf<T>::stat;
  if (p != nullptr) static_cast<S*>(p)[i] = static_cast<S>(v);
}

// ---- sums -----------------------------------------------------------------------------------------------------------
// The cells of a vector are added in a float32 tree, vectors in double: then in one order, whatever is scheduled when.

template <int N, class C> __device__ __forceinline__ double tree_sum(const C (&v)[N]) {
  C t[N];
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = v[i];
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) t[i] = t[i] + t[i + width];
  return double(t[0]);
}

struct Two {
  double a, b;
};

// Over `lanes` neighbouring lanes, a power of two; every lane gets the sum.
__device__ __forceinline__ double lane_sum(double v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(all_lanes, v, step, 32);
  return v;
}
struct LaneSum {
  int lanes;
  __device__ __forceinline__ Two operator()(Two v) const { return {lane_sum(v.a, lanes), lane_sum(v.b, lanes)}; }
  __device__ __forceinline__ bool first() const { return int(threadIdx.x) % lanes == 0; }
  // Rows of one warp must stay together: what one of them needs, all do.
  __device__ __forceinline__ bool any(bool p) const { return __any_sync(all_lanes, p) != 0; }
};

constexpr int most_warps = 32;
// Shared memory of one sum over a block and its cluster: a pair per warp, and the block's own.
constexpr int sum_bytes = int((most_warps + 1) * sizeof(Two));

// Over the threads of a block, then over the blocks of its cluster in the order of their ranks. Every sum has a place
// of its own in shared memory, so that none waits for the readers of the one before.
struct ClusterSum {
  Two* place;
  __device__ __forceinline__ bool first() const { return cluster_rank() == 0 && threadIdx.x == 0; }
  __device__ __forceinline__ bool any(bool p) const { return p; }  // the same in all threads
  __device__ __forceinline__ Two operator()(Two v) {
    const int warps = int(blockDim.x) / 32;
    v = {lane_sum(v.a, 32), lane_sum(v.b, 32)};
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = v;
    __syncthreads();
    v = {0, 0};
    for (int i = 0; i < warps; ++i) v.a += place[i].a, v.b += place[i].b;
    if (cluster_size() > 1) {
      if (threadIdx.x == 0) place[most_warps] = v;
      cluster_sync();
      v = {0, 0};
      for (int i = 0; i < cluster_size(); ++i) {
        const Two* peer = cluster_peer(place + most_warps, i);
        v.a += peer->a, v.b += peer->b;
      }
    }
    place += most_warps + 1;
    return v;
  }
};

// ---- moments of cells on the chip -----------------------------------------------------------------------------------

// `each(f)` calls f(cells, k) for every vector of this thread, k of its cells counting; `sum` adds over all threads.
// Two passes: the mean of differences to `pilot`, any cell of the data, then the squares about it. Data that float32
// cannot square are done again in double.
template <class T, class C, class Each, class Sum>
__device__ __forceinline__ Moments moments_in(Each each, Sum& sum, double pilot, double n, bool center) {
  constexpr int V = vector_cells<T>;
  Exact mean{0, 0};
  if (center) {
    double s = 0;
    const C k0 = C(pilot);
    each([&](Bits16 bits, int k) {
      C d[V];
      unpack<T>(bits, d);
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = i < k ? d[i] - k0 : C(0);
      s += tree_sum(d);
    });
    mean = two_sum(pilot, sum({s, 0}).a / n);
  }
  double s = 0;
  const C k1 = C(mean.sum);
  each([&](Bits16 bits, int k) {
    C d[V];
    unpack<T>(bits, d);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      d[i] = i < k ? d[i] - k1 : C(0);
      d[i] = d[i] * d[i];
    }
    s += tree_sum(d);
  });
  const double q = sum({s, 0}).a, off = (mean.sum - double(k1)) + mean.error;
  const bool good = sizeof(C) == 8 || (q >= 0x1p-90 && q <= 0x1p+100);
  return {mean.sum, mean.error, q / n - off * off, good};
}

template <class T, class Each, class Sum>
__device__ __forceinline__ Moments chip_moments(Each each, Sum& sum, double pilot, double n, bool center) {
  const Moments m = moments_in<T, Compute<T>>(each, sum, pilot, n, center);
  if constexpr (sizeof(T) == 8) return m;
  if (!sum.any(!m.good)) return m;
  const Moments careful = moments_in<T, double>(each, sum, pilot, n, center);
  return m.good ? m : careful;
}
constexpr int moment_sums = 4;

// ---- whole numbers --------------------------------------------------------------------------------------------------

// Division by a number that is the same for the whole launch. Exact for dividends below 2^31; beyond, and for large
// divisors, the ordinary division.
struct Divider {
  uint32_t by = 1, factor = 0, shift = 0;
  int64_t wide = 1;
  Divider() = default;
  Divider(int64_t divisor, int64_t most) : wide(divisor) {
    by = most < (int64_t(1) << 31) ? uint32_t(divisor) : 0;
    if (by <= 1) return;
    while ((uint64_t(1) << shift) < by) ++shift;
    factor = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - by)) / by + 1);
  }
  __host__ __device__ __forceinline__ int64_t divide(int64_t n) const {
    if (by == 0) return n / wide;
    if (by == 1) return n;
    const uint64_t low = uint32_t(n);
    return int64_t((((low * factor) >> 32) + low) >> shift);
  }
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t most_blocks = 0x7fffffff;

// Calls f(T{}) with the storage type.
template <class F> auto with_type(DType type, F f) {
  switch (type) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::f16: return f(f16{});
    default: return f(bf16{});
  }
}

}  // namespace
}  // namespace nf::cuda
