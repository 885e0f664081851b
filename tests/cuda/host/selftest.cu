// SPDX-License-Identifier: BSD-3-Clause
// Small kernels, right and wrong ones, by which test_emulator.py tries the emulation. nvcc compiles them too.
#include "cuda/platform.cuh"

namespace nf::cuda {
namespace {

constexpr unsigned all = 0xffffffffu;

// What is left out of a kernel. The right one is `nothing`.
enum Fault {
  nothing,
  no_wait,             // for the asynchronous copies
  no_block_barrier,    // between writing and reading a block's partial sums
  no_cluster_barrier,  // between writing and reading a cluster's
  no_reuse_barrier,    // between reading partial sums and writing the next over them
  no_last_barrier,     // before a block may end
  faults
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(all, v, bits);
  return v;
}

template <Fault fault> __device__ __forceinline__ float cluster_sum(float v, float* partial, float* total) {
  const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) partial[warp] = v;
  if constexpr (fault != no_block_barrier) __syncthreads();
  float sum = 0;
  for (int i = 0; i < warps; ++i) sum += partial[i];
  if (threadIdx.x == 0) *total = sum;
  if constexpr (fault != no_cluster_barrier) cluster_sync();
  sum = 0;
  for (int rank = 0; rank < cluster_size(); ++rank) sum += *cluster_peer(total, rank);
  if constexpr (fault != no_reuse_barrier) cluster_sync();
  return sum;
}

// Layer norm without parameters, a cluster for each row, its cells in shared memory.
template <class T, Fault fault>
__global__ void __launch_bounds__(256) layer_norm(const T* x, T* y, int64_t n, float eps) {
  constexpr int cells = 16 / sizeof(T);
  const int64_t share = n / cluster_size(), row = blockIdx.x / cluster_size();
  x += row * n + cluster_rank() * share;
  y += row * n + cluster_rank() * share;
  float* partial = reinterpret_cast<float*>(shared_memory());
  T* own = reinterpret_cast<T*>(shared_memory() + 256);
  for (int64_t i = int64_t(threadIdx.x) * cells; i < share; i += int64_t(blockDim.x) * cells)
    copy_async16(own + i, x + i);
  copy_async_commit();
  if constexpr (fault != no_wait) copy_async_wait<0>();

  float sum = 0;
  for (int64_t i = int64_t(threadIdx.x) * cells; i < share; i += int64_t(blockDim.x) * cells) {
    const Bits16 bits = load16_shared(own + i);
    T v[cells];
    memcpy(v, &bits, 16);
#pragma unroll
    for (int k = 0; k < cells; ++k) sum += to_f32(v[k]);
  }
  const float mean = cluster_sum<fault>(sum, partial, partial + 32) / float(n);
  sum = 0;
  for (int64_t i = int64_t(threadIdx.x) * cells; i < share; i += int64_t(blockDim.x) * cells) {
    const Bits16 bits = load16_shared(own + i);
    T v[cells];
    memcpy(v, &bits, 16);
#pragma unroll
    for (int k = 0; k < cells; ++k) {
      const float d = to_f32(v[k]) - mean;
      sum = fmaf(d, d, sum);
    }
  }
  // The second sum may lie over the first one: only the barriers of cluster_sum keep them apart. The last of these
  // barriers also keeps the blocks alive.
  constexpr Fault second = fault == no_last_barrier ? no_reuse_barrier : fault == no_reuse_barrier ? nothing : fault;
  const float var = cluster_sum<second>(sum, partial, partial + 32) / float(n);
  const float rstd = static_cast<float>(rstd_of(var, eps));
  for (int64_t i = int64_t(threadIdx.x) * cells; i < share; i += int64_t(blockDim.x) * cells) {
    const Bits16 bits = load16_shared(own + i);
    T v[cells];
    memcpy(v, &bits, 16);
#pragma unroll
    for (int k = 0; k < cells; ++k) v[k] = from_f32<T>((to_f32(v[k]) - mean) * rstd);
    Bits16 out;
    memcpy(&out, v, 16);
    store16(y + i, out);
  }
}

template <class T>
int run_layer_norm(const void* x, void* y, int64_t rows, int64_t n, int threads, int cluster, int fault) {
  using Kernel = void (*)(const T*, T*, int64_t, float);
  static constexpr Kernel kernels[faults] = {layer_norm<T, nothing>,          layer_norm<T, no_wait>,
                                             layer_norm<T, no_block_barrier>, layer_norm<T, no_cluster_barrier>,
                                             layer_norm<T, no_reuse_barrier>, layer_norm<T, no_last_barrier>};
  Shape shape;
  shape.grid = dim3(unsigned(rows * cluster));
  shape.threads = threads;
  shape.cluster = cluster;
  shape.shared = 256 + size_t(n / cluster) * sizeof(T);
  return launch(kernels[fault], shape, static_cast<const T*>(x), static_cast<T*>(y), n, 1e-5f);
}

// One row of `out` for each kind of exchange.
__global__ void exchanges(int* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __shfl_sync(all, lane, 5);
  out[32 + lane] = __shfl_sync(all, lane, 9, 8);  // lane 1 of the eight
  out[64 + lane] = __shfl_xor_sync(all, lane, 3);
  out[96 + lane] = __shfl_xor_sync(all, lane, 8, 8);  // groups after one's own cannot be read, those before can
  out[128 + lane] = __shfl_down_sync(all, lane, 3);
  out[160 + lane] = __shfl_down_sync(all, lane, 3, 8);
  out[192 + lane] = int(__ballot_sync(all, lane % 3 == 0));
  out[224 + lane] = __any_sync(all, lane == 7) * 2 + __all_sync(all, lane < 31);
  // Halves that never meet.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int i = 0; i < (lane < 16 ? 1 : 3); ++i) sum += __shfl_xor_sync(half, sum, 1 << i, 16);
  out[256 + lane] = sum;
  out[288 + lane] = int(__shfl_sync(all, 0x100000000ll * lane, 3) >> 32) + int(__shfl_sync(all, lane + 0.5, 2) * 2);
}

// Two groups of copies under way.
__global__ void copies(const float* x, float* out) {
  float* own = reinterpret_cast<float*>(shared_memory());
  const int i = int(threadIdx.x);
  copy_async4(own + i, x + i);
  copy_async_commit();
  copy_async4(own + 32 + i, x + 32 + i);
  copy_async_commit();
  out[i] = own[i];
  copy_async_wait<1>();
  out[32 + i] = own[i];
  out[64 + i] = own[32 + i];
  copy_async_wait<0>();
  out[96 + i] = own[32 + i];
}

// A block that a peer writes to before it has begun.
__global__ void early_write(float* out) {
  float* own = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) *cluster_peer(own, 1 - cluster_rank()) = 1;
  cluster_sync();
  if (threadIdx.x == 0) out[cluster_rank()] = *own;
}

// Block 0 may have ended when block 1 reads from it.
__global__ void late_read(float* out) {
  float* own = reinterpret_cast<float*>(shared_memory());
  float* peer = cluster_peer(own, 0);
  own[threadIdx.x] = 1;
  cluster_sync();
  if (cluster_rank() == 1) out[threadIdx.x] = peer[threadIdx.x];
}

// Mistakes that are errors.
enum Mistake {
  divergent_block,
  divergent_lines,
  returned_early,
  divergent_warp,
  absent_lane,
  foreign_lane,
  misaligned_load,
  misaligned_copy,
  beyond_shared,
  beyond_global,
  beyond_cluster,
  never_waited,
  before_shared
};

__global__ void mistaken(int mistake, const float* x, float* out) {
  char* own = shared_memory();
  const int i = int(threadIdx.x);
  Bits16 v = {};
  switch (mistake) {
    case divergent_block:
      if (i < 32) {
        __syncthreads();
      } else {
        cluster_sync();
        __syncthreads();
      }
      break;
    case divergent_lines:
      if (i < 32) {
        __syncthreads();
        out[i] = 1;
      } else {
        __syncthreads();
      }
      break;
    case returned_early:
      if (i == 63) return;
      __syncthreads();
      break;
    case divergent_warp:
      if (i % 32 < 16) __syncwarp();
      __syncthreads();
      break;
    case absent_lane:
      if (i % 32 == 31) return;
      out[i] = __shfl_down_sync(all, float(i), 1);
      break;
    case foreign_lane:
      if (i % 32 < 16) out[i] = __shfl_xor_sync(0xffffu, float(i), 16);
      break;
    case misaligned_load: v = load16(x + 1); break;
    case misaligned_copy: copy_async8(own, x + 1); break;
    case beyond_shared: own[256] = 1; break;
    case beyond_global: v = load16(x + 64); break;
    case beyond_cluster: cluster_peer(own, cluster_size())[0] = 1; break;
    case never_waited:
      copy_async4(own + 4 * i, x + i);
      copy_async_commit();
      break;
    case before_shared: copy_async4(own - 4, x); break;
    default: break;
  }
  if (v.w[0] == 12345) out[i] = 1;
}

}  // namespace
}  // namespace nf::cuda

#define NF_EXPORT extern "C" __attribute__((visibility("default")))

// type: 0 float, 1 f16, 2 bf16
NF_EXPORT int nf_selftest_layer_norm(int type, const void* x, void* y, int64_t rows, int64_t n, int threads,
                                     int cluster, int fault) {
  using namespace nf::cuda;
  if (type == 0) return run_layer_norm<float>(x, y, rows, n, threads, cluster, fault);
  if (type == 1) return run_layer_norm<nf::f16>(x, y, rows, n, threads, cluster, fault);
  return run_layer_norm<nf::bf16>(x, y, rows, n, threads, cluster, fault);
}

NF_EXPORT int nf_selftest_exchanges(int* out) {
  using namespace nf::cuda;
  return launch(exchanges, Shape{dim3(1), 32}, out);
}

NF_EXPORT int nf_selftest_copies(const float* x, float* out) {
  using namespace nf::cuda;
  return launch(copies, Shape{dim3(1), 32, 1, 256}, x, out);
}

NF_EXPORT int nf_selftest_early_write(float* out) {
  using namespace nf::cuda;
  return launch(early_write, Shape{dim3(2), 32, 2, 4}, out);
}

NF_EXPORT int nf_selftest_late_read(float* out) {
  using namespace nf::cuda;
  return launch(late_read, Shape{dim3(2), 32, 2, 128}, out);
}

NF_EXPORT int nf_selftest_mistaken(int mistake, const float* x, float* out) {
  using namespace nf::cuda;
  return launch(mistaken, Shape{dim3(2), 64, 2, 256}, mistake, x, out);
}

NF_EXPORT int nf_selftest_launch(unsigned x, unsigned y, unsigned z, int threads, int cluster, size_t shared) {
  using namespace nf::cuda;
  return launch(mistaken, Shape{dim3(x, y, z), threads, cluster, shared}, -1, static_cast<const float*>(nullptr),
                static_cast<float*>(nullptr));
}
