// Runs CUDA grids on the CPU, by value: g++ compiles the .cu files unchanged, tests need no GPU.
//
//   g++ -std=c++17 -DFUSEDOPT_SIMT -fno-strict-aliasing -Wno-unknown-pragmas -I tests/simt/include
//       -isystem CUDA/include -x c++ kernels.cu
//
// What the kernels owe it, all harmless under nvcc: launches and shared memory by csrc/cuda/launch.h's macros, whose
// other half stands here; inline PTX with a host body beside it; __attribute__((noinline)), not __noinline__.
//
// scheduler.cpp runs the threads in turns, in forward, reverse or seeded random order; it finds divergent barriers,
// deadlocks, and masks that do not fit. Shared memory is a heap block of the exact size, all NaN at first, so that ASAN
// sees overruns. Races between blocks, and a missing __threadfence, are hardly found; one block cannot spin on another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include <cuda_runtime_api.h>

#define FUSEDOPT_LAUNCH(kernel, grid, block, smem, stream, ...) \
  FUSEDOPT_LAUNCH_CLUSTER(kernel, grid, block, 1, smem, stream __VA_OPT__(, ) __VA_ARGS__)
#define FUSEDOPT_LAUNCH_CLUSTER(kernel, grid, block, cluster, smem, stream, ...)                        \
  ::fusedopt_simt::launch(::fusedopt_simt::Launch{#kernel, grid, block, cluster, size_t(smem), stream}, \
                          kernel __VA_OPT__(, ) __VA_ARGS__)
// The address of the static names the variable: one per instantiation, as __shared__ has it.
#define FUSEDOPT_SHARED(T, name, ...)                                               \
  typedef T simt_type_##name __VA_ARGS__;                                           \
  static const char simt_key_##name = 0;                                            \
  simt_type_##name& name = *static_cast<simt_type_##name*>(::fusedopt_simt::shared( \
      {"shared " #name, __FILE__, __LINE__}, &simt_key_##name, sizeof(simt_type_##name), alignof(simt_type_##name)))
#define FUSEDOPT_DYN_SHARED(T, name) \
  T* const name = static_cast<T*>(::fusedopt_simt::shared({"shared " #name, __FILE__, __LINE__}, nullptr, 0, 16))

// The caller's place, as the last arguments of whatever waits.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fusedopt_simt {

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Launch {
  const char* kernel;  // as written in the macro
  dim3 grid, block, cluster;
  size_t smem;
  cudaStream_t stream;
};

// ---- control, for tests. Plain symbols of that name, so that ctypes reaches them in a shared library. ----
#define SIMT_CONTROL(name) __asm__("fusedopt_simt_" name) __attribute__((visibility("default")))
bool set_order(const char* order) SIMT_CONTROL("set_order");  // "forward", "reverse" or "seed:N"; false: none of these
void set_noop(bool on) SIMT_CONTROL("set_noop");              // launches are checked and counted, but do not run
// The n-th launch (runtime call of that name; null: any) from now on, 1 the next, returns `error` and does nothing.
void fail_launch(int n, cudaError_t error) SIMT_CONTROL("fail_launch");
void fail_call(const char* name, int n, cudaError_t error) SIMT_CONTROL("fail_call");
size_t launch_count() SIMT_CONTROL("launch_count");                   // accepted launches since reset()
const Launch* launch_record(size_t i) SIMT_CONTROL("launch_record");  // null beyond the count, or the first 4096
void reset() SIMT_CONTROL("reset");  // count and log to zero, no failure pending, no-op mode off; the order stays

// ---- for the macros and device.h ----
struct Where {
  const char *what, *file;
  int line;
};
using Fold = uint64_t (*)(uint64_t, uint64_t);

// False: it is not to run, and the macro returns *error.
bool admit(const Launch& launch, const void* kernel, cudaError_t* error);
void run_grid(const Launch& launch, void (*body)(void*), void* data);  // throws Error
extern size_t smem_limit;  // of the kernel that was admitted last, static and dynamic

void* shared(Where where, const void* key, size_t bytes, size_t alignment);  // no key: the launch's dynamic memory
void* map_shared(Where where, const void* address, unsigned rank);
unsigned cluster_rank();
dim3 cluster_dim();

uint64_t block_barrier(Where where, uint64_t value);  // the sum of all threads' values
void cluster_barrier(Where where);
void warp_barrier(Where where, unsigned mask);
uint64_t warp_shuffle(Where where, unsigned mask, uint64_t value, unsigned source);
uint64_t warp_fold(Where where, unsigned mask, uint64_t value, Fold fold);
[[noreturn]] void fail(Where where, const char* why);

extern bool atomics_watched;
void atomic_point();  // before every atomic
void fence();

template <class... P, class... A>
cudaError_t launch(const Launch& config, void (*kernel)(P...), A&&... args) {
  static_assert(((std::is_trivially_copyable_v<P> && !std::is_reference_v<P>) && ...),
                "kernel arguments are copied as bytes");
  static_assert((sizeof(P) + ... + 0) <= 32764, "a launch takes at most 32,764 bytes of arguments");
  cudaError_t error = cudaSuccess;
  if (!admit(config, reinterpret_cast<const void*>(kernel), &error)) return error;
  std::tuple<P...> params(std::forward<A>(args)...);
  auto body = [&] { std::apply(kernel, params); };
  run_grid(config, [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
  return cudaSuccess;
}

}  // namespace fusedopt_simt
