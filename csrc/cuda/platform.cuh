// SPDX-License-Identifier: BSD-3-Clause
// The vocabulary of the kernels: what CUDA C++ has no portable name for. Under nvcc it is real CUDA; under a host
// compiler the same names, and CUDA's own, come from the emulation (tests/cuda/host/emulation.h), so that every kernel
// source compiles in both worlds.
//
// Clusters exist from compute capability 9.0 on. Code for older devices sees a cluster of one block, and the functions
// that launch ask max_cluster() first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../formula.h"
#include "kernels.h"

#if defined(__CUDACC__)
#define NF_NOINLINE __noinline__
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#else
#define NF_NOINLINE __attribute__((noinline))
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#endif

namespace nf::cuda {

struct alignas(16) Bits16 {
  uint32_t w[4];
};

// A launch. `shared` bytes of dynamic shared memory for each block; `cluster` blocks along x work together.
struct Shape {
  dim3 grid;
  int threads;
  int cluster = 1;
  size_t shared = 0;
  Stream stream = nullptr;
};

}  // namespace nf::cuda

#if !defined(__CUDACC__)
#include "emulation.h"
#else

namespace nf::cuda {

// ---- shared memory and clusters ----------------------------------------------------------------------------------

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char nf_dynamic_shared[];
  return nf_dynamic_shared;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define NF_CLUSTERS 1
#else
#define NF_CLUSTERS 0
#endif

__device__ __forceinline__ int cluster_rank() {
#if NF_CLUSTERS
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if NF_CLUSTERS
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// Every block is a cluster of one when none was asked for. The forms that need not be reached by whole warps at once.
__device__ __forceinline__ void cluster_sync() {
#if NF_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// `p` points into this block's own shared memory. Every peer must have begun, and none may end before the others have
// finished with it: a cluster_sync() before the first access and one after the last.
template <class T> __device__ __forceinline__ T* cluster_peer(T* p, int rank) {
#if NF_CLUSTERS
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  (void)rank;
  return p;
#endif
}

// ---- loads and stores --------------------------------------------------------------------------------------------
// Read once, written once: neither should push parameters out of the L1 cache. The loads may be moved by the compiler;
// what they read must not be written by another thread during the kernel. (The same cell by the same thread may: the
// value stored depends on the value loaded.)

__device__ __forceinline__ Bits16 load16(const void* p) {
  Bits16 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(p));
  return v;
}

__device__ __forceinline__ void store16(void* p, Bits16 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}

// Ordinary accesses, so that they serve the pointers of cluster_peer() too.
__device__ __forceinline__ Bits16 load16_shared(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store16_shared(void* p, Bits16 v) {
  *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

template <class T> __device__ __forceinline__ T load1(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "one cell of 2, 4 or 8 bytes");
  T v;
  if constexpr (sizeof(T) == 2) {
    uint16_t u;
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(u) : "l"(p));
    memcpy(&v, &u, 2);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t u;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(u) : "l"(p));
    memcpy(&v, &u, 4);
  } else {
    uint64_t u;
    asm("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(u) : "l"(p));
    memcpy(&v, &u, 8);
  }
  return v;
}

template <class T> __device__ __forceinline__ void store1(T* p, T v) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "one cell of 2, 4 or 8 bytes");
  if constexpr (sizeof(T) == 2) {
    uint16_t u;
    memcpy(&u, &v, 2);
    asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(p), "h"(u) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t u;
    memcpy(&u, &v, 4);
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(u) : "memory");
  } else {
    uint64_t u;
    memcpy(&u, &v, 8);
    asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(p), "l"(u) : "memory");
  }
}

// Parameters: read by many threads, kept in the caches.
__device__ __forceinline__ Bits16 load16_param(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T> __device__ __forceinline__ T load_param(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "one cell of 2, 4 or 8 bytes");
  T v;
  if constexpr (sizeof(T) == 2) {
    const unsigned short u = __ldg(reinterpret_cast<const unsigned short*>(p));
    memcpy(&v, &u, 2);
  } else if constexpr (sizeof(T) == 4) {
    const unsigned u = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&v, &u, 4);
  } else {
    const unsigned long long u = __ldg(reinterpret_cast<const unsigned long long*>(p));
    memcpy(&v, &u, 8);
  }
  return v;
}

// ---- asynchronous copies, global to shared -----------------------------------------------------------------------
// copy_async_wait<N>() waits until at most the N newest groups that this thread committed are still under way. The
// copies of other threads need a barrier after their wait.

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- conversions: to nearest, ties to even, once; NaN stays NaN --------------------------------------------------

__device__ __forceinline__ float to_f32(float v) { return v; }
__device__ __forceinline__ float to_f32(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
__device__ __forceinline__ float to_f32(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }

template <class T> __device__ __forceinline__ T from_f32(float v) { return static_cast<T>(v); }
template <> __device__ __forceinline__ f16 from_f32<f16>(float v) {
  f16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float v) {
  bf16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}

// Two cells in one word, the first in the low half: one instruction.
template <class T> __device__ __forceinline__ uint32_t pack_f32(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_f32<f16>(float low, float high) {
  uint32_t u;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  return u;
}
template <> __device__ __forceinline__ uint32_t pack_f32<bf16>(float low, float high) {
  uint32_t u;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  return u;
}

// ---- launching ---------------------------------------------------------------------------------------------------

// How many blocks a cluster may have on the current device: 8, or 1 where there are no clusters.
inline int max_cluster() {
  constexpr int devices = 64;
  static signed char known[devices];  // 0: not asked yet. Two threads that ask at once store the same answer.
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= devices) return 1;
  signed char answer = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (answer == 0) {
    int yes = 0;
    if (cudaDeviceGetAttribute(&yes, cudaDevAttrClusterLaunch, device) != cudaSuccess) return 1;
    answer = yes != 0 ? 8 : 1;
    __atomic_store_n(&known[device], answer, __ATOMIC_RELAXED);
  }
  return answer;
}

// Bytes of shared memory that one block may have on the current device.
inline int max_shared() {
  constexpr int devices = 64;
  static int known[devices];
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= devices) return bytes;
  const int answer = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (answer != 0) return answer;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess)
    __atomic_store_n(&known[device], bytes, __ATOMIC_RELAXED);
  return bytes;
}

// More than 48 KiB of shared memory must be asked for, once per kernel and device; once again only for still more.
inline int allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return int(error);
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return 0;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)))
    return int(error);
  most = bytes;
  return 0;
}

// Enqueues a kernel. Returns 0 or the number of a CUDA error. A grid without blocks is no work.
template <class... P, class... A> int launch(void (*kernel)(P...), const Shape& shape, A... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return 0;
  if (const int error = allow_shared(reinterpret_cast<const void*>(kernel), shape.shared)) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;  // older devices refuse the attribute
  return int(cudaLaunchKernelEx(&config, kernel, P(args)...));
}

}  // namespace nf::cuda

#endif
