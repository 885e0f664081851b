// SPDX-License-Identifier: BSD-3-Clause
#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstring>
#include <new>

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

bool float_type(const PyArray_Descr* d, DType* out) {
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

// ---- x -------------------------------------------------------------------------------------------------------------

bool find_order(PyArrayObject* a, Order* order) {
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

bool on_device(PyObject* obj) {
  if (PyObject_HasAttrString(obj, "__cuda_array_interface__") != 0) return true;
  if (PyObject_HasAttrString(obj, "__dlpack_device__") == 0) return false;
  bool device = false;
  Ref pair(PyObject_CallMethod(obj, "__dlpack_device__", nullptr));
  if (pair && PyTuple_Check(pair.get()) && PyTuple_GET_SIZE(pair.get()) > 0) {
    Ref kind(PyNumber_Index(PyTuple_GET_ITEM(pair.get(), 0)));
    const long k = kind ? PyLong_AsLong(kind.get()) : 0;
    device = k == 2 || k == 13;  // CUDA and its managed memory; its pinned host memory (3) is read as any other
  }
  PyErr_Clear();
  return device;
}

[[noreturn]] static void refuse_device(const char* fn, const char* name) {
  fail(PyExc_TypeError,
       "%s: %s is on a CUDA device, but x is on the host; copy it to the host first, for example with "
       "cupy.asnumpy(%s) or %s.cpu().numpy(), or x to the device",
       fn, name, name, name);
}

Ref as_array(const char* fn, const char* name, PyObject* obj) {
  if (PyArray_Check(obj)) return Ref::borrow(obj);
  if (on_device(obj)) {
    if (std::strcmp(name, "x") == 0) throw OnDevice{fn};
    refuse_device(fn, name);
  }
  if (obj == Py_None) fail(PyExc_TypeError, "%s: %s must be an array, got None", fn, name);
  Ref array(PyArray_FromAny(obj, nullptr, 0, 0, 0, nullptr));
  if (array) return array;
  if (!PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_TypeError)) throw Failure{};
  PyObject *type, *value, *trace;  // such as lists of different lengths: NumPy's words, behind whose and which they are
  PyErr_Fetch(&type, &value, &trace);
  const Ref kind(type), words(value), where(trace);
  fail(kind.get(), "%s: %s must be an array: %S", fn, name, words ? words.get() : kind.get());
}

Ref as_written(const char* fn, const char* name, const char* why, PyObject* obj) {
  if (PyArray_Check(obj)) return Ref::borrow(obj);
  if (on_device(obj)) refuse_device(fn, name);
  fail(PyExc_TypeError, "%s: %s must be a NumPy array%s, got %.100s", fn, name, why, Py_TYPE(obj)->tp_name);
}

PyObject* call_on_device(const char* fn, PyObject* const* args, Py_ssize_t count) {
  Ref module(PyImport_ImportModule("normfast._cuda"));
  if (!module) {
    if (!PyErr_ExceptionMatches(PyExc_ModuleNotFoundError)) return nullptr;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError,
                 "%s: x is on a CUDA device, and this build of normfast has no CUDA backend; build normfast with "
                 "NORMFAST_CUDA=ON, or copy x to the host first, for example with cupy.asnumpy(x) or x.cpu().numpy()",
                 fn);
    return nullptr;
  }
  Ref function(PyObject_GetAttrString(module.get(), fn));
  if (!function) return nullptr;
  return PyObject_Vectorcall(function.get(), args, size_t(count), nullptr);
}

Source take_source(const char* fn, const char* name, PyObject* obj) {
  Ref given = as_array(fn, name, obj);
  Source s{Ref::borrow(given.get()), std::move(given), {}, DType::f64, false};
  PyArray_Descr* d = PyArray_DESCR(s.array.array());
  if (!float_type(d, &s.dtype)) {
    if (!PyTypeNum_ISINTEGER(d->type_num) && !PyTypeNum_ISBOOL(d->type_num))
      fail(PyExc_TypeError,
           "%s: %s must be of a floating dtype (float16, bfloat16, float32, float64) or integer, got %S", fn, name, d);
    // As np.mean does. The cast keeps the order of the axes; it is not the caller's array any more.
    const bool plain = find_order(s.array.array(), &s.order);
    s.array = Ref::checked(PyArray_NewLikeArray(s.array.array(), NPY_KEEPORDER, PyArray_DescrFromType(NPY_DOUBLE), 0));
    if (PyArray_CopyInto(s.array.array(), s.given.array()) < 0) throw Failure{};
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
  Order seen = s.order;
  const bool was_ordered = find_order(s.array.array(), &seen);
  s.array = std::move(copy);
  find_order(s.array.array(), &s.order);
  s.copied = !plain && !was_ordered;
  return s;
}

void make_c_order(Source& x) {
  x.array = Ref::checked(PyArray_NewCopy(x.array.array(), NPY_CORDER));
  find_order(x.array.array(), &x.order);
}

bool same_dims(PyArrayObject* a, int nd, const npy_intp* dims) {
  return PyArray_NDIM(a) == nd && PyArray_CompareLists(PyArray_DIMS(a), dims, nd);
}

bool same_strides(PyArrayObject* a, PyArrayObject* b) {
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
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
    PyErr_Clear();
    if (too_large) fail(PyExc_ValueError, "%s: %s must be finite, got an integer beyond float64", fn, name);
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

static int normal_axis(const char* fn, const char* name, int64_t axis, int nd) {
  if (axis >= -nd && axis < nd) return int(axis < 0 ? axis + nd : axis);
  Ref module = Ref::checked(PyImport_ImportModule("numpy.exceptions"));
  Ref type = Ref::checked(PyObject_GetAttrString(module.get(), "AxisError"));
  // AxisError's own text follows.
  Ref prefix = Ref::checked(name != nullptr ? PyUnicode_FromFormat("%s: %s", fn, name) : PyUnicode_FromString(fn));
  Ref error = Ref::checked(PyObject_CallFunction(type.get(), "LiO", static_cast<long long>(axis), nd, prefix.get()));
  PyErr_SetObject(type.get(), error.get());
  throw Failure{};
}

int take_axis(const char* fn, PyObject* obj, int nd) {
  return normal_axis(fn, "channel_axis", take_int(fn, "channel_axis", obj), nd);
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
    a.reduced[normal_axis(fn, nullptr, take_int(fn, "axis", index.get()), nd)] = true;
    a.count = 1;
    return a;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(obj); ++i) {
    const int axis = normal_axis(fn, nullptr, take_int(fn, "axis", PyTuple_GET_ITEM(obj, i)), nd);
    if (a.reduced[axis]) fail(PyExc_ValueError, "%s: axis must name each axis once, got %R", fn, obj);
    a.reduced[axis] = true;
    ++a.count;
  }
  return a;
}

// ---- parameters and statistics --------------------------------------------------------------------------------------

Ref permuted(Ref a, const int* permutation) {
  if (permutation == nullptr) return a;
  npy_intp axes[NPY_MAXDIMS];
  const int nd = PyArray_NDIM(a.array());
  for (int i = 0; i < nd; ++i) axes[i] = permutation[i];
  PyArray_Dims dims{axes, nd};
  return Ref::checked(PyArray_Transpose(a.array(), &dims));
}

void check_param(const char* fn, const char* name, PyArrayObject* a, const Source& x, int nd, const npy_intp* dims,
                 const char* match) {
  DType dtype = DType::f64;
  PyArray_Descr* d = PyArray_DESCR(a);
  if (!float_type(d, &dtype) || (dtype != x.dtype && dtype != DType::f32 && dtype != DType::f64))
    fail(PyExc_TypeError, "%s: %s must have the dtype of x (%S), float32 or float64, got %S", fn, name,
         PyArray_DESCR(x.array.array()), d);
  if (!same_dims(a, nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R to match %s, got %R", fn, name, shape_of(nd, dims).get(), match,
         shape_of(PyArray_NDIM(a), PyArray_DIMS(a)).get());
}

Param take_param(const char* fn, const char* name, PyObject* obj, const Source& x, int nd, const npy_intp* dims,
                 const int* permutation, const char* match) {
  Param p;
  if (obj == Py_None) return p;
  p.given = as_array(fn, name, obj);
  PyArrayObject* a = p.given.array();
  check_param(fn, name, a, x, nd, dims, match);
  PyArray_Descr* d = PyArray_DESCR(a);
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

Stat take_stat(const char* fn, const char* name, PyObject* obj, int nd, const npy_intp* dims, const int* permutation,
               DType type) {
  Stat s;
  s.given = as_array(fn, name, obj);
  PyArrayObject* a = s.given.array();
  PyArray_Descr* d = PyArray_DESCR(a);
  if (!PyTypeNum_ISFLOAT(d->type_num) && !is_bfloat16(d))
    fail(PyExc_TypeError, "%s: %s must be of a floating dtype, got %S", fn, name, d);
  if (!same_dims(a, nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R, got %R", fn, name, shape_of(nd, dims).get(),
         shape_of(PyArray_NDIM(a), PyArray_DIMS(a)).get());
  const int number = type == DType::f64 ? NPY_DOUBLE : NPY_FLOAT;
  if (d->type_num == number && permutation == nullptr && PyArray_ISCARRAY_RO(a)) {
    s.data = PyArray_DATA(a);
    return s;
  }
  const Ref turned = permuted(Ref::borrow(s.given.get()), permutation);
  s.array = Ref::checked(
      PyArray_FromArray(turned.array(), PyArray_DescrFromType(number), NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST));
  s.data = PyArray_DATA(s.array.array());
  return s;
}

template <class T> static void read_as(PyArrayObject* a, double* to) {
  const npy_intp n = PyArray_SIZE(a), stride = PyArray_STRIDE(a, 0);
  const char* from = PyArray_BYTES(a);
  if (is_plain(a) && stride == npy_intp(sizeof(T))) {  // a loop that compilers turn into vectors
    const T* p = reinterpret_cast<const T*>(from);
    for (npy_intp i = 0; i < n; ++i) to[i] = double(Cast<T>::get(p[i]));
    return;
  }
  for (npy_intp i = 0; i < n; ++i) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, from + i * stride, sizeof(T));
    if (PyArray_ISBYTESWAPPED(a)) std::reverse(bytes, bytes + sizeof(T));
    T value;
    std::memcpy(&value, bytes, sizeof(T));
    to[i] = double(Cast<T>::get(value));
  }
}

void read_doubles(PyArrayObject* a, double* to) {
  DType type = DType::f64;
  float_type(PyArray_DESCR(a), &type);
  switch (type) {
    case DType::f64: return read_as<double>(a, to);
    case DType::f32: return read_as<float>(a, to);
    case DType::f16: return read_as<f16>(a, to);
    case DType::bf16: return read_as<bf16>(a, to);
  }
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

}  // namespace nf
