// SPDX-License-Identifier: BSD-3-Clause
// CUDA's vocabulary for a host compiler, so that the kernels run and are tested without a GPU. Included by
// csrc/cuda/platform.cuh, never by itself.
//
// Every thread of a cluster is a fiber; one cluster runs at a time; a fiber runs until it must wait (engine.cpp). What
// is stricter than a GPU, on purpose:
//   - shared memory is NaN bytes when a block begins and again as soon as its last thread has returned
//   - an asynchronous copy fills its destination with NaN bytes when issued and happens at its wait
//   - barriers must be reached by all threads that they wait for, at the same line of the source
//   - a warp operation may name no lane that has returned, and read no lane that is not named
//   - vector accesses and copies must be aligned, copies must go to the block's own shared memory
// A violation ends the launch with an error; emulation::last_error() says what happened and where.
//
// What it cannot show: speed, weak memory ordering, the rounding of the device's own functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// The running thread's. Set at every switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace nf::cuda::emulation {

enum Error { invalid_value = 1, invalid_configuration = 9, misaligned_address = 716, launch_failure = 719 };

// 0: threads take turns in order. Anything else: an order drawn from the seed, with switches at every memory access.
void set_schedule(uint64_t seed);
void set_max_cluster(int n);
const char* last_error();

// A place in the source of a kernel.
struct Place {
  const char* file;
  int line;
};

// Ends the launch; does not return.
[[noreturn]] void fail(Error error, const char* format, ...) __attribute__((format(printf, 2, 3)));

extern bool hostile;
void maybe_switch();
inline void touch() {
  if (hostile) maybe_switch();
}

template <int bytes> inline void check_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail(misaligned_address, "%s of %d bytes at the address %p", what, bytes, p);
}

void block_barrier(Place);
char* shared_memory();
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int groups);
void* cluster_peer(void* p, int rank);

// An operation of a warp. Completed by the last lane to arrive.
enum class Operation { sync, shuffle, vote };
uint64_t warp_operation(Operation, unsigned mask, uint64_t value, int source, int kind, Place);
int lane();
void check_width(int width);

// One operation for each way of choosing the lane to read.
template <class T> T shuffle(unsigned mask, T v, int source, int kind, Place place) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "not a type that CUDA shuffles");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = warp_operation(Operation::shuffle, mask, bits, source, kind * 16 + int(sizeof v), place);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

int launch(const void* kernel, const Shape&, void (*call)(void*), void* with);

}  // namespace nf::cuda::emulation

// ---- CUDA's own names ----------------------------------------------------------------------------------------------

#define NF_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(NF_PLACE) { nf::cuda::emulation::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, NF_PLACE) {
  using namespace nf::cuda::emulation;
  warp_operation(Operation::sync, mask, 0, lane(), 0, {file, line});
}

template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32, NF_PLACE) {
  using namespace nf::cuda::emulation;
  check_width(width);
  return shuffle(mask, v, (lane() & ~(width - 1)) + (source & (width - 1)), 0, {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, NF_PLACE) {
  using namespace nf::cuda::emulation;
  check_width(width);
  const int source = lane() ^ bits, last = lane() | (width - 1);
  return shuffle(mask, v, source < 0 || source > last ? lane() : source, 1, {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, NF_PLACE) {
  using namespace nf::cuda::emulation;
  check_width(width);
  const int64_t source = int64_t(lane()) + delta, last = lane() | (width - 1);
  return shuffle(mask, v, source > last ? lane() : int(source), 2, {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, NF_PLACE) {
  using namespace nf::cuda::emulation;
  check_width(width);
  const int64_t source = int64_t(lane()) - delta, first = lane() & ~(width - 1);
  return shuffle(mask, v, source < first ? lane() : int(source), 3, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, NF_PLACE) {
  using namespace nf::cuda::emulation;
  return unsigned(warp_operation(Operation::vote, mask, predicate != 0, lane(), 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, NF_PLACE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, NF_PLACE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

template <class T> inline T min(T a, T b) { return std::is_floating_point<T>::value ? T(fmin(a, b)) : b < a ? b : a; }
template <class T> inline T max(T a, T b) { return std::is_floating_point<T>::value ? T(fmax(a, b)) : a < b ? b : a; }
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __clz(int i) { return i == 0 ? 32 : __builtin_clz(unsigned(i)); }
inline int __ffs(int i) { return __builtin_ffs(i); }
inline float __uint_as_float(unsigned u) { return nf::bits_to_float(u); }
inline unsigned __float_as_uint(float f) { return nf::float_to_bits(f); }

namespace nf::cuda {

// ---- platform.cuh's names --------------------------------------------------------------------------------------

inline char* shared_memory() { return emulation::shared_memory(); }
int cluster_rank();
int cluster_size();
void cluster_sync(NF_PLACE);
template <class T> T* cluster_peer(T* p, int rank) {
  return static_cast<T*>(emulation::cluster_peer(const_cast<std::remove_const_t<T>*>(p), rank));
}

inline Bits16 load16(const void* p) {
  emulation::touch();
  emulation::check_aligned<16>(p, "load");
  Bits16 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Bits16 load16_shared(const void* p) { return load16(p); }
inline Bits16 load16_param(const void* p) { return load16(p); }
inline void store16(void* p, Bits16 v) {
  emulation::touch();
  emulation::check_aligned<16>(p, "store");
  std::memcpy(p, &v, 16);
}
inline void store16_shared(void* p, Bits16 v) { store16(p, v); }

template <class T> T load1(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "one cell of 2, 4 or 8 bytes");
  emulation::touch();
  emulation::check_aligned<sizeof(T)>(p, "load");
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T> T load_param(const T* p) { return load1(p); }
template <class T> void store1(T* p, T v) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "one cell of 2, 4 or 8 bytes");
  emulation::touch();
  emulation::check_aligned<sizeof(T)>(p, "store");
  std::memcpy(p, &v, sizeof v);
}

inline void copy_async16(void* shared, const void* global) {
  emulation::check_aligned<16>(shared, "copy");
  emulation::check_aligned<16>(global, "copy");
  emulation::copy_async(shared, global, 16);
}
inline void copy_async8(void* shared, const void* global) {
  emulation::check_aligned<8>(shared, "copy");
  emulation::check_aligned<8>(global, "copy");
  emulation::copy_async(shared, global, 8);
}
inline void copy_async4(void* shared, const void* global) {
  emulation::check_aligned<4>(shared, "copy");
  emulation::check_aligned<4>(global, "copy");
  emulation::copy_async(shared, global, 4);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int N> void copy_async_wait() { emulation::copy_async_wait(N); }

inline float to_f32(float v) { return v; }
inline float to_f32(f16 v) { return to_float(v); }
inline float to_f32(bf16 v) { return to_float(v); }
template <class T> T from_f32(float v) { return static_cast<T>(v); }
template <> inline f16 from_f32<f16>(float v) { return to_f16(v); }
template <> inline bf16 from_f32<bf16>(float v) { return to_bf16(v); }
template <class T> uint32_t pack_f32(float low, float high) {
  static_assert(sizeof(T) == 2, "two cells in one word");
  return uint32_t(from_f32<T>(high).bits) << 16 | from_f32<T>(low).bits;
}

int max_cluster();
constexpr int max_shared() { return 227 << 10; }

template <class... P, class... A> int launch(void (*kernel)(P...), const Shape& shape, A... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(P(args)...)};
  // Every thread has its own copy of the arguments.
  return emulation::launch(
      reinterpret_cast<const void*>(kernel), shape,
      [](void* with) {
        const Call& c = *static_cast<const Call*>(with);
        std::apply(c.kernel, c.args);
      },
      &call);
}

}  // namespace nf::cuda
