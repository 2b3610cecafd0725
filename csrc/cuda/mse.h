// Mean squared error on a CUDA device.
#pragma once
#include "../mse.h"

namespace fusedopt {

inline constexpr int kMsePartials = 4096;

// Both are asynchronous; they throw CudaError, or std::invalid_argument for a dtype that has no kernel.

// *loss = factor * the sum of squares, in an order that depends on numel alone; and the gradient, if args.grad is
// given. `partial`: kMsePartials doubles.
void cuda_mse(const MseArgs& args, double factor, double* partial, float* loss, int device, void* stream);

// The gradient alone, times *upstream, rounded once.
void cuda_mse_backward(const MseArgs& args, const float* upstream, int device, void* stream);

}  // namespace fusedopt
