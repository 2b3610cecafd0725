// Sums over long arrays in an order that depends on their length alone: a block's share, then the shares.
#pragma once
#include <cstdint>

#include "launch.h"

namespace fusedopt {
namespace {

constexpr int kWarp = 32;
constexpr int kSumThreads = 256;

// The sum of all threads' values, in thread 0.
__device__ inline double across_block(double sum) {
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

// A block's share of sum(term(i)), in its thread 0.
template <class Term>
__device__ double block_sum(int64_t n, const Term& term) {
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kSumThreads)
    sum += term(i);
  return across_block(sum);
}

}  // namespace
}  // namespace fusedopt
