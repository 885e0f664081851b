// SPDX-License-Identifier: BSD-3-Clause
// The module _cuda: the functions of _core for arrays on a CUDA device. It is imported with the first such array, and
// imports on a machine without a driver.
#include <pybind11/pybind11.h>

#define NF_OWNS_NUMPY
#include "cuda.h"

namespace py = pybind11;

static int import_numpy() {
  import_array1(-1);
  return 0;
}

// What show_config says: of the build, and of the devices or why there are none.
static py::dict config() {
  py::list devices, targets;
  py::object reason = py::none();
  int count = 0, error = nf::cuda::count_devices(&count);
  for (int i = 0; i < count && error == 0; ++i) {
    nf::cuda::DeviceInfo info;
    error = nf::cuda::describe_device(i, &info);
    if (error != 0) break;
    py::dict device;
    device["name"] = info.name;
    device["compute_capability"] = std::to_string(info.major) + "." + std::to_string(info.minor);
    devices.append(device);
  }
  if (error != 0) reason = py::str(std::string(nf::cuda::error_name(error)) + ": " + nf::cuda::error_text(error));
  std::string word;
  for (const char* p = nf::cuda::architectures();; ++p) {
    if (*p != ';' && *p != ',' && *p != '\0') word += *p;
    else targets.append(word), word.clear();
    if (*p == '\0') break;
  }
  py::dict all;
  all["toolkit"] = nf::cuda::toolkit();
  all["architectures"] = targets;
  all["devices"] = devices;
  all["reason"] = reason;
  return all;
}

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  if (import_numpy() < 0) throw py::error_already_set();
  for (PyMethodDef* methods : {nf::cuda::layer_norm_methods, nf::cuda::group_norm_methods, nf::cuda::batch_norm_methods,
                               nf::cuda::device_array_functions})
    if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
  if (!nf::cuda::add_device_array(m.ptr())) throw py::error_already_set();
  m.def("config", &config);
}
