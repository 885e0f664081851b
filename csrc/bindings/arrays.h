// SPDX-License-Identifier: BSD-3-Clause
// Everything between a Python argument and a pointer: checks, their messages, memory order, results.
//
// Functions here throw `Failure` with the Python error set; `guarded` turns that, and want of memory, into a null
// result.
#pragma once

#define PY_ARRAY_UNIQUE_SYMBOL normfast_array_api
#ifndef NF_OWNS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <Python.h>
#include <numpy/arrayobject.h>

#include <chrono>
#include <cstdint>
#include <new>
#include <thread>
#include <utility>

#include "../cpu/kernels.h"

namespace nf {

struct Failure {};

// Thrown where x turns out to lie on a CUDA device: the call goes on in the module _cuda.
struct OnDevice {
  const char* fn;
};

// An owned reference.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : p_(owned) {}
  static Ref borrow(PyObject* p) {
    Py_XINCREF(p);
    return Ref(p);
  }
  // The result of a C API call that returns null on error.
  static Ref checked(PyObject* owned) {
    if (owned == nullptr) throw Failure{};
    return Ref(owned);
  }
  Ref(Ref&& o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  Ref& operator=(Ref&& o) noexcept {
    std::swap(p_, o.p_);
    return *this;
  }
  ~Ref() { Py_XDECREF(p_); }
  PyObject* get() const { return p_; }
  PyArrayObject* array() const { return reinterpret_cast<PyArrayObject*>(p_); }
  PyObject* release() { return std::exchange(p_, nullptr); }
  explicit operator bool() const { return p_ != nullptr; }

 private:
  PyObject* p_ = nullptr;
};

[[noreturn]] void fail(PyObject* type, const char* format, ...);

template <class F> PyObject* guarded(F f) {
  try {
    return f();
  } catch (const Failure&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// Memory order of an array: memory position i is axis[i] of the array.
struct Order {
  int nd = 0;
  int axis[NPY_MAXDIMS];
  bool identity = true;
};

// x, ready for the kernels: native, aligned and contiguous in the order `order`.
struct Source {
  Ref given;  // the caller's array, or what stands for an array-like, on the same memory
  Ref array;  // the same, or a copy
  Order order;
  DType dtype;
  bool copied;  // the caller's array was not contiguous in any order
  int nd() const { return PyArray_NDIM(array.array()); }
  const npy_intp* dims() const { return PyArray_DIMS(array.array()); }
  npy_intp dim(int axis) const { return dims()[axis]; }
  npy_intp size() const { return PyArray_SIZE(array.array()); }
  const void* data() const { return PyArray_DATA(array.array()); }
  size_t bytes() const { return size_t(PyArray_NBYTES(array.array())); }
};

// ---- about an array ----

// Is this one of the four floating types, in either byte order?
bool float_type(const PyArray_Descr* d, DType* out);
// Native byte order and aligned.
inline bool is_plain(PyArrayObject* a) { return PyArray_ISALIGNED(a) && PyArray_ISNOTSWAPPED(a); }
// Is it contiguous when its axes are taken in some order? Fills the order, slowest axis first.
bool find_order(PyArrayObject* a, Order* order);
bool same_dims(PyArrayObject* a, int nd, const npy_intp* dims);
// The same place for every cell: strides are equal wherever an axis is longer than one.
bool same_strides(PyArrayObject* a, PyArrayObject* b);
// The array with its axes permuted; as it is where `permutation` is null.
Ref permuted(Ref a, const int* permutation);

// ---- arguments ----

// Does the object say that its memory is on a CUDA device?
bool on_device(PyObject* obj);
// Anything np.asarray takes, as an array. Throws OnDevice for the argument x; other arrays on a device are refused.
Ref as_array(const char* fn, const char* name, PyObject* obj);
// An argument that will be written: only an array will do. `why` ends the expectation in the message.
Ref as_written(const char* fn, const char* name, const char* why, PyObject* obj);
[[noreturn]] void refuse_out(const char* fn);

// Argument `name` of function `fn` as kernel input.
Source take_source(const char* fn, const char* name, PyObject* obj);
// The same in the memory order, shape and dtype of `x` (dy in backward).
Ref take_like(const char* fn, const char* name, PyObject* obj, const Source& x);
// A copy of x in C order.
void make_c_order(Source& x);

double take_eps(const char* fn, PyObject* obj);
double take_number(const char* fn, const char* name, PyObject* obj);
bool take_bool(const char* fn, const char* name, PyObject* obj);
int64_t take_int(const char* fn, const char* name, PyObject* obj);
int take_axis(const char* fn, PyObject* obj, int nd);

// The axes of a layer norm: which of x's axes are normalised.
struct Axes {
  bool reduced[NPY_MAXDIMS];
  int count;
};
Axes take_axes(const char* fn, PyObject* obj, int nd);

// weight or bias in the compute type of x, contiguous; `type_num` remembers the caller's dtype for the gradient.
// `permutation`, if not null, is applied to the parameter's axes first.
struct Param {
  Ref array;
  Ref given;
  const void* data = nullptr;
  PyArray_Descr* descr = nullptr;  // borrowed from `given`
};
Param take_param(const char* fn, const char* name, PyObject* obj, const Source& x, int nd, const npy_intp* dims,
                 const int* permutation, const char* match);
void check_param(const char* fn, const char* name, PyArrayObject* a, const Source& x, int nd, const npy_intp* dims,
                 const char* match);
// What an array of one axis and of one of the four floating types holds, whatever its stride and byte order. Cannot fail.
void read_doubles(PyArrayObject* a, double* to);

// A statistic, contiguous and of `type` (f64 or f32).
struct Stat {
  Ref array;
  Ref given;
  const void* data = nullptr;
};
Stat take_stat(const char* fn, const char* name, PyObject* obj, int nd, const npy_intp* dims, const int* permutation,
               DType type);
// The type of statistics for cells of this type, as the kernels take them.
inline DType stat_type(DType x) { return x == DType::f64 || x == DType::f32 ? DType::f64 : DType::f32; }

// Which gradients are wanted.
enum Need : int { need_x = 1, need_weight = 2, need_bias = 4 };
int take_needs(const char* fn, PyObject* obj, bool has_weight, bool has_bias_gradient);

// An array that `out` must not overlap; one flagged `same` may be `out` itself.
struct Input {
  PyObject* array;
  const char* name;
  bool same;
};
// The checks of `out` that are not of its dtype: shape, writable, what it overlaps.
void check_out(const char* fn, PyArrayObject* out, int nd, const npy_intp* dims, const Input* inputs, int count);

// A result of x's dtype: where the kernel writes, and what the caller gets.
class Result {
 public:
  Result(const char* fn, PyObject* out, const Source& x, const Input* inputs, int count);
  void* data() const { return PyArray_DATA(target_.array()); }
  PyArrayObject* array() const { return target_.array(); }
  Ref finish();

 private:
  Ref target_, result_;  // result_ is null where the target is the result
};

// A new statistic array: shape `dims`, laid out in `permutation` order if that is not null.
Ref new_stat(DType x, int nd, const npy_intp* dims, const int* permutation);
Ref new_array(PyArray_Descr* borrowed, int nd, const npy_intp* dims, size_t bytes, const void* like);

// A parameter gradient of `descr` in native order, its axes permuted as the kernels write it.
class ParamGradient {
 public:
  ParamGradient() = default;  // not wanted
  // `zero`: nobody will write it, since there are no cells.
  ParamGradient(PyArray_Descr* borrowed, int nd, const npy_intp* dims, const int* permutation, bool zero);
  void* data() const { return array_ ? PyArray_DATA(array_.array()) : nullptr; }
  DType type() const { return type_; }
  // Doubles in the order of the kernels, rounded once.
  void fill(const double* values);
  Ref finish();  // null where not wanted

 private:
  Ref array_, view_, result_;  // what the kernel writes, the same in the caller's order, and a copy of that in C order:
                               // the latter two where the orders differ
  DType type_ = DType::f64;
};

// Doubles into an array made by new_stat.
void fill_stat(const Ref& stat, const double* values);
bool arrays_overlap(PyArrayObject* a, PyArrayObject* b);

// The tuple of several results. It is made before anything is written, since filling it cannot fail.
class Results {
 public:
  explicit Results(int count) : tuple_(Ref::checked(PyTuple_New(count))) {}
  PyObject* fill(Ref* items);  // None for what is null

 private:
  Ref tuple_;
};

// Where the interpreter is ending, CPython before 3.14 does not give the GIL back but ends the thread, unwinding it
// through objects that nobody may touch without the GIL. It waits here instead for the process to end, as in 3.14.
template <class F> auto without_gil(F f) {
  PyThreadState* state = PyEval_SaveThread();
  const auto result = f();
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  return result;
}

// Work that takes long enough to be worth it.
constexpr size_t gil_threshold = 256 << 10;
template <class F> bool without_gil(size_t bytes, F f) { return bytes < gil_threshold ? f() : without_gil(f); }

Ref shape_of(int nd, const npy_intp* dims);
[[noreturn]] void out_of_memory();

// Entry points take a fixed number of positional arguments; the Python functions hold names and defaults.
using Entry = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
// The function of the module _cuda that is called `fn`, with the same arguments.
PyObject* call_on_device(const char* fn, PyObject* const* args, Py_ssize_t count);
template <Entry f, int n> PyObject* exactly(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count == n) return f(self, args, count);
  } catch (const OnDevice& e) {
    return call_on_device(e.fn, args, count);
  }
  PyErr_Format(PyExc_TypeError, "expected %d positional arguments, got %zd", n, count);
  return nullptr;
}
#define NF_METHOD(name, n) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&exactly<name, n>)), METH_FASTCALL, nullptr}

// Method tables, one per file.
extern PyMethodDef layer_norm_methods[], group_norm_methods[], batch_norm_methods[], control_methods[];

}  // namespace nf
