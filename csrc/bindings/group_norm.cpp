// SPDX-License-Identifier: BSD-3-Clause
// Group norm and instance norm: instance norm is group norm with a channel to a group.
#include <cstdio>
#include <optional>
#include <vector>

#include "arrays.h"

namespace nf {
namespace {

// Where sample, channel and the other axes lie in memory.
struct Plan {
  bool by_rows;
  Rows rows;
  Columns columns;
  npy_intp channels, samples, groups;
  int64_t n;
};

// x with its sample axis first in memory; anything else is copied to C order.
void put_samples_first(Source& x) {
  if (x.nd() == 0 || x.order.axis[0] == 0) return;
  make_c_order(x);
}

Plan make_plan(const char* fn, const Source& x, int channel_axis, npy_intp groups) {
  Plan p;
  p.samples = x.dim(0), p.channels = x.dim(channel_axis), p.groups = groups;
  int64_t before = 1, after = 1;
  bool seen = false, rows = true;
  for (int i = 1; i < x.nd(); ++i) {
    const int axis = x.order.axis[i];
    if (axis == channel_axis) seen = true;
    else if (seen) after *= x.dim(axis);
    else before *= x.dim(axis), rows = false;
  }
  const int64_t each = groups > 0 ? p.channels / groups : 0;
  p.n = before * after * each;
  // Without channels, instance norm has no groups, and nothing to reduce.
  if (p.n == 0 && groups > 0)
    fail(PyExc_ValueError, "%s: x must have elements in every group, got shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
  p.by_rows = rows;
  if (rows) p.rows = {p.samples * groups, each, after, groups};
  else p.columns = {p.samples, before, groups, each * after, after, false};
  return p;
}

int take_channel_axis(const char* fn, PyObject* obj, const Source& x) {
  if (x.nd() < 2)
    fail(PyExc_ValueError, "%s: x must have at least 2 dimensions (samples, channels, ...), got shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
  const int axis = take_axis(fn, obj, x.nd());
  if (axis == 0) fail(PyExc_ValueError, "%s: channel_axis must not be axis 0, that of the samples, got %R", fn, obj);
  return axis;
}

// groups: null for instance norm
npy_intp take_groups(const char* fn, PyObject* obj, npy_intp channels) {
  if (obj == nullptr) return channels;
  const int64_t groups = take_int(fn, "num_groups", obj);
  if (groups < 1) fail(PyExc_ValueError, "%s: num_groups must be at least 1, got %R", fn, obj);
  if (channels % groups != 0)
    fail(PyExc_ValueError, "%s: num_groups must divide the number of channels, %zd, got %R", fn, Py_ssize_t(channels),
         obj);
  return npy_intp(groups);
}

struct Match {
  char text[48];
  explicit Match(int axis) { std::snprintf(text, sizeof text, "x axis %d", axis); }
};

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
  Source work{Ref::borrow(x.array.get()), x.order, x.dtype, x.copied};
  put_samples_first(work);
  const bool moved = work.array.get() != x.array.get();
  const Plan p = make_plan(fn, work, axis, groups);
  const Result::Input inputs[] = {{x_obj, "x", true}, {w.given.get(), "weight", false}, {b.given.get(), "bias", false}};
  Result y(fn, out, x, inputs, 3);
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
  return build_results(items, 3);
}

PyObject* backward(const char* fn, bool instance, PyObject* dy_obj, PyObject* x_obj, PyObject* mean_obj,
                   PyObject* rstd_obj, PyObject* w_obj, PyObject* axis_obj, PyObject* needs_obj, PyObject* out) {
  Source x = take_source(fn, "x", x_obj);
  const int axis = take_channel_axis(fn, axis_obj, x);
  const Ref dy_given = take_like(fn, "dy", dy_obj, x);
  const npy_intp channels = x.dim(axis);
  npy_intp groups = channels;
  if (!instance) {  // the number of groups is told by the statistics
    const Ref m = as_array(fn, "mean", mean_obj);
    if (PyArray_NDIM(m.array()) != 2 || PyArray_DIM(m.array(), 0) != x.dim(0) ||
        PyArray_DIM(m.array(), 1) < (channels > 0) || (channels > 0 && channels % PyArray_DIM(m.array(), 1) != 0))
      fail(PyExc_ValueError,
           "%s: mean must have shape (%zd, num_groups), with num_groups a divisor of the %zd channels, got %R", fn,
           Py_ssize_t(x.dim(0)), Py_ssize_t(channels),
           shape_of(PyArray_NDIM(m.array()), PyArray_DIMS(m.array())).get());
    groups = PyArray_DIM(m.array(), 1);
  }
  const npy_intp stat_dims[2] = {x.dim(0), groups};
  const Stat mean = take_stat(fn, "mean", mean_obj, 2, stat_dims, nullptr);
  const Stat rstd = take_stat(fn, "rstd", rstd_obj, 2, stat_dims, nullptr);
  const Match match(axis);
  const Param w = take_param(fn, "weight", w_obj, x, 1, &channels, nullptr, match.text);
  const int needs = take_needs(fn, needs_obj, w_obj != Py_None, true);
  if (out != Py_None && !(needs & need_x)) refuse_out(fn);
  Source work{Ref::borrow(x.array.get()), x.order, x.dtype, x.copied};
  put_samples_first(work);
  const bool moved = work.array.get() != x.array.get();
  const Ref dy = moved ? Ref::checked(PyArray_NewCopy(dy_given.array(), NPY_CORDER)) : Ref::borrow(dy_given.get());
  const Plan p = make_plan(fn, work, axis, groups);
  const Result::Input inputs[] = {{dy_obj, "dy", true},
                                  {x_obj, "x", true},
                                  {mean.given.get(), "mean", false},
                                  {rstd.given.get(), "rstd", false},
                                  {w.given.get(), "weight", false}};
  std::optional<Result> dx;
  if (needs & need_x) dx.emplace(fn, out, x, inputs, 5);
  std::vector<double> dweight(needs & need_weight ? size_t(channels) : 0),
      dbias(needs & need_bias ? size_t(channels) : 0);
  double* dweight_data = needs & need_weight ? dweight.data() : nullptr;
  double* dbias_data = needs & need_bias ? dbias.data() : nullptr;
  void* dx_data = !(needs & need_x) ? nullptr : moved ? PyArray_DATA(work.array.array()) : dx->data();
  if (p.samples * groups > 0 && needs != 0) {
    const bool ok = without_gil(x.bytes(), [&] {
      const void* g = PyArray_DATA(dy.array());
      if (p.by_rows)
        return kernels().rows_backward[int(x.dtype)](
            {p.rows, g, work.data(), mean.data, rstd.data, w.data, dx_data, dweight_data, dbias_data, true});
      return kernels().columns_backward[int(x.dtype)](
          {p.columns, g, work.data(), mean.data, rstd.data, w.data, dx_data, dweight_data, dbias_data, true, false});
    });
    if (!ok) out_of_memory();
  }
  if (moved && dx && PyArray_CopyInto(dx->array(), work.array.array()) < 0) throw Failure{};
  PyArray_Descr* descr = w.descr != nullptr ? w.descr : PyArray_DESCR(x.array.array());
  Ref items[3];
  if (dx) items[0] = dx->finish();
  if (needs & need_weight) items[1] = new_gradient(dweight_data, descr, 1, &channels, nullptr);
  if (needs & need_bias) items[2] = new_gradient(dbias_data, descr, 1, &channels, nullptr);
  return build_results(items, 3);
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
