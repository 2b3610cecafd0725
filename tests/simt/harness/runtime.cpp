// As much of the CUDA runtime as csrc/cuda and the tests ask for: one device of compute capability 9.0, whose memory is
// the host's; and what a launch is refused for.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>

namespace fusedopt_simt {

size_t smem_limit;

namespace {

// Few multiprocessors and blocks, so that a persistent grid has to come round.
constexpr int kMultiprocessors = 2, kResidentBlocks = 1;
constexpr size_t kSmemDefault = 48 * 1024, kSmemMost = 227 * 1024, kRecords = 4096;
constexpr int kVersion = 13000;

struct Attributes {
  size_t smem = kSmemDefault;
  bool large_clusters = false;
};

struct Failure {
  int in = 0;  // calls from now on; 0: none
  std::string of;
  cudaError_t error = cudaSuccess;
  bool due() { return in && --in == 0; }
};

bool noop = false;
size_t accepted = 0;
std::deque<Launch> records;
Failure failing_launch, failing_call;
cudaError_t last_error = cudaSuccess;
std::map<const void*, Attributes> attributes;  // by kernel

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t call(const char* name, cudaError_t result = cudaSuccess) {
  const bool meant = failing_call.of.empty() || failing_call.of == name;
  return remember(meant && failing_call.due() ? failing_call.error : result);
}

size_t volume(dim3 d) { return size_t(d.x) * d.y * d.z; }

cudaError_t refusal(const Launch& launch, const Attributes& kernel) {
  const dim3 g = launch.grid, b = launch.block, c = launch.cluster;
  if (!volume(g) || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!volume(b) || b.x > 1024 || b.y > 1024 || b.z > 64 || volume(b) > 1024) return cudaErrorInvalidConfiguration;
  if (!volume(c) || volume(c) > (kernel.large_clusters ? 16 : 8)) return cudaErrorInvalidClusterSize;
  if (g.x % c.x || g.y % c.y || g.z % c.z) return cudaErrorInvalidClusterSize;
  return launch.smem > kernel.smem ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void set_noop(bool on) { noop = on; }
void fail_launch(int n, cudaError_t error) { failing_launch = {n, "", error}; }
void fail_call(const char* name, int n, cudaError_t error) { failing_call = {n, name ? name : "", error}; }
size_t launch_count() { return accepted; }
const Launch* launch_record(size_t i) { return i < records.size() ? &records[i] : nullptr; }
void reset() {
  accepted = 0;
  records.clear();
  failing_launch = failing_call = {};
  noop = false;
}

bool admit(const Launch& launch, const void* kernel, cudaError_t* error) {
  const Attributes& granted = attributes[kernel];
  *error = failing_launch.due() ? failing_launch.error : refusal(launch, granted);
  if (remember(*error) != cudaSuccess) return false;
  smem_limit = granted.smem > kSmemDefault ? kSmemMost : kSmemDefault;
  ++accepted;
  if (records.size() < kRecords) records.push_back(launch);
  return !noop;
}

}  // namespace fusedopt_simt

using namespace fusedopt_simt;

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, call(__func__); }
cudaError_t cudaSetDevice(int device) { return call(__func__, device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, call(__func__); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, call(__func__); }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, call(__func__); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "simulated");
  properties->major = 9;
  properties->multiProcessorCount = kMultiprocessors;
  return call(__func__);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSmemDefault;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSmemMost;
      break;
    case cudaDevAttrClusterLaunch:
      *value = 1;
      break;
    default:
      return call(__func__, cudaErrorInvalidValue);
  }
  return call(__func__);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = kResidentBlocks, call(__func__);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || size_t(value) > kSmemMost) return call(__func__, cudaErrorInvalidValue);
    attributes[kernel].smem = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes[kernel].large_clusters = value;
  }
  return call(__func__);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->ptxVersion = found->binaryVersion = 90;
  return call(__func__);
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  const cudaError_t error = call(__func__);
  if (error == cudaSuccess) std::memset(to, byte, bytes);
  return error;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  const cudaError_t error = call(__func__);
  if (error == cudaSuccess) std::memcpy(to, from, bytes);
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// clang-format off
#define SIMT_ERRORS(X)                                                                                        \
  X(Success) X(ErrorInvalidValue) X(ErrorMemoryAllocation) X(ErrorInvalidConfiguration) X(ErrorInvalidDevice) \
  X(ErrorInvalidClusterSize) X(ErrorLaunchOutOfResources) X(ErrorLaunchFailure) X(ErrorNoKernelImageForDevice)
// clang-format on
const char* cudaGetErrorName(cudaError_t error) {
#define SIMT_NAME(name) \
  if (error == cuda##name) return "cuda" #name;
  SIMT_ERRORS(SIMT_NAME)
#undef SIMT_NAME
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t) { return "simulated"; }
}
