// SPDX-License-Identifier: BSD-3-Clause
#include "plain_device.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace nf::cuda {
namespace {

std::string log;
int device_now = 0, devices = 2, failure = 0;
std::map<void*, size_t> live;  // blocks allocated in stream order

void note(const std::string& what, Stream stream) {
  log += what + " " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + "\n";
}
Stream stream_of(int device) { return reinterpret_cast<void*>(uintptr_t(100 + device)); }

}  // namespace

void note_launch(const char* kernel, Stream stream) { note(kernel, stream); }

bool is_workspace(void* p, size_t bytes) {
  if (bytes == 0) return true;
  if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 256 != 0) return false;
  std::memset(p, 0xcd, bytes);
  return true;
}

int count_devices(int* count) {
  *count = failure != 0 ? 0 : devices;
  return failure;
}
int describe_device(int device, DeviceInfo* info) {
  std::strcpy(info->name, "host memory");
  info->major = device, info->minor = 0;
  return 0;
}
const char* error_name(int error) { return error == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorOfTheTest"; }
const char* error_text(int) { return "as the test ordered"; }
bool is_out_of_memory(int error) { return error == 2; }

int current_device(int* device) {
  *device = device_now;
  return 0;
}
int use_device(int device) {
  device_now = device;
  note("use_device " + std::to_string(device), nullptr);
  return 0;
}
int device_of(const void*, int* device) {
  *device = 0;
  return 0;
}
int synchronize_device() {
  note("synchronize", nullptr);
  return 0;
}
int own_stream(int device, Stream* stream) {
  *stream = stream_of(device);
  return 0;
}
int wait_for(Stream later, Stream earlier) {
  note("wait_for " + std::to_string(reinterpret_cast<uintptr_t>(earlier)), later);
  return 0;
}
int set_mark(Stream stream, void** mark) {
  note("set_mark", stream);
  *mark = &log;
  return 0;
}
bool mark_passed(void*) { return true; }

int allocate(size_t bytes, Stream stream, void** memory) {
  if (bytes >= size_t(1) << 40) return 2;
  const size_t whole = (bytes / 256 + 1) * 256;
  *memory = std::aligned_alloc(256, whole);
  std::memset(*memory, 0xcd, whole);
  live[*memory] = bytes;
  note("allocate " + std::to_string(device_now), stream);
  return 0;
}
int release(void* memory, Stream stream) {
  note("release " + std::to_string(device_now), stream);
  if (live.erase(memory) == 0) return 1;
  std::free(memory);
  return 0;
}
int fill_zero(void* memory, size_t bytes, Stream stream) {
  note("fill_zero", stream);
  std::memset(memory, 0, bytes);
  return 0;
}
int copy_in(void* device, const void* host, size_t bytes, Stream) {
  std::memcpy(device, host, bytes);
  return 0;
}
int copy_out(void* host, const void* device, size_t bytes, Stream) {
  std::memcpy(host, device, bytes);
  return 0;
}

int dlpack_device_type() { return 1; }
bool takes_dlpack_device(int type) { return type == 1; }
const char* toolkit() { return "none"; }
const char* architectures() { return "host,memory"; }

}  // namespace nf::cuda

// For the tests, through ctypes.
#define NF_TEST extern "C" __attribute__((visibility("default")))
NF_TEST const char* nf_test_log() { return nf::cuda::log.c_str(); }
NF_TEST void nf_test_clear_log() { nf::cuda::log.clear(); }
NF_TEST int nf_test_live() { return int(nf::cuda::live.size()); }
NF_TEST void nf_test_fail(int error) { nf::cuda::failure = error; }
