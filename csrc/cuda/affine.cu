// SPDX-License-Identifier: BSD-3-Clause
// The affine map with statistics that are there already: batch norm in evaluation, and the second half of the norms of
// columns.cu.
//
//   y = (x - mean)*rstd*weight + bias
//   traffic    x is read once, y is written once: 2 s bytes per cell of size s
#include "maps.cuh"

namespace nf::cuda {
namespace {

template <class T> struct ForwardStats {
  ForwardMap a;

  __device__ __forceinline__ Moments moments(int64_t i, double* rstd) const {
    if (a.table != nullptr) {
      const Statistic s = a.table[i];
      *rstd = s.rstd;
      return {s.mean, s.mean_lo, s.var, true};
    }
    const double var = param<double>(a.var, i);
    *rstd = rstd_given(var, a.eps);
    // The variance is not that of these cells: the 0 makes `centre` take the mean itself.
    return {param<double>(a.mean, i), 0, 0, true};
  }
  __device__ __forceinline__ void write(int64_t i) const {
    if (a.mean_out == nullptr && a.rstd_out == nullptr) return;
    double rstd;
    const Moments m = moments(i, &rstd);
    write_stat<T>(a.mean_out, i, m.mean), write_stat<T>(a.rstd_out, i, rstd);
  }

  template <class C> struct Coefficients {
    C hi, s, t;
  };
  // Of one column: statistic i, parameter p. Along the rows (see columns.cu) the parameters come with each row.
  template <class C> __device__ __forceinline__ Coefficients<C> at(int64_t i, int64_t p, bool along_rows) const {
    double rstd;
    const Moments m = moments(i, &rstd);
    const double w = along_rows ? 1.0 : param_or<double>(a.weight, p, 1.0);
    const double b = along_rows ? 0.0 : param_or<double>(a.bias, p, 0.0);
    const Affine<C> k = nf::affine<C>(m.mean, m.mean_lo, m.var, rstd, w, b);
    return {k.hi, k.s, k.t};
  }
  __device__ __forceinline__ bool fits(int64_t i) const {
    double rstd;
    const Moments m = moments(i, &rstd);
    return fits_single(m.mean, rstd);
  }
  template <class C> __device__ __forceinline__ C apply(C x, C, const Coefficients<C>& k) const {
    return fused(x - k.hi, k.s, k.t);
  }
};

}  // namespace

int map_forward(const ForwardMap& a) {
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    return launch_map<T, ForwardStats<T>, false>(a.g, ForwardStats<T>{a}, a.x, nullptr, a.y, a.weight, a.bias,
                                                 a.stream);
  });
}

int affine(const AffineMap& a) {
  Columns g = a.g;
  if (g.outer * g.span == 0) g.outer = 0, g.span = g.param_span = 1;  // no cells, but perhaps statistics
  return map_forward(
      {g, a.type, a.x, a.y, a.weight, a.bias, nullptr, a.mean, a.var, a.mean_out, a.rstd_out, a.eps, a.stream});
}

}  // namespace nf::cuda
