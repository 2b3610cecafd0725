// The CUDA part of fusedopt._native. Nothing but argument passing.
#include <pybind11/pybind11.h>

#include "cuda/runtime.h"

namespace py = pybind11;

namespace fusedopt {

void bind_cuda(py::module_& m) {
  m.def(
      "cuda_probe",
      [] {
        CudaProbe probe;
        {
          py::gil_scoped_release release;  // the driver takes up to seconds to start
          probe = probe_cuda();
        }
        py::list devices;
        for (const CudaDevice& device : probe.devices)
          devices.append(py::make_tuple(device.name, device.major, device.minor, device.multiprocessors));
        return py::make_tuple(probe.driver, probe.runtime, probe.error, probe.message, devices);
      },
      "(driver version, runtime version, error name or \"\", its text, [(name, major, minor, multiprocessors)])");
}

}  // namespace fusedopt
