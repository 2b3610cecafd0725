// Sums in double whose order does not depend on how blocks are scheduled: each block's share, then a block over those.
#pragma once
#include "launch.h"

namespace fusedopt {

inline constexpr int kSumThreads = 256;  // of a block

// The sum over a block's threads, in its thread 0. Once per kernel: nobody waits before the shared memory is reused.
inline __device__ double block_sum(double sum) {
  constexpr int kWarp = 32;
  FUSEDOPT_SHARED(double, of_warp, [kSumThreads / kWarp]);
  const auto fold = [](double value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
  };
  sum = fold(sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x < kWarp) sum = fold(threadIdx.x < kSumThreads / kWarp ? of_warp[threadIdx.x] : 0.0);
  return sum;
}

}  // namespace fusedopt
