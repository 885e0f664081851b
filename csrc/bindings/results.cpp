// SPDX-License-Identifier: BSD-3-Clause
// Results: where they are written, memory from the pool, what `out` may overlap, gradients rounded once.
#include <cstdlib>
#include <cstring>

#include "../cpu/memory.h"
#include "arrays.h"

namespace nf {

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

Result::Result(const char* fn, PyObject* out, const Source& x, const Input* inputs, int count) {
  PyArrayObject* work = x.array.array();
  if (out == Py_None) {
    target_ = new_like(x);
    // A strided x was copied in the order of its strides; its result is in C order.
    if (x.copied && !x.order.identity) result_ = new_array(PyArray_DESCR(work), x.nd(), x.dims(), x.bytes(), x.data());
    return;
  }
  const Ref taken = as_written(fn, "out", "", out);
  PyArrayObject* a = taken.array();
  if (!PyArray_EquivTypes(PyArray_DESCR(a), PyArray_DESCR(work)))
    fail(PyExc_TypeError, "%s: out must have dtype %S, that of the result, got %S", fn, PyArray_DESCR(work),
         PyArray_DESCR(a));
  check_out(fn, a, x.nd(), x.dims(), inputs, count);
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

ParamGradient::ParamGradient(PyArray_Descr* given, int nd, const npy_intp* dims, const int* permutation, bool zero) {
  float_type(given, &type_);
  PyArray_Descr* descr = PyArray_DescrNewByteorder(given, NPY_NATIVE);
  if (descr == nullptr) throw Failure{};
  const Ref owner(reinterpret_cast<PyObject*>(descr));
  npy_intp order[NPY_MAXDIMS];
  size_t bytes = size_t(PyDataType_ELSIZE(descr));
  for (int i = 0; i < nd; ++i) order[i] = dims[permutation != nullptr ? permutation[i] : i], bytes *= size_t(order[i]);
  array_ = new_array(descr, nd, order, bytes, nullptr);
  if (zero) std::memset(data(), 0, bytes);
  if (permutation == nullptr) return;
  result_ = new_array(descr, nd, dims, bytes, nullptr);
  view_ = unpermuted(Ref::borrow(array_.get()), permutation);
}

void ParamGradient::fill(const double* values) {
  const npy_intp n = PyArray_SIZE(array_.array());
  switch (type_) {
    case DType::f64: round_to<double>(data(), values, n); break;
    case DType::f32: round_to<float>(data(), values, n); break;
    case DType::f16: round_to<f16>(data(), values, n); break;
    case DType::bf16: round_to<bf16>(data(), values, n); break;
  }
}

Ref ParamGradient::finish() {
  if (!result_) return std::move(array_);
  if (PyArray_CopyInto(result_.array(), view_.array()) < 0) throw Failure{};
  return std::move(result_);
}

}  // namespace nf
