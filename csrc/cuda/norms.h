// What a step needs ahead of an update by a rule that is kNormed.
#pragma once
#include "sums.h"
#include "update.h"

namespace fusedopt {

// Sums of squares of a parameter's elements, and of its direction's.
struct Squares {
  double weights, direction;
};

// To partial[chunk] of every chunk whose tensor steps and adapts; for a grid as an update's.
using NormsKernel = void (*)(UpdateArgs, Squares* partial);

// Null where the rule needs no norms.
NormsKernel norms_kernel(int rule, Dtype param);

namespace {

// Of all threads, in thread 0.
__device__ inline Squares across_block(Squares sums) {
  static_assert(kThreads == kSumThreads);
  sums.weights = across_block(sums.weights);
  __syncthreads();  // the next sums come where these were
  sums.direction = across_block(sums.direction);
  __syncthreads();
  return sums;
}

}  // namespace
}  // namespace fusedopt
