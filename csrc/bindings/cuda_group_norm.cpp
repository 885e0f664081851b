// SPDX-License-Identifier: BSD-3-Clause
// Group norm and instance norm on a device; group_norm.cpp is the same on the host.
#include <optional>

#include "cuda.h"
#include "plans.h"

namespace nf::cuda {
namespace {

// The layout in which the kernels see x: samples first in memory, else C order.
struct Seen {
  Source source;
  const int* order;

  explicit Seen(const Source& x)
      : source{Ref::borrow(x.given.get()), Ref::borrow(x.array.get()), x.order, x.dtype, x.copied} {
    if (source.order.axis[0] != 0) {
      source.order.identity = true;
      for (int i = 0; i < x.nd(); ++i) source.order.axis[i] = i;
    }
    order = source.order.identity ? nullptr : source.order.axis;
  }
  Seen(const Seen&) = delete;
};

PyObject* forward(const char* fn, PyObject* x_obj, PyObject* groups_obj, PyObject* w_obj, PyObject* b_obj,
                  PyObject* axis_obj, PyObject* eps_obj, PyObject* out, PyObject* stats_obj) {
  Call call(fn, x_obj);
  const InputX x = take_input(call, x_obj);
  const DType type = x.source.dtype;
  const int axis = take_channel_axis(fn, axis_obj, x.source);
  const npy_intp channels = x.source.dim(axis), groups = take_groups(fn, groups_obj, channels);
  const double eps = take_eps(fn, eps_obj);
  const Match match(axis);
  const Array w = take_parameter(call, "weight", w_obj, x, 1, &channels, match.text);
  const Array b = take_parameter(call, "bias", b_obj, x, 1, &channels, match.text);
  const bool stats = take_bool(fn, "return_stats", stats_obj);
  const Seen seen(x.source);
  const GroupPlan p = group_plan(fn, seen.source, axis, groups);
  const Input inputs[] = {
      {x.array.view.get(), "x", true}, {w.view.get(), "weight", false}, {b.view.get(), "bias", false}};
  Output y(call, out, x, inputs, 3);

  void* y_data = y.prepare(seen.order);
  const npy_intp stat_dims[2] = {p.samples, groups};
  Results results(stats ? 3 : 0);
  Made mean, rstd;
  if (stats)
    mean = call.make(stat_type(type), 2, stat_dims, nullptr), rstd = call.make(stat_type(type), 2, stat_dims, nullptr);
  if (p.samples * groups > 0) {
    const void* x_data = call.gathered(x.array, seen.order, type);
    const Given weight = given(call, w, nullptr), bias = given(call, b, nullptr);
    if (p.by_rows) {
      call.check(
          rows_forward({p.rows, type, x_data, y_data, weight, bias, mean.data, rstd.data, eps, true, call.stream}));
    } else {
      ColumnsForward a{p.columns, type, x_data, y_data, weight,  bias,       mean.data,
                       rstd.data, {},   eps,    true,   nullptr, call.stream};
      a.work = call.workspace(columns_forward_workspace(a));
      call.check(columns_forward(a));
    }
  }
  Ref result = y.finish();
  if (!stats) return result.release();
  Ref items[3] = {std::move(result), call.hand_over(std::move(mean)), call.hand_over(std::move(rstd))};
  return results.fill(items);
}

PyObject* backward(const char* fn, bool instance, PyObject* dy_obj, PyObject* x_obj, PyObject* mean_obj,
                   PyObject* rstd_obj, PyObject* w_obj, PyObject* axis_obj, PyObject* needs_obj, PyObject* out) {
  Call call(fn, x_obj);
  const InputX x = take_input(call, x_obj);
  const DType type = x.source.dtype;
  const int axis = take_channel_axis(fn, axis_obj, x.source);
  const Array dy = take_like_x(call, "dy", dy_obj, x);
  const npy_intp channels = x.source.dim(axis);
  npy_intp groups = channels;
  if (!instance) {  // told by the statistics
    const Array m = call.take("mean", mean_obj);
    groups = groups_of(fn, m.array(), x.source.dim(0), channels);
  }
  const npy_intp stat_dims[2] = {x.source.dim(0), groups};
  const Array mean = take_statistic(call, "mean", mean_obj, 2, stat_dims);
  const Array rstd = take_statistic(call, "rstd", rstd_obj, 2, stat_dims);
  const Match match(axis);
  const Array w = take_parameter(call, "weight", w_obj, x, 1, &channels, match.text);
  const int needs = take_needs(fn, needs_obj, w_obj != Py_None, true);
  if (out != Py_None && !(needs & need_x)) refuse_out(fn);
  const Seen seen(x.source);
  const GroupPlan p = group_plan(fn, seen.source, axis, groups);
  const Input inputs[] = {{dy.view.get(), "dy", true},
                          {x.array.view.get(), "x", true},
                          {mean.view.get(), "mean", false},
                          {rstd.view.get(), "rstd", false},
                          {w.view.get(), "weight", false}};
  std::optional<Output> dx;
  if (needs & need_x) dx.emplace(call, out, x, inputs, 5);

  const bool empty = p.samples * groups == 0;
  void* dx_data = dx ? dx->prepare(seen.order) : nullptr;
  Results results(3);
  Gradient dweight, dbias;
  if (needs & need_weight) dweight.prepare(call, w ? w.dtype() : type, 1, &channels, nullptr, empty);
  if (needs & need_bias) dbias.prepare(call, w ? w.dtype() : type, 1, &channels, nullptr, empty);
  if (!empty && needs != 0) {
    const void* dy_data = call.gathered(dy, seen.order, type);
    const void* x_data = call.gathered(x.array, seen.order, type);
    const Given m = given(call, mean, nullptr), r = given(call, rstd, nullptr), weight = given(call, w, nullptr);
    if (p.by_rows) {
      RowsBackward a{p.rows,           type,           dy_data, x_data,  m,          r, weight, dx_data,
                     dweight.wanted(), dbias.wanted(), true,    nullptr, call.stream};
      a.work = call.workspace(rows_backward_workspace(a));
      call.check(rows_backward(a));
    } else {
      ColumnsBackward a{p.columns,        type,           dy_data, x_data, m,       r,          weight, dx_data,
                        dweight.wanted(), dbias.wanted(), true,    false,  nullptr, call.stream};
      a.work = call.workspace(columns_backward_workspace(a));
      call.check(columns_backward(a));
    }
  }
  Ref items[3];
  if (dx) items[0] = dx->finish();
  items[1] = dweight.finish(call), items[2] = dbias.finish(call);
  return results.fill(items);
}

PyObject* group_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&] { return forward("group_norm", a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); });
}
PyObject* instance_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&] { return forward("instance_norm", a[0], nullptr, a[1], a[2], a[3], a[4], a[5], a[6]); });
}
PyObject* group_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded(
      [&] { return backward("group_norm_backward", false, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); });
}
PyObject* instance_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded(
      [&] { return backward("instance_norm_backward", true, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); });
}

}  // namespace

PyMethodDef group_norm_methods[] = {NF_METHOD(group_norm, 8),
                                    NF_METHOD(instance_norm, 7),
                                    NF_METHOD(group_norm_backward, 8),
                                    NF_METHOD(instance_norm_backward, 8),
                                    {nullptr, nullptr, 0, nullptr}};

}  // namespace nf::cuda
