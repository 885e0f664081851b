// SPDX-License-Identifier: BSD-3-Clause
// The extension module. pybind11 makes the module; the functions are plain C entry points, because its argument
// conversion would cost more than normalising a short row.
#include <pybind11/pybind11.h>

#define NF_OWNS_NUMPY
#include "arrays.h"

namespace py = pybind11;

static int import_numpy() {
  import_array1(-1);
  return 0;
}

PYBIND11_MODULE(_core_of_main, m, py::mod_gil_not_used()) {
  // A thread's first exception allocates, and glibc ends the process where that fails. The main thread has it behind it
  // now.
  try {
    throw nf::Failure{};
  } catch (const nf::Failure&) {
  }
  if (import_numpy() < 0) throw py::error_already_set();
  if (const char* refused = nf::choose_kernels()) throw py::import_error(refused);
  for (PyMethodDef* methods :
       {nf::layer_norm_methods, nf::group_norm_methods, nf::batch_norm_methods, nf::control_methods})
    if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
}

// In a sub-interpreter Python 3.11 would wait for itself for ever before pybind11 could refuse.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError, "normfast: works in the main interpreter only, not in sub-interpreters");
    return nullptr;
  }
  return PyInit__core_of_main();
}
