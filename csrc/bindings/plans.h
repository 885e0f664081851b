// SPDX-License-Identifier: BSD-3-Clause
// How the axes of each norm lie in memory, and which geometry of the kernels that is. The same on host and device.
#pragma once

#include <cstring>

#include "arrays.h"

namespace nf {

// ---- layer norm, RMS norm -------------------------------------------------------------------------------------------

// How the normalised axes lie in memory, and what follows for parameters and statistics.
struct LayerPlan {
  enum { by_rows, by_columns, gathered } kind;
  Rows rows;
  Columns columns;
  int64_t n = 1, count = 1;  // cells of a reduction, reductions
  int param_nd = 0;
  npy_intp param_dims[NPY_MAXDIMS];  // the normalised axes, in the order of x
  int param_order[NPY_MAXDIMS];      // the same in memory order
  npy_intp stat_dims[NPY_MAXDIMS];
  bool params_permuted = false;
  const int* param_permutation() const { return params_permuted ? param_order : nullptr; }
};

inline LayerPlan layer_plan(const char* fn, const Source& x, const Axes& axes) {
  LayerPlan p;
  int index_of[NPY_MAXDIMS];
  for (int i = 0; i < x.nd(); ++i) {
    p.stat_dims[i] = axes.reduced[i] ? 1 : x.dim(i);
    if (axes.reduced[i]) {
      index_of[i] = p.param_nd;
      p.param_dims[p.param_nd++] = x.dim(i);
      p.n *= x.dim(i);
    } else {
      p.count *= x.dim(i);
    }
  }
  if (p.n == 0)
    fail(PyExc_ValueError, "%s: x must have elements along the normalised axes, got shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
  // Runs of neighbouring axes, in memory order, that are all normalised or all kept. Axes of length one count too:
  // the kernel, and so the bits, must not depend on how many reductions there are.
  int64_t sizes[NPY_MAXDIMS + 1];
  bool kinds[NPY_MAXDIMS + 1];
  int runs = 0, params = 0;
  for (int i = 0; i < x.nd(); ++i) {
    const int axis = x.order.axis[i];
    if (runs == 0 || kinds[runs - 1] != axes.reduced[axis]) kinds[runs] = axes.reduced[axis], sizes[runs++] = 1;
    sizes[runs - 1] *= x.dim(axis);
    if (axes.reduced[axis]) p.param_order[params++] = index_of[axis];
  }
  for (int i = 0; i < params; ++i) p.params_permuted = p.params_permuted || p.param_order[i] != i;
  const bool ends_reduced = runs > 0 && kinds[runs - 1];
  if (axes.count == 0) {
    p.kind = LayerPlan::by_rows, p.rows = {p.count, 1, 1, 1};
  } else if (ends_reduced && runs <= 2) {
    p.kind = LayerPlan::by_rows, p.rows = {p.count, p.n, 1, 1};
  } else if (!ends_reduced && runs <= 3) {
    p.kind = LayerPlan::by_columns;
    p.columns = {runs == 3 ? sizes[0] : 1, sizes[runs - 2], sizes[runs - 1], 1, 0, false};
  } else {
    p.kind = LayerPlan::gathered, p.rows = {p.count, p.n, 1, 1};
    p.params_permuted = false;  // gathered rows have the order of x
  }
  return p;
}

inline const int* stat_permutation(const LayerPlan& p, const Source& x) {
  return x.order.identity || p.kind == LayerPlan::gathered ? nullptr : x.order.axis;
}

// What a parameter must match, for the message if it does not. Every call makes one; printf would take a tenth of a
// short call's time.
struct Match {
  char text[16] = "x axis ";
  explicit Match(int axis) {
    char* at = text + std::strlen(text);
    if (axis >= 10) *at++ = char('0' + axis / 10);
    *at++ = char('0' + axis % 10), *at = 0;
  }
};
static_assert(NPY_MAXDIMS <= 100, "two digits");

// ---- group norm, instance norm --------------------------------------------------------------------------------------

// Where sample, channel and the other axes lie in memory.
struct GroupPlan {
  bool by_rows;
  Rows rows;
  Columns columns;
  npy_intp channels, samples, groups;
  int64_t n;
};

inline GroupPlan group_plan(const char* fn, const Source& x, int channel_axis, npy_intp groups) {
  GroupPlan p;
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

inline int take_channel_axis(const char* fn, PyObject* obj, const Source& x) {
  if (x.nd() < 2)
    fail(PyExc_ValueError, "%s: x must have at least 2 dimensions (samples, channels, ...), got shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
  const int axis = take_axis(fn, obj, x.nd());
  if (axis == 0) fail(PyExc_ValueError, "%s: channel_axis must not be axis 0, that of the samples, got %R", fn, obj);
  return axis;
}

// groups: null for instance norm
inline npy_intp take_groups(const char* fn, PyObject* obj, npy_intp channels) {
  if (obj == nullptr) return channels;
  const int64_t groups = take_int(fn, "num_groups", obj);
  if (groups < 1) fail(PyExc_ValueError, "%s: num_groups must be at least 1, got %R", fn, obj);
  if (channels % groups != 0)
    fail(PyExc_ValueError, "%s: num_groups must divide the number of channels, %zd, got %R", fn, Py_ssize_t(channels),
         obj);
  return npy_intp(groups);
}

// The number of groups that the statistics of a group norm tell.
inline npy_intp groups_of(const char* fn, PyArrayObject* mean, npy_intp samples, npy_intp channels) {
  const bool pair = PyArray_NDIM(mean) == 2 && PyArray_DIM(mean, 0) == samples;
  const npy_intp groups = pair ? PyArray_DIM(mean, 1) : 0;
  if (!pair || groups < (channels > 0) || (channels > 0 && channels % groups != 0))
    fail(PyExc_ValueError,
         "%s: mean must have shape (%zd, num_groups), with num_groups a divisor of the %zd channels, got %R", fn,
         Py_ssize_t(samples), Py_ssize_t(channels), shape_of(PyArray_NDIM(mean), PyArray_DIMS(mean)).get());
  return groups;
}

// ---- batch norm -----------------------------------------------------------------------------------------------------

struct BatchPlan {
  Columns columns;
  npy_intp channels;
  int64_t n;  // values per channel
  Match match;
};

inline BatchPlan batch_plan(const char* fn, const Source& x, PyObject* axis_obj) {
  if (x.nd() < 2)
    fail(PyExc_ValueError, "%s: x must have at least 2 dimensions, got shape %R", fn, shape_of(x.nd(), x.dims()).get());
  const int channel_axis = take_axis(fn, axis_obj, x.nd());
  BatchPlan p{{}, 0, 0, Match(channel_axis)};
  int64_t before = 1, after = 1;
  bool seen = false;
  for (int i = 0; i < x.nd(); ++i) {
    const int axis = x.order.axis[i];
    if (axis == channel_axis) seen = true;
    else (seen ? after : before) *= x.dim(axis);
  }
  p.channels = x.dim(channel_axis);
  p.n = before * after;
  p.columns = {1, before, p.channels, after, after, true};
  return p;
}

inline void check_batch(const char* fn, const BatchPlan& p, const Source& x) {
  if (p.n == 0)
    fail(PyExc_ValueError, "%s: x must have values in every channel when training, got shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
  if (p.n == 1 && p.channels > 0)
    fail(PyExc_ValueError, "%s: Expected more than 1 value per channel when training, got input shape %R", fn,
         shape_of(x.nd(), x.dims()).get());
}

inline double unit_number(const char* fn, const char* name, PyObject* obj) {
  const double v = take_number(fn, name, obj);
  if (!(v >= 0 && v <= 1)) fail(PyExc_ValueError, "%s: %s must lie in [0, 1], got %R", fn, name, obj);
  return v;
}

// How the running averages of batch norm take a new value in.
struct Averaging {
  double weight;  // of the new value
  int ddof;
};
inline Averaging take_averaging(const char* fn, PyObject* momentum_obj, PyObject* decay_obj, PyObject* ddof_obj) {
  const double momentum = unit_number(fn, "momentum", momentum_obj);
  double weight = momentum;
  if (decay_obj != Py_None) {
    weight = 1 - unit_number(fn, "decay", decay_obj);
    if (momentum != 0.1)
      fail(PyExc_ValueError,
           "%s: decay and momentum must not both be given (momentum weighs the new value, decay the old one), got "
           "decay=%R and momentum=%R",
           fn, decay_obj, momentum_obj);
  }
  const int64_t ddof = take_int(fn, "running_ddof", ddof_obj);
  if (ddof != 0 && ddof != 1) fail(PyExc_ValueError, "%s: running_ddof must be 0 or 1, got %R", fn, ddof_obj);
  return {weight, int(ddof)};
}

// Are the running statistics given? Both or neither.
inline bool take_given(const char* fn, PyObject* mean, PyObject* var, bool training) {
  const bool given = mean != Py_None;
  if (given != (var != Py_None))
    fail(PyExc_ValueError, "%s: running_mean and running_var must be given together, got only %s", fn,
         given ? "running_mean" : "running_var");
  if (!training && !given)
    fail(PyExc_ValueError,
         "%s: running_mean and running_var must be given when training=False, got None; pass training=True to use "
         "the batch's own statistics",
         fn);
  return given;
}

// Two arrays that will both be written must not share memory, and neither may lie in an input.
inline void check_apart(const char* fn, PyObject* written, const char* name, PyObject* other, const char* other_name) {
  if (other == nullptr || !PyArray_Check(other)) return;
  if (arrays_overlap(reinterpret_cast<PyArrayObject*>(written), reinterpret_cast<PyArrayObject*>(other)))
    fail(PyExc_ValueError, "%s: %s must not overlap %s, got arrays that share memory", fn, name, other_name);
}

}  // namespace nf
