// SPDX-License-Identifier: BSD-3-Clause
// The scalar formulas: moments from shifted sums, and the coefficients of the affine maps, forward and backward.
// Computed in double and rounded once. Written so that NaN takes the careful branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NF_HD static inline __host__ __device__
#else
#define NF_HD static inline __attribute__((always_inline))
#endif

namespace nf {

// a + b = sum + error, exactly (Knuth).
struct Exact {
  double sum, error;
};
NF_HD Exact two_sum(double a, double b) {
  const double s = a + b;
  const double t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

// The mean is held as hi + lo: rounding it to one number of the data's precision is where nearly all of the
// error of the usual implementations comes from.
struct Moments {
  double mean, mean_lo, var;
  bool good;  // false: the shift was badly placed or the squares left the range; do it again the careful way
};

// From s = sum(x - k) and q = sum((x - k)^2) over n cells. `single`: the sums were formed in float32.
// With 4 (mean - k)^2 <= var cancellation costs q a quarter of its last bit.
NF_HD Moments moments_from_sums(double s, double q, double k, double n, bool single) {
  const double dm = s / n;
  const double var = q / n - dm * dm;
  const Exact mean = two_sum(k, dm);
  const double least = single ? 0x1p-90 : 0x1p-900, most = single ? 0x1p+100 : 0x1p+900;
  const bool good = 4 * dm * dm <= var && q >= least && q <= most;
  return {mean.sum, mean.error, var, good};
}

// Rounding may leave a variance just below zero. (NaN stays NaN.)
NF_HD double not_negative(double var) { return var < 0 ? 0.0 : var; }
NF_HD double rstd_of(double var, double eps) { return 1.0 / sqrt(not_negative(var) + eps); }

// Batch norm in evaluation takes the variance as it is given.
NF_HD double rstd_given(double var, double eps) { return 1.0 / sqrt(var + eps); }

// The running average; `weight` is that of the new value. The variance entering it is divided by n - ddof.
NF_HD double running_average(double running, double batch, double weight) {
  return (1 - weight) * running + weight * batch;
}
NF_HD double sample_variance(double var, double n, int ddof) { return ddof == 0 ? var : var * (n / (n - ddof)); }

// Constant data with eps = 0 have rstd = inf; their centred cells are exactly 0, and so is the output before bias.
NF_HD double usable(double rstd) { return rstd == HUGE_VAL ? 0.0 : rstd; }

// Can the map of a float32 computation hold these, with room for a weight of 10^10 either way? (NaN can: it spoils
// the row in any type.)
NF_HD bool fits_single(double mean, double rstd) {
  return !(fabs(mean) > 1e37) && !(rstd > 1e28 && rstd < HUGE_VAL) && !(rstd < 1e-28);
}

// Backward multiplies by rstd twice, so its range is narrower.
NF_HD bool fits_single_backward(double mean, double rstd) {
  return !(fabs(mean) > 1e37) && !(rstd > 1e16 && rstd < HUGE_VAL) && !(rstd < 1e-16);
}

// The number that is subtracted from x before anything is multiplied: the mean, rounded to steps of 2^-14 of the spread
// (of the power of two above it). It has few bits, so the subtraction is exact for most cells, and the rest of the mean,
// which goes into the constant of the map, is so small that its rounding is too: errors stay in proportion to the cells,
// and weights may differ by large factors. Where the cells tell of no spread - constant ones, or nearly, beside eps -
// and where `var` is not given as theirs, it is the mean itself, rounded: x - hi is 0 for constant cells.
template <class C> NF_HD C centre(double mean, double var, double rstd) {
  uint64_t u;
  std::memcpy(&u, &rstd, 8);
  u = (uint64_t(0x7fe) << 52) - (u & (uint64_t(0x7ff) << 52));
  double spread;  // the power of two above
  std::memcpy(&spread, &u, 8);
  const double magnet = spread * 0x1.8p38;  // adding and subtracting 1.5 * 2^52 steps of spread / 2^14 rounds to them
  const double k = (mean + magnet) - magnet;
  return static_cast<C>(((var * rstd * rstd > 0.5) & (mean * mean < var * 0x1p40)) ? k : mean);
}

// xhat = fma(x - hi, rs, t)
template <class C> struct Hat {
  C hi, rs, t;
};
template <class C> NF_HD Hat<C> hat(double mean, double mean_lo, double var, double rstd) {
  const C hi = centre<C>(mean, var, rstd);
  const double lo = (mean - static_cast<double>(hi)) + mean_lo;
  const double r = usable(rstd);
  return {hi, static_cast<C>(r), static_cast<C>(-lo * r)};
}

// y = fma(x - hi, s, t), for a run of cells that share weight and bias
template <class C> struct Affine {
  C hi, s, t;
};
template <class C>
NF_HD Affine<C> affine(double mean, double mean_lo, double var, double rstd, double weight, double bias) {
  const C hi = centre<C>(mean, var, rstd);
  const double lo = (mean - static_cast<double>(hi)) + mean_lo;
  const double s = usable(rstd) * weight;
  return {hi, static_cast<C>(s), static_cast<C>(bias - lo * s)};
}

// The shift for sums of dy*(x - shift): the mean to within a thousandth of the spread, on a grid of that step. A mean
// taken to the last bit has bits below those of x; subtracting it would round every cell the same way, and a dy of one
// sign would add that up. What the shift leaves of the mean is taken off in double.
template <class C> NF_HD C slope_shift(double mean, double rstd) {
  const double spread = 1 / rstd;
  uint64_t u;
  std::memcpy(&u, &spread, 8);
  u &= uint64_t(0x7ff) << 52;  // the power of two below
  double step;
  std::memcpy(&step, &u, 8);
  const double magnet = step * 0x1.8p42;  // adding and subtracting 1.5 * 2^52 steps of spread / 2^10 rounds to the grid
  const double k = (mean + magnet) - magnet;
  return static_cast<C>(k - k == 0 ? k : mean);
}

// dx = rstd*(g - c1 - xhat*c2) with g = dy*weight, c1 = mean(g), c2 = mean(g*xhat).
// For cells with their own weight: dx = fma(g, rs, fma(xhat, a, b)).
template <class C> struct Slope {
  C a, b;
};
template <class C> NF_HD Slope<C> slope(double rstd, double c1, double c2) {
  const double r = usable(rstd);
  return {static_cast<C>(-c2 * r), static_cast<C>(-c1 * r)};
}

// For a run of cells with one weight: dx = fma(dy, p, fma(x - hi, q, t)).
template <class C> struct Gradient {
  C hi, p, q, t;
};
template <class C> NF_HD Gradient<C> gradient(double mean, double rstd, double weight, double c1, double c2) {
  const C hi = static_cast<C>(mean);
  const double lo = mean - static_cast<double>(hi);
  const double r = usable(rstd);
  const double q = -c2 * r * r;
  return {hi, static_cast<C>(weight * r), static_cast<C>(q), static_cast<C>(-c1 * r - q * lo)};
}

}  // namespace nf
