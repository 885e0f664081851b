// SPDX-License-Identifier: BSD-3-Clause
#include "device.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

namespace nf::cuda {

// An error that leaves the device usable is reported once, by us, and not again by the next library that asks.
static int done(cudaError_t e) {
  if (e != cudaSuccess) cudaGetLastError();
  return int(e);
}
static cudaStream_t handle(Stream s) { return static_cast<cudaStream_t>(s); }

int count_devices(int* count) {
  *count = 0;
  const int error = done(cudaGetDeviceCount(count));
  return error == 0 && *count == 0 ? int(cudaErrorNoDevice) : error;
}

int describe_device(int device, DeviceInfo* info) {
  cudaDeviceProp p;
  if (const int error = done(cudaGetDeviceProperties(&p, device))) return error;
  std::snprintf(info->name, sizeof info->name, "%s", p.name);
  info->major = p.major, info->minor = p.minor;
  return 0;
}

const char* error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
bool is_out_of_memory(int error) { return error == int(cudaErrorMemoryAllocation); }

int current_device(int* device) { return done(cudaGetDevice(device)); }
int use_device(int device) { return done(cudaSetDevice(device)); }

int device_of(const void* address, int* device) {
  cudaPointerAttributes a;
  *device = -1;
  if (const int error = done(cudaPointerGetAttributes(&a, address))) return error;
  if (a.type == cudaMemoryTypeDevice || a.type == cudaMemoryTypeManaged) *device = a.device;
  return 0;
}

int synchronize_device() { return done(cudaDeviceSynchronize()); }

int own_stream(int device, Stream* stream) {
  constexpr int most = 64;
  static std::mutex lock;
  static cudaStream_t streams[most];
  if (device < 0 || device >= most) return int(cudaErrorInvalidDevice);
  std::lock_guard<std::mutex> guard(lock);
  if (streams[device] == nullptr) {
    int before = 0;
    if (const int error = current_device(&before)) return error;
    if (const int error = use_device(device)) return error;
    const int error = done(cudaStreamCreate(&streams[device]));
    use_device(before);
    if (error) return error;
  }
  *stream = streams[device];
  return 0;
}

int set_mark(Stream stream, void** mark) {
  cudaEvent_t event;
  if (const int error = done(cudaEventCreateWithFlags(&event, cudaEventDisableTiming))) return error;
  if (const int error = done(cudaEventRecord(event, handle(stream)))) {
    cudaEventDestroy(event);
    return error;
  }
  *mark = event;
  return 0;
}

bool mark_passed(void* mark) {
  // Asking must not spoil a graph capture that is under way in this thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const int error = done(cudaEventQuery(static_cast<cudaEvent_t>(mark)));
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != 0) return false;
  cudaEventDestroy(static_cast<cudaEvent_t>(mark));
  return true;
}

int wait_for(Stream later, Stream earlier) {
  void* mark;
  if (const int error = set_mark(earlier, &mark)) return error;
  const int error = done(cudaStreamWaitEvent(handle(later), static_cast<cudaEvent_t>(mark), 0));
  cudaEventDestroy(static_cast<cudaEvent_t>(mark));  // goes when it has been passed
  return error;
}

int allocate(size_t bytes, Stream stream, void** memory) {
  return done(cudaMallocAsync(memory, bytes > 0 ? bytes : 1, handle(stream)));
}
int release(void* memory, Stream stream) { return done(cudaFreeAsync(memory, handle(stream))); }
int fill_zero(void* memory, size_t bytes, Stream stream) {
  return done(cudaMemsetAsync(memory, 0, bytes, handle(stream)));
}

static int copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, Stream stream) {
  if (const int error = done(cudaMemcpyAsync(to, from, bytes, kind, handle(stream)))) return error;
  return done(cudaStreamSynchronize(handle(stream)));
}
int copy_in(void* device, const void* host, size_t bytes, Stream stream) {
  return copy(device, host, bytes, cudaMemcpyHostToDevice, stream);
}
int copy_out(void* host, const void* device, size_t bytes, Stream stream) {
  return copy(host, device, bytes, cudaMemcpyDeviceToHost, stream);
}

int dlpack_device_type() { return 2; }
bool takes_dlpack_device(int type) { return type == 2 || type == 13; }  // CUDA, its managed memory

const char* toolkit() {
#define NF_TEXT(x) #x
#define NF_VALUE(x) NF_TEXT(x)
  return NF_VALUE(__CUDACC_VER_MAJOR__) "." NF_VALUE(__CUDACC_VER_MINOR__);
}
const char* architectures() { return NF_CUDA_ARCHITECTURES; }

}  // namespace nf::cuda
