// SPDX-License-Identifier: BSD-3-Clause
// Threads, memory pool, configuration.
#include "../cpu/memory.h"
#include "../cpu/threads.h"
#include "arrays.h"

namespace nf {
namespace {

int take_threads(const char* fn, PyObject* obj) {
  const int64_t n = take_int(fn, "n", obj);
  if (n < 1 || n > max_threads) fail(PyExc_ValueError, "%s: n must lie between 1 and %d, got %R", fn, max_threads, obj);
  return int(n);
}

// For `with threads(n)`, which refuses a bad n before the block is entered.
PyObject* check_num_threads(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    take_threads("threads", a[0]);
    Py_RETURN_NONE;
  });
}

PyObject* set_num_threads(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    set_threads(take_threads("set_num_threads", a[0]));
    Py_RETURN_NONE;
  });
}

PyObject* get_num_threads(PyObject*, PyObject* const*, Py_ssize_t) { return PyLong_FromLong(get_threads()); }

PyObject* set_pool_limit(PyObject*, PyObject* const* a, Py_ssize_t) {
  return guarded([&]() -> PyObject* {
    const int64_t n = take_int("set_pool_limit", "nbytes", a[0]);
    if (n < 0 || n == INT64_MAX)
      fail(PyExc_ValueError, "set_pool_limit: nbytes must be a number of bytes, 0 or more, got %R", a[0]);
    pool_set_limit(size_t(n));
    Py_RETURN_NONE;
  });
}

PyObject* release_pool(PyObject*, PyObject* const*, Py_ssize_t) {
  pool_release();
  Py_RETURN_NONE;
}

PyObject* config(PyObject*, PyObject* const*, Py_ssize_t) {
  const CodePaths paths = built_code_paths();
  Ref names(PyList_New(0));
  for (int i = 0; i < paths.count && names; ++i) {
    Ref name(PyUnicode_FromString(paths.names[i]));
    if (!name || PyList_Append(names.get(), name.get()) < 0) return nullptr;
  }
  if (!names) return nullptr;
  return Py_BuildValue("{s:s,s:O,s:i,s:{s:n,s:n},s:s}", "code_path", kernels().name, "code_paths", names.get(),
                       "threads", get_threads(), "pool", "limit", Py_ssize_t(pool_limit()), "held",
                       Py_ssize_t(pool_held()), "compiler", NF_COMPILER);
}

}  // namespace

PyMethodDef control_methods[] = {NF_METHOD(check_num_threads, 1), NF_METHOD(set_num_threads, 1),
                                 NF_METHOD(get_num_threads, 0),   NF_METHOD(set_pool_limit, 1),
                                 NF_METHOD(release_pool, 0),      NF_METHOD(config, 0),
                                 {nullptr, nullptr, 0, nullptr}};

}  // namespace nf
