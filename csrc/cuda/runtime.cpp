#include "runtime.h"

#include <cuda_runtime_api.h>

namespace fusedopt {

// Only calls that leave every device without a context: a process of a distributed job would otherwise take some
// hundred megabytes on each device of its machine, and those that it never uses are its neighbours'. So whether a
// device can run this build is told by its compute capability, not by asking a kernel for its attributes.
CudaProbe probe_cuda() {
  CudaProbe probe{};
  const auto failed = [&probe](cudaError_t code) {
    if (code == cudaSuccess) return false;
    cudaGetLastError();  // the runtime keeps the error for whoever asks next
    probe.error = cudaGetErrorName(code);
    probe.message = cudaGetErrorString(code);
    return true;
  };
  int count = 0;
  if (failed(cudaDriverGetVersion(&probe.driver)) || failed(cudaRuntimeGetVersion(&probe.runtime)) ||
      failed(cudaGetDeviceCount(&count)))
    return probe;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (failed(cudaGetDeviceProperties(&properties, i))) return probe;
    probe.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount});
  }
  return probe;
}

}  // namespace fusedopt
