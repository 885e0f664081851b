// SPDX-License-Identifier: BSD-3-Clause
// normfast.cuda.DeviceArray: a small array on a device for those who have no library of such arrays. It owns its
// memory, allocated and freed in stream order on our stream of the device, and offers it through both protocols.
#include <cstdlib>

#include "cuda.h"
#include "dlpack.h"

namespace nf::cuda {

namespace {

struct Object {
  PyObject_HEAD void* data;
  int nd, device;
  CellType type;
  bool shared;  // another library has the address, and may be working on the memory when it lets go of it
  int64_t dims[max_dims], strides[max_dims];  // strides in bytes
};

Object* self_of(PyObject* obj) { return reinterpret_cast<Object*>(obj); }

npy_intp cells(const Object* o) {
  npy_intp n = 1;
  for (int i = 0; i < o->nd; ++i) n *= npy_intp(o->dims[i]);
  return n;
}
size_t bytes(const Object* o) { return size_t(cells(o)) * size_of(o->type); }

// The array's device is the current one for a while.
struct On {
  int before = -1;
  explicit On(int device) {
    int now = 0;
    if (current_device(&now) == 0 && now != device && use_device(device) == 0) before = now;
  }
  ~On() {
    if (before >= 0) use_device(before);
  }
};

void deallocate(PyObject* obj) {
  Object* o = self_of(obj);
  if (o->data != nullptr) {
    const On on(o->device);
    Stream stream;
    if (o->shared) synchronize_device();
    if (own_stream(o->device, &stream) == 0) release(o->data, stream);
  }
  PyTypeObject* type = Py_TYPE(obj);
  type->tp_free(obj);
  Py_DECREF(type);
}

Ref tuple_of(const int64_t* values, int n) {
  npy_intp v[max_dims];
  for (int i = 0; i < n; ++i) v[i] = npy_intp(values[i]);
  return shape_of(n, v);
}

// As NumPy knows it; bfloat16 needs ml_dtypes.
Ref dtype_of(const Object* o) {
  if (o->type != CellType::bf16)
    return Ref::checked(reinterpret_cast<PyObject*>(PyArray_DescrFromType(carrier(o->type))));
  Ref module = Ref::checked(PyImport_ImportModule("ml_dtypes"));
  Ref type = Ref::checked(PyObject_GetAttrString(module.get(), "bfloat16"));
  PyArray_Descr* descr = nullptr;
  if (PyArray_DescrConverter(type.get(), &descr) != NPY_SUCCEED) throw Failure{};
  return Ref(reinterpret_cast<PyObject*>(descr));
}

PyObject* get_shape(PyObject* s, void*) {
  return guarded([&] { return tuple_of(self_of(s)->dims, self_of(s)->nd).release(); });
}
PyObject* get_strides(PyObject* s, void*) {
  return guarded([&] { return tuple_of(self_of(s)->strides, self_of(s)->nd).release(); });
}
PyObject* get_dtype(PyObject* s, void*) {
  return guarded([&] { return dtype_of(self_of(s)).release(); });
}
PyObject* get_ndim(PyObject* s, void*) { return PyLong_FromLong(self_of(s)->nd); }
PyObject* get_size(PyObject* s, void*) { return PyLong_FromSsize_t(cells(self_of(s))); }
PyObject* get_nbytes(PyObject* s, void*) { return PyLong_FromSize_t(bytes(self_of(s))); }
PyObject* get_device(PyObject* s, void*) { return PyUnicode_FromFormat("cuda:%d", self_of(s)->device); }

PyObject* get_interface(PyObject* s, void*) {
  return guarded([&]() -> PyObject* {
    Object* o = self_of(s);
    Stream stream;
    check("__cuda_array_interface__", own_stream(o->device, &stream));
    Ref typestr(o->type == CellType::bf16 ? PyUnicode_FromString("<V2")
                                          : PyObject_GetAttrString(dtype_of(o).get(), "str"));
    if (!typestr) throw Failure{};
    const bool any = cells(o) > 0;
    Ref address = Ref::checked(PyLong_FromVoidPtr(any ? o->data : nullptr));
    Ref number = Ref::checked(PyLong_FromVoidPtr(stream));
    o->shared = true;
    return Py_BuildValue("{s:N,s:N,s:O,s:(OO),s:i,s:O}", "shape", tuple_of(o->dims, o->nd).release(), "strides",
                         tuple_of(o->strides, o->nd).release(), "typestr", typestr.get(), "data", address.get(),
                         Py_False, "version", 3, "stream", number.get());
  });
}

PyObject* to_numpy(PyObject* s, PyObject*) {
  return guarded([&]() -> PyObject* {
    const char* fn = "DeviceArray.numpy";
    const Object* o = self_of(s);
    npy_intp dims[max_dims], strides[max_dims];
    for (int i = 0; i < o->nd; ++i) dims[i] = npy_intp(o->dims[i]), strides[i] = npy_intp(o->strides[i]);
    // The memory order stays: an empty array of the same strides, its memory copied as a whole.
    Ref like = Ref::checked(PyArray_NewFromDescr(&PyArray_Type, reinterpret_cast<PyArray_Descr*>(dtype_of(o).release()),
                                                 o->nd, dims, strides, o->data, NPY_ARRAY_WRITEABLE, nullptr));
    Ref result = Ref::checked(PyArray_NewLikeArray(like.array(), NPY_KEEPORDER, nullptr, 0));
    if (bytes(o) == 0) return result.release();
    const On on(o->device);
    Stream stream;
    check(fn, own_stream(o->device, &stream));
    check(fn, without_gil([&] { return copy_out(PyArray_DATA(result.array()), o->data, bytes(o), stream); }));
    return result.release();
  });
}

PyObject* to_repr(PyObject* s) {
  return guarded([&]() -> PyObject* {
    const Object* o = self_of(s);
    return PyUnicode_FromFormat("DeviceArray(shape=%R, dtype=%s, device='cuda:%d')", tuple_of(o->dims, o->nd).get(),
                                name_of(o->type), o->device);
  });
}

// ---- DLPack, as a producer ------------------------------------------------------------------------------------------

template <class M> struct Export {
  M managed;
  PyObject* owner;
  int64_t dims[max_dims], strides[max_dims];
};

template <class M> void finish_export(M* managed) {
  auto* e = static_cast<Export<M>*>(managed->context);
  PyGILState_STATE state = PyGILState_Ensure();  // the consumer may be on a thread of its own
  Py_DECREF(e->owner);
  PyGILState_Release(state);
  delete e;
}

// A capsule that nobody took still owns the array.
template <class M> void drop_capsule(PyObject* capsule) {
  const char* name = std::is_same_v<M, dlpack::Managed> ? dlpack::name : dlpack::name_versioned;
  if (!PyCapsule_IsValid(capsule, name)) return;
  auto* managed = static_cast<M*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

dlpack::Type dlpack_type(CellType type) {
  const uint8_t bits = uint8_t(8 * size_of(type));
  const uint8_t code = type == CellType::bf16      ? dlpack::code_bfloat
                       : type <= CellType::f16     ? dlpack::code_float
                       : type <= CellType::i64     ? dlpack::code_int
                       : type == CellType::boolean ? dlpack::code_bool
                                                   : dlpack::code_uint;
  return {code, bits, 1};
}

template <class M> PyObject* export_array(Object* o) {
  auto* e = new Export<M>;
  const int64_t item = int64_t(size_of(o->type));
  for (int i = 0; i < o->nd; ++i) e->dims[i] = o->dims[i], e->strides[i] = o->strides[i] / item;
  e->managed.context = e;
  e->managed.deleter = finish_export<M>;
  if constexpr (std::is_same_v<M, dlpack::ManagedVersioned>) e->managed.version = {1, 0}, e->managed.flags = 0;
  e->managed.tensor = {o->data, {dlpack_device_type(), o->device}, o->nd, dlpack_type(o->type), e->dims, e->strides, 0};
  e->owner = Py_NewRef(reinterpret_cast<PyObject*>(o));
  const char* name = std::is_same_v<M, dlpack::Managed> ? dlpack::name : dlpack::name_versioned;
  PyObject* capsule = PyCapsule_New(&e->managed, name, drop_capsule<M>);
  if (capsule == nullptr) finish_export(&e->managed);
  return capsule;
}

PyObject* to_dlpack(PyObject* s, PyObject* args, PyObject* keywords) {
  return guarded([&]() -> PyObject* {
    PyObject *stream_obj = Py_None, *version = Py_None, *where = Py_None, *copy = Py_None;
    static const char* const names[] = {"stream", "max_version", "dl_device", "copy", nullptr};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", const_cast<char**>(names), &stream_obj,
                                     &version, &where, &copy))
      throw Failure{};
    Object* o = self_of(s);
    if (copy == Py_True) fail(PyExc_BufferError, "__dlpack__: copy must not be True; numpy() makes a copy");
    if (where != Py_None) {
      int type = 0, id = 0;
      if (!PyArg_ParseTuple(where, "ii", &type, &id)) throw Failure{};
      if (type != dlpack_device_type() || id != o->device)
        fail(PyExc_BufferError, "__dlpack__: dl_device must be (%d, %d), where the array is, got %R",
             dlpack_device_type(), o->device, where);
    }
    // -1: the consumer does not care. None: the legacy default stream, which is 1.
    const long long number = stream_obj == Py_None ? 1 : take_int("__dlpack__", "stream", stream_obj);
    if (number != -1) {
      const On on(o->device);
      Stream ours;
      check("__dlpack__", own_stream(o->device, &ours));
      Stream theirs = reinterpret_cast<void*>(number);
      if (theirs != ours) check("__dlpack__", wait_for(theirs, ours));
    }
    o->shared = true;
    const bool versioned =
        PyTuple_Check(version) && PyTuple_GET_SIZE(version) > 0 && PyLong_AsLong(PyTuple_GET_ITEM(version, 0)) >= 1;
    if (PyErr_Occurred()) throw Failure{};
    return versioned ? export_array<dlpack::ManagedVersioned>(o) : export_array<dlpack::Managed>(o);
  });
}

PyObject* to_dlpack_device(PyObject* s, PyObject*) {
  return Py_BuildValue("(ii)", dlpack_device_type(), self_of(s)->device);
}

PyGetSetDef properties[] = {{"shape", get_shape, nullptr, "Lengths of the axes.", nullptr},
                            {"dtype", get_dtype, nullptr, "Type of the elements, as a NumPy dtype.", nullptr},
                            {"ndim", get_ndim, nullptr, "Number of axes.", nullptr},
                            {"size", get_size, nullptr, "Number of elements.", nullptr},
                            {"nbytes", get_nbytes, nullptr, "Size of the elements in bytes.", nullptr},
                            {"strides", get_strides, nullptr, "Bytes from one element to the next, by axis.", nullptr},
                            {"device", get_device, nullptr, "Where it is, such as \"cuda:0\".", nullptr},
                            {"__cuda_array_interface__", get_interface, nullptr, nullptr, nullptr},
                            {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef methods[] = {{"numpy", to_numpy, METH_NOARGS, "Copy to a new NumPy array, when all work on it is done."},
                         {"__dlpack__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(to_dlpack)),
                          METH_VARARGS | METH_KEYWORDS, nullptr},
                         {"__dlpack_device__", to_dlpack_device, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyType_Slot slots[] = {{Py_tp_doc, const_cast<char*>("An array on a CUDA device, made by to_device or by a norm.")},
                       {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
                       {Py_tp_repr, reinterpret_cast<void*>(to_repr)},
                       {Py_tp_getset, properties},
                       {Py_tp_methods, methods},
                       {0, nullptr}};
PyType_Spec spec = {"normfast.cuda.DeviceArray", sizeof(Object), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

// ---- functions of normfast.cuda -------------------------------------------------------------------------------------

PyObject* to_device(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const char* fn = "to_device";
    require_device(fn);
    int device = 0, count = 0;
    check(fn, current_device(&device));
    if (a[1] != Py_None) {
      const int64_t asked = take_int(fn, "device", a[1]);
      check(fn, count_devices(&count));
      if (asked < 0 || asked >= count)
        fail(PyExc_ValueError, "%s: device must be one of the %d CUDA devices, got %R", fn, count, a[1]);
      device = int(asked);
    }
    if (!PyArray_Check(a[0]) && on_device(a[0]))
      fail(PyExc_TypeError, "%s: x must be an array on the host, got one that is on a CUDA device", fn);
    Ref x = Ref::checked(PyArray_CheckFromAny(a[0], nullptr, 0, 0, NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_ALIGNED, nullptr));
    CellType type = CellType::f64;
    DType floating;
    const int number = PyArray_TYPE(x.array());
    bool known = float_type(PyArray_DESCR(x.array()), &floating);
    if (known) type = CellType(int(floating));
    else if (PyTypeNum_ISINTEGER(number) || PyTypeNum_ISBOOL(number))
      for (int i = int(CellType::i8); i <= int(CellType::boolean) && !known; ++i)
        if (PyArray_EquivTypenums(number, carrier(CellType(i)))) known = true, type = CellType(i);
    if (!known)
      fail(PyExc_TypeError,
           "%s: x must be of a floating dtype (float16, bfloat16, float32, float64), integer or bool, got %S", fn,
           PyArray_DESCR(x.array()));
    Order order;
    if (!find_order(x.array(), &order)) {
      x = Ref::checked(PyArray_NewCopy(x.array(), NPY_CORDER));
      find_order(x.array(), &order);
    }
    const On on(device);
    Stream stream;
    check(fn, own_stream(device, &stream));
    Ref result = Ref::checked(new_device_array(type, PyArray_NDIM(x.array()), PyArray_DIMS(x.array()),
                                               order.identity ? nullptr : order.axis, device, stream));
    const size_t size = size_t(PyArray_NBYTES(x.array()));
    if (size > 0)
      check(fn,
            without_gil([&] { return copy_in(self_of(result.get())->data, PyArray_DATA(x.array()), size, stream); }));
    return result.release();
  });
}

PyObject* synchronize(PyObject*, PyObject* const*, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    require_device("synchronize");
    check("synchronize", without_gil([] { return synchronize_device(); }));
    Py_RETURN_NONE;
  });
}

}  // namespace

PyMethodDef device_array_functions[] = {
    NF_METHOD(to_device, 2), NF_METHOD(synchronize, 0), {nullptr, nullptr, 0, nullptr}};

PyTypeObject* device_array_type = nullptr;

bool add_device_array(PyObject* module) {
  device_array_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return device_array_type != nullptr &&
         PyModule_AddObjectRef(module, "DeviceArray", reinterpret_cast<PyObject*>(device_array_type)) == 0;
}

PyObject* new_device_array(CellType type, int nd, const npy_intp* dims, const int* order, int device, Stream stream) {
  PyObject* obj = device_array_type->tp_alloc(device_array_type, 0);
  if (obj == nullptr) return nullptr;
  Object* o = self_of(obj);
  o->nd = nd, o->device = device, o->type = type;
  for (int i = 0; i < nd; ++i) o->dims[i] = dims[i];
  strides_in(order, nd, dims, size_of(type), o->strides);
  if (const int error = allocate(bytes(o), stream, &o->data)) {
    o->data = nullptr;
    Py_DECREF(obj);
    PyErr_Format(is_out_of_memory(error) ? PyExc_MemoryError : PyExc_RuntimeError, "%s: %s", error_name(error),
                 error_text(error));
    return nullptr;
  }
  return obj;
}

void* device_array_data(PyObject* obj) { return self_of(obj)->data; }
void returned_when_done(PyObject* obj) { self_of(obj)->shared = false; }

void read_device_array(const char* fn, const char* name, PyObject* obj, Array& a) {
  Object* o = self_of(obj);
  a.object = Ref::borrow(obj);
  a.type = o->type, a.device = o->device;
  a.has_stream = own_stream(o->device, &a.stream) == 0;
  describe(fn, name, a, o->data, o->nd, o->dims, o->strides);
}

}  // namespace nf::cuda
