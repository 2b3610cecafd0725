// The softmax arithmetic of one logit, for host and device, and the loss and gradient made of it.
#pragma once
#include "element.h"

#include <cmath>

namespace fusedopt::FUSEDOPT_ISA {

FUSEDOPT_HD double exp_of(double x) { return std::exp(x); }

// exp for x <= 0 (a logit less its row's maximum) as 2^n 2^r; branch-free, so that it vectorises, and short, because a
// cached logit costs nothing else. Relative error below 2e-7 + 2e-8 |x|. Below -87 the result would be subnormal and is
// 0. NaN stays NaN.
FUSEDOPT_HD float exp_of(float x) {
  const float kLog2E = 1.44269504088896341f;
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * kLog2E + kMagic;
  const float r = x * kLog2E - (shifted - kMagic);
  float series = 1.3264727247e-3f;  // minimax for 2^r on [-1/2, 1/2] with 2^0 = 1, relative error 9.2e-8
  series = series * r + 9.6715126882e-3f;
  series = series * r + 5.5507337436e-2f;
  series = series * r + 2.4022242085e-1f;
  series = series * r + 6.9314697760e-1f;
  series = series * r + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));  // 2^n
  return x < -87.0f ? 0.0f : series * power;
}

// The targets of one row, smoothed and weighted, are y[c] = delta * [c == target] + spread * w[c] (class indices) or
// y[c] = w[c] * (keep * t[c] + spread) (probabilities); `mass` is their sum. Then
//   loss          = mass * lse - sum_c y[c] x[c]
//   d loss / dx_c = mass * softmax(x)[c] - y[c]
// Logits count from the row's maximum throughout: mass * lse and sum y x alone may each be 1e4 times the loss.

}  // namespace fusedopt::FUSEDOPT_ISA
