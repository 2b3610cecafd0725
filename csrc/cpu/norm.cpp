// Sums of squares of gradients, compiled once per instruction set.
#include "engine.h"

#include "../element.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

// In double: memory is slower, and no gradient's square overflows.
template <class S>
double sum_squares(const void* data, int64_t begin, int64_t end) {
  const S* values = static_cast<const S*>(data);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = begin; i < end; ++i) {
    const double value = double(load(values[i]));
    sum += value * value;
  }
  return sum;
}

}  // namespace

CpuEngine::NormKernel norm(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return sum_squares<double>;
    case Dtype::kF32:
      return sum_squares<float>;
    case Dtype::kBF16:
      return sum_squares<bf16>;
    case Dtype::kF16:
      return sum_squares<f16>;
    default:
      return nullptr;
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
