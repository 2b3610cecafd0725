// A grid as a loop: thread after thread, block after block. And as much of the CUDA runtime as csrc/cuda asks for.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fusedopt_simt {

static size_t launches = 0;
static bool noop = false;

void set_noop(bool on) { noop = on; }
size_t launch_count() { return launches; }
void reset() {
  launches = 0;
  noop = false;
}

bool atomics_watched = false;
void atomic_point() {}
void fence() {}

bool admit(const Launch&, const void*, cudaError_t*) {
  ++launches;
  return !noop;
}

void run_grid(const Launch& launch, void (*body)(void*), void* data) {
  gridDim = launch.grid;
  blockDim = launch.block;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) body(data);
}

}  // namespace fusedopt_simt

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNotSupported; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
// few multiprocessors and blocks, so that a persistent grid has to come round
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return "simulated"; }
}
