// SPDX-License-Identifier: BSD-3-Clause
// The kernels of csrc/cuda/kernels.h as plain loops in double over memory of the host: what the bindings do with arrays
// can then be tested without a device and without the kernels. They also check what kernels may rely on.
#include <cmath>
#include <vector>

#include "cuda/device.h"
#include "formula.h"
#include "plain_device.h"

namespace nf::cuda {
namespace {

constexpr int misused = 999;

double load(const void* p, CellType type, int64_t i) {
  switch (type) {
    case CellType::f64: return static_cast<const double*>(p)[i];
    case CellType::f32: return static_cast<const float*>(p)[i];
    case CellType::f16: return to_float(static_cast<const f16*>(p)[i]);
    case CellType::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    case CellType::i8: return static_cast<const int8_t*>(p)[i];
    case CellType::i16: return static_cast<const int16_t*>(p)[i];
    case CellType::i32: return static_cast<const int32_t*>(p)[i];
    case CellType::i64: return double(static_cast<const int64_t*>(p)[i]);
    case CellType::u8: return static_cast<const uint8_t*>(p)[i];
    case CellType::u16: return static_cast<const uint16_t*>(p)[i];
    case CellType::u32: return static_cast<const uint32_t*>(p)[i];
    case CellType::u64: return double(static_cast<const uint64_t*>(p)[i]);
    case CellType::boolean: return static_cast<const uint8_t*>(p)[i] != 0;
  }
  return 0;
}
double load(const void* p, DType type, int64_t i) { return load(p, CellType(int(type)), i); }
double load(const Given& g, int64_t i, double otherwise) { return g.p == nullptr ? otherwise : load(g.p, g.type, i); }

void store(void* p, DType type, int64_t i, double v) {
  if (p == nullptr) return;
  switch (type) {
    case DType::f64: static_cast<double*>(p)[i] = v; break;
    case DType::f32: static_cast<float*>(p)[i] = float(v); break;
    case DType::f16: static_cast<f16*>(p)[i] = Cast<f16>::from(v); break;
    case DType::bf16: static_cast<bf16*>(p)[i] = Cast<bf16>::from(v); break;
  }
}
void store(const Wanted& w, int64_t i, double v) { store(w.p, w.type, i, v); }
DType stat(DType x) { return x == DType::f32 || x == DType::f64 ? DType::f64 : DType::f32; }

// Any geometry: the cells and parameters of each statistic.
struct Cells {
  int64_t statistics, cells, parameters;
  std::vector<int64_t> cell, parameter;  // by statistic

  explicit Cells(const Rows& g) : statistics(g.count), cells(g.channels * g.span), parameters(g.period * g.channels) {
    for (int64_t r = 0; r < g.count; ++r)
      for (int64_t c = 0; c < g.channels; ++c)
        for (int64_t s = 0; s < g.span; ++s) {
          cell.push_back((r * g.channels + c) * g.span + s);
          parameter.push_back(r % g.period * g.channels + c);
        }
  }
  explicit Cells(const Columns& g) : statistics(g.batch * g.channels), cells(g.outer * g.span) {
    parameters = g.param_span == 0 ? g.outer : g.channels * g.span / (g.param_span > 0 ? g.param_span : 1);
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t c = 0; c < g.channels; ++c)
        for (int64_t o = 0; o < g.outer; ++o)
          for (int64_t s = 0; s < g.span; ++s) {
            cell.push_back(((b * g.outer + o) * g.channels + c) * g.span + s);
            parameter.push_back(g.param_span == 0 ? o : (c * g.span + s) / g.param_span);
          }
  }
};

template <class A> Moments moments(const A& a, const Cells& g, int64_t k) {
  double mean = 0, var = 0;
  const int64_t *cell = g.cell.data() + k * g.cells, n = g.cells;
  const double pilot = a.center ? load(a.x, a.type, cell[0]) : 0;
  if (a.center) {
    for (int64_t i = 0; i < n; ++i) mean += load(a.x, a.type, cell[i]) - pilot;
    mean /= double(n);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double d = load(a.x, a.type, cell[i]) - pilot - mean;
    var += d * d;
  }
  const Exact sum = two_sum(pilot, mean);
  return {sum.sum, sum.error, var / double(n), true};
}

template <class A> void normalise(const A& a, const Cells& g, int64_t k, const Moments& m, double rstd) {
  for (int64_t i = k * g.cells; i < (k + 1) * g.cells; ++i) {
    const double d = (load(a.x, a.type, g.cell[i]) - m.mean) - m.mean_lo;
    const double xhat = d == 0 ? 0 : d * usable(rstd);
    store(a.y, a.type, g.cell[i], xhat * load(a.weight, g.parameter[i], 1) + load(a.bias, g.parameter[i], 0));
  }
}

template <class A> int forward(const A& a, const Running& running) {
  const Cells g(a.g);
  for (int64_t k = 0; k < g.statistics; ++k) {
    const Moments m = moments(a, g, k);
    const double rstd = rstd_of(m.var, a.eps);
    normalise(a, g, k, m, rstd);
    store(a.mean, stat(a.type), k, m.mean + m.mean_lo);
    store(a.rstd, stat(a.type), k, rstd);
    if (running.mean.p == nullptr) continue;
    const double var = sample_variance(m.var, double(g.cells), running.ddof);
    store(running.mean, k,
          running_average(load(running.mean.p, running.mean.type, k), m.mean + m.mean_lo, running.weight));
    store(running.var, k, running_average(load(running.var.p, running.var.type, k), var, running.weight));
  }
  return 0;
}

template <class A> int backward(const A& a, bool frozen) {
  const Cells g(a.g);
  std::vector<double> dweight(size_t(g.parameters)), dbias(size_t(g.parameters)), xhat(size_t(g.cells)), slope(xhat);
  for (int64_t k = 0; k < g.statistics; ++k) {
    const double mean = a.center ? load(a.mean, k, 0) : 0, rstd = usable(load(a.rstd, k, 0));
    double c1 = 0, c2 = 0;
    for (int64_t j = 0; j < g.cells; ++j) {
      const int64_t i = k * g.cells + j, p = g.parameter[i];
      const double dy = load(a.dy, a.type, g.cell[i]);
      xhat[j] = (load(a.x, a.type, g.cell[i]) - mean) * rstd;
      slope[j] = dy * load(a.weight, p, 1);
      c1 += slope[j] / double(g.cells), c2 += slope[j] * xhat[j] / double(g.cells);
      dweight[p] += dy * xhat[j], dbias[p] += dy;
    }
    if (frozen) c1 = c2 = 0;
    if (!a.center) c1 = 0;
    for (int64_t j = 0; j < g.cells; ++j)
      store(a.dx, a.type, g.cell[k * g.cells + j], rstd * (slope[j] - c1 - xhat[j] * c2));
  }
  for (int64_t p = 0; p < g.parameters; ++p) store(a.dweight, p, dweight[p]), store(a.dbias, p, dbias[p]);
  return 0;
}

}  // namespace

int rows_forward(const RowsForward& a) {
  note_launch("rows_forward", a.stream);
  return forward(a, {});
}
int rows_backward(const RowsBackward& a) {
  note_launch("rows_backward", a.stream);
  if (!is_workspace(a.work, rows_backward_workspace(a))) return misused;
  return backward(a, false);
}
int columns_forward(const ColumnsForward& a) {
  note_launch("columns_forward", a.stream);
  if (!is_workspace(a.work, columns_forward_workspace(a))) return misused;
  return forward(a, a.running);
}
int columns_backward(const ColumnsBackward& a) {
  note_launch("columns_backward", a.stream);
  if (!is_workspace(a.work, columns_backward_workspace(a))) return misused;
  return backward(a, a.frozen);
}
int affine(const AffineMap& a) {
  note_launch("affine", a.stream);
  const Cells g(a.g);
  for (int64_t k = 0; k < g.statistics; ++k) {
    const double mean = load(a.mean, k, 0), rstd = rstd_given(load(a.var, k, 0), a.eps);
    normalise(a, g, k, {mean, 0, 0, true}, rstd);
    store(a.mean_out, stat(a.type), k, mean), store(a.rstd_out, stat(a.type), k, rstd);
  }
  return 0;
}

int copy_cells(const CopyCells& a) {
  note_launch("copy_cells", a.stream);
  int64_t at[max_dims] = {};
  for (;;) {
    const char* from = static_cast<const char*>(a.from);
    char* to = static_cast<char*>(a.to);
    for (int i = 0; i < a.nd; ++i) from += at[i] * a.from_strides[i], to += at[i] * a.to_strides[i];
    store(to, a.to_type, 0, load(from, a.from_type, 0));
    int i = a.nd - 1;
    while (i >= 0 && ++at[i] == a.dims[i]) at[i--] = 0;
    if (i < 0) return 0;
  }
}

size_t rows_backward_workspace(const RowsBackward&) { return 1000; }
size_t columns_forward_workspace(const ColumnsForward&) { return 500; }
size_t columns_backward_workspace(const ColumnsBackward& a) { return a.frozen ? 0 : 300; }

}  // namespace nf::cuda
