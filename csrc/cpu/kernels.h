// SPDX-License-Identifier: BSD-3-Clause
// What the kernels take and the table in which each instruction set offers them.
//
// Kernels know pointers and geometry, nothing of Python or of validation. A kernel returns false when it could
// not get its workspace; it has then written nothing.
#pragma once

#include "../dtype.h"
#include "../geometry.h"

namespace nf {

// Pointers of one call. `weight` and `bias` are contiguous and of the compute type (float; double for float64
// data), statistics are of the stat type (TypeOf; double for AffineMap), parameter gradients of `gradient_type`.
// Null means: not given, or not wanted.

struct RowsForward {
  Rows g;
  const void* x;
  void* y;
  const void *weight, *bias;
  void *mean, *rstd;
  double eps;
  bool center;  // false: RMS norm, the mean is taken as zero
};

struct RowsBackward {
  Rows g;
  const void *dy, *x;
  const void *mean, *rstd;
  const void* weight;
  void* dx;
  void *dweight, *dbias;
  DType gradient_type;
  bool center;
};

struct ColumnsForward {
  Columns g;
  const void* x;
  void* y;
  const void *weight, *bias;
  void *mean, *rstd;
  double *batch_mean, *batch_var;  // unrounded, the variance biased: for the running average of batch norm
  double eps;
  bool center;
};

struct ColumnsBackward {
  Columns g;
  const void *dy, *x;
  const void *mean, *rstd;
  const void* weight;
  void* dx;
  void *dweight, *dbias;
  DType gradient_type;
  bool center;
  bool frozen;  // the statistics are constants: no gradient flows through them
};

// y = (x - mean)*rstd*weight + bias with given statistics, one per channel (batch norm in evaluation).
struct AffineMap {
  Columns g;
  const void* x;
  void* y;
  const double *mean, *var;
  double eps;
  double* rstd;  // written as well
  const void *weight, *bias;
};

struct Kernels {
  const char* name;
  bool (*rows_forward[4])(const RowsForward&);  // indexed by DType
  bool (*rows_backward[4])(const RowsBackward&);
  bool (*columns_forward[4])(const ColumnsForward&);
  bool (*columns_backward[4])(const ColumnsBackward&);
  bool (*affine[4])(const AffineMap&);
};

// The table of the code path chosen at import (dispatch.cpp).
const Kernels& kernels();

struct CodePaths {
  const char* names[4];
  int count;
};
CodePaths built_code_paths();
// Chooses the table, honouring NORMFAST_ISA. Returns null, or a message saying why the request was refused.
const char* choose_kernels();

}  // namespace nf
