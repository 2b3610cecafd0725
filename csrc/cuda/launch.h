// How kernels are launched, how they declare shared memory, and what becomes of an error.
//
// Kernels use these macros and nothing else for it: under FUSEDOPT_SIMT the tests' own <cuda_runtime.h> supplies them,
// and runs a grid on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fusedopt {

// A CUDA call that failed; the message names the call or kernel and the error.
struct CudaError : std::runtime_error {
  CudaError(const std::string& what, cudaError_t code)
      : std::runtime_error(what + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code)), code(code) {}
  cudaError_t code;
};

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps the error for whoever asks next, who would take it for their own
  throw CudaError(what, code);
}

// Makes a device current for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }

 private:
  int device_, previous_ = 0;
};

}  // namespace fusedopt

#if !defined(FUSEDOPT_SIMT)

namespace fusedopt {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  // devices before sm_90 refuse the attribute, even for clusters of one block
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace fusedopt

// Both evaluate to a cudaError_t. The kernel stands in parentheses, so that its template arguments may hold commas:
// check(FUSEDOPT_LAUNCH((update<Rule, float>), grid, block, 0, stream, rows), "update").
#define FUSEDOPT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fusedopt::launch(kernel, grid, block, 1, shared_bytes, stream, __VA_ARGS__)
// The grid's blocks in clusters, whose size divides the grid's; sm_90 or newer.
#define FUSEDOPT_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::fusedopt::launch(kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__)

// FUSEDOPT_SHARED(float, sums, [32]); declares `__shared__ float sums[32]`.
#define FUSEDOPT_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// FUSEDOPT_DYN_SHARED(float, row); declares `row`, a float*, at the launch's shared_bytes; 16-byte aligned.
#define FUSEDOPT_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fusedopt_dyn_shared[]; \
  T* const name = reinterpret_cast<T*>(fusedopt_dyn_shared)

#endif
