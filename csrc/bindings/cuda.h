// SPDX-License-Identifier: BSD-3-Clause
// Calls with arrays on a CUDA device: what a call knows of its arrays, their library and their stream.
//
// An array on the device is described by a NumPy array over its memory, so that shapes, strides, overlaps and the plans
// of the norms are worked out by the code that serves the host. That memory is never touched.
#pragma once

#include <new>
#include <vector>

#include "../cuda/device.h"
#include "arrays.h"

namespace nf::cuda {

// Where an array comes from: how it is read, which stream its users mean, and how a result becomes its like.
enum class Library { own, cupy, torch, numba, jax, standard, other };
Library library_of(PyObject* obj);

// ---- types of cells ----

size_t size_of(CellType type);
inline size_t size_of(DType type) { return size_of(CellType(int(type))); }  // the floating types come first in both
const char* name_of(CellType type);
inline const char* name_of(DType type) { return name_of(CellType(int(type))); }
// The type that describes such cells in a NumPy array: bfloat16 goes as uint16, since NumPy may not have it.
int carrier(CellType type);

// ---- an array of the caller ----

struct Array {
  Ref object;  // the caller's; null: not given
  Ref view;
  Ref keeper;   // what keeps the memory alive
  Ref unknown;  // the name of a type that the kernels do not know
  CellType type = CellType::f64;
  bool read_only = false;
  bool released_by_call = false;  // the owner may reuse the memory as soon as `keeper` is gone, whatever still runs
  int device = -1;
  bool has_stream = false;  // the array says on which stream it is being computed
  Stream stream = nullptr;
  Library library = Library::other;

  explicit operator bool() const { return bool(object); }
  PyArrayObject* array() const { return view.array(); }
  int nd() const { return PyArray_NDIM(array()); }
  const npy_intp* dims() const { return PyArray_DIMS(array()); }
  npy_intp size() const { return PyArray_SIZE(array()); }
  void* data() const { return PyArray_DATA(array()); }
  bool is_float() const { return !unknown && type <= CellType::bf16; }
  DType dtype() const { return DType(int(type)); }
  Ref type_name() const;
};

// Its description. Memory of no bytes may have a null address.
void describe(const char* fn, const char* name, Array& a, void* data, int nd, const int64_t* dims,
              const int64_t* byte_strides);
// The strides, in bytes, of memory that is contiguous when the axes are taken in `order` (null: as they come).
void strides_in(const int* order, int nd, const npy_intp* dims, size_t item, int64_t* strides);
bool contiguous_in(const int* order, PyArrayObject* a);

// ---- reading the protocols (cuda_protocols.cpp) ----

// Is it on a device? Then which; `obj` may be anything.
bool find_device(PyObject* obj, Library library, int* device);
// `stream`: on which the caller goes on; a producer that can do so lets it wait for its own.
void read_array(const char* fn, const char* name, PyObject* obj, Stream stream, Array& a);

// ---- arrays of our own (cuda_device_array.cpp) ----

extern PyTypeObject* device_array_type;
bool add_device_array(PyObject* module);
// Uninitialised memory, allocated on `stream`; the array itself belongs to our stream of the device.
PyObject* new_device_array(CellType type, int nd, const npy_intp* dims, const int* order, int device, Stream stream);
void* device_array_data(PyObject* obj);
void read_device_array(const char* fn, const char* name, PyObject* obj, Array& a);
// The library that took the memory over gives it back only when it is done with it.
void returned_when_done(PyObject* device_array);
extern PyMethodDef device_array_functions[];

[[noreturn]] void fail_cuda(const char* fn, int error);
inline void check(const char* fn, int error) {
  if (error != 0) fail_cuda(fn, error);
}
// RuntimeError with CUDA's reason if there is no device.
void require_device(const char* fn);

// ---- a call ----

// A result: memory, and the object that goes to the caller.
struct Made {
  Ref object;
  void* data = nullptr;
  explicit operator bool() const { return bool(object); }
};

class Call {
 public:
  // x chooses the device, the stream and the library of the results.
  Call(const char* fn, PyObject* x);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const char* fn;
  int device = 0;
  Stream stream = nullptr;

  // Argument `name`, which has to be on the device of x.
  Array take(const char* name, PyObject* obj);
  void check(int error) const { cuda::check(fn, error); }

  // Memory for the time of the call.
  void* workspace(size_t bytes);
  // An array as contiguous memory of type `as` with its axes in `order`: itself, or a copy in the workspace.
  const void* gathered(const Array& a, const int* order, DType as);
  // Contiguous cells with their axes in `order`, into an array of the same shape.
  void scatter(const void* from, const int* order, DType from_type, const Array& to);
  void copy(int nd, const npy_intp* dims, const void* from, CellType from_type, const int64_t* from_strides, void* to,
            DType to_type, const int64_t* to_strides);

  // A new array of the caller's library, contiguous with its axes in `order`.
  Made make(DType type, int nd, const npy_intp* dims, const int* order);
  // What the caller gets, once all work is enqueued.
  Ref hand_over(Made made);

 private:
  PyObject* x_;
  Library library_;
  Ref module_;         // of the library
  Ref device_object_;  // what the library calls the device
  Ref entered_;        // CuPy's notion of the current device, where it had to be changed
  int previous_ = -1;  // device to go back to
  std::vector<Ref> kept_, capsules_;
  std::vector<void*> blocks_;

  void enter();
  Ref make_by_library(const char* type, int nd, const npy_intp* dims);
};

// ---- arguments (cuda_arguments.cpp): the checks and messages of arrays.cpp, nothing is enqueued ----

// x, and how its memory is laid out when the kernels see it: in the order of its axes if it is contiguous in any, else
// copied to C order.
struct InputX {
  Array array;
  Source source;
};
InputX take_input(Call& call, PyObject* obj);
Array take_like_x(Call& call, const char* name, PyObject* obj, const InputX& x);
Array take_parameter(Call& call, const char* name, PyObject* obj, const InputX& x, int nd, const npy_intp* dims,
                     const char* match);
Array take_statistic(Call& call, const char* name, PyObject* obj, int nd, const npy_intp* dims);

// What the kernels take of them.
Given given(Call& call, const Array& a, const int* order);

// A result of x's shape and dtype.
class Output {
 public:
  Output(Call& call, PyObject* out, const InputX& x, const Input* inputs, int count);
  // Where a kernel writes that sees the axes in `order`.
  void* prepare(const int* order);
  Ref finish();

 private:
  Call& call_;
  const InputX& x_;
  Array out_;
  Made made_;
  void* work_ = nullptr;  // not null: copied to the result at the end
  const int* order_ = nullptr;
};

// A parameter gradient: zeros until a kernel writes it.
class Gradient {
 public:
  // In the dtype of `like`, C order; the kernel writes it with its axes in `order`.
  void prepare(Call& call, DType type, int nd, const npy_intp* dims, const int* order, bool zeros);
  Wanted wanted() const { return {work_ != nullptr ? work_ : made_.data, type_}; }
  Ref finish(Call& call);
  explicit operator bool() const { return bool(made_); }

 private:
  Made made_;
  DType type_ = DType::f32;
  void* work_ = nullptr;
  const int* order_ = nullptr;
  int nd_ = 0;
  const npy_intp* dims_ = nullptr;
};

extern PyMethodDef layer_norm_methods[], group_norm_methods[], batch_norm_methods[];

template <class F> PyObject* guarded(F f) {
  try {
    return f();
  } catch (const Failure&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

}  // namespace nf::cuda
