// Mean squared error, compiled once per instruction set: the sum of squares and the gradient in one pass.
#include "engine.h"

#include "memory.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kBlock = 512;  // squares summed in T before the sum goes on in double

template <class S, bool kGrad>
double sum_squares(const MseArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const S* input = static_cast<const S*>(a.input);
  const S* target = static_cast<const S*>(a.target);
  [[maybe_unused]] S* grad = static_cast<S*>(a.grad);
  [[maybe_unused]] const T factor = T(a.grad_factor);
  find_pages(input + begin, end - begin);
  find_pages(target + begin, end - begin);
  if constexpr (kGrad) find_pages(grad + begin, end - begin);
  double total = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = end < block + kBlock ? end : block + kBlock;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = block; i < stop; ++i) {
      const T difference = T(load(input[i])) - T(load(target[i]));
      sum += difference * difference;
      if constexpr (kGrad) store(grad[i], factor * difference);
    }
    total += sum;
  }
  return total;
}

template <class S>
CpuEngine::MseKernel kernel(const MseArgs& a) {
  return a.grad ? sum_squares<S, true> : sum_squares<S, false>;
}

}  // namespace

CpuEngine::MseKernel mse(const MseArgs& a) {
  switch (a.dtype) {
    case Dtype::kF64:
      return kernel<double>(a);
    case Dtype::kF32:
      return kernel<float>(a);
    case Dtype::kBF16:
      return kernel<bf16>(a);
    case Dtype::kF16:
      return kernel<f16>(a);
    default:
      return nullptr;
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
