// Mean squared error on a CUDA device: the sum of squares and the gradient in one pass.
#include "mse.h"

#include <algorithm>
#include <stdexcept>

#include "launch.h"
#include "sums.h"
#include "vector.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;

constexpr int kPacks = 4;                    // vectors of each array that a thread has under way
constexpr int kTile = kPacks * kSumThreads;  // vectors that a block has under way
constexpr const char* kName = "mse_loss";

// `partial` takes each block's sum of squares, unless it is null.
template <class S, bool kGrad>
__global__ __launch_bounds__(kSumThreads) void squared_error(const __grid_constant__ MseArgs a, const float* upstream,
                                                             double* partial) {
  const Vectors<S> input(static_cast<S*>(const_cast<void*>(a.input)), a.numel);
  const Vectors<S> target(static_cast<S*>(const_cast<void*>(a.target)), a.numel);
  [[maybe_unused]] const Vectors<S> grad(static_cast<S*>(a.grad), a.numel);
  [[maybe_unused]] const float factor = float(a.grad_factor) * (kGrad && upstream ? *upstream : 1.0f);
  const int64_t count = input.count();
  double total = 0;
  for (int64_t tile = int64_t(blockIdx.x) * kTile; tile < count; tile += int64_t(gridDim.x) * kTile) {
    const int64_t first = tile + threadIdx.x;
    Vector<S> x[kPacks], y[kPacks];
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      x[pack] = input.load(first + pack * kSumThreads);
      y[pack] = target.load(first + pack * kSumThreads);
    }
    float squares = 0;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Vector<S> out;
#pragma unroll
      for (int i = 0; i < Vector<S>::kSize; ++i) {
        const float difference = load(x[pack].get(i)) - load(y[pack].get(i));
        squares += difference * difference;
        S e;
        store(e, factor * difference);
        out.set(i, e);
      }
      if constexpr (kGrad) grad.write(first + pack * kSumThreads, out);
    }
    total += squares;
  }
  if (!partial) return;
  total = across_block(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void finish_loss(const double* partial, int n, double factor, float* loss) {
  const double total = block_sum(n, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) *loss = float(factor * total);
}

using Kernel = void (*)(MseArgs, const float*, double*);

template <class S>
Kernel kernel_for(const MseArgs& a) {
  return a.grad ? squared_error<S, true> : squared_error<S, false>;
}

Kernel kernel_for(const MseArgs& a) {
  switch (a.dtype) {
    case Dtype::kF32:
      return kernel_for<float>(a);
    case Dtype::kBF16:
      return kernel_for<bf16>(a);
    case Dtype::kF16:
      return kernel_for<f16>(a);
    default:
      throw std::invalid_argument("mse_loss has no CUDA kernel for this dtype");
  }
}

// Returns the number of blocks, which depends on the size alone, as the sum's order must.
int launch_squares(const MseArgs& a, const float* upstream, double* partial, cudaStream_t stream) {
  const int64_t elements = int64_t(kTile) * 16 / (a.dtype == Dtype::kF32 ? 4 : 2);
  const int blocks = int(std::clamp<int64_t>((a.numel + elements - 1) / elements, 1, kMsePartials));
  check(FUSEDOPT_LAUNCH(kernel_for(a), dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, a, upstream, partial),
        kName);
  return blocks;
}

}  // namespace

void cuda_mse(const MseArgs& a, double factor, double* partial, float* loss, int device, void* stream) {
  const OnDevice current(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int blocks = launch_squares(a, nullptr, partial, on);
  check(FUSEDOPT_LAUNCH(finish_loss, dim3(1), dim3(kSumThreads), 0, on, partial, blocks, factor, loss), kName);
}

void cuda_mse_backward(const MseArgs& a, const float* upstream, int device, void* stream) {
  const OnDevice current(device);
  launch_squares(a, upstream, nullptr, static_cast<cudaStream_t>(stream));
}

}  // namespace fusedopt
