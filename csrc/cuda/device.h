// SPDX-License-Identifier: BSD-3-Clause
// What the bindings need of the CUDA runtime: devices, streams, memory in stream order, error texts.
//
// Functions that return an int return 0 or the number of a CUDA error. A test build puts other functions of these names
// in their place, whose device is the host's memory.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace nf::cuda {

struct DeviceInfo {
  char name[256];
  int major, minor;  // compute capability
};
int count_devices(int* count);
int describe_device(int device, DeviceInfo* info);
const char* error_name(int error);
const char* error_text(int error);
bool is_out_of_memory(int error);

int current_device(int* device);
int use_device(int device);
// Of an address on a device; of anything else the number is -1.
int device_of(const void* address, int* device);
int synchronize_device();

// A stream of our own per device, for arrays whose library names none. It is ordered with the legacy default stream,
// which such libraries use, and with nothing else.
int own_stream(int device, Stream* stream);
// What is enqueued on `later` from now on waits for what is on `earlier` now.
int wait_for(Stream later, Stream earlier);
// A mark on a stream, and whether all before it is done. A mark that has been passed is gone.
int set_mark(Stream stream, void** mark);
bool mark_passed(void* mark);

int allocate(size_t bytes, Stream stream, void** memory);
int release(void* memory, Stream stream);
int fill_zero(void* memory, size_t bytes, Stream stream);
// These two return when the copy is done.
int copy_in(void* device, const void* host, size_t bytes, Stream stream);
int copy_out(void* host, const void* device, size_t bytes, Stream stream);

// The DLPack number of our kind of device, and the kinds whose memory the kernels can read.
int dlpack_device_type();
bool takes_dlpack_device(int type);

// What this was built with: the toolkit as "13.0", the architectures as "80-real;90".
const char* toolkit();
const char* architectures();

}  // namespace nf::cuda
