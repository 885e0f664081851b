// SPDX-License-Identifier: BSD-3-Clause
// The checks of arguments on a device, with the messages of arrays.cpp, and where results go. What is checked is only
// looked at; copies are enqueued when a kernel asks for its pointers, after all checks.
#include "cuda.h"

namespace nf::cuda {

InputX take_input(Call& call, PyObject* obj) {
  InputX x{call.take("x", obj), {Ref(), Ref(), {}, DType::f64, false}};
  const Array& a = x.array;
  if (a.unknown)
    fail(PyExc_TypeError, "%s: x must be of a floating dtype (float16, bfloat16, float32, float64) or integer, got %S",
         call.fn, a.type_name().get());
  Source& s = x.source;
  s.array = Ref::borrow(a.view.get());
  if (a.is_float()) s.dtype = a.dtype();
  s.copied = !find_order(a.array(), &s.order);
  if (s.copied) {
    s.order.identity = true;
    for (int i = 0; i < s.order.nd; ++i) s.order.axis[i] = i;
  }
  return x;
}

Array take_like_x(Call& call, const char* name, PyObject* obj, const InputX& x) {
  Array a = call.take(name, obj);
  const bool whole = !a.unknown && !a.is_float();
  if (a.unknown || (whole ? DType::f64 : a.dtype()) != x.source.dtype)
    fail(PyExc_TypeError, "%s: %s must have the dtype of x, %s, got %S", call.fn, name, name_of(x.source.dtype),
         a.type_name().get());
  if (!same_dims(a.array(), x.source.nd(), x.source.dims()))
    fail(PyExc_ValueError, "%s: %s must have the shape of x, %R, got %R", call.fn, name,
         shape_of(x.source.nd(), x.source.dims()).get(), shape_of(a.nd(), a.dims()).get());
  return a;
}

Array take_parameter(Call& call, const char* name, PyObject* obj, const InputX& x, int nd, const npy_intp* dims,
                     const char* match) {
  if (obj == Py_None) return {};
  Array a = call.take(name, obj);
  if (!a.is_float() || (a.dtype() != x.source.dtype && a.dtype() != DType::f32 && a.dtype() != DType::f64))
    fail(PyExc_TypeError, "%s: %s must have the dtype of x (%s), float32 or float64, got %S", call.fn, name,
         name_of(x.source.dtype), a.type_name().get());
  if (!same_dims(a.array(), nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R to match %s, got %R", call.fn, name, shape_of(nd, dims).get(),
         match, shape_of(a.nd(), a.dims()).get());
  return a;
}

Array take_statistic(Call& call, const char* name, PyObject* obj, int nd, const npy_intp* dims) {
  Array a = call.take(name, obj);
  if (!a.is_float())
    fail(PyExc_TypeError, "%s: %s must be of a floating dtype, got %S", call.fn, name, a.type_name().get());
  if (!same_dims(a.array(), nd, dims))
    fail(PyExc_ValueError, "%s: %s must have shape %R, got %R", call.fn, name, shape_of(nd, dims).get(),
         shape_of(a.nd(), a.dims()).get());
  return a;
}

Given given(Call& call, const Array& a, const int* order) {
  if (!a) return {};
  return {call.gathered(a, order, a.dtype()), a.dtype()};
}

// ---- results --------------------------------------------------------------------------------------------------------

Output::Output(Call& call, PyObject* out, const InputX& x, const Input* inputs, int count) : call_(call), x_(x) {
  if (out == Py_None) return;
  out_ = call.take("out", out);
  const DType type = x.source.dtype;
  if (!out_.is_float() || out_.dtype() != type)
    fail(PyExc_TypeError, "%s: out must have dtype %s, that of the result, got %S", call.fn, name_of(type),
         out_.type_name().get());
  if (out_.library == Library::jax)
    fail(PyExc_ValueError, "%s: out must be writable, got a JAX array, which is immutable", call.fn);
  if (out_.read_only) PyArray_CLEARFLAGS(out_.array(), NPY_ARRAY_WRITEABLE);
  check_out(call.fn, out_.array(), x.source.nd(), x.source.dims(), inputs, count);
}

void* Output::prepare(const int* order) {
  const Source& x = x_.source;
  const int* result_order = x.order.identity ? nullptr : x.order.axis;
  const auto same = [&](const int* other) {  // the same memory, if not by the same list of axes
    int64_t a[max_dims], b[max_dims];
    strides_in(order, x.nd(), x.dims(), 1, a), strides_in(other, x.nd(), x.dims(), 1, b);
    for (int i = 0; i < x.nd(); ++i)
      if (x.dim(i) > 1 && a[i] != b[i]) return false;
    return true;
  };
  order_ = order;
  bool direct;
  if (out_) {
    made_.data = out_.data();
    direct = contiguous_in(order, out_.array());
  } else {
    made_ = call_.make(x.dtype, x.nd(), x.dims(), result_order);
    direct = x.size() == 0 || same(result_order);
  }
  if (direct) return made_.data;
  work_ = call_.workspace(size_t(x.size()) * size_of(x.dtype));
  return work_;
}

Ref Output::finish() {
  const Source& x = x_.source;
  if (out_) {
    if (work_ != nullptr) call_.scatter(work_, order_, x.dtype, out_);
    return Ref::borrow(out_.object.get());
  }
  if (work_ != nullptr) {
    int64_t from[max_dims], to[max_dims];
    strides_in(order_, x.nd(), x.dims(), size_of(x.dtype), from);
    strides_in(x.order.identity ? nullptr : x.order.axis, x.nd(), x.dims(), size_of(x.dtype), to);
    call_.copy(x.nd(), x.dims(), work_, CellType(int(x.dtype)), from, made_.data, x.dtype, to);
  }
  return call_.hand_over(std::move(made_));
}

void Gradient::prepare(Call& call, DType type, int nd, const npy_intp* dims, const int* order, bool zeros) {
  type_ = type, nd_ = nd, dims_ = dims, order_ = order;
  made_ = call.make(type, nd, dims, nullptr);
  size_t bytes = size_of(type);
  for (int i = 0; i < nd; ++i) bytes *= size_t(dims[i]);
  if (zeros) {
    if (bytes > 0) call.check(fill_zero(made_.data, bytes, call.stream));
  } else if (order != nullptr) {
    work_ = call.workspace(bytes);
  }
}

Ref Gradient::finish(Call& call) {
  if (!made_) return {};
  if (work_ != nullptr) {
    int64_t from[max_dims], to[max_dims];
    strides_in(order_, nd_, dims_, size_of(type_), from);
    strides_in(nullptr, nd_, dims_, size_of(type_), to);
    call.copy(nd_, dims_, work_, CellType(int(type_)), from, made_.data, type_, to);
  }
  return call.hand_over(std::move(made_));
}

}  // namespace nf::cuda
