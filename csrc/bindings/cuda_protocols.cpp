// SPDX-License-Identifier: BSD-3-Clause
// Arrays of other libraries: __cuda_array_interface__, __dlpack__, and PyTorch's own attributes.
#include <cstring>

#include "cuda.h"
#include "dlpack.h"

namespace nf::cuda {

// ---- which library --------------------------------------------------------------------------------------------------

// A class of a module that the caller has imported; never imported by us. Null without an error if it is not there.
static Ref find_class(const char* module, const char* name) {
  Ref key = Ref::checked(PyUnicode_FromString(module));
  Ref m(PyImport_GetModule(key.get()));
  Ref c(m ? PyObject_GetAttrString(m.get(), name) : nullptr);
  if (!c) PyErr_Clear();
  return c;
}

static bool instance_of(PyObject* obj, const char* module, const char* name) {
  const Ref c = find_class(module, name);
  if (!c) return false;
  const int yes = PyObject_IsInstance(obj, c.get());
  if (yes < 0) PyErr_Clear();
  return yes > 0;
}

Library library_of(PyObject* obj) {
  if (Py_TYPE(obj) == device_array_type) return Library::own;
  if (instance_of(obj, "torch", "Tensor")) return Library::torch;
  if (instance_of(obj, "cupy", "ndarray")) return Library::cupy;
  if (instance_of(obj, "jax", "Array")) return Library::jax;
  if (instance_of(obj, "numba.cuda.cudadrv.devicearray", "DeviceNDArrayBase")) return Library::numba;
  return PyObject_HasAttrString(obj, "__array_namespace__") ? Library::standard : Library::other;
}

// ---- types ----------------------------------------------------------------------------------------------------------

static bool find_type(char kind, size_t size, CellType* type) {
  switch (kind) {
    case 'f':
      *type = size == 8 ? CellType::f64 : size == 4 ? CellType::f32 : CellType::f16;
      return size == 8 || size == 4 || size == 2;
    case 'i':
      *type = size == 8 ? CellType::i64 : size == 4 ? CellType::i32 : size == 2 ? CellType::i16 : CellType::i8;
      return size == 8 || size == 4 || size == 2 || size == 1;
    case 'u':
      *type = size == 8 ? CellType::u64 : size == 4 ? CellType::u32 : size == 2 ? CellType::u16 : CellType::u8;
      return size == 8 || size == 4 || size == 2 || size == 1;
    case 'b': *type = CellType::boolean; return size == 1;
    default: return false;
  }
}

// ---- __cuda_array_interface__ ---------------------------------------------------------------------------------------

static int64_t as_int(const char* fn, const char* name, const char* what, PyObject* obj) {
  const long long v = PyLong_AsLongLong(obj);
  if (v == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ whose %s is not made of integers, got %R", fn, name,
         what, obj);
  }
  return v;
}

static int as_ints(const char* fn, const char* name, const char* what, PyObject* tuple, int64_t* values) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > max_dims)
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ whose %s is no tuple of at most %d integers, got %R",
         fn, name, what, max_dims, tuple);
  const int n = int(PyTuple_GET_SIZE(tuple));
  for (int i = 0; i < n; ++i) values[i] = as_int(fn, name, what, PyTuple_GET_ITEM(tuple, i));
  return n;
}

// The typestr of NumPy, "<f4". CuPy's bfloat16 is a "<V2" there; the attribute dtype tells.
static void read_typestr(const char* fn, const char* name, PyObject* typestr, Array& a) {
  const char* text = typestr != nullptr && PyUnicode_Check(typestr) ? PyUnicode_AsUTF8(typestr) : nullptr;
  if (text == nullptr || std::strlen(text) < 3) {
    PyErr_Clear();
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ without a typestr", fn, name);
  }
  const long size = std::strtol(text + 2, nullptr, 10);
  if (text[0] == '>' && size > 1)
    fail(PyExc_TypeError, "%s: %s must be in native byte order, as all arrays on a device, got typestr %R", fn, name,
         typestr);
  if (find_type(text[1], size_t(size), &a.type)) return;
  Ref dtype(PyObject_GetAttrString(a.object.get(), "dtype"));
  PyErr_Clear();
  if (dtype && text[1] == 'V' && size == 2) {
    Ref dtype_name(PyObject_Str(dtype.get()));
    if (dtype_name && PyUnicode_CompareWithASCIIString(dtype_name.get(), "bfloat16") == 0) {
      a.type = CellType::bf16;
      return;
    }
    PyErr_Clear();
  }
  PyArray_Descr* descr = nullptr;
  if (PyArray_DescrConverter(typestr, &descr) == NPY_SUCCEED) a.unknown = Ref(PyObject_Str((PyObject*)descr));
  Py_XDECREF(descr);
  PyErr_Clear();
  if (!a.unknown) a.unknown = Ref::borrow(typestr);
}

static PyObject* entry(PyObject* dict, const char* key) {
  PyObject* v = PyDict_GetItemString(dict, key);  // borrowed
  return v == Py_None ? nullptr : v;
}

static void read_interface(const char* fn, const char* name, Array& a) {
  a.keeper = Ref::checked(PyObject_GetAttrString(a.object.get(), "__cuda_array_interface__"));
  PyObject* dict = a.keeper.get();
  if (!PyDict_Check(dict))
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ that is no dict, got %.100s", fn, name,
         Py_TYPE(dict)->tp_name);
  if (entry(dict, "mask") != nullptr) fail(PyExc_TypeError, "%s: %s must have no mask, got a masked array", fn, name);
  read_typestr(fn, name, entry(dict, "typestr"), a);
  int64_t dims[max_dims], strides[max_dims];
  PyObject *shape = entry(dict, "shape"), *given_strides = entry(dict, "strides"), *data = entry(dict, "data");
  if (shape == nullptr) fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ without a shape", fn, name);
  const int nd = as_ints(fn, name, "shape", shape, dims);
  if (given_strides != nullptr && as_ints(fn, name, "strides", given_strides, strides) != nd)
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ with shape %R and strides %R", fn, name, shape,
         given_strides);
  if (data == nullptr || !PyTuple_Check(data) || PyTuple_GET_SIZE(data) != 2)
    fail(PyExc_TypeError, "%s: %s has a __cuda_array_interface__ without an address", fn, name);
  a.read_only = take_bool(fn, name, PyTuple_GET_ITEM(data, 1));
  void* address = PyLong_AsVoidPtr(PyTuple_GET_ITEM(data, 0));
  if (address == nullptr && PyErr_Occurred()) throw Failure{};
  if (PyObject* stream = entry(dict, "stream")) {
    const int64_t number = as_int(fn, name, "stream", stream);
    if (number == 0)
      fail(PyExc_ValueError, "%s: %s has a __cuda_array_interface__ with stream 0, which the protocol forbids", fn,
           name);
    a.has_stream = true, a.stream = reinterpret_cast<void*>(number);
  }
  describe(fn, name, a, address, nd, dims, given_strides != nullptr ? strides : nullptr);
}

// ---- __dlpack__ -----------------------------------------------------------------------------------------------------

static bool dlpack_device(PyObject* obj, int* type, int* id) {
  Ref method(PyObject_GetAttrString(obj, "__dlpack_device__"));
  if (!method) {
    PyErr_Clear();
    return false;
  }
  Ref pair = Ref::checked(PyObject_CallNoArgs(method.get()));
  Ref sequence = Ref::checked(PySequence_Tuple(pair.get()));
  if (PyTuple_GET_SIZE(sequence.get()) != 2) return false;
  Ref first = Ref::checked(PyNumber_Index(PyTuple_GET_ITEM(sequence.get(), 0)));
  Ref second = Ref::checked(PyNumber_Index(PyTuple_GET_ITEM(sequence.get(), 1)));
  *type = int(PyLong_AsLong(first.get())), *id = int(PyLong_AsLong(second.get()));
  if (PyErr_Occurred()) throw Failure{};
  return true;
}

static void read_tensor(const char* fn, const char* name, Array& a, const dlpack::Tensor& t) {
  if (!takes_dlpack_device(t.device.type))
    fail(PyExc_TypeError, "%s: %s must be on a CUDA device, got DLPack device type %d", fn, name, t.device.type);
  if (t.ndim < 0 || t.ndim > max_dims)
    fail(PyExc_ValueError, "%s: %s must have at most %d dimensions, got %d", fn, name, max_dims, int(t.ndim));
  a.device = t.device.id;
  const size_t size = t.dtype.bits / 8u;
  const uint8_t code = t.dtype.code;
  bool known = t.dtype.lanes == 1 && t.dtype.bits % 8 == 0;
  if (known && code == dlpack::code_bfloat) a.type = CellType::bf16, known = size == 2;
  else if (known)
    known = code != dlpack::code_complex && find_type(code == dlpack::code_int     ? 'i'
                                                      : code == dlpack::code_uint  ? 'u'
                                                      : code == dlpack::code_float ? 'f'
                                                      : code == dlpack::code_bool  ? 'b'
                                                                                   : '?',
                                                      size, &a.type);
  if (!known)
    a.unknown = Ref::checked(code == dlpack::code_complex && t.dtype.lanes == 1
                                 ? PyUnicode_FromFormat("complex%d", int(t.dtype.bits))
                                 : PyUnicode_FromFormat("DLPack type %d of %d bits", int(code), int(t.dtype.bits)));
  int64_t strides[max_dims];
  if (t.strides != nullptr)
    for (int i = 0; i < t.ndim; ++i) strides[i] = t.strides[i] * int64_t(a.unknown ? 1 : size);
  describe(fn, name, a, static_cast<char*>(t.data) + t.byte_offset, t.ndim, t.shape,
           t.strides != nullptr ? strides : nullptr);
}

static void read_dlpack(const char* fn, const char* name, Stream stream, Array& a) {
  Ref method = Ref::checked(PyObject_GetAttrString(a.object.get(), "__dlpack__"));
  // 0 is not allowed there: the legacy default stream is 1. Memory on the host has no stream.
  Ref number = dlpack_device_type() == 1
                   ? Ref::borrow(Py_None)
                   : Ref::checked(PyLong_FromVoidPtr(stream != nullptr ? stream : reinterpret_cast<void*>(1)));
  Ref none = Ref::checked(PyTuple_New(0));
  Ref keywords = Ref::checked(Py_BuildValue("{s:O,s:(ii)}", "stream", number.get(), "max_version", 1, 0));
  a.keeper = Ref(PyObject_Call(method.get(), none.get(), keywords.get()));
  if (!a.keeper && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer from before DLPack 1.0
    PyErr_Clear();
    if (PyDict_DelItemString(keywords.get(), "max_version") < 0) throw Failure{};
    a.keeper = Ref(PyObject_Call(method.get(), none.get(), keywords.get()));
  }
  if (!a.keeper) throw Failure{};
  a.released_by_call = true;
  // The capsule stays ours and unused: its destructor gives the array back to its owner.
  if (PyCapsule_IsValid(a.keeper.get(), dlpack::name_versioned)) {
    const auto* m =
        static_cast<const dlpack::ManagedVersioned*>(PyCapsule_GetPointer(a.keeper.get(), dlpack::name_versioned));
    if (m->version.major != 1)
      fail(PyExc_TypeError, "%s: %s must come as DLPack 1, got version %d.%d", fn, name, int(m->version.major),
           int(m->version.minor));
    a.read_only = (m->flags & (dlpack::flag_read_only | dlpack::flag_is_copied)) != 0;
    read_tensor(fn, name, a, m->tensor);
  } else if (PyCapsule_IsValid(a.keeper.get(), dlpack::name)) {
    read_tensor(fn, name, a,
                static_cast<const dlpack::Managed*>(PyCapsule_GetPointer(a.keeper.get(), dlpack::name))->tensor);
  } else {
    fail(PyExc_TypeError, "%s: %s has a __dlpack__ that gives no DLPack capsule, got %R", fn, name, a.keeper.get());
  }
}

// ---- PyTorch --------------------------------------------------------------------------------------------------------

// Its __dlpack__ insists on the current device being that of the tensor, and costs more than the five attributes.
static void read_torch(const char* fn, const char* name, Array& a) {
  PyObject* obj = a.object.get();
  Ref grad = Ref::checked(PyObject_GetAttrString(obj, "requires_grad"));
  if (grad.get() == Py_True)
    fail(PyExc_TypeError,
         "%s: %s must not require a gradient, since PyTorch would not see this operation; pass %s.detach()", fn, name,
         name);
  Ref negative = Ref::checked(PyObject_CallMethod(obj, "is_neg", nullptr));
  if (negative.get() == Py_True)
    fail(PyExc_TypeError, "%s: %s must hold its values, got a lazily negated tensor; pass %s.resolve_neg()", fn, name,
         name);
  Ref dtype = Ref::checked(PyObject_GetAttrString(obj, "dtype"));
  Ref text = Ref::checked(PyObject_Str(dtype.get()));  // "torch.float32"
  const char* type = PyUnicode_AsUTF8(text.get());
  if (type == nullptr) throw Failure{};
  const char* dot = std::strchr(type, '.');
  type = dot != nullptr ? dot + 1 : type;
  int found = -1;
  for (int i = 0; i <= int(CellType::boolean); ++i)
    if (std::strcmp(name_of(CellType(i)), type) == 0) found = i;
  if (found >= 0) a.type = CellType(found);
  else a.unknown = Ref::checked(PyUnicode_FromString(type));
  Ref shape = Ref::checked(PyObject_GetAttrString(obj, "shape"));
  Ref steps = Ref::checked(PyObject_CallMethod(obj, "stride", nullptr));
  Ref address = Ref::checked(PyObject_CallMethod(obj, "data_ptr", nullptr));
  int64_t dims[max_dims], strides[max_dims];
  const int nd = as_ints(fn, name, "shape", shape.get(), dims);
  as_ints(fn, name, "strides", steps.get(), strides);
  for (int i = 0; i < nd; ++i) strides[i] *= int64_t(a.unknown ? 1 : size_of(a.type));
  void* data = PyLong_AsVoidPtr(address.get());
  if (data == nullptr && PyErr_Occurred()) throw Failure{};
  describe(fn, name, a, data, nd, dims, strides);
}

// ---- any ------------------------------------------------------------------------------------------------------------

bool find_device(PyObject* obj, Library library, int* device) {
  int type = 0;
  *device = -1;
  if (PyArray_Check(obj)) return false;
  if (library == Library::own) {
    Array a;
    read_device_array("", "", obj, a);
    *device = a.device;
    return true;
  }
  if (dlpack_device(obj, &type, device)) return takes_dlpack_device(type);
  Ref dict(PyObject_GetAttrString(obj, "__cuda_array_interface__"));
  if (!dict) {
    PyErr_Clear();
    return false;
  }
  // The protocol does not tell the device; the address does.
  PyObject* data = PyDict_Check(dict.get()) ? entry(dict.get(), "data") : nullptr;
  Ref address(data != nullptr ? PySequence_GetItem(data, 0) : nullptr);
  void* p = address ? PyLong_AsVoidPtr(address.get()) : nullptr;
  PyErr_Clear();
  if (p == nullptr || device_of(p, device) != 0 || *device < 0) current_device(device);  // no memory, no device
  return true;
}

void read_array(const char* fn, const char* name, PyObject* obj, Stream stream, Array& a) {
  a.object = Ref::borrow(obj);
  switch (a.library) {
    case Library::own: read_device_array(fn, name, obj, a); return;
    case Library::torch: read_torch(fn, name, a); return;
    case Library::cupy:
    case Library::numba: read_interface(fn, name, a); return;
    default: break;
  }
  if (PyObject_HasAttrString(obj, "__dlpack__")) read_dlpack(fn, name, stream, a);
  else read_interface(fn, name, a);
}

}  // namespace nf::cuda
