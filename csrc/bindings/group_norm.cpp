// SPDX-License-Identifier: BSD-3-Clause
// Group norm and instance norm: instance norm is group norm with a channel to a group.
#include <optional>
#include <vector>

#include "plans.h"

namespace nf {
namespace {

// x with its sample axis first in memory; anything else is copied to C order.
void put_samples_first(Source& x) {
  if (x.nd() == 0 || x.order.axis[0] == 0) return;
  make_c_order(x);
}

PyObject* forward(const char* fn, PyObject* x_obj, PyObject* groups_obj, PyObject* w_obj, PyObject* b_obj,
                  PyObject* axis_obj, PyObject* eps_obj, PyObject* out, PyObject* stats_obj) {
  Source x = take_source(fn, "x", x_obj);
  const int axis = take_channel_axis(fn, axis_obj, x);
  const npy_intp channels = x.dim(axis), groups = take_groups(fn, groups_obj, channels);
  const double eps = take_eps(fn, eps_obj);
  const Match match(axis);
  const Param w = take_param(fn, "weight", w_obj, x, 1, &channels, nullptr, match.text);
  const Param b = take_param(fn, "bias", b_obj, x, 1, &channels, nullptr, match.text);
  const bool stats = take_bool(fn, "return_stats", stats_obj);
  Source work{Ref::borrow(x.given.get()), Ref::borrow(x.array.get()), x.order, x.dtype, x.copied};
  put_samples_first(work);
  const bool moved = work.array.get() != x.array.get();
  const GroupPlan p = group_plan(fn, work, axis, groups);
  const Input inputs[] = {{x.given.get(), "x", true}, {w.given.get(), "weight", false}, {b.given.get(), "bias", false}};
  Result y(fn, out, x, inputs, 3);
  Results results(stats ? 3 : 0);
  const npy_intp stat_dims[2] = {p.samples, groups};
  Ref mean, rstd;
  if (stats) mean = new_stat(x.dtype, 2, stat_dims, nullptr), rstd = new_stat(x.dtype, 2, stat_dims, nullptr);
  void* mean_data = stats ? PyArray_DATA(mean.array()) : nullptr;
  void* rstd_data = stats ? PyArray_DATA(rstd.array()) : nullptr;
  void* y_data = moved ? PyArray_DATA(work.array.array()) : y.data();  // the copy is ours to overwrite
  if (p.samples * groups > 0) {
    const bool ok = without_gil(x.bytes(), [&] {
      if (p.by_rows)
        return kernels().rows_forward[int(x.dtype)](
            {p.rows, work.data(), y_data, w.data, b.data, mean_data, rstd_data, eps, true});
      return kernels().columns_forward[int(x.dtype)](
          {p.columns, work.data(), y_data, w.data, b.data, mean_data, rstd_data, nullptr, nullptr, eps, true});
    });
    if (!ok) out_of_memory();
  }
  if (moved && PyArray_CopyInto(y.array(), work.array.array()) < 0) throw Failure{};
  Ref result = y.finish();
  if (!stats) return result.release();
  Ref items[3] = {std::move(result), std::move(mean), std::move(rstd)};
  return results.fill(items);
}

PyObject* backward(const char* fn, bool instance, PyObject* dy_obj, PyObject* x_obj, PyObject* mean_obj,
                   PyObject* rstd_obj, PyObject* w_obj, PyObject* axis_obj, PyObject* needs_obj, PyObject* out) {
  Source x = take_source(fn, "x", x_obj);
  const int axis = take_channel_axis(fn, axis_obj, x);
  const Ref dy_given = as_array(fn, "dy", dy_obj), dy_like = take_like(fn, "dy", dy_given.get(), x);
  const npy_intp channels = x.dim(axis);
  // The number of groups is told by the statistics.
  const npy_intp groups =
      instance ? channels : groups_of(fn, as_array(fn, "mean", mean_obj).array(), x.dim(0), channels);
  const npy_intp stat_dims[2] = {x.dim(0), groups};
  const Stat mean = take_stat(fn, "mean", mean_obj, 2, stat_dims, nullptr, stat_type(x.dtype));
  const Stat rstd = take_stat(fn, "rstd", rstd_obj, 2, stat_dims, nullptr, stat_type(x.dtype));
  const Match match(axis);
  const Param w = take_param(fn, "weight", w_obj, x, 1, &channels, nullptr, match.text);
  const int needs = take_needs(fn, needs_obj, w_obj != Py_None, true);
  if (out != Py_None && !(needs & need_x)) refuse_out(fn);
  Source work{Ref::borrow(x.given.get()), Ref::borrow(x.array.get()), x.order, x.dtype, x.copied};
  put_samples_first(work);
  const bool moved = work.array.get() != x.array.get();
  const Ref dy = moved ? Ref::checked(PyArray_NewCopy(dy_like.array(), NPY_CORDER)) : Ref::borrow(dy_like.get());
  const GroupPlan p = group_plan(fn, work, axis, groups);
  const Input inputs[] = {{dy_given.get(), "dy", true},
                          {x.given.get(), "x", true},
                          {mean.given.get(), "mean", false},
                          {rstd.given.get(), "rstd", false},
                          {w.given.get(), "weight", false}};
  std::optional<Result> dx;
  if (needs & need_x) dx.emplace(fn, out, x, inputs, 5);
  PyArray_Descr* descr = w.descr != nullptr ? w.descr : PyArray_DESCR(x.array.array());
  ParamGradient dweight, dbias;
  if (needs & need_weight) dweight = ParamGradient(descr, 1, &channels, nullptr, x.size() == 0);
  if (needs & need_bias) dbias = ParamGradient(descr, 1, &channels, nullptr, x.size() == 0);
  Results results(3);
  const DType gradient_type = needs & need_weight ? dweight.type() : dbias.type();
  void* dx_data = !(needs & need_x) ? nullptr : moved ? PyArray_DATA(work.array.array()) : dx->data();
  if (p.samples * groups > 0 && needs != 0) {
    const bool ok = without_gil(x.bytes(), [&] {
      const void* g = PyArray_DATA(dy.array());
      if (p.by_rows)
        return kernels().rows_backward[int(x.dtype)]({p.rows, g, work.data(), mean.data, rstd.data, w.data, dx_data,
                                                      dweight.data(), dbias.data(), gradient_type, true});
      return kernels().columns_backward[int(x.dtype)]({p.columns, g, work.data(), mean.data, rstd.data, w.data, dx_data,
                                                       dweight.data(), dbias.data(), gradient_type, true, false});
    });
    if (!ok) out_of_memory();
  }
  if (moved && dx && PyArray_CopyInto(dx->array(), work.array.array()) < 0) throw Failure{};
  Ref items[3];
  if (dx) items[0] = dx->finish();
  items[1] = dweight.finish(), items[2] = dbias.finish();
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

}  // namespace nf
