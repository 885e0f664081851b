// SPDX-License-Identifier: BSD-3-Clause
// What `out` may be: its shape, and which memory it may share. Addresses are compared, memory is not touched, so that
// this serves arrays on a device too.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "arrays.h"

namespace nf {

struct Span {
  const char *begin, *end;
};
static Span bounds(PyArrayObject* a) {
  const char *lo = static_cast<const char*>(PyArray_DATA(a)), *hi = lo;
  if (PyArray_SIZE(a) == 0) return {lo, lo};
  for (int i = 0; i < PyArray_NDIM(a); ++i) {
    const npy_intp reach = (PyArray_DIM(a, i) - 1) * PyArray_STRIDE(a, i);
    if (reach < 0) lo += reach;
    else hi += reach;
  }
  return {lo, hi + PyArray_ITEMSIZE(a)};
}

bool arrays_overlap(PyArrayObject* a, PyArrayObject* b) {
  const Span s = bounds(a), t = bounds(b);
  if (s.begin >= t.end || t.begin >= s.end) return false;
  Ref numpy = Ref::checked(PyImport_ImportModule("numpy"));
  Ref shares(PyObject_CallMethod(numpy.get(), "shares_memory", "OOi", a, b, 100000));
  if (!shares) {  // too hard to tell: take the cautious answer
    PyErr_Clear();
    return true;
  }
  return shares.get() == Py_True;
}

// Are all elements further apart than their size? By looking at each, of arrays of a moderate size.
static bool elements_apart(PyArrayObject* a) {
  const npy_intp n = PyArray_SIZE(a);
  if (n > npy_intp(1) << 22) return false;
  std::vector<npy_intp> at{0};
  at.reserve(size_t(n));
  for (int axis = 0; axis < PyArray_NDIM(a); ++axis) {
    const size_t before = at.size();
    for (npy_intp i = 1; i < PyArray_DIM(a, axis); ++i)
      for (size_t k = 0; k < before; ++k) at.push_back(at[k] + i * PyArray_STRIDE(a, axis));
  }
  std::sort(at.begin(), at.end());
  for (size_t k = 1; k < at.size(); ++k)
    if (at[k] - at[k - 1] < PyArray_ITEMSIZE(a)) return false;
  return true;
}

static bool overlaps_itself(PyArrayObject* a) {
  // Ordered by stride, every axis steps over all that the smaller ones reach. What does not may still be interleaved.
  if (PyArray_SIZE(a) == 0) return false;
  Order order;
  find_order(a, &order);
  npy_intp reach = PyArray_ITEMSIZE(a);
  for (int i = order.nd - 1; i >= 0; --i) {
    const npy_intp n = PyArray_DIM(a, order.axis[i]), stride = std::llabs(PyArray_STRIDE(a, order.axis[i]));
    if (n <= 1) continue;
    if (stride < reach) return !elements_apart(a);
    reach += (n - 1) * stride;
  }
  return false;
}

void check_out(const char* fn, PyArrayObject* a, int nd, const npy_intp* dims, const Input* inputs, int count) {
  if (!same_dims(a, nd, dims))
    fail(PyExc_ValueError, "%s: out must have shape %R, that of x, got %R", fn, shape_of(nd, dims).get(),
         shape_of(PyArray_NDIM(a), PyArray_DIMS(a)).get());
  if (!PyArray_ISWRITEABLE(a)) fail(PyExc_ValueError, "%s: out must be writable, got a read-only array", fn);
  if (overlaps_itself(a))
    fail(PyExc_ValueError, "%s: out must not overlap itself: some of its elements share memory", fn);
  for (int i = 0; i < count; ++i) {
    if (inputs[i].array == nullptr || !PyArray_Check(inputs[i].array)) continue;
    PyArrayObject* b = reinterpret_cast<PyArrayObject*>(inputs[i].array);
    if (inputs[i].same && PyArray_DATA(a) == PyArray_DATA(b) && same_dims(b, PyArray_NDIM(a), PyArray_DIMS(a)) &&
        same_strides(a, b) && PyArray_EquivTypes(PyArray_DESCR(a), PyArray_DESCR(b)))
      continue;
    if (arrays_overlap(a, b))
      fail(PyExc_ValueError,
           inputs[i].same ? "%s: out must be %s itself or not overlap it, got an array that shares part of its memory"
                          : "%s: out must not overlap %s, got an array that shares memory with it",
           fn, inputs[i].name);
  }
}

PyObject* Results::fill(Ref* items) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple_.get()); ++i)
    PyTuple_SET_ITEM(tuple_.get(), i, items[i] ? items[i].release() : Ref::borrow(Py_None).release());
  return tuple_.release();
}

}  // namespace nf
