// SPDX-License-Identifier: BSD-3-Clause
// Batch norm: training (the batch's own statistics, running averages) and evaluation (the running ones).
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "../formula.h"
#include "plans.h"

namespace nf {
namespace {

// Room for numbers that somebody else will fill.
using Doubles = std::unique_ptr<double[]>;
Doubles room_for(npy_intp n) { return Doubles(new double[size_t(n)]); }

// running_mean or running_var; in training it is checked that it can be written.
Ref take_running(const char* fn, const char* name, PyObject* obj, const Source& x, const BatchPlan& p, bool training) {
  if (training) as_written(fn, name, ", since it is updated in place", obj);
  Ref given = as_array(fn, name, obj);
  check_param(fn, name, given.array(), x, 1, &p.channels, p.match.text);  // the same dtypes as a parameter may have
  if (training && !PyArray_ISWRITEABLE(given.array()))
    fail(PyExc_ValueError, "%s: %s must be writable, since it is updated in place, got a read-only array", fn, name);
  return given;
}

// What a running statistic is about to become, rounded once to the dtype of its array. All memory is taken before
// anything is computed, so that a call that fails has changed neither of the two.
class NextRunning {
 public:
  NextRunning(PyArrayObject* target, npy_intp channels)
      : target_(target),
        channels_(channels),
        before_(room_for(channels)),
        batch_(room_for(channels)),
        rounded_(PyArray_DESCR(target), 1, &channels, nullptr, false) {}
  double* batch() { return batch_.get(); }  // the batch's own, from the kernels

  // The caller's array, whatever its stride and byte order. The old value is read only now, with the GIL: what others
  // that train on the same array have done meanwhile counts. Cannot fail.
  void update(double weight) {
    read_doubles(target_, before_.get());
    for (npy_intp c = 0; c < channels_; ++c) batch_[c] = running_average(before_[c], batch_[c], weight);
    rounded_.fill(batch_.get());
    const size_t bytes = size_t(PyArray_ITEMSIZE(target_));
    const char* from = static_cast<const char*>(rounded_.data());
    for (npy_intp c = 0; c < channels_; ++c) {
      char* at = PyArray_BYTES(target_) + c * PyArray_STRIDE(target_, 0);
      std::memcpy(at, from + size_t(c) * bytes, bytes);
      if (PyArray_ISBYTESWAPPED(target_)) std::reverse(at, at + bytes);
    }
  }

 private:
  PyArrayObject* target_;
  npy_intp channels_;
  Doubles before_, batch_;
  ParamGradient rounded_;
};

PyObject* batch_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const char* fn = "batch_norm";
    PyObject *x_obj = a[0], *rm_obj = a[1], *rv_obj = a[2], *w_obj = a[3], *b_obj = a[4], *out = a[11];
    const Source x = take_source(fn, "x", x_obj);
    const BatchPlan p = batch_plan(fn, x, a[10]);
    const bool training = take_bool(fn, "training", a[5]);
    const Averaging running = take_averaging(fn, a[6], a[7], a[8]);
    const double eps = take_eps(fn, a[9]);
    const Param w = take_param(fn, "weight", w_obj, x, 1, &p.channels, nullptr, p.match.text);
    const Param b = take_param(fn, "bias", b_obj, x, 1, &p.channels, nullptr, p.match.text);
    const bool given = take_given(fn, rm_obj, rv_obj, training);
    Ref rm, rv;
    if (given)
      rm = take_running(fn, "running_mean", rm_obj, x, p, training),
      rv = take_running(fn, "running_var", rv_obj, x, p, training);
    if (training) check_batch(fn, p, x);
    if (training && given) {
      check_apart(fn, rm_obj, "running_mean", rv_obj, "running_var");
      const std::pair<PyObject*, const char*> inputs[] = {
          {x.copied ? nullptr : x.given.get(), "x"}, {w.given.get(), "weight"}, {b.given.get(), "bias"}};
      for (const auto& input : inputs) {
        check_apart(fn, rm_obj, "running_mean", input.first, input.second);
        check_apart(fn, rv_obj, "running_var", input.first, input.second);
      }
    }
    const bool stats = take_bool(fn, "return_stats", a[12]);
    const Input inputs[] = {{x.given.get(), "x", true},
                            {rm_obj, "running_mean", false},
                            {rv_obj, "running_var", false},
                            {w.given.get(), "weight", false},
                            {b.given.get(), "bias", false}};
    Result y(fn, out, x, inputs, 5);
    std::optional<NextRunning> next_mean, next_var;
    if (training && given) next_mean.emplace(rm.array(), p.channels), next_var.emplace(rv.array(), p.channels);
    Results results(stats ? 3 : 0);
    Ref mean, rstd;
    if (stats) mean = new_stat(x.dtype, 1, &p.channels, nullptr), rstd = new_stat(x.dtype, 1, &p.channels, nullptr);
    bool ok = true;
    if (training) {
      const ColumnsForward args{p.columns,
                                x.data(),
                                y.data(),
                                w.data,
                                b.data,
                                stats ? PyArray_DATA(mean.array()) : nullptr,
                                stats ? PyArray_DATA(rstd.array()) : nullptr,
                                given ? next_mean->batch() : nullptr,
                                given ? next_var->batch() : nullptr,
                                eps,
                                true};
      if (p.channels > 0) ok = without_gil(x.bytes(), [&] { return kernels().columns_forward[int(x.dtype)](args); });
      if (!ok) out_of_memory();
      for (npy_intp c = 0; given && c < p.channels; ++c)
        next_var->batch()[c] = sample_variance(next_var->batch()[c], double(p.n), running.ddof);
    } else {
      // Copies: others may train on the same arrays while the GIL is released.
      const Doubles mean_of = room_for(p.channels), var_of = room_for(p.channels), rstd_of = room_for(p.channels);
      read_doubles(rm.array(), mean_of.get()), read_doubles(rv.array(), var_of.get());
      const AffineMap args{p.columns, x.data(),      y.data(), mean_of.get(), var_of.get(),
                           eps,       rstd_of.get(), w.data,   b.data};
      if (p.channels > 0) ok = without_gil(x.bytes(), [&] { return kernels().affine[int(x.dtype)](args); });
      if (!ok) out_of_memory();
      if (stats) fill_stat(mean, mean_of.get()), fill_stat(rstd, rstd_of.get());
    }
    Ref result = y.finish();
    if (stats) {
      Ref items[3] = {std::move(result), std::move(mean), std::move(rstd)};
      result = Ref(results.fill(items));
    }
    if (next_mean)
      next_mean->update(running.weight), next_var->update(running.weight);  // last: nothing after it can fail
    return result.release();
  });
}

PyObject* batch_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const char* fn = "batch_norm_backward";
    PyObject *dy_obj = a[0], *x_obj = a[1], *w_obj = a[4], *out = a[8];
    const Source x = take_source(fn, "x", x_obj);
    const Ref dy_given = as_array(fn, "dy", dy_obj), dy = take_like(fn, "dy", dy_given.get(), x);
    const BatchPlan p = batch_plan(fn, x, a[6]);
    const bool training = take_bool(fn, "training", a[5]);
    const Stat mean = take_stat(fn, "mean", a[2], 1, &p.channels, nullptr, stat_type(x.dtype));
    const Stat rstd = take_stat(fn, "rstd", a[3], 1, &p.channels, nullptr, stat_type(x.dtype));
    const Param w = take_param(fn, "weight", w_obj, x, 1, &p.channels, nullptr, p.match.text);
    const int needs = take_needs(fn, a[7], w_obj != Py_None, true);
    if (out != Py_None && !(needs & need_x)) refuse_out(fn);
    if (training) check_batch(fn, p, x);
    const Input inputs[] = {{dy_given.get(), "dy", true},
                            {x.given.get(), "x", true},
                            {mean.given.get(), "mean", false},
                            {rstd.given.get(), "rstd", false},
                            {w.given.get(), "weight", false}};
    std::optional<Result> dx;
    if (needs & need_x) dx.emplace(fn, out, x, inputs, 5);
    PyArray_Descr* descr = w.descr != nullptr ? w.descr : PyArray_DESCR(x.array.array());
    ParamGradient dweight, dbias;
    if (needs & need_weight) dweight = ParamGradient(descr, 1, &p.channels, nullptr, x.size() == 0);
    if (needs & need_bias) dbias = ParamGradient(descr, 1, &p.channels, nullptr, x.size() == 0);
    Results results(3);
    const ColumnsBackward args{p.columns,
                               PyArray_DATA(dy.array()),
                               x.data(),
                               mean.data,
                               rstd.data,
                               w.data,
                               dx ? dx->data() : nullptr,
                               dweight.data(),
                               dbias.data(),
                               needs & need_weight ? dweight.type() : dbias.type(),
                               true,
                               !training};
    if (x.size() > 0 && needs != 0 &&
        !without_gil(x.bytes(), [&] { return kernels().columns_backward[int(x.dtype)](args); }))
      out_of_memory();
    Ref items[3];
    if (dx) items[0] = dx->finish();
    items[1] = dweight.finish(), items[2] = dbias.finish();
    return results.fill(items);
  });
}

}  // namespace

PyMethodDef batch_norm_methods[] = {
    NF_METHOD(batch_norm, 13), NF_METHOD(batch_norm_backward, 9), {nullptr, nullptr, 0, nullptr}};

}  // namespace nf
