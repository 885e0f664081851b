// SPDX-License-Identifier: BSD-3-Clause
// Layer norm and RMS norm: the same kernels with and without the mean.
#include <cstring>
#include <optional>
#include <vector>

#include "plans.h"

namespace nf {
namespace {

struct Norm {
  const char* fn;
  bool center;
};

// ---- axes that fit neither geometry: rows are gathered into a small buffer, a part of x at a time -------------------

class Gather {
 public:
  Gather(const Source& x, const Axes& axes) {
    int nd = 0;
    for (int i = 0; i < x.nd(); ++i)
      if (!axes.reduced[i]) {
        if (x.dim(i) > longest_) longest_ = x.dim(i), cut_ = nd;
        order_[nd++] = i;
      }
    for (int i = 0; i < x.nd(); ++i)
      if (axes.reduced[i]) order_[nd++] = i;
    nd_ = nd;
    const npy_intp each = npy_intp(x.bytes()) / longest_;
    step_ = (npy_intp(1) << 20) / (each > 0 ? each : 1);
    if (step_ < 1) step_ = 1;
  }
  npy_intp length() const { return longest_; }
  npy_intp step() const { return step_; }

  // Part [begin, end) along the longest kept axis: kept axes first, then the normalised ones.
  Ref view(PyObject* array, npy_intp begin, npy_intp end) const {
    PyArray_Dims dims{const_cast<npy_intp*>(order_), nd_};
    Ref turned = Ref::checked(PyArray_Transpose(reinterpret_cast<PyArrayObject*>(array), &dims));
    // Of NumPy's own type: what a subclass answers to an index is its own affair.
    turned = Ref::checked(PyArray_View(turned.array(), nullptr, &PyArray_Type));
    Ref key = Ref::checked(PyTuple_New(cut_ + 1));
    for (int i = 0; i < cut_; ++i)
      PyTuple_SET_ITEM(key.get(), i, Ref::checked(PySlice_New(nullptr, nullptr, nullptr)).release());
    Ref from = Ref::checked(PyLong_FromSsize_t(begin)), to = Ref::checked(PyLong_FromSsize_t(end));
    PyTuple_SET_ITEM(key.get(), cut_, Ref::checked(PySlice_New(from.get(), to.get(), nullptr)).release());
    return Ref::checked(PyObject_GetItem(turned.get(), key.get()));
  }
  Ref copy(PyObject* array, npy_intp begin, npy_intp end) const {
    return Ref::checked(PyArray_NewCopy(view(array, begin, end).array(), NPY_CORDER));
  }
  void put(PyObject* array, npy_intp begin, npy_intp end, const Ref& values) const {
    if (PyArray_CopyInto(view(array, begin, end).array(), values.array()) < 0) throw Failure{};
  }

 private:
  npy_intp order_[NPY_MAXDIMS];
  int nd_ = 0, cut_ = 0;
  npy_intp longest_ = 0, step_ = 1;
};

void forward_gathered(const RowsForward& all, const Source& x, const Axes& axes, PyArrayObject* y, PyArrayObject* mean,
                      PyArrayObject* rstd) {
  const Gather g(x, axes);
  for (npy_intp at = 0; at < g.length(); at += g.step()) {
    const npy_intp end = at + g.step() < g.length() ? at + g.step() : g.length();
    Ref part = g.copy(x.array.get(), at, end);
    RowsForward a = all;
    a.g.count = all.g.count / g.length() * (end - at);
    a.x = PyArray_DATA(part.array());
    a.y = PyArray_DATA(part.array());
    Ref m, r;
    if (mean != nullptr) m = g.copy(reinterpret_cast<PyObject*>(mean), at, end), a.mean = PyArray_DATA(m.array());
    if (rstd != nullptr) r = g.copy(reinterpret_cast<PyObject*>(rstd), at, end), a.rstd = PyArray_DATA(r.array());
    if (!without_gil(size_t(PyArray_NBYTES(part.array())), [&] { return kernels().rows_forward[int(x.dtype)](a); }))
      out_of_memory();
    g.put(reinterpret_cast<PyObject*>(y), at, end, part);
    if (m) g.put(reinterpret_cast<PyObject*>(mean), at, end, m);
    if (r) g.put(reinterpret_cast<PyObject*>(rstd), at, end, r);
  }
}

void backward_gathered(const RowsBackward& all, const Source& x, const Axes& axes, PyObject* dy, PyArrayObject* dx,
                       const Stat& mean, const Stat& rstd, const LayerPlan& p, ParamGradient& dweight,
                       ParamGradient& dbias) {
  const Gather g(x, axes);
  std::vector<double> part_w(all.dweight != nullptr ? size_t(p.n) : 0), part_b(all.dbias != nullptr ? size_t(p.n) : 0);
  std::vector<double> total_w(part_w.size()), total_b(part_b.size());
  const auto shaped = [&](const void* data) {
    const int number = stat_type(x.dtype) == DType::f64 ? NPY_DOUBLE : NPY_FLOAT;
    return Ref::checked(
        PyArray_SimpleNewFromData(x.nd(), const_cast<npy_intp*>(p.stat_dims), number, const_cast<void*>(data)));
  };
  Ref mean_array, rstd_array = shaped(rstd.data);
  if (mean.data != nullptr) mean_array = shaped(mean.data);
  for (npy_intp at = 0; at < g.length(); at += g.step()) {
    const npy_intp end = at + g.step() < g.length() ? at + g.step() : g.length();
    Ref x_part = g.copy(x.array.get(), at, end), dy_part = g.copy(dy, at, end), m,
        r = g.copy(rstd_array.get(), at, end);
    RowsBackward a = all;
    a.g.count = all.g.count / g.length() * (end - at);
    a.x = PyArray_DATA(x_part.array()), a.dy = PyArray_DATA(dy_part.array());
    if (mean_array) m = g.copy(mean_array.get(), at, end), a.mean = PyArray_DATA(m.array());
    a.rstd = PyArray_DATA(r.array());
    a.dx = dx != nullptr ? PyArray_DATA(dy_part.array()) : nullptr;
    a.dweight = all.dweight != nullptr ? part_w.data() : nullptr;
    a.dbias = all.dbias != nullptr ? part_b.data() : nullptr;
    a.gradient_type = DType::f64;
    if (!without_gil(size_t(PyArray_NBYTES(x_part.array())), [&] { return kernels().rows_backward[int(x.dtype)](a); }))
      out_of_memory();
    if (dx != nullptr) g.put(reinterpret_cast<PyObject*>(dx), at, end, dy_part);
    for (size_t i = 0; i < part_w.size(); ++i) total_w[i] += part_w[i];
    for (size_t i = 0; i < part_b.size(); ++i) total_b[i] += part_b[i];
  }
  if (!total_w.empty()) dweight.fill(total_w.data());
  if (!total_b.empty()) dbias.fill(total_b.data());
}

// ---- forward --------------------------------------------------------------------------------------------------------

PyObject* forward(const Norm& norm, PyObject* x_obj, PyObject* w_obj, PyObject* b_obj, PyObject* axis,
                  PyObject* eps_obj, PyObject* out, PyObject* stats_obj) {
  const char* fn = norm.fn;
  const Source x = take_source(fn, "x", x_obj);
  const Axes axes = take_axes(fn, axis, x.nd());
  const LayerPlan p = layer_plan(fn, x, axes);
  const double eps = take_eps(fn, eps_obj);
  const Param w =
      take_param(fn, "weight", w_obj, x, p.param_nd, p.param_dims, p.param_permutation(), "the normalised axes of x");
  const Param b =
      take_param(fn, "bias", b_obj, x, p.param_nd, p.param_dims, p.param_permutation(), "the normalised axes of x");
  const bool stats = take_bool(fn, "return_stats", stats_obj);
  const Input inputs[] = {{x.given.get(), "x", true}, {w.given.get(), "weight", false}, {b.given.get(), "bias", false}};
  Result y(fn, out, x, inputs, 3);
  Results results(!stats ? 0 : norm.center ? 3 : 2);
  Ref mean, rstd;
  if (stats) {
    if (norm.center) mean = new_stat(x.dtype, x.nd(), p.stat_dims, stat_permutation(p, x));
    rstd = new_stat(x.dtype, x.nd(), p.stat_dims, stat_permutation(p, x));
  }
  // new_stat returns a view with its axes in x's order over memory in kernel order; both have the same data pointer.
  void* mean_data = mean ? PyArray_DATA(mean.array()) : nullptr;
  void* rstd_data = rstd ? PyArray_DATA(rstd.array()) : nullptr;
  if (p.count > 0) {
    bool ok = true;
    if (p.kind == LayerPlan::by_columns) {
      const ColumnsForward a{p.columns, x.data(), y.data(), w.data, b.data,     mean_data,
                             rstd_data, nullptr,  nullptr,  eps,    norm.center};
      ok = without_gil(x.bytes(), [&] { return kernels().columns_forward[int(x.dtype)](a); });
    } else {
      const RowsForward a{p.rows, x.data(), y.data(), w.data, b.data, mean_data, rstd_data, eps, norm.center};
      if (p.kind == LayerPlan::gathered)
        forward_gathered(a, x, axes, y.array(), mean ? mean.array() : nullptr, rstd ? rstd.array() : nullptr);
      else ok = without_gil(x.bytes(), [&] { return kernels().rows_forward[int(x.dtype)](a); });
    }
    if (!ok) out_of_memory();
  }
  Ref result = y.finish();
  if (!stats) return result.release();
  Ref items[3] = {std::move(result), std::move(mean), std::move(rstd)};
  if (!norm.center) items[1] = std::move(items[2]);
  return results.fill(items);
}

// ---- backward -------------------------------------------------------------------------------------------------------

PyObject* backward(const Norm& norm, PyObject* dy_obj, PyObject* x_obj, PyObject* mean_obj, PyObject* rstd_obj,
                   PyObject* w_obj, PyObject* axis, PyObject* needs_obj, PyObject* out) {
  const char* fn = norm.fn;
  const Source x = take_source(fn, "x", x_obj);
  const Ref dy_given = as_array(fn, "dy", dy_obj), dy = take_like(fn, "dy", dy_given.get(), x);
  const Axes axes = take_axes(fn, axis, x.nd());
  const LayerPlan p = layer_plan(fn, x, axes);
  const DType type = stat_type(x.dtype);
  Stat mean;
  if (norm.center) mean = take_stat(fn, "mean", mean_obj, x.nd(), p.stat_dims, stat_permutation(p, x), type);
  const Stat rstd = take_stat(fn, "rstd", rstd_obj, x.nd(), p.stat_dims, stat_permutation(p, x), type);
  const Param w =
      take_param(fn, "weight", w_obj, x, p.param_nd, p.param_dims, p.param_permutation(), "the normalised axes of x");
  const int needs = take_needs(fn, needs_obj, w_obj != Py_None, norm.center);
  if (out != Py_None && !(needs & need_x)) refuse_out(fn);
  Ref items[3];
  std::optional<Result> dx;
  if (needs & need_x) {
    const Input inputs[] = {{dy_given.get(), "dy", true},
                            {x.given.get(), "x", true},
                            {mean.given.get(), "mean", false},
                            {rstd.given.get(), "rstd", false},
                            {w.given.get(), "weight", false}};
    dx.emplace(fn, out, x, inputs, 5);
  }
  PyArray_Descr* descr = w.descr != nullptr ? w.descr : PyArray_DESCR(x.array.array());
  ParamGradient dweight, dbias;
  if (needs & need_weight)
    dweight = ParamGradient(descr, p.param_nd, p.param_dims, p.param_permutation(), x.size() == 0);
  if (needs & need_bias) dbias = ParamGradient(descr, p.param_nd, p.param_dims, p.param_permutation(), x.size() == 0);
  Results results(norm.center ? 3 : 2);
  const DType gradient_type = needs & need_weight ? dweight.type() : dbias.type();
  if (p.count > 0 && needs != 0) {
    bool ok = true;
    void* dx_data = dx ? dx->data() : nullptr;
    if (p.kind == LayerPlan::by_columns) {
      const ColumnsBackward a{p.columns, PyArray_DATA(dy.array()), x.data(),     mean.data,     rstd.data,   w.data,
                              dx_data,   dweight.data(),           dbias.data(), gradient_type, norm.center, false};
      ok = without_gil(x.bytes(), [&] { return kernels().columns_backward[int(x.dtype)](a); });
    } else {
      const RowsBackward a{p.rows,  PyArray_DATA(dy.array()), x.data(),     mean.data,     rstd.data,  w.data,
                           dx_data, dweight.data(),           dbias.data(), gradient_type, norm.center};
      if (p.kind == LayerPlan::gathered)
        backward_gathered(a, x, axes, dy.get(), dx ? dx->array() : nullptr, mean, rstd, p, dweight, dbias);
      else ok = without_gil(x.bytes(), [&] { return kernels().rows_backward[int(x.dtype)](a); });
    }
    if (!ok) out_of_memory();
  }
  if (dx) items[0] = dx->finish();
  items[1] = dweight.finish(), items[2] = dbias.finish();
  return results.fill(items);
}

// ---- entry points: all arguments by position (the Python functions hold names and defaults) -------------------------

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

}  // namespace nf
