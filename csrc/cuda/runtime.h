// What this machine's driver and devices are, asked without making a context on any of them.
#pragma once
#include <string>
#include <vector>

namespace fusedopt {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
};

struct CudaProbe {
  int driver;         // the newest CUDA version that the driver takes, as 1000 * major + 10 * minor; 0 without a driver
  int runtime;        // the version that this library was built with
  std::string error;  // the runtime's name for what went wrong, "" where nothing did
  std::string message;
  std::vector<CudaDevice> devices;
};

// Never throws: what goes wrong is told in the answer.
CudaProbe probe_cuda();

}  // namespace fusedopt
