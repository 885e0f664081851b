// SPDX-License-Identifier: BSD-3-Clause
#include "arrays.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "../cpu/memory.h"

namespace nf {

void fail(PyObject* type, const char* format, ...) {
  va_list args;
  va_start(args, format);
  PyErr_FormatV(type, format, args);
  va_end(args);
  throw Failure{};
}

void out_of_memory() {
  PyErr_NoMemory();
  throw Failure{};
}

Ref shape_of(int nd, const npy_intp* dims) {
  Ref t = Ref::checked(PyTuple_New(nd));
  for (int i = 0; i < nd; ++i) PyTuple_SET_ITEM(t.get(), i, Ref::checked(PyLong_FromSsize_t(dims[i])).release());
  return t;
}

// ---- dtypes --------------------------------------------------------------------------------------------------------

static bool is_bfloat16(const PyArray_Descr* d) {
  if (d->type_num < NPY_USERDEF || PyDataType_ELSIZE(d) != 2) return false;
  const char* name = std::strrchr(d->typeobj->tp_name, '.');
  return std::strcmp(name != nullptr ? name + 1 : d->typeobj->tp_name, "bfloat16") == 0;
}

// Is this one of the four floating types? (`native` aside)
static bool float_type(const PyArray_Descr* d, DType* out) {
  switch (d->type_num) {
    case NPY_DOUBLE: *out = DType::f64; return true;
    case NPY_FLOAT: *out = DType::f32; return true;
    case NPY_HALF: *out = DType::f16; return true;
    default:
      if (!is_bfloat16(d)) return false;
      *out = DType::bf16;
      return true;
  }
}

static bool is_plain(PyArrayObject* a) { return PyArray_ISALIGNED(a) && PyArray_ISNOTSWAPPED(a); }

// ---- x -------------------------------------------------------------------------------------------------------------

// Is the array contiguous when its axes are taken in some order? Fills the order, slowest axis first.
static bool find_order(PyArrayObject* a, Order* order) {
  const int nd = PyArray_NDIM(a);
  order->nd = nd;
  order->identity = true;
  for (int i = 0; i < nd; ++i) order->axis[i] = i;
  if (PyArray_IS_C_CONTIGUOUS(a)) return true;
  const npy_intp *dims = PyArray_DIMS(a), *strides = PyArray_STRIDES(a);
  for (int i = 1; i < nd; ++i)  // by stride, stable
    for (int j = i; j > 0 && std::llabs(strides[order->axis[j]]) > std::llabs(strides[order->axis[j - 1]]); --j)
      std::swap(order->axis[j], order->axis[j - 1]);
  npy_intp expected = PyArray_ITEMSIZE(a);
  bool contiguous = true;
  for (int i = nd - 1; i >= 0; --i) {
    const int axis = order->axis[i];
    if (axis != i) order->identity = false;
    if (dims[axis] == 1) continue;
    if (strides[axis] != expected) contiguous = false;
    expected *= dims[axis];
  }
  return contiguous;
}

static void refuse_device(const char* fn, const char* name, PyObject* obj) {
  bool device = PyObject_HasAttrString(obj, "__cuda_array_interface__") != 0;
  if (!device && PyObject_HasAttrString(obj, "__dlpack_device__") != 0) {
    Ref pair(PyObject_CallMethod(obj, "__dlpack_device__", nullptr));
    if (pair && PyTuple_Check(pair.get()) && PyTuple_GET_SIZE(pair.get()) > 0) {
      Ref kind(PyNumber_Index(PyTuple_GET_ITEM(pair.get(), 0)));
      const long k = kind ? PyLong_AsLong(kind.get()) : 0;
      device = k == 2 || k == 3 || k == 13;  // CUDA, its pinned host memory, its managed memory
      if (k == 3) device = false;
    }
    PyErr_Clear();
  }
  if (device)
    fail(PyExc_TypeError,
         "%s: %s is on a CUDA device, and this version of normfast has no CUDA backend; copy it to the host first, "
         "for example with cupy.asnumpy(%s) or %s.cpu().numpy()",
         fn, name, name, name);
}

Ref as_array(const char* fn, const char* name, PyObject* obj) {
  if (PyArray_Check(obj)) return Ref::borrow(obj);
  refuse_device(fn, name, obj);
  if (obj == Py_None) fail(PyExc_TypeError, "%s: %s must be an array, got None", fn, name);
  return Ref::checked(PyArray_FromAny(obj, nullptr, 0, 0, 0, nullptr));
}

static Ref cast_double(PyObject* array) {
  return Ref::checked(PyArray_FromArray(reinterpret_cast<PyArrayObject*>(array), PyArray_DescrFromType(NPY_DOUBLE),
                                        NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST));
}

Source take_source(const char* fn, const char* name, PyObject* obj) {
  Source s{as_array(fn, name, obj), {}, DType::f64, false};
  PyArray_Descr* d = PyArray_DESCR(s.array.array());
  if (!float_type(d, &s.dtype)) {
    if (!PyTypeNum_ISINTEGER(d->type_num) && !PyTypeNum_ISBOOL(d->type_num))
      fail(PyExc_TypeError,
           "%s: %s must be of a floating dtype (float16, bfloat16, float32, float64) or integer, got %S", fn, name, d);
    // As np.mean does. The cast keeps the order of the axes; it is not the caller's array any more.
    const bool plain = find_order(s.array.array(), &s.order);
    s.array = Ref::checked(PyArray_NewLikeArray(s.array.array(), NPY_KEEPORDER, PyArray_DescrFromType(NPY_DOUBLE), 0));
    if (PyArray_CopyInto(s.array.array(), as_array(fn, name, obj).array()) < 0) throw Failure{};
    find_order(s.array.array(), &s.order);
    s.copied = !plain;
    return s;
  }
  if (find_order(s.array.array(), &s.order) && is_plain(s.array.array())) {
    s.copied = false;
    return s;
  }
  // Strided, misaligned or byteswapped: one copy, in the order of the strides, so that it takes the same kernel as
  // the contiguous array would.
  const bool plain = PyArray_IS_C_CONTIGUOUS(s.array.array()) != 0;
  PyArray_Descr* native = PyArray_DescrNewByteorder(d, NPY_NATIVE);
  if (native == nullptr) throw Failure{};
  Ref copy = Ref::checked(PyArray_NewLikeArray(s.array.array(), NPY_KEEPORDER, native, 0));
  if (PyArray_CopyInto(copy.array(), s.array.array()) < 0) throw Failure{};
  Order given = s.order;
  const bool was_ordered = find_order(s.array.array(), &given);
  s.array = std::move(copy);
  find_order(s.array.array(), &s.order);
  s.copied = !plain && !was_ordered;
  return s;
}

void make_c_order(Source& x) {
  x.array = Ref::checked(PyArray_NewCopy(x.array.array(), NPY_CORDER));
  find_order(x.array.array(), &x.order);
}

static bool same_dims(PyArrayObject* a, int nd, const npy_intp* dims) {
  return PyArray_NDIM(a) == nd && PyArray_CompareLists(PyArray_DIMS(a), dims, nd);
}

// Same place for every cell: strides are equal wherever an axis is longer than one.
static bool same_strides(PyArrayObject* a, PyArrayObject* b) {
  for (int i = 0; i < PyArray_NDIM(a); ++i)
    if (PyArray_DIM(a, i) > 1 && PyArray_STRIDE(a, i) != PyArray_STRIDE(b, i)) return false;
  return true;
}

Ref take_like(const char* fn, const char* name, PyObject* obj, const Source& x) {
  Ref a = as_array(fn, name, obj);
  PyArray_Descr* d = PyArray_DESCR(a.array());
  DType dtype;
  const bool whole = PyTypeNum_ISINTEGER(d->type_num) || PyTypeNum_ISBOOL(d->type_num);
  if (whole) dtype = DType::f64;
  else if (!float_type(d, &dtype)) dtype = DType(-1);
  if (dtype != x.dtype)
    fail(PyExc_TypeError, "%s: %s must have the dtype of x, %S, got %S", fn, name, PyArray_DESCR(x.array.array()), d);
  if (!same_dims(a.array(), x.nd(), x.dims()))
    fail(PyExc_ValueError, "%s: %s must have the shape of x, %R, got %R", fn, name, shape_of(x.nd(), x.dims()).get(),
         shape_of(PyArray_NDIM(a.array()), PyArray_DIMS(a.array())).get());
  if (!whole && is_plain(a.array()) && same_strides(a.array(), x.array.array())) return a;
  PyArray_Descr* descr = PyArray_DESCR(x.array.array());
  Py_INCREF(descr);
  Ref copy = Ref::checked(PyArray_NewLikeArray(x.array.array(), NPY_KEEPORDER, descr, 0));
  if (PyArray_CopyInto(copy.array(), a.array()) < 0) throw Failure{};
  return copy;
}

// ---- scalars -------------------------------------------------------------------------------------------------------

double take_number(const char* fn, const char* name, PyObject* obj) {
  const double v = PyFloat_AsDouble(obj);
  if (v == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: %s must be a number, got %.100s", fn, name, Py_TYPE(obj)->tp_name);
  }
  return v;
}

double take_eps(const char* fn, PyObject* obj) {
  const double eps = PyFloat_CheckExact(obj) ? PyFloat_AS_DOUBLE(obj) : take_number(fn, "eps", obj);
  if (!(eps >= 0) || !std::isfinite(eps))
    fail(PyExc_ValueError, "%s: eps must be finite and not negative, got %R", fn, obj);
  return eps;
}

bool take_bool(const char* fn, const char* name, PyObject* obj) {
  if (obj == Py_True) return true;
  if (obj == Py_False) return false;
  const int truth = PyObject_IsTrue(obj);
  if (truth < 0) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: %s must be True or False, got %.100s", fn, name, Py_TYPE(obj)->tp_name);
  }
  return truth != 0;
}

int64_t take_int(const char* fn, const char* name, PyObject* obj) {
  Ref index(PyNumber_Index(obj));
  if (!index) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: %s must be an integer, got %.100s", fn, name, Py_TYPE(obj)->tp_name);
  }
  int overflow = 0;
  const long long v = PyLong_AsLongLongAndOverflow(index.get(), &overflow);
  if (overflow != 0) return overflow > 0 ? INT64_MAX : INT64_MIN;
  return v;
}

// `prefix`: what AxisError puts before its own text
static int normal_axis(const char* prefix, int64_t axis, int nd) {
  if (axis >= -nd && axis < nd) return int(axis < 0 ? axis + nd : axis);
  Ref module = Ref::checked(PyImport_ImportModule("numpy.exceptions"));
  Ref type = Ref::checked(PyObject_GetAttrString(module.get(), "AxisError"));
  Ref error = Ref::checked(PyObject_CallFunction(type.get(), "Lis", static_cast<long long>(axis), nd, prefix));
  PyErr_SetObject(type.get(), error.get());
  throw Failure{};
}

int take_axis(const char* fn, PyObject* obj, int nd) {
  char prefix[64];
  std::snprintf(prefix, sizeof prefix, "%s: channel_axis", fn);
  return normal_axis(prefix, take_int(fn, "channel_axis", obj), nd);
}

Axes take_axes(const char* fn, PyObject* obj, int nd) {
  Axes a;
  std::memset(a.reduced, 0, sizeof(bool) * size_t(nd));
  a.count = 0;
  if (!PyTuple_Check(obj)) {
    Ref index(PyNumber_Index(obj));
    if (!index) {
      PyErr_Clear();
      fail(PyExc_TypeError, "%s: axis must be an int or a tuple of ints, got %.100s", fn, Py_TYPE(obj)->tp_name);
    }
    a.reduced[normal_axis(fn, take_int(fn, "axis", index.get()), nd)] = true;
    a.count = 1;
    return a;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(obj); ++i) {
    const int axis = normal_axis(fn, take_int(fn, "axis", PyTuple_GET_ITEM(obj, i)), nd);
    if (a.reduced[axis]) fail(PyExc_ValueError, "%s: axis must name each axis once, got %R", fn, obj);
    a.reduced[axis] = true;
    ++a.count;
  }
  return a;
}

// ---- parameters and statistics --------------------------------------------------------------------------------------

static Ref permuted(Ref a, const int* permutation) {
  if (permutation == nullptr) return a;
  npy_intp axes[NPY_MAXDIMS];
  const int nd = PyArray_NDIM(a.array());
  for (int i = 0; i < nd; ++i) axes[i] = permutation[i];
  PyArray_Dims dims{axes, nd};
  return Ref::checked(PyArray_Transpose(a.array(), &dims));
}

Param take_param(const char* fn, const char* name, PyObject* obj, const Source& x, int nd, const npy_intp* dims,
                 const int* permutation, const char* match) {
  Param p;
  if (obj == Py_None) return p;
  p.given = as_array(fn, name, obj);
  PyArrayObject* a = p.given.array();
  DType dtype = DType::f64;
  PyArray_Descr* d = PyArray_DESCR(a);
  if (!float_type(d, &dtype) || (dtype != x.dtype && dtype != DType::f32 && dtype != DType::f64))
    fail(PyExc_TypeError, "%s: %s must have the dtype of x (%S), float32 or float64, got %S", fn, name,
         PyArray_DESCR(x.array.array()), d);
  if (!same_dims(a, nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R to match %s, got %R", fn, name, shape_of(nd, dims).get(), match,
         shape_of(PyArray_NDIM(a), PyArray_DIMS(a)).get());
  p.descr = d;
  const int compute = x.dtype == DType::f64 ? NPY_DOUBLE : NPY_FLOAT;
  if (d->type_num == compute && permutation == nullptr && PyArray_ISCARRAY_RO(a)) {
    p.data = PyArray_DATA(a);
    return p;
  }
  p.array = Ref::checked(PyArray_FromArray(permuted(Ref::borrow(p.given.get()), permutation).array(),
                                           PyArray_DescrFromType(compute), NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST));
  p.data = PyArray_DATA(p.array.array());
  return p;
}

Stat take_stat(const char* fn, const char* name, PyObject* obj, int nd, const npy_intp* dims, const int* permutation) {
  Stat s;
  s.given = as_array(fn, name, obj);
  PyArrayObject* a = s.given.array();
  PyArray_Descr* d = PyArray_DESCR(a);
  if (!PyTypeNum_ISFLOAT(d->type_num) && !is_bfloat16(d))
    fail(PyExc_TypeError, "%s: %s must be of a floating dtype, got %S", fn, name, d);
  if (!same_dims(a, nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R, got %R", fn, name, shape_of(nd, dims).get(),
         shape_of(PyArray_NDIM(a), PyArray_DIMS(a)).get());
  if (d->type_num == NPY_DOUBLE && permutation == nullptr && PyArray_ISCARRAY_RO(a)) {
    s.data = static_cast<const double*>(PyArray_DATA(a));
    return s;
  }
  s.array = cast_double(permuted(Ref::borrow(s.given.get()), permutation).get());
  s.data = static_cast<const double*>(PyArray_DATA(s.array.array()));
  return s;
}

int take_needs(const char* fn, PyObject* obj, bool has_weight, bool has_bias_gradient) {
  const int all = need_x | need_weight | (has_bias_gradient ? need_bias : 0);
  if (obj == Py_None) return has_weight ? all : need_x;
  const char* names = has_bias_gradient ? "\"x\", \"weight\", \"bias\"" : "\"x\", \"weight\"";
  if (PyUnicode_Check(obj) || PyBytes_Check(obj))
    fail(PyExc_TypeError, "%s: needs must be a tuple of names from (%s), got the bare string %R; write (%R,)", fn,
         names, obj, obj);
  Ref items(PySequence_Fast(obj, ""));
  if (!items) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: needs must be a tuple of names from (%s), got %.100s", fn, names, Py_TYPE(obj)->tp_name);
  }
  int needs = 0;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i) {
    PyObject* one = PySequence_Fast_GET_ITEM(items.get(), i);
    if (!PyUnicode_Check(one))
      fail(PyExc_TypeError, "%s: needs must hold strings from (%s), got %.100s", fn, names, Py_TYPE(one)->tp_name);
    const int bit = PyUnicode_CompareWithASCIIString(one, "x") == 0        ? need_x
                    : PyUnicode_CompareWithASCIIString(one, "weight") == 0 ? need_weight
                    : PyUnicode_CompareWithASCIIString(one, "bias") == 0   ? need_bias
                                                                           : 0;
    if ((bit & all) == 0) fail(PyExc_ValueError, "%s: needs must hold names from (%s), got %R", fn, names, one);
    if (needs & bit) fail(PyExc_ValueError, "%s: needs must name each gradient once, got %R twice", fn, one);
    needs |= bit;
  }
  return needs;
}

void refuse_out(const char* fn) {
  fail(PyExc_ValueError, "%s: out must be None when needs does not hold \"x\", since it receives dx, got an array", fn);
}

// ---- results -------------------------------------------------------------------------------------------------------

static void return_block(PyObject* capsule) { pool_free(PyCapsule_GetPointer(capsule, "normfast.block")); }

// Large arrays get their memory from the pool, and give it back when the array dies.
static Ref array_in_pool(PyArray_Descr* descr, int nd, const npy_intp* dims, const npy_intp* strides, size_t bytes,
                         const void* like) {
  void* block = pool_alloc(bytes, like);
  if (block == nullptr) out_of_memory();
  Ref capsule(PyCapsule_New(block, "normfast.block", return_block));
  if (!capsule) {
    pool_free(block);
    throw Failure{};
  }
  Py_INCREF(descr);
  Ref a =
      Ref::checked(PyArray_NewFromDescr(&PyArray_Type, descr, nd, dims, strides, block, NPY_ARRAY_WRITEABLE, nullptr));
  if (PyArray_SetBaseObject(a.array(), capsule.release()) < 0) throw Failure{};
  return a;
}

Ref new_array(PyArray_Descr* descr, int nd, const npy_intp* dims, size_t bytes, const void* like) {
  if (bytes >= pool_threshold) return array_in_pool(descr, nd, dims, nullptr, bytes, like);
  Py_INCREF(descr);
  return Ref::checked(PyArray_NewFromDescr(&PyArray_Type, descr, nd, dims, nullptr, nullptr, 0, nullptr));
}

// A new array of x's shape and memory order.
static Ref new_like(const Source& x) {
  PyArrayObject* a = x.array.array();
  if (x.order.identity) return new_array(PyArray_DESCR(a), x.nd(), x.dims(), x.bytes(), x.data());
  if (x.bytes() >= pool_threshold)
    return array_in_pool(PyArray_DESCR(a), x.nd(), x.dims(), PyArray_STRIDES(a), x.bytes(), x.data());
  PyArray_Descr* descr = PyArray_DESCR(a);
  Py_INCREF(descr);
  return Ref::checked(PyArray_NewLikeArray(a, NPY_KEEPORDER, descr, 0));
}

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

Result::Result(const char* fn, PyObject* out, const Source& x, const Input* inputs, int count) {
  PyArrayObject* work = x.array.array();
  if (out == Py_None) {
    target_ = new_like(x);
    // A strided x was copied in the order of its strides; its result is in C order.
    if (x.copied && !x.order.identity) result_ = new_array(PyArray_DESCR(work), x.nd(), x.dims(), x.bytes(), x.data());
    return;
  }
  if (!PyArray_Check(out))
    fail(PyExc_TypeError, "%s: out must be a NumPy array, got %.100s", fn, Py_TYPE(out)->tp_name);
  PyArrayObject* a = reinterpret_cast<PyArrayObject*>(out);
  if (!PyArray_EquivTypes(PyArray_DESCR(a), PyArray_DESCR(work)))
    fail(PyExc_TypeError, "%s: out must have dtype %S, that of the result, got %S", fn, PyArray_DESCR(work),
         PyArray_DESCR(a));
  if (!same_dims(a, x.nd(), x.dims()))
    fail(PyExc_ValueError, "%s: out must have shape %R, that of x, got %R", fn, shape_of(x.nd(), x.dims()).get(),
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
  if (is_plain(a) && same_strides(a, work)) {
    target_ = Ref::borrow(out);
  } else {
    target_ = new_like(x);
    result_ = Ref::borrow(out);
  }
}

Ref Result::finish() {
  if (!result_) return std::move(target_);
  if (PyArray_CopyInto(result_.array(), target_.array()) < 0) throw Failure{};
  return std::move(result_);
}

static Ref unpermuted(Ref a, const int* permutation) {
  if (permutation == nullptr) return a;
  int inverse[NPY_MAXDIMS];
  for (int i = 0; i < PyArray_NDIM(a.array()); ++i) inverse[permutation[i]] = i;
  return permuted(std::move(a), inverse);
}

static Ref empty_permuted(int type_num, int nd, const npy_intp* dims, const int* permutation) {
  npy_intp order[NPY_MAXDIMS];
  for (int i = 0; i < nd; ++i) order[i] = dims[permutation != nullptr ? permutation[i] : i];
  return Ref::checked(PyArray_SimpleNew(nd, order, type_num));
}

Ref new_stat(DType x, int nd, const npy_intp* dims, const int* permutation) {
  const int type = x == DType::f64 || x == DType::f32 ? NPY_DOUBLE : NPY_FLOAT;
  return unpermuted(empty_permuted(type, nd, dims, permutation), permutation);
}

void fill_stat(const Ref& stat, const double* values) {
  PyArrayObject* a = stat.array();
  for (npy_intp i = 0; i < PyArray_SIZE(a); ++i) {
    if (PyArray_TYPE(a) == NPY_DOUBLE) static_cast<double*>(PyArray_DATA(a))[i] = values[i];
    else static_cast<float*>(PyArray_DATA(a))[i] = static_cast<float>(values[i]);
  }
}

template <class T> static void round_to(void* out, const double* values, npy_intp n) {
  T* p = static_cast<T*>(out);
  for (npy_intp i = 0; i < n; ++i) p[i] = Cast<T>::from(values[i]);
}

Ref new_gradient(const double* values, PyArray_Descr* given, int nd, const npy_intp* dims, const int* permutation) {
  DType dtype = DType::f64;
  float_type(given, &dtype);
  PyArray_Descr* descr = PyArray_DescrNewByteorder(given, NPY_NATIVE);
  if (descr == nullptr) throw Failure{};
  npy_intp order[NPY_MAXDIMS];
  for (int i = 0; i < nd; ++i) order[i] = dims[permutation != nullptr ? permutation[i] : i];
  Ref a = Ref::checked(PyArray_NewFromDescr(&PyArray_Type, descr, nd, order, nullptr, nullptr, 0, nullptr));
  const npy_intp n = PyArray_SIZE(a.array());
  void* out = PyArray_DATA(a.array());
  switch (dtype) {
    case DType::f64: round_to<double>(out, values, n); break;
    case DType::f32: round_to<float>(out, values, n); break;
    case DType::f16: round_to<f16>(out, values, n); break;
    case DType::bf16: round_to<bf16>(out, values, n); break;
  }
  if (permutation == nullptr) return a;
  return Ref::checked(PyArray_NewCopy(unpermuted(std::move(a), permutation).array(), NPY_CORDER));
}

PyObject* build_results(Ref* items, int count) {
  Ref t = Ref::checked(PyTuple_New(count));
  for (int i = 0; i < count; ++i)
    PyTuple_SET_ITEM(t.get(), i, items[i] ? items[i].release() : Ref::borrow(Py_None).release());
  return t.release();
}

}  // namespace nf
