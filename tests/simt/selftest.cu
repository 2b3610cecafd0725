// Kernels that show what the harness computes and what it finds: `selftest CASE ORDER` prints "ok", or what was found.
// tests/test_simt.py knows the defects' lines by the comments "defect: CASES".
#include <cooperative_groups.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace cg = cooperative_groups;
using fusedopt::check;

namespace {

// Of exactly this size, so that ASAN sees an overrun.
template <class T>
struct Array {
  explicit Array(size_t n, T value = T()) : n(n), data(new T[n]) { std::fill_n(data.get(), n, value); }
  operator T*() const { return data.get(); }
  size_t n;
  std::unique_ptr<T[]> data;
};

Array<float> counted(size_t n) {
  Array<float> array(n);
  std::iota(array.data.get(), array.data.get() + n, 0.0f);
  return array;
}

struct Wrong : std::runtime_error {
  using runtime_error::runtime_error;
};

template <class T, class U>
void expect(const char* what, T found, U wanted) {
  if (double(found) == double(wanted)) return;
  throw Wrong(std::string("wrong value: ") + what + " is " + std::to_string(double(found)) + ", not " +
              std::to_string(double(wanted)));
}
#define EXPECT(found, wanted) expect(#found, found, wanted)
#define RUN(kernel, grid, block, ...) \
  check(FUSEDOPT_LAUNCH(kernel, grid, block, 0, nullptr __VA_OPT__(, ) __VA_ARGS__), #kernel)
#define RUN_CLUSTER(kernel, grid, block, cluster, ...) \
  check(FUSEDOPT_LAUNCH_CLUSTER(kernel, grid, block, cluster, 0, nullptr __VA_OPT__(, ) __VA_ARGS__), #kernel)

// --- what must come out right ---

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

template <int kThreads>
__device__ float block_sum(float x) {
  FUSEDOPT_SHARED(float, sums, [kThreads / 32]);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x < kThreads / 32 ? sums[threadIdx.x] : 0.0f;
  x = warp_sum(x);
  __syncthreads();  // the next call writes `sums` again
  if (threadIdx.x == 0) sums[0] = x;
  __syncthreads();
  x = sums[0];
  __syncthreads();
  return x;
}

__global__ void sum_rows(const float* rows, int n, float* sums) {
  for (int turn = 0; turn < 2; ++turn) {
    float sum = 0.0f;
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) sum += rows[int(blockIdx.x) * n + i];
    sum = block_sum<128>(sum);
    if (threadIdx.x == 77) sums[blockIdx.x] = sum;
  }
}

void reduction() {
  const int n = 333;
  const auto rows = counted(3 * n);
  Array<float> sums(3);
  RUN(sum_rows, 3, 128, rows, n, sums);
  for (int r = 0; r < 3; ++r) EXPECT(sums[r], std::accumulate(rows + r * n, rows + (r + 1) * n, 0.0));
}

template <bool kFirst, bool kLast>
__global__ void sum_cluster(const float* from, float* sums) {
  FUSEDOPT_SHARED(float, part, [1]);
  const auto cluster = cg::this_cluster();
  const float sum = block_sum<64>(from[blockIdx.x * 64 + threadIdx.x]);
  if (threadIdx.x == 0) part[0] = sum;
  if (kFirst) cluster.sync();
  if (threadIdx.x == 0) {
    float all = 0.0f;
    for (unsigned b = 0; b < cluster.num_blocks(); ++b)
      all += *cluster.map_shared_rank(part, b);  // defect: cluster_start cluster_end
    sums[blockIdx.x] = all;
  }
  if (kLast) cluster.sync();
}

template <bool kFirst, bool kLast>
void cluster_reduction() {
  const auto from = counted(8 * 64);
  Array<float> sums(8);
  RUN_CLUSTER((sum_cluster<kFirst, kLast>), 8, 64, 4, from, sums);
  for (int b = 0; b < 8; ++b) EXPECT(sums[b], 256 * (b / 4 * 256 + 127.5));
}

__global__ void vote(unsigned* out) {
  const unsigned t = threadIdx.x + threadIdx.y * blockDim.x, lane = t % 32,
                 half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[0 * 64 + t] = __ballot_sync(~0u, lane % 3 == 0);
  if (lane < 16) out[1 * 64 + t] = __ballot_sync(half, 1);
  if (lane >= 16) out[1 * 64 + t] = __ballot_sync(half, lane == 20);
  out[2 * 64 + t] = __shfl_down_sync(~0u, t, 3);
  out[3 * 64 + t] = __shfl_up_sync(~0u, t, 1, 8);
  out[4 * 64 + t] = __reduce_add_sync(half, t);
  out[5 * 64 + t] = unsigned(__any_sync(~0u, t == 40)) * 2 + unsigned(__all_sync(~0u, t < 32));
  const auto tile = cg::tiled_partition<4>(cg::this_thread_block());
  out[6 * 64 + t] = tile.shfl(t, 1) + tile.ballot(lane % 2);
  out[7 * 64 + t] = unsigned(__syncthreads_count(t % 5 == 0));
  out[8 * 64 + t] = unsigned(__syncthreads_or(t == 63)) * 2 + unsigned(__syncthreads_and(t != 63));
}

void votes() {
  Array<unsigned> out(9 * 64);
  RUN(vote, 1, dim3(16, 4), out);
  for (unsigned t = 0; t < 64; ++t) {
    const unsigned lane = t % 32;
    EXPECT(out[0 * 64 + t], 0x49249249u);
    EXPECT(out[1 * 64 + t], lane < 16 ? 0x0000ffffu : 1u << 20);
    EXPECT(out[2 * 64 + t], lane < 29 ? t + 3 : t);
    EXPECT(out[3 * 64 + t], lane % 8 ? t - 1 : t);
    EXPECT(out[4 * 64 + t], t / 16 * 256 + 120);
    EXPECT(out[5 * 64 + t], t < 32 ? 1 : 2);
    EXPECT(out[6 * 64 + t], t / 4 * 4 + 1 + 10);
    EXPECT(out[7 * 64 + t], 13);
    EXPECT(out[8 * 64 + t], 2);
  }
}

// The last block to come adds up what the others left.
__global__ void gather(unsigned* tickets, double* parts, double* total, float* most, int* slots) {
  FUSEDOPT_SHARED(bool, is_last, [1]);
  atomicAdd(&parts[blockIdx.x], double(threadIdx.x));
  atomicMax(reinterpret_cast<int*>(most), __float_as_int(float(blockIdx.x * blockDim.x + threadIdx.x)));
  int expected = 0, seen = atomicCAS(slots, 0, 1);
  while (seen != expected) {
    expected = seen;
    seen = atomicCAS(slots, expected, expected + 1);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (is_last[0] && threadIdx.x == 0) {
    __threadfence();
    for (unsigned b = 0; b < gridDim.x; ++b) *total += parts[b];
  }
}

void atomics() {
  Array<unsigned> tickets(1);
  Array<double> parts(5), total(1);
  Array<float> most(1);
  Array<int> slots(1);
  for (int turn = 1; turn <= 2; ++turn) {
    RUN(gather, 5, 96, tickets, parts, total, most, slots);
    EXPECT(tickets[0], 0);
    EXPECT(most[0], 479);
    EXPECT(slots[0], 480 * turn);
  }
  EXPECT(total[0], 3 * 5 * 95 * 48);
}

template <class T>
__global__ void turn_around(const T* from, T* to) {
  FUSEDOPT_DYN_SHARED(T, row);
  FUSEDOPT_SHARED(T, offset, [1]);
  row[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  if (threadIdx.x == 0) offset[0] = T(sizeof(T));
  __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x] + offset[0];
}

template <class T>
void turned() {
  Array<T> from(2 * 40), to(2 * 40);
  std::iota(from.data.get(), from.data.get() + 80, T(0));
  check(FUSEDOPT_LAUNCH(turn_around<T>, 2, 40, 40 * sizeof(T), nullptr, from, to), "turn_around");
  for (int i = 0; i < 80; ++i) EXPECT(to[i], i / 40 * 40 + 39 - i % 40 + int(sizeof(T)));
}
void dynamic() {
  turned<float>();
  turned<double>();
}

// --- what must be found ---

__global__ void no_barrier(float* to) {
  FUSEDOPT_SHARED(float, x, [64]);
  x[threadIdx.x] = float(threadIdx.x);
  to[threadIdx.x] = x[63 - threadIdx.x];  // defect: missing_barrier
}
void missing_barrier() {
  Array<float> to(64);
  RUN(no_barrier, 1, 64, to);
  for (int i = 0; i < 64; ++i) EXPECT(to[i], 63 - i);
}

__global__ void no_loop_barrier(float* to) {
  FUSEDOPT_SHARED(float, x, [64]);
  for (int turn = 0; turn < 2; ++turn) {
    x[threadIdx.x] = float(threadIdx.x);  // defect: missing_loop_barrier
    __syncthreads();
    to[threadIdx.x] = x[63 - threadIdx.x];
  }
}
void missing_loop_barrier() { RUN(no_loop_barrier, 1, 64, Array<float>(64)); }

__global__ void no_syncwarp(float* to) {
  FUSEDOPT_SHARED(float, x, [32]);
  x[threadIdx.x] = float(threadIdx.x);
  if (__any_sync(~0u, 1)) to[threadIdx.x] = x[31 - threadIdx.x];  // defect: missing_syncwarp
}
void missing_syncwarp() { RUN(no_syncwarp, 1, 32, Array<float>(32)); }

__global__ void leave_before_read(float* to) {
  FUSEDOPT_SHARED(float, x, [1]);
  const auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) x[0] = 1.0f;
  const float* const first = cluster.map_shared_rank(x, 0);
  cluster.sync();
  if (cluster.block_rank() == 0) return;
  __syncthreads();
  to[threadIdx.x] = *first;  // defect: cluster_late
}
void cluster_late() {
  Array<float> to(32);
  RUN_CLUSTER(leave_before_read, 2, 32, 2, to);
  for (int i = 0; i < 32; ++i) EXPECT(to[i], 1);
}

__global__ void copy_past_the_end(const float* from, float* to) {
  to[threadIdx.x] = from[threadIdx.x + 1];  // defect: global_overrun
}
void global_overrun() { RUN(copy_past_the_end, 1, 32, Array<float>(32), Array<float>(32)); }

__global__ void past_shared(float* to) {
  FUSEDOPT_SHARED(float, x, [32]);
  FUSEDOPT_DYN_SHARED(float, y);
  x[threadIdx.x] = y[threadIdx.x] = 1.0f;
  float* const which = to[0] == 0.0f ? &x[0] : y;
  __syncthreads();
  which[threadIdx.x + 1] = 2.0f;  // defect: shared_overrun dynamic_overrun
}
void shared_overrun() { check(FUSEDOPT_LAUNCH(past_shared, 1, 32, 32 * 4, nullptr, Array<float>(1)), "past_shared"); }
void dynamic_overrun() {
  check(FUSEDOPT_LAUNCH(past_shared, 1, 32, 32 * 4, nullptr, Array<float>(1, 1.0f)), "past_shared");
}

__global__ void vectors(const float* from, float4* to) {
  to[threadIdx.x] = *reinterpret_cast<const float4*>(from + 1);  // defect: misaligned
}
void misaligned() { RUN(vectors, 1, 1, Array<float>(8), Array<float4>(1)); }

__global__ void leaves_early(int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();  // defect: divergent_exit
}
void divergent_exit() { RUN(leaves_early, 1, 64, 40); }

__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();  // defect: divergent_places
}
void divergent_places() { RUN(two_barriers, 1, 64); }

__global__ void half_shuffles(float* to) {
  float x = 1.0f;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(~0u, x, 1);  // defect: deadlock
  __syncthreads();
  *to = x;
}
void deadlock() { RUN(half_shuffles, 1, 64, Array<float>(1)); }

__global__ void masks(unsigned* to) {
  *to = __ballot_sync(threadIdx.x < 8 ? ~0u : 0xfffffffeu, 1);  // defect: mask_mismatch
}
void mask_mismatch() { RUN(masks, 1, 32, Array<unsigned>(1)); }

__global__ void lane_leaves(unsigned* to) {
  if (threadIdx.x == 9) return;
  *to = __ballot_sync(~0u, 1);  // defect: exited_lane
}
void exited_lane() { RUN(lane_leaves, 1, 32, Array<unsigned>(1)); }

__global__ void short_warp(unsigned* to) {
  *to = __ballot_sync(~0u, 1);  // defect: missing_lane
}
void missing_lane() { RUN(short_warp, 1, 48, Array<unsigned>(1)); }

__global__ void others_only() {
  __syncwarp(0xfffffffeu);  // defect: not_in_mask
}
void not_in_mask() { RUN(others_only, 1, 32); }

__global__ void traps(int n) {
  if (int(threadIdx.x) == n) __trap();  // defect: trap
}
void trap() { RUN(traps, 1, 64, 33); }

__global__ void no_cluster_barrier() {
  if (blockIdx.x == 0) cg::this_cluster().sync();  // defect: divergent_cluster
}
void divergent_cluster() { RUN_CLUSTER(no_cluster_barrier, 2, 32, 2); }

__global__ void much_shared() {
  FUSEDOPT_SHARED(char, some, [2048]);  // defect: too_much_shared
  some[threadIdx.x] = 0;
}
void too_much_shared() { check(FUSEDOPT_LAUNCH(much_shared, 1, 32, 47 * 1024, nullptr), "much_shared"); }

// After an error the next launch runs as ever.
void recovery() {
  for (const auto defect : {divergent_exit, deadlock, trap}) {
    try {
      defect();
    } catch (const fusedopt_simt::Error&) {
      reduction();
      continue;
    }
    throw Wrong("nothing was found");
  }
}

// --- what launches are refused for, and what can be injected ---

__global__ void nothing() {}
__global__ void nothing_either() {}

cudaError_t refused(dim3 grid, dim3 block, dim3 cluster, size_t smem) {
  const cudaError_t error = FUSEDOPT_LAUNCH_CLUSTER(nothing, grid, block, cluster, smem, nullptr);
  EXPECT(cudaPeekAtLastError(), error);
  EXPECT(cudaGetLastError(), error);
  EXPECT(cudaGetLastError(), cudaSuccess);
  return error;
}

void launches() {
  EXPECT(refused(1, 1, 1, 0), cudaSuccess);
  for (const dim3 grid : {dim3(0), dim3(1, 65536), dim3(1, 1, 65536)})
    EXPECT(refused(grid, 1, 1, 0), cudaErrorInvalidConfiguration);
  for (const dim3 block : {dim3(0), dim3(1025), dim3(32, 33), dim3(1, 1, 65)})
    EXPECT(refused(1, block, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT(refused(6, 1, 4, 0), cudaErrorInvalidClusterSize);
  EXPECT(refused(16, 1, 16, 0), cudaErrorInvalidClusterSize);
  EXPECT(cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), cudaSuccess);
  EXPECT(refused(16, 1, 16, 0), cudaSuccess);
  EXPECT(refused(1, 1, 1, 48 * 1024 + 1), cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024), cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024), cudaSuccess);
  cudaGetLastError();
  EXPECT(refused(1, 1, 1, 227 * 1024), cudaSuccess);
  EXPECT(FUSEDOPT_LAUNCH(nothing_either, 1, 1, 48 * 1024 + 1, nullptr), cudaErrorInvalidValue);
}

void injections() {
  fusedopt_simt::reset();
  fusedopt_simt::fail_launch(2, cudaErrorLaunchFailure);
  EXPECT(refused(7, 64, 1, 5), cudaSuccess);
  EXPECT(refused(1, 1, 1, 0), cudaErrorLaunchFailure);
  EXPECT(refused(1, 1, 1, 0), cudaSuccess);
  EXPECT(fusedopt_simt::launch_count(), 2);
  const fusedopt_simt::Launch* const first = fusedopt_simt::launch_record(0);
  if (std::strcmp(first->kernel, "nothing")) throw Wrong(first->kernel);
  EXPECT(first->grid.x * 1000 + first->block.x * 10 + first->smem, 7645);
  EXPECT(fusedopt_simt::launch_record(2) == nullptr, true);

  fusedopt_simt::fail_call("cudaSetDevice", 2, cudaErrorInvalidDevice);
  int device;
  for (int turn = 0; turn < 4; ++turn) {
    EXPECT(cudaGetDevice(&device), cudaSuccess);
    EXPECT(cudaSetDevice(device), turn == 1 ? cudaErrorInvalidDevice : cudaSuccess);
  }
  EXPECT(cudaGetLastError(), cudaErrorInvalidDevice);

  fusedopt_simt::fail_launch(1, cudaErrorLaunchFailure);
  try {
    RUN(nothing, 1, 1);
    throw Wrong("nothing was thrown");
  } catch (const fusedopt::CudaError& error) {
    if (std::strcmp(error.what(), "nothing: cudaErrorLaunchFailure: simulated")) throw Wrong(error.what());
    EXPECT(cudaGetLastError(), cudaSuccess);
  }

  fusedopt_simt::set_noop(true);
  EXPECT(FUSEDOPT_LAUNCH(traps, 1, 64, 0, nullptr, 33), cudaSuccess);
  EXPECT(fusedopt_simt::launch_count(), 3);
  fusedopt_simt::reset();
}

const std::map<std::string, std::function<void()>> cases = {
#define CASE(name) {#name, name}
    CASE(reduction),
    CASE(votes),
    CASE(atomics),
    CASE(dynamic),
    CASE(recovery),
    CASE(launches),
    CASE(injections),
    CASE(missing_barrier),
    CASE(missing_loop_barrier),
    CASE(missing_syncwarp),
    CASE(global_overrun),
    CASE(shared_overrun),
    CASE(dynamic_overrun),
    CASE(misaligned),
    CASE(divergent_exit),
    CASE(divergent_places),
    CASE(deadlock),
    CASE(mask_mismatch),
    CASE(exited_lane),
    CASE(missing_lane),
    CASE(not_in_mask),
    CASE(trap),
    CASE(divergent_cluster),
    CASE(cluster_late),
    CASE(too_much_shared),
    {"cluster", cluster_reduction<true, true>},
    {"cluster_start", cluster_reduction<false, true>},
    {"cluster_end", cluster_reduction<true, false>},
#undef CASE
};

}  // namespace

int main(int, char** arguments) {
  try {
    if (!fusedopt_simt::set_order(arguments[2])) throw Wrong("no such order");
    cases.at(arguments[1])();
  } catch (const std::runtime_error& found) {
    std::puts(found.what());
    return 2;
  }
  std::puts("ok");
}
