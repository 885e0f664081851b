// SPDX-License-Identifier: BSD-3-Clause
// Layer norm and RMS norm on a device; layer_norm.cpp is the same on the host.
#include <optional>

#include "cuda.h"
#include "plans.h"

namespace nf::cuda {
namespace {

struct Norm {
  const char* fn;
  bool center;
};

constexpr char match[] = "the normalised axes of x";

// The order of the axes in which the kernels see x. Where the normalised axes fit neither geometry, the kept axes come
// first: each reduction is then a row of a copy.
struct Seen {
  int axis[max_dims];
  const int* order;       // null: C order
  const int* stat_order;  // of the statistics

  Seen(const Source& x, const Axes& axes, const LayerPlan& p) {
    int n = 0;
    if (p.kind == LayerPlan::gathered) {
      for (int i = 0; i < x.nd(); ++i)
        if (!axes.reduced[i]) axis[n++] = i;
      for (int i = 0; i < x.nd(); ++i)
        if (axes.reduced[i]) axis[n++] = i;
      order = axis;
    } else {
      for (int i = 0; i < x.nd(); ++i) axis[i] = x.order.axis[i];
      order = x.order.identity ? nullptr : axis;
    }
    stat_order = stat_permutation(p, x);
  }
  Seen(const Seen&) = delete;
};

PyObject* forward(const Norm& norm, PyObject* x_obj, PyObject* w_obj, PyObject* b_obj, PyObject* axis,
                  PyObject* eps_obj, PyObject* out, PyObject* stats_obj) {
  const char* fn = norm.fn;
  Call call(fn, x_obj);
  const InputX x = take_input(call, x_obj);
  const Source& s = x.source;
  const Axes axes = take_axes(fn, axis, s.nd());
  const LayerPlan p = layer_plan(fn, s, axes);
  const double eps = take_eps(fn, eps_obj);
  const Array w = take_parameter(call, "weight", w_obj, x, p.param_nd, p.param_dims, match);
  const Array b = take_parameter(call, "bias", b_obj, x, p.param_nd, p.param_dims, match);
  const bool stats = take_bool(fn, "return_stats", stats_obj);
  const Input inputs[] = {
      {x.array.view.get(), "x", true}, {w.view.get(), "weight", false}, {b.view.get(), "bias", false}};
  Output y(call, out, x, inputs, 3);

  const Seen seen(s, axes, p);
  void* y_data = y.prepare(seen.order);
  Results results(!stats ? 0 : norm.center ? 3 : 2);
  Made mean, rstd;
  if (stats) {
    if (norm.center) mean = call.make(stat_type(s.dtype), s.nd(), p.stat_dims, seen.stat_order);
    rstd = call.make(stat_type(s.dtype), s.nd(), p.stat_dims, seen.stat_order);
  }
  if (p.count > 0) {
    const void* x_data = call.gathered(x.array, seen.order, s.dtype);
    const Given weight = given(call, w, p.param_permutation()), bias = given(call, b, p.param_permutation());
    if (p.kind == LayerPlan::by_columns) {
      ColumnsForward a{p.columns, s.dtype, x_data, y_data,      weight,  bias,       mean.data,
                       rstd.data, {},      eps,    norm.center, nullptr, call.stream};
      a.work = call.workspace(columns_forward_workspace(a));
      call.check(columns_forward(a));
    } else {
      call.check(rows_forward(
          {p.rows, s.dtype, x_data, y_data, weight, bias, mean.data, rstd.data, eps, norm.center, call.stream}));
    }
  }
  Ref result = y.finish();
  if (!stats) return result.release();
  Ref items[3] = {std::move(result), Ref(), call.hand_over(std::move(rstd))};
  if (norm.center) items[1] = call.hand_over(std::move(mean));
  else std::swap(items[1], items[2]);
  return results.fill(items);
}

PyObject* backward(const Norm& norm, PyObject* dy_obj, PyObject* x_obj, PyObject* mean_obj, PyObject* rstd_obj,
                   PyObject* w_obj, PyObject* axis, PyObject* needs_obj, PyObject* out) {
  const char* fn = norm.fn;
  Call call(fn, x_obj);
  const InputX x = take_input(call, x_obj);
  const Source& s = x.source;
  const Array dy = take_like_x(call, "dy", dy_obj, x);
  const Axes axes = take_axes(fn, axis, s.nd());
  const LayerPlan p = layer_plan(fn, s, axes);
  Array mean;
  if (norm.center) mean = take_statistic(call, "mean", mean_obj, s.nd(), p.stat_dims);
  const Array rstd = take_statistic(call, "rstd", rstd_obj, s.nd(), p.stat_dims);
  const Array w = take_parameter(call, "weight", w_obj, x, p.param_nd, p.param_dims, match);
  const int needs = take_needs(fn, needs_obj, w_obj != Py_None, norm.center);
  if (out != Py_None && !(needs & need_x)) refuse_out(fn);
  const Input inputs[] = {{dy.view.get(), "dy", true},
                          {x.array.view.get(), "x", true},
                          {mean.view.get(), "mean", false},
                          {rstd.view.get(), "rstd", false},
                          {w.view.get(), "weight", false}};
  std::optional<Output> dx;
  if (needs & need_x) dx.emplace(call, out, x, inputs, 5);

  const Seen seen(s, axes, p);
  const DType param_type = w ? w.dtype() : s.dtype;
  void* dx_data = dx ? dx->prepare(seen.order) : nullptr;
  Results results(norm.center ? 3 : 2);
  Gradient dweight, dbias;
  const auto prepare = [&](Gradient& g) {
    g.prepare(call, param_type, p.param_nd, p.param_dims, p.param_permutation(), p.count == 0);
  };
  if (needs & need_weight) prepare(dweight);
  if (needs & need_bias) prepare(dbias);
  if (p.count > 0 && needs != 0) {
    const void* dy_data = call.gathered(dy, seen.order, s.dtype);
    const void* x_data = call.gathered(x.array, seen.order, s.dtype);
    const Given m = given(call, mean, seen.stat_order), r = given(call, rstd, seen.stat_order);
    const Given weight = given(call, w, p.param_permutation());
    if (p.kind == LayerPlan::by_columns) {
      ColumnsBackward a{p.columns, s.dtype,          dy_data,        x_data,      m,     r,       weight,
                        dx_data,   dweight.wanted(), dbias.wanted(), norm.center, false, nullptr, call.stream};
      a.work = call.workspace(columns_backward_workspace(a));
      call.check(columns_backward(a));
    } else {
      RowsBackward a{p.rows,  s.dtype,          dy_data,        x_data,      m,       r,          weight,
                     dx_data, dweight.wanted(), dbias.wanted(), norm.center, nullptr, call.stream};
      a.work = call.workspace(rows_backward_workspace(a));
      call.check(rows_backward(a));
    }
  }
  Ref items[3];
  if (dx) items[0] = dx->finish();
  items[1] = dweight.finish(call), items[2] = dbias.finish(call);
  return results.fill(items);
}

PyObject* layer_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&] { return forward({"layer_norm", true}, a[0], a[1], a[2], a[3], a[4], a[5], a[6]); });
}
PyObject* rms_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&] { return forward({"rms_norm", false}, a[0], a[1], Py_None, a[2], a[3], a[4], a[5]); });
}
PyObject* layer_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded(
      [&] { return backward({"layer_norm_backward", true}, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); });
}
PyObject* rms_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded(
      [&] { return backward({"rms_norm_backward", false}, a[0], a[1], Py_None, a[2], a[3], a[4], a[5], a[6]); });
}

}  // namespace

PyMethodDef layer_norm_methods[] = {NF_METHOD(layer_norm, 7),
                                    NF_METHOD(rms_norm, 6),
                                    NF_METHOD(layer_norm_backward, 8),
                                    NF_METHOD(rms_norm_backward, 7),
                                    {nullptr, nullptr, 0, nullptr}};

}  // namespace nf::cuda
