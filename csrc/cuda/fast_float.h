// The arithmetic of 16-bit tensors on a GPU: float, but for divisions and square roots, which are good to 2 units in
// the last place. IEEE's take as many instructions as all the rest of a rule, and at 14 bytes a parameter (Adam in
// bf16) there is time for about 130: the step would wait for arithmetic, for bits that rounding to bf16 throws away.
#pragma once
#include "../element.h"

namespace fusedopt::FUSEDOPT_ISA {

struct fast_float {
  float x;

  fast_float() = default;
  template <class A>
  FUSEDOPT_HD fast_float(A value) : x(float(value)) {}

  friend FUSEDOPT_HD fast_float operator+(fast_float a, fast_float b) { return a.x + b.x; }
  friend FUSEDOPT_HD fast_float operator-(fast_float a, fast_float b) { return a.x - b.x; }
  friend FUSEDOPT_HD fast_float operator*(fast_float a, fast_float b) { return a.x * b.x; }
  // Not `div.full`, whose range goes on above 2^126: what a rule divides by is a square root plus eps.
  friend FUSEDOPT_HD fast_float operator/(fast_float a, fast_float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a.x, b.x);
#else
    return a.x / b.x;
#endif
  }
  FUSEDOPT_HD fast_float& operator+=(fast_float b) { return *this = *this + b; }
  FUSEDOPT_HD fast_float& operator-=(fast_float b) { return *this = *this - b; }
  FUSEDOPT_HD fast_float& operator*=(fast_float b) { return *this = *this * b; }
  friend FUSEDOPT_HD bool operator<(fast_float a, fast_float b) { return a.x < b.x; }
  friend FUSEDOPT_HD bool operator>(fast_float a, fast_float b) { return a.x > b.x; }
  friend FUSEDOPT_HD bool operator!=(fast_float a, fast_float b) { return a.x != b.x; }
};

FUSEDOPT_HD fast_float sqrt_of(fast_float a) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a.x));
  return root;
#else
  return __builtin_sqrtf(a.x);
#endif
}

FUSEDOPT_HD fast_float choose(bool c, fast_float a, fast_float b) { return c ? a.x : b.x; }

template <class E>
FUSEDOPT_HD void store(E& to, fast_float value) {
  store(to, value.x);
}

}  // namespace fusedopt::FUSEDOPT_ISA
