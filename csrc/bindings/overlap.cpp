// SPDX-License-Identifier: BSD-3-Clause
// What `out` may be: its shape, and which memory it may share. Addresses are compared, memory is not touched, so that
// this serves arrays on a device too.
#include <cstdlib>

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

static bool overlaps_itself(PyArrayObject* a) {
  // Ordered by stride, every axis must step over all that the smaller ones reach.
  if (PyArray_SIZE(a) == 0) return false;
  Order order;
  find_order(a, &order);
  npy_intp reach = PyArray_ITEMSIZE(a);
  for (int i = order.nd - 1; i >= 0; --i) {
    const npy_intp n = PyArray_DIM(a, order.axis[i]), stride = std::llabs(PyArray_STRIDE(a, order.axis[i]));
    if (n <= 1) continue;
    if (stride < reach) return true;
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

PyObject* build_results(Ref* items, int count) {
  Ref t = Ref::checked(PyTuple_New(count));
  for (int i = 0; i < count; ++i)
    PyTuple_SET_ITEM(t.get(), i, items[i] ? items[i].release() : Ref::borrow(Py_None).release());
  return t.release();
}

}  // namespace nf
