// What one mean squared error is told.
#pragma once
#include "step.h"

namespace fusedopt {

// sum_i (input_i - target_i)^2, and grad_i = grad_factor * (input_i - target_i)
struct MseArgs {
  Dtype dtype;  // of all three
  const void* input;
  const void* target;
  void* grad;  // or null
  double grad_factor;
  int64_t numel;
};

}  // namespace fusedopt
