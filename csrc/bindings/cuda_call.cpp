// SPDX-License-Identifier: BSD-3-Clause
// One call: its device and stream, memory and results through the caller's library, copies of what is not contiguous.
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cuda.h"

namespace nf::cuda {

// ---- types of cells -------------------------------------------------------------------------------------------------

size_t size_of(CellType type) {
  constexpr unsigned char sizes[] = {8, 4, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8, 1};
  return sizes[int(type)];
}
const char* name_of(CellType type) {
  constexpr const char* names[] = {"float64", "float32", "float16", "bfloat16", "int8",   "int16", "int32",
                                   "int64",   "uint8",   "uint16",  "uint32",   "uint64", "bool"};
  return names[int(type)];
}
int carrier(CellType type) {
  constexpr int numbers[] = {NPY_FLOAT64, NPY_FLOAT32, NPY_FLOAT16, NPY_UINT16, NPY_INT8,   NPY_INT16, NPY_INT32,
                             NPY_INT64,   NPY_UINT8,   NPY_UINT16,  NPY_UINT32, NPY_UINT64, NPY_BOOL};
  return numbers[int(type)];
}

Ref Array::type_name() const {
  return unknown ? Ref::borrow(unknown.get()) : Ref::checked(PyUnicode_FromString(name_of(type)));
}

void describe(const char* fn, const char* name, Array& a, void* data, int nd, const int64_t* dims,
              const int64_t* byte_strides) {
  static char nowhere[16];
  npy_intp shape[max_dims], strides[max_dims];
  int64_t cells = 1;
  for (int i = 0; i < nd; ++i) {
    if (dims[i] < 0) fail(PyExc_ValueError, "%s: %s must have no negative length, got %zd", fn, name, dims[i]);
    shape[i] = npy_intp(dims[i]), cells *= dims[i];
  }
  const int type = a.unknown ? NPY_UINT8 : carrier(a.type);
  const size_t item = a.unknown ? 1 : size_of(a.type);
  bool aligned = reinterpret_cast<uintptr_t>(data) % item == 0;
  if (byte_strides != nullptr) {
    for (int i = 0; i < nd; ++i) {
      strides[i] = npy_intp(byte_strides[i]);
      aligned = aligned && (shape[i] <= 1 || strides[i] % npy_intp(item) == 0);
    }
  } else {
    npy_intp step = npy_intp(item);
    for (int i = nd - 1; i >= 0; --i) strides[i] = step, step *= shape[i] > 0 ? shape[i] : 1;
  }
  if (cells > 0 && data == nullptr) fail(PyExc_ValueError, "%s: %s has no memory: its address is null", fn, name);
  if (cells > 0 && !aligned) fail(PyExc_ValueError, "%s: %s must be aligned to the size of its elements", fn, name);
  a.view = Ref::checked(PyArray_NewFromDescr(&PyArray_Type, PyArray_DescrFromType(type), nd, shape, strides,
                                             data != nullptr ? data : nowhere, NPY_ARRAY_WRITEABLE, nullptr));
}

void strides_in(const int* order, int nd, const npy_intp* dims, size_t item, int64_t* strides) {
  int64_t step = int64_t(item);
  for (int i = nd - 1; i >= 0; --i) {
    const int axis = order != nullptr ? order[i] : i;
    strides[axis] = step, step *= dims[axis];
  }
}

bool contiguous_in(const int* order, PyArrayObject* a) {
  if (order == nullptr) return PyArray_IS_C_CONTIGUOUS(a);
  int64_t strides[max_dims];
  strides_in(order, PyArray_NDIM(a), PyArray_DIMS(a), size_t(PyArray_ITEMSIZE(a)), strides);
  if (PyArray_SIZE(a) == 0) return true;
  for (int i = 0; i < PyArray_NDIM(a); ++i)
    if (PyArray_DIM(a, i) > 1 && PyArray_STRIDE(a, i) != strides[i]) return false;
  return true;
}

// ---- errors ---------------------------------------------------------------------------------------------------------

void fail_cuda(const char* fn, int error) {
  PyErr_Format(is_out_of_memory(error) ? PyExc_MemoryError : PyExc_RuntimeError, "%s: %s: %s", fn, error_name(error),
               error_text(error));
  throw Failure{};
}

void require_device(const char* fn) {
  int count = 0;
  if (const int error = count_devices(&count))
    fail(PyExc_RuntimeError, "%s: no CUDA device: %s: %s", fn, error_name(error), error_text(error));
}

// ---- what others may reuse too early --------------------------------------------------------------------------------

// The owner of a DLPack capsule may reuse the memory as soon as it has it back, on a stream that knows nothing of ours.
// The capsule is kept until the kernels that read it are done; that is looked at on later calls.
namespace {
struct Borrowed {
  void* mark;
  PyObject* capsule;
};
std::mutex borrowed_lock;
std::vector<Borrowed>& borrowed() {
  static auto* all = new std::vector<Borrowed>;  // outlives everything
  return *all;
}
}  // namespace

static void give_back_borrowed() {
  std::vector<PyObject*> over;
  {
    std::lock_guard<std::mutex> guard(borrowed_lock);
    auto& all = borrowed();
    size_t left = 0;
    for (const Borrowed& b : all) {
      if (mark_passed(b.mark)) over.push_back(b.capsule);
      else all[left++] = b;
    }
    all.resize(left);
  }
  for (PyObject* capsule : over) Py_DECREF(capsule);
}

static void borrow_until_done(Ref capsule, Stream stream) {
  void* mark;
  if (set_mark(stream, &mark) != 0) return;
  std::lock_guard<std::mutex> guard(borrowed_lock);
  borrowed().push_back({mark, capsule.release()});
}

// ---- device and stream ----------------------------------------------------------------------------------------------

static Ref imported(const char* name) {
  Ref key = Ref::checked(PyUnicode_FromString(name));
  Ref m(PyImport_GetModule(key.get()));
  return m ? std::move(m) : Ref::checked(PyImport_ImportModule(name));
}

static Stream stream_number(const Ref& number) {
  void* p = PyLong_AsVoidPtr(number.get());
  if (p == nullptr && PyErr_Occurred()) throw Failure{};
  return p;
}

Call::Call(const char* name, PyObject* x) : fn(name), x_(x), library_(library_of(x)) {
  require_device(fn);
  if (!find_device(x, library_, &device))
    fail(PyExc_TypeError, "%s: x must be on a CUDA device, got %.100s", fn, Py_TYPE(x)->tp_name);
  int count = 0;
  check(count_devices(&count));
  if (device < 0 || device >= count)
    fail(PyExc_ValueError, "%s: x must be on one of the %d CUDA devices, got cuda:%d", fn, count, device);
  try {
    enter();
  } catch (...) {
    if (previous_ >= 0) use_device(previous_);
    throw;
  }
}

static Stream torch_stream(PyObject* device) {
  Ref cuda = Ref::checked(PyObject_GetAttrString(imported("torch").get(), "cuda"));
  Ref current = Ref::checked(PyObject_CallMethod(cuda.get(), "current_stream", "O", device));
  return stream_number(Ref::checked(PyObject_GetAttrString(current.get(), "cuda_stream")));
}

// The stream is the one that the caller's library is working on.
void Call::enter() {
  int now = 0;
  check(current_device(&now));
  if (now != device) {
    check(use_device(device));
    previous_ = now;
  }
  switch (library_) {
    case Library::cupy: {
      module_ = imported("cupy");
      Ref cuda = Ref::checked(PyObject_GetAttrString(module_.get(), "cuda"));
      if (previous_ >= 0) {  // its notion of the current device may be its own
        Ref there = Ref::checked(PyObject_CallMethod(cuda.get(), "Device", "i", device));
        Ref done = Ref::checked(PyObject_CallMethod(there.get(), "__enter__", nullptr));
        entered_ = std::move(there);
      }
      Ref current = Ref::checked(PyObject_CallMethod(cuda.get(), "get_current_stream", nullptr));
      stream = stream_number(Ref::checked(PyObject_GetAttrString(current.get(), "ptr")));
      break;
    }
    case Library::torch: {
      module_ = imported("torch");
      device_object_ = Ref::checked(PyObject_GetAttrString(x_, "device"));
      stream = torch_stream(device_object_.get());
      break;
    }
    case Library::numba: module_ = imported("numba.cuda"); [[fallthrough]];
    default: {
      // The stream that x names; where it names none, one of ours. Never the legacy default stream unasked.
      if (library_ == Library::other || library_ == Library::numba) {
        Ref dict(PyObject_GetAttrString(x_, "__cuda_array_interface__"));
        PyErr_Clear();
        PyObject* named =
            dict && PyDict_Check(dict.get()) ? PyDict_GetItemString(dict.get(), "stream") : nullptr;  // borrowed
        if (named != nullptr && named != Py_None) {
          stream = stream_number(Ref::borrow(named));
          if (stream != nullptr) break;  // 0 is refused when the array is read
        }
      }
      check(own_stream(device, &stream));
    }
  }
}

Call::~Call() {
  for (void* block : blocks_) release(block, stream);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (entered_) {
    Ref left(PyObject_CallMethod(entered_.get(), "__exit__", "OOO", Py_None, Py_None, Py_None));
    if (!left) PyErr_Clear();
  }
  for (Ref& capsule : capsules_) borrow_until_done(std::move(capsule), stream);
  kept_.clear();
  PyErr_Restore(type, value, trace);
  if (previous_ >= 0) use_device(previous_);
}

// ---- arguments ------------------------------------------------------------------------------------------------------

static const char* way_in(Library library) {
  switch (library) {
    case Library::torch:
      return "%s: %s is %.100s but x is on cuda:%d; copy it there, for example with torch.as_tensor(%s, "
             "device=\"cuda:%d\")";
    case Library::cupy: return "%s: %s is %.100s but x is on cuda:%d; copy it there, for example with cupy.asarray(%s)";
    case Library::numba:
      return "%s: %s is %.100s but x is on cuda:%d; copy it there, for example with numba.cuda.to_device(%s)";
    case Library::jax:
      return "%s: %s is %.100s but x is on cuda:%d; copy it there, for example with jax.device_put(%s, x.device)";
    default: return "%s: %s is %.100s but x is on cuda:%d; copy it there, for example with normfast.cuda.to_device(%s)";
  }
}

Array Call::take(const char* name, PyObject* obj) {
  if (obj == Py_None) fail(PyExc_TypeError, "%s: %s must be an array, got None", fn, name);
  Array a;
  a.library = library_of(obj);
  if (!find_device(obj, a.library, &a.device)) {
    char what[128];
    if (PyArray_Check(obj)) PyOS_snprintf(what, sizeof what, "a NumPy array");
    else PyOS_snprintf(what, sizeof what, "on the host (%.100s)", Py_TYPE(obj)->tp_name);
    fail(PyExc_TypeError, way_in(library_), fn, name, what, device, name, device);
  }
  if (a.device != device)
    fail(PyExc_ValueError, "%s: %s is on cuda:%d but x is on cuda:%d; all arrays must be on one device", fn, name,
         a.device, device);
  const int where = a.device;
  read_array(fn, name, obj, stream, a);
  a.device = where;
  if (a.library == Library::torch && library_ != Library::torch) {
    Ref there = Ref::checked(PyObject_GetAttrString(obj, "device"));
    a.has_stream = true, a.stream = torch_stream(there.get());
  }
  // What another library computes on another stream is waited for, on the device.
  if (a.has_stream && a.stream != stream && a.library != library_) check(wait_for(stream, a.stream));
  if (a.released_by_call) {
    give_back_borrowed();
    capsules_.push_back(Ref::borrow(a.keeper.get()));
  }
  return a;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Through the allocator of the library: `shape` of cells of a type that it has by this name.
Ref Call::make_by_library(const char* type, int nd, const npy_intp* dims) {
  Ref shape = shape_of(nd, dims);
  if (library_ == Library::torch) {
    Ref dtype = Ref::checked(PyObject_GetAttrString(module_.get(), type));
    Ref empty = Ref::checked(PyObject_GetAttrString(module_.get(), "empty"));
    Ref args = Ref::checked(PyTuple_Pack(1, shape.get()));
    Ref keywords = Ref::checked(Py_BuildValue("{s:O,s:O}", "dtype", dtype.get(), "device", device_object_.get()));
    return Ref::checked(PyObject_Call(empty.get(), args.get(), keywords.get()));
  }
  // NumPy does not know bfloat16 by its name.
  Ref dtype = std::strcmp(type, "bfloat16") == 0
                  ? Ref::checked(PyObject_GetAttrString(imported("ml_dtypes").get(), type))
                  : Ref::checked(PyUnicode_FromString(type));
  return Ref::checked(PyObject_CallMethod(module_.get(), "empty", "OO", shape.get(), dtype.get()));
}

static void* address_in(const Ref& obj, Library library) {
  Ref number;
  if (library == Library::torch) {
    number = Ref::checked(PyObject_CallMethod(obj.get(), "data_ptr", nullptr));
  } else if (library == Library::cupy) {
    Ref data = Ref::checked(PyObject_GetAttrString(obj.get(), "data"));
    number = Ref::checked(PyObject_GetAttrString(data.get(), "ptr"));
  } else {
    Ref dict = Ref::checked(PyObject_GetAttrString(obj.get(), "__cuda_array_interface__"));
    Ref data = Ref::checked(PyMapping_GetItemString(dict.get(), "data"));
    number = Ref::checked(PySequence_GetItem(data.get(), 0));
  }
  return stream_number(number);
}

void* Call::workspace(size_t bytes) {
  if (bytes == 0) return nullptr;
  if (library_ == Library::torch || library_ == Library::cupy) {
    constexpr size_t alignment = 256;
    const npy_intp n = npy_intp(bytes + alignment - 1);
    kept_.push_back(make_by_library("uint8", 1, &n));
    const auto address = reinterpret_cast<uintptr_t>(address_in(kept_.back(), library_));
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }
  void* block = nullptr;
  check(allocate(bytes, stream, &block));
  blocks_.push_back(block);
  return block;
}

Made Call::make(DType type, int nd, const npy_intp* dims, const int* order) {
  Made made;
  if (library_ == Library::numba) {
    int64_t steps[max_dims];
    npy_intp strides[max_dims];
    strides_in(order, nd, dims, size_of(type), steps);
    for (int i = 0; i < nd; ++i) strides[i] = npy_intp(steps[i]);
    made.object = Ref::checked(PyObject_CallMethod(module_.get(), "device_array", "OsO", shape_of(nd, dims).get(),
                                                   name_of(type), shape_of(nd, strides).get()));
    made.data = address_in(made.object, library_);
    return made;
  }
  if (library_ != Library::torch && library_ != Library::cupy) {
    made.object = Ref::checked(new_device_array(CellType(int(type)), nd, dims, order, device, stream));
    made.data = device_array_data(made.object.get());
    return made;
  }
  npy_intp ordered[max_dims], inverse[max_dims];
  for (int i = 0; i < nd; ++i) {
    const int axis = order != nullptr ? order[i] : i;
    ordered[i] = dims[axis], inverse[axis] = i;
  }
  made.object = make_by_library(name_of(type), nd, ordered);
  made.data = address_in(made.object, library_);
  if (order != nullptr && nd > 1)
    made.object = Ref::checked(PyObject_CallMethod(
        made.object.get(), library_ == Library::torch ? "permute" : "transpose", "(O)", shape_of(nd, inverse).get()));
  return made;
}

Ref Call::hand_over(Made made) {
  if (library_ == Library::own || library_ == Library::other) {
    Stream ours;
    check(own_stream(device, &ours));
    if (ours != stream) check(wait_for(ours, stream));  // an array of ours belongs to our stream
  }
  if (library_ != Library::jax && library_ != Library::standard) return std::move(made.object);
  Ref space = Ref::checked(PyObject_CallMethod(x_, "__array_namespace__", nullptr));
  Ref result = Ref::checked(PyObject_CallMethod(space.get(), "from_dlpack", "O", made.object.get()));
  if (library_ == Library::jax) returned_when_done(made.object.get());
  return result;
}

// ---- copies ---------------------------------------------------------------------------------------------------------

void Call::copy(int nd, const npy_intp* dims, const void* from, CellType from_type, const int64_t* from_strides,
                void* to, DType to_type, const int64_t* to_strides) {
  CopyCells c;
  c.from = from, c.from_type = from_type, c.to = to, c.to_type = to_type, c.stream = stream, c.nd = 0;
  int axes[max_dims], n = 0;
  for (int i = 0; i < nd; ++i) {
    if (dims[i] == 0) return;
    if (dims[i] == 1) continue;
    int at = n++;  // slowest first, as the target lies
    for (; at > 0 && std::llabs(to_strides[axes[at - 1]]) < std::llabs(to_strides[i]); --at) axes[at] = axes[at - 1];
    axes[at] = i;
  }
  for (int i = 0; i < n; ++i) {
    const int64_t length = dims[axes[i]], from_step = from_strides[axes[i]], to_step = to_strides[axes[i]];
    // An axis that continues the one before it becomes part of it.
    if (c.nd > 0 && c.from_strides[c.nd - 1] == length * from_step && c.to_strides[c.nd - 1] == length * to_step) {
      c.dims[c.nd - 1] *= length, c.from_strides[c.nd - 1] = from_step, c.to_strides[c.nd - 1] = to_step;
      continue;
    }
    c.dims[c.nd] = length, c.from_strides[c.nd] = from_step, c.to_strides[c.nd] = to_step, ++c.nd;
  }
  check(copy_cells(c));
}

const void* Call::gathered(const Array& a, const int* order, DType as) {
  if (a.is_float() && a.dtype() == as && contiguous_in(order, a.array())) return a.data();
  void* work = workspace(size_t(a.size()) * size_of(as));
  int64_t from[max_dims], to[max_dims];
  for (int i = 0; i < a.nd(); ++i) from[i] = PyArray_STRIDE(a.array(), i);
  strides_in(order, a.nd(), a.dims(), size_of(as), to);
  copy(a.nd(), a.dims(), a.data(), a.type, from, work, as, to);
  return work;
}

void Call::scatter(const void* from, const int* order, DType from_type, const Array& a) {
  int64_t source[max_dims], to[max_dims];
  strides_in(order, a.nd(), a.dims(), size_of(from_type), source);
  for (int i = 0; i < a.nd(); ++i) to[i] = PyArray_STRIDE(a.array(), i);
  copy(a.nd(), a.dims(), from, CellType(int(from_type)), source, a.data(), a.dtype(), to);
}

}  // namespace nf::cuda
