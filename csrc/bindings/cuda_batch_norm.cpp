// SPDX-License-Identifier: BSD-3-Clause
// Batch norm on a device; batch_norm.cpp is the same on the host.
#include <optional>

#include "cuda.h"
#include "plans.h"

namespace nf::cuda {
namespace {

Array take_running(Call& call, const char* name, PyObject* obj, const InputX& x, const BatchPlan& p, bool training) {
  Array a = take_parameter(call, name, obj, x, 1, &p.channels, p.match.text);
  if (training && (a.read_only || a.library == Library::jax))
    fail(PyExc_ValueError, "%s: %s must be writable, since it is updated in place, got a read-only array", call.fn,
         name);
  return a;
}

// Where the kernel updates a running statistic: in place, or in a copy that is written back.
struct Updated {
  Wanted wanted;
  bool copied = false;
  Updated(Call& call, const Array& a) {
    if (!a) return;
    const void* p = call.gathered(a, nullptr, a.dtype());
    copied = p != a.data();
    wanted = {const_cast<void*>(p), a.dtype()};
  }
  void finish(Call& call, const Array& a) const {
    if (copied) call.scatter(wanted.p, nullptr, a.dtype(), a);
  }
};

PyObject* batch_norm(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const char* fn = "batch_norm";
    PyObject *rm_obj = a[1], *rv_obj = a[2], *out = a[11];
    Call call(fn, a[0]);
    const InputX x = take_input(call, a[0]);
    const DType type = x.source.dtype;
    const BatchPlan p = batch_plan(fn, x.source, a[10]);
    const bool training = take_bool(fn, "training", a[5]);
    const Averaging running = take_averaging(fn, a[6], a[7], a[8]);
    const double eps = take_eps(fn, a[9]);
    const Array w = take_parameter(call, "weight", a[3], x, 1, &p.channels, p.match.text);
    const Array b = take_parameter(call, "bias", a[4], x, 1, &p.channels, p.match.text);
    const bool has_running = take_given(fn, rm_obj, rv_obj, training);
    Array rm, rv;
    if (has_running) {
      rm = take_running(call, "running_mean", rm_obj, x, p, training);
      rv = take_running(call, "running_var", rv_obj, x, p, training);
    }
    if (training) check_batch(fn, p, x.source);
    if (training && has_running) {
      check_apart(fn, rm.view.get(), "running_mean", rv.view.get(), "running_var");
      const std::pair<PyObject*, const char*> inputs[] = {
          {x.source.copied ? nullptr : x.array.view.get(), "x"}, {w.view.get(), "weight"}, {b.view.get(), "bias"}};
      for (const auto& input : inputs) {
        check_apart(fn, rm.view.get(), "running_mean", input.first, input.second);
        check_apart(fn, rv.view.get(), "running_var", input.first, input.second);
      }
    }
    const bool stats = take_bool(fn, "return_stats", a[12]);
    const Input inputs[] = {{x.array.view.get(), "x", true},
                            {rm.view.get(), "running_mean", false},
                            {rv.view.get(), "running_var", false},
                            {w.view.get(), "weight", false},
                            {b.view.get(), "bias", false}};
    Output y(call, out, x, inputs, 5);

    const int* order = x.source.order.identity ? nullptr : x.source.order.axis;
    void* y_data = y.prepare(order);
    Results results(stats ? 3 : 0);
    Made mean, rstd;
    if (stats) {
      mean = call.make(stat_type(type), 1, &p.channels, nullptr);
      rstd = call.make(stat_type(type), 1, &p.channels, nullptr);
    }
    if (p.channels > 0 && (x.source.size() > 0 || stats)) {  // in evaluation there are statistics without cells
      const void* x_data = call.gathered(x.array, order, type);
      const Given weight = given(call, w, nullptr), bias = given(call, b, nullptr);
      if (training) {
        const Updated m(call, rm), v(call, rv);
        ColumnsForward args{p.columns,  type,      x_data,
                            y_data,     weight,    bias,
                            mean.data,  rstd.data, {m.wanted, v.wanted, running.weight, running.ddof},
                            eps,        true,      nullptr,
                            call.stream};
        args.work = call.workspace(columns_forward_workspace(args));
        call.check(columns_forward(args));
        m.finish(call, rm), v.finish(call, rv);
      } else {
        call.check(affine({p.columns, type, x_data, y_data, given(call, rm, nullptr), given(call, rv, nullptr), weight,
                           bias, mean.data, rstd.data, eps, call.stream}));
      }
    }
    Ref result = y.finish();
    if (!stats) return result.release();
    Ref items[3] = {std::move(result), call.hand_over(std::move(mean)), call.hand_over(std::move(rstd))};
    return results.fill(items);
  });
}

PyObject* batch_norm_backward(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const char* fn = "batch_norm_backward";
    PyObject* out = a[8];
    Call call(fn, a[1]);
    const InputX x = take_input(call, a[1]);
    const DType type = x.source.dtype;
    const Array dy = take_like_x(call, "dy", a[0], x);
    const BatchPlan p = batch_plan(fn, x.source, a[6]);
    const bool training = take_bool(fn, "training", a[5]);
    const Array mean = take_statistic(call, "mean", a[2], 1, &p.channels);
    const Array rstd = take_statistic(call, "rstd", a[3], 1, &p.channels);
    const Array w = take_parameter(call, "weight", a[4], x, 1, &p.channels, p.match.text);
    const int needs = take_needs(fn, a[7], a[4] != Py_None, true);
    if (out != Py_None && !(needs & need_x)) refuse_out(fn);
    if (training) check_batch(fn, p, x.source);
    const Input inputs[] = {{dy.view.get(), "dy", true},
                            {x.array.view.get(), "x", true},
                            {mean.view.get(), "mean", false},
                            {rstd.view.get(), "rstd", false},
                            {w.view.get(), "weight", false}};
    std::optional<Output> dx;
    if (needs & need_x) dx.emplace(call, out, x, inputs, 5);

    const int* order = x.source.order.identity ? nullptr : x.source.order.axis;
    const bool empty = x.source.size() == 0;
    void* dx_data = dx ? dx->prepare(order) : nullptr;
    Results results(3);
    Gradient dweight, dbias;
    if (needs & need_weight) dweight.prepare(call, w ? w.dtype() : type, 1, &p.channels, nullptr, empty);
    if (needs & need_bias) dbias.prepare(call, w ? w.dtype() : type, 1, &p.channels, nullptr, empty);
    if (!empty && needs != 0) {
      const void* dy_data = call.gathered(dy, order, type);
      const void* x_data = call.gathered(x.array, order, type);
      ColumnsBackward args{p.columns,
                           type,
                           dy_data,
                           x_data,
                           given(call, mean, nullptr),
                           given(call, rstd, nullptr),
                           given(call, w, nullptr),
                           dx_data,
                           dweight.wanted(),
                           dbias.wanted(),
                           true,
                           !training,
                           nullptr,
                           call.stream};
      args.work = call.workspace(columns_backward_workspace(args));
      call.check(columns_backward(args));
    }
    Ref items[3];
    if (dx) items[0] = dx->finish();
    items[1] = dweight.finish(call), items[2] = dbias.finish(call);
    return results.fill(items);
  });
}

}  // namespace

PyMethodDef batch_norm_methods[] = {
    NF_METHOD(batch_norm, 13), NF_METHOD(batch_norm_backward, 9), {nullptr, nullptr, 0, nullptr}};

}  // namespace nf::cuda
