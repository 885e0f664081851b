// SPDX-License-Identifier: BSD-3-Clause
// The structures of DLPack 1.0, https://dmlc.github.io/dlpack, as far as they are needed to exchange arrays.
#pragma once

#include <cstdint>

namespace nf::dlpack {

struct Device {
  int32_t type, id;
};
enum Code : uint8_t { code_int = 0, code_uint = 1, code_float = 2, code_bfloat = 4, code_complex = 5, code_bool = 6 };
struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t *shape, *strides;  // in elements; null strides: C order
  uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct Version {
  uint32_t major, minor;
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};
constexpr uint64_t flag_read_only = 1, flag_is_copied = 2;

constexpr char name[] = "dltensor", name_versioned[] = "dltensor_versioned";
constexpr char used[] = "used_dltensor", used_versioned[] = "used_dltensor_versioned";

}  // namespace nf::dlpack
