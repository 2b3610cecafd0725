// The arithmetic of 16-bit tensors on a GPU: float, but for divisions and square roots, which are good to 2 units in
// the last place. IEEE's take as many instructions as all the rest of a rule, and at 14 bytes a parameter (Adam in
// bf16) there is time for about 130: the step would wait for arithmetic, for bits that rounding to bf16 throws away.
#pragma once
#include "../float_with.h"

namespace fusedopt::FUSEDOPT_ISA {

struct FastOps {
  // Not `div.full`, whose range goes on above 2^126: what a rule divides by is a square root plus eps.
  static FUSEDOPT_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
  }
  static FUSEDOPT_HD float root(float a) {
#if defined(__CUDA_ARCH__)
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a));
    return root;
#else
    return __builtin_sqrtf(a);
#endif
  }
};
using fast_float = float_with<FastOps>;

}  // namespace fusedopt::FUSEDOPT_ISA
