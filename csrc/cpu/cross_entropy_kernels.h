// From what a cross entropy is told to the loop compiled for it, in one build of the CPU engine.
#pragma once
#include "../softmax.h"
#include "engine.h"
#include "memory.h"

namespace fusedopt::FUSEDOPT_ISA {

using CrossEntropyKernel = CpuEngine::CrossEntropyKernel;

// For (batch, classes, pixels)
CrossEntropyKernel pixels_forward(const CrossEntropyArgs& a);
CrossEntropyKernel pixels_backward(const CrossEntropyArgs& a);

namespace {

template <class S>
bool writes_past_cache(const CrossEntropyArgs& a) {
  return a.grad && a.grad != a.logits && goes_past_cache<S>(a.rows * a.classes);
}

template <class Pass>
CrossEntropyKernel for_target(const CrossEntropyArgs& a) {
  if (a.probabilities)
    return a.weight ? Pass::template kernel<Target::kProbability, true>
                    : Pass::template kernel<Target::kProbability, false>;
  if (a.label_smoothing == 0) return Pass::template kernel<Target::kIndex, false>;
  return a.weight ? Pass::template kernel<Target::kSmoothedIndex, true>
                  : Pass::template kernel<Target::kSmoothedIndex, false>;
}

template <template <class, Scaling kScaling, bool kEntropy> class Pass, class S>
CrossEntropyKernel for_logits(const CrossEntropyArgs& a) {
  // the entropy is little beside a tanh, and a scale seldom comes alone
  if (a.softcap != 0) return for_target<Pass<S, Scaling::kCapped, true>>(a);
  if (a.logit_scale != 1) return for_target<Pass<S, Scaling::kScaled, true>>(a);
  return a.argmax ? for_target<Pass<S, Scaling::kNone, true>>(a) : for_target<Pass<S, Scaling::kNone, false>>(a);
}

template <template <class, Scaling kScaling, bool kEntropy> class Pass>
CrossEntropyKernel cross_entropy_kernel(const CrossEntropyArgs& a) {
  switch (a.dtype) {
    case Dtype::kF64:
      return for_logits<Pass, double>(a);
    case Dtype::kF32:
      return for_logits<Pass, float>(a);
    case Dtype::kBF16:
      return for_logits<Pass, bf16>(a);
    case Dtype::kF16:
      return for_logits<Pass, f16>(a);
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace fusedopt::FUSEDOPT_ISA
