// SPDX-License-Identifier: BSD-3-Clause
// The functions of csrc/cuda/kernels.h with flat arguments, for ctypes. A null pointer: not given, or not wanted.
// A type is a DType (copy_cells: also a CellType) as an int. Where `bytes` is given,
// the call only says how much workspace it needs.
#include <cstdlib>
#include <cstring>

#include "cuda/platform.cuh"

#define NF_EXPORT extern "C" __attribute__((visibility("default")))

using namespace nf;
using namespace nf::cuda;

NF_EXPORT void nf_set_schedule(uint64_t seed) { emulation::set_schedule(seed); }
NF_EXPORT void nf_set_max_cluster(int n) { emulation::set_max_cluster(n); }
NF_EXPORT const char* nf_last_error() { return emulation::last_error(); }

// What a device allocation is: aligned to 256 bytes, filled with anything but zeros. To the byte, for the sanitizer.
NF_EXPORT void* nf_allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes) != 0) return nullptr;
  return std::memset(p, 0xff, bytes);
}
NF_EXPORT void nf_free(void* p) { std::free(p); }

#if !defined(NF_SELFTEST_ONLY)

namespace {
Given given(const void* p, int type) { return {p, DType(type)}; }
Wanted wanted(void* p, int type) { return {p, DType(type)}; }
}  // namespace

NF_EXPORT int nf_rows_forward(int64_t count, int64_t channels, int64_t span, int64_t period, int type, const void* x,
                              void* y, const void* weight, int weight_type, const void* bias, int bias_type, void* mean,
                              void* rstd, double eps, int center) {
  return rows_forward({{count, channels, span, period},
                       DType(type),
                       x,
                       y,
                       given(weight, weight_type),
                       given(bias, bias_type),
                       mean,
                       rstd,
                       eps,
                       center != 0,
                       nullptr});
}

NF_EXPORT int nf_rows_backward(int64_t count, int64_t channels, int64_t span, int64_t period, int type, const void* dy,
                               const void* x, const void* mean, int mean_type, const void* rstd, int rstd_type,
                               const void* weight, int weight_type, void* dx, void* dweight, int dweight_type,
                               void* dbias, int dbias_type, int center, void* work, size_t* bytes) {
  const RowsBackward call{{count, channels, span, period},
                          DType(type),
                          dy,
                          x,
                          given(mean, mean_type),
                          given(rstd, rstd_type),
                          given(weight, weight_type),
                          dx,
                          wanted(dweight, dweight_type),
                          wanted(dbias, dbias_type),
                          center != 0,
                          work,
                          nullptr};
  if (bytes == nullptr) return rows_backward(call);
  *bytes = rows_backward_workspace(call);
  return 0;
}

NF_EXPORT int nf_columns_forward(int64_t batch, int64_t outer, int64_t channels, int64_t span, int64_t param_span,
                                 int any_order, int type, const void* x, void* y, const void* weight, int weight_type,
                                 const void* bias, int bias_type, void* mean, void* rstd, void* running_mean,
                                 int running_mean_type, void* running_var, int running_var_type, double running_weight,
                                 int ddof, double eps, int center, void* work, size_t* bytes) {
  const ColumnsForward call{
      {batch, outer, channels, span, param_span, any_order != 0},
      DType(type),
      x,
      y,
      given(weight, weight_type),
      given(bias, bias_type),
      mean,
      rstd,
      {wanted(running_mean, running_mean_type), wanted(running_var, running_var_type), running_weight, ddof},
      eps,
      center != 0,
      work,
      nullptr};
  if (bytes == nullptr) return columns_forward(call);
  *bytes = columns_forward_workspace(call);
  return 0;
}

NF_EXPORT int nf_columns_backward(int64_t batch, int64_t outer, int64_t channels, int64_t span, int64_t param_span,
                                  int any_order, int type, const void* dy, const void* x, const void* mean,
                                  int mean_type, const void* rstd, int rstd_type, const void* weight, int weight_type,
                                  void* dx, void* dweight, int dweight_type, void* dbias, int dbias_type, int center,
                                  int frozen, void* work, size_t* bytes) {
  const ColumnsBackward call{{batch, outer, channels, span, param_span, any_order != 0},
                             DType(type),
                             dy,
                             x,
                             given(mean, mean_type),
                             given(rstd, rstd_type),
                             given(weight, weight_type),
                             dx,
                             wanted(dweight, dweight_type),
                             wanted(dbias, dbias_type),
                             center != 0,
                             frozen != 0,
                             work,
                             nullptr};
  if (bytes == nullptr) return columns_backward(call);
  *bytes = columns_backward_workspace(call);
  return 0;
}

NF_EXPORT int nf_affine(int64_t batch, int64_t outer, int64_t channels, int64_t span, int64_t param_span, int type,
                        const void* x, void* y, const void* mean, int mean_type, const void* var, int var_type,
                        const void* weight, int weight_type, const void* bias, int bias_type, void* mean_out,
                        void* rstd_out, double eps) {
  return affine({{batch, outer, channels, span, param_span, true},
                 DType(type),
                 x,
                 y,
                 given(mean, mean_type),
                 given(var, var_type),
                 given(weight, weight_type),
                 given(bias, bias_type),
                 mean_out,
                 rstd_out,
                 eps,
                 nullptr});
}

// Strides in bytes.
NF_EXPORT int nf_copy_cells(int nd, const int64_t* dims, const void* from, const int64_t* from_strides, int from_type,
                            void* to, const int64_t* to_strides, int to_type) {
  CopyCells call{};
  call.nd = nd;
  for (int i = 0; i < nd; ++i) {
    call.dims[i] = dims[i];
    call.from_strides[i] = from_strides[i];
    call.to_strides[i] = to_strides[i];
  }
  call.from = from;
  call.from_type = CellType(from_type);
  call.to = to;
  call.to_type = DType(to_type);
  return copy_cells(call);
}

#endif
