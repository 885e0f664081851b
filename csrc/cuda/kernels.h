// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA kernels take: the structures of cpu/kernels.h, with pointers to device memory.
//
// Kernels know pointers and geometry, nothing of Python or of validation. Everything is enqueued on `stream`; nothing
// is allocated, queried or waited for. Each function returns 0 or the number of a CUDA error. The functions named
// *_workspace say how much device memory (aligned to 256 bytes, uninitialised) the call needs at `work`.
//
// No CUDA header is needed here: bindings/cuda.cpp and the emulation of tests/cuda/host/ include it alike.
#pragma once

#include <cstddef>

#include "../dtype.h"
#include "../geometry.h"

namespace nf::cuda {

using Stream = void*;  // a cudaStream_t

// A contiguous vector of parameters or statistics in any of the four types. Null: not given, or not wanted.
struct Given {
  const void* p = nullptr;
  DType type = DType::f32;
};
struct Wanted {
  void* p = nullptr;
  DType type = DType::f32;
};

// The running averages of batch norm, updated in place: running = (1 - weight)*running + weight*batch.
struct Running {
  Wanted mean, var;
  double weight = 0;
  int ddof = 1;
};

// `type` is that of x, y, dy and dx. Statistics going out are float for 16-bit x, else double.

struct RowsForward {
  Rows g;
  DType type;
  const void* x;
  void* y;
  Given weight, bias;
  void *mean, *rstd;
  double eps;
  bool center;  // false: RMS norm, the mean is taken as zero
  Stream stream;
};

struct RowsBackward {
  Rows g;
  DType type;
  const void *dy, *x;
  Given mean, rstd, weight;
  void* dx;
  Wanted dweight, dbias;
  bool center;
  void* work;
  Stream stream;
};

struct ColumnsForward {
  Columns g;
  DType type;
  const void* x;
  void* y;
  Given weight, bias;
  void *mean, *rstd;
  Running running;
  double eps;
  bool center;
  void* work;
  Stream stream;
};

struct ColumnsBackward {
  Columns g;
  DType type;
  const void *dy, *x;
  Given mean, rstd, weight;
  void* dx;
  Wanted dweight, dbias;
  bool center;
  bool frozen;  // the statistics are constants: no gradient flows through them
  void* work;
  Stream stream;
};

// Batch norm in evaluation: y = (x - mean)/sqrt(var + eps)*weight + bias, one statistic per channel. `mean_out` and
// `rstd_out`, if not null, receive the statistics.
struct AffineMap {
  Columns g;
  DType type;
  const void* x;
  void* y;
  Given mean, var, weight, bias;
  void *mean_out, *rstd_out;
  double eps;
  Stream stream;
};

// Copies between arrays of any strides, converting. What the caller gives in other strides or types than the kernels
// take is copied first; results likewise afterwards.
enum class CellType : int { f64, f32, f16, bf16, i8, i16, i32, i64, u8, u16, u32, u64, boolean };
constexpr int max_dims = 64;
struct CopyCells {
  int nd;
  int64_t dims[max_dims];
  const void* from;
  int64_t from_strides[max_dims];  // bytes
  CellType from_type;
  void* to;
  int64_t to_strides[max_dims];
  DType to_type;
  Stream stream;
};

int rows_forward(const RowsForward&);
int rows_backward(const RowsBackward&);
int columns_forward(const ColumnsForward&);
int columns_backward(const ColumnsBackward&);
int affine(const AffineMap&);
int copy_cells(const CopyCells&);

size_t rows_backward_workspace(const RowsBackward&);
size_t columns_forward_workspace(const ColumnsForward&);
size_t columns_backward_workspace(const ColumnsBackward&);

}  // namespace nf::cuda
