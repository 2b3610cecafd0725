// The softmax arithmetic of one logit, for host and device, and the loss and gradient made of it.
#pragma once
#include "element.h"

#include <cmath>

namespace fusedopt::FUSEDOPT_ISA {

FUSEDOPT_HD double exp_of(double x) { return std::exp(x); }

// exp for x <= 0 (a logit less its row's maximum), within 1.5 ulp; branch-free, so that it vectorises. Below -87 the
// result would be subnormal and is 0. NaN stays NaN.
FUSEDOPT_HD float exp_of(float x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  float series = 1.9875691500e-4f;                               // minimax for (exp(r) - 1 - r) / r^2 (Cephes expf)
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const float mantissa = series * r * r + r + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));  // 2^n
  return x < -87.0f ? 0.0f : mantissa * power;
}

// The targets of one row, smoothed and weighted, are y[c] = delta * [c == target] + spread * w[c] (class indices) or
// y[c] = w[c] * (keep * t[c] + spread) (probabilities); `mass` is their sum. Then
//   loss          = mass * lse - sum_c y[c] x[c]
//   d loss / dx_c = mass * softmax(x)[c] - y[c]
// Logits count from the row's maximum throughout: mass * lse and sum y x alone may each be 1e4 times the loss.

}  // namespace fusedopt::FUSEDOPT_ISA
