// The arithmetic of cross entropy for host and device: of one logit, of one target, and of one row's sums.
#pragma once
#include "cross_entropy.h"
#include "element.h"

#include <cmath>

namespace fusedopt::FUSEDOPT_ISA {

// --- one logit ---

FUSEDOPT_HD double exp_of(double x) { return std::exp(x); }
FUSEDOPT_HD double tanh_of(double x) { return std::tanh(x); }

// x / ln 2 as an integer n and the rest r in [-1/2, 1/2]; branch-free, so that it vectorises.
struct PowerOfTwo {
  float r, power;  // power = 2^n

  FUSEDOPT_HD explicit PowerOfTwo(float x) {
    const float kLog2E = 1.44269504088896341f;
    const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const float shifted = x * kLog2E + kMagic;
    r = x * kLog2E - (shifted - kMagic);
    power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  }
};

// exp for x <= 0 (a logit less its row's maximum) as 2^n 2^r; short, because a cached logit costs nothing else.
// Relative error below 2e-7 + 2e-8 |x|. Below -87 the result would be subnormal and is 0. NaN stays NaN.
FUSEDOPT_HD float exp_of(float x) {
  const PowerOfTwo two(x);
  float series = 1.3264727247e-3f;  // minimax for 2^r on [-1/2, 1/2] with 2^0 = 1, relative error 9.2e-8
  series = series * two.r + 9.6715126882e-3f;
  series = series * two.r + 5.5507337436e-2f;
  series = series * two.r + 2.4022242085e-1f;
  series = series * two.r + 6.9314697760e-1f;
  series = series * two.r + 1.0f;
  return x < -87.0f ? 0.0f : series * two.power;
}

// tanh |x| = -m / (m + 2) with m = exp(-2 |x|) - 1, which keeps the relative error below 4e-7 however small x is. At 20
// and above tanh is 1 to the last bit. NaN stays NaN.
FUSEDOPT_HD float tanh_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  const PowerOfTwo two(-2.0f * (magnitude > 20.0f ? 20.0f : magnitude));
  float series = 1.5403512758e-4f;  // minimax for (2^r - 1) / r on [-1/2, 1/2], relative error 1.1e-8
  series = series * two.r + 1.3390735478e-3f;
  series = series * two.r + 9.6182374937e-3f;
  series = series * two.r + 5.5503574336e-2f;
  series = series * two.r + 2.4022649795e-1f;
  series = series * two.r + 6.9314718793e-1f;
  const float m = series * two.r * two.power + (two.power - 1.0f);
  return bit_cast<float>((bit_cast<uint32_t>(m / (m + 2.0f)) & 0x7fffffffu) | (bits & 0x80000000u));
}

// What a row's gradient is made with, the logits' scale included.
template <class T>
struct Factors {
  T softmax, target;  // of e and of y
};

// x, whose rounding no contraction undoes: fused with the subtraction of a maximum or lse that was rounded, the largest
// logit would differ from itself. `zero` is 0, but the compiler does not know.
FUSEDOPT_HD float rounded(float x, uint32_t zero) { return bit_cast<float>(bit_cast<uint32_t>(x) | zero); }
FUSEDOPT_HD double rounded(double x, uint32_t zero) { return bit_cast<double>(bit_cast<uint64_t>(x) | zero); }

enum class Scaling { kNone, kScaled, kCapped };

// What softmax sees of a logit x: x itself; s = scale * x; or that, then cap * tanh(s / cap).
template <class T, Scaling kScaling>
struct Logit {
  T scale, cap, inverse;
  uint32_t zero;

  FUSEDOPT_HD explicit Logit(const CrossEntropyArgs& a)
      : scale(T(a.logit_scale)),
        cap(T(a.softcap)),
        inverse(kScaling == Scaling::kCapped ? T(1 / a.softcap) : T(0)),
        zero(uint32_t(a.rows < 0)) {}

  FUSEDOPT_HD T scaled(T x) const { return kScaling == Scaling::kNone ? x : rounded(scale * x, zero); }
  FUSEDOPT_HD T capped(T scaled) const {
    if constexpr (kScaling == Scaling::kCapped) return rounded(cap * tanh_of(inverse * scaled), zero);
    return scaled;
  }
  FUSEDOPT_HD T operator()(T x) const { return capped(scaled(x)); }

  // d loss / dx of a logit with e = exp(s - max) and target y
  FUSEDOPT_HD T gradient(const Factors<T>& factor, T e, T s, T y) const {
    const T grad = factor.softmax * e - factor.target * y;
    if constexpr (kScaling == Scaling::kCapped) return grad * (1 - (s * inverse) * (s * inverse));
    return grad;
  }
};

// e log e of an unnormalised probability e = exp(from_max); its limit at 0
template <class T>
FUSEDOPT_HD T times_log(T e, T from_max) {
  return e == 0 ? T(0) : e * from_max;
}

// --- one target ---

enum class Target { kIndex, kSmoothedIndex, kProbability };

// The targets of one row, smoothed and weighted, are y[c] = one_hot * [c == label] + spread * w[c] (class indices) or
// y[c] = w[c] * (keep * t[c] + spread) (probabilities); `mass` is their sum. Then
//   loss          = mass * lse - sum_c y[c] s[c] + z_loss * lse^2
//   d loss / ds_c = (mass + 2 z_loss lse) * softmax(s)[c] - y[c]
// Logits count from the row's maximum throughout: mass * lse and sum y s alone may each be 1e4 times the loss.
template <class T, Target kTarget>
struct Smoothing {
  const T* weight;
  int64_t ignore_index;
  T keep, spread;  // 1 - label_smoothing, label_smoothing / classes

  FUSEDOPT_HD explicit Smoothing(const CrossEntropyArgs& a)
      : weight(static_cast<const T*>(a.weight)),
        ignore_index(a.ignore_index),
        keep(T(1 - a.label_smoothing)),
        spread(T(a.label_smoothing / double(a.classes))) {}

  FUSEDOPT_HD bool ignored(int64_t label) const { return kTarget != Target::kProbability && label == ignore_index; }
  FUSEDOPT_HD T one_hot(int64_t label) const {
    return kTarget == Target::kProbability || ignored(label) ? T(0) : keep * (weight ? weight[label] : T(1));
  }
  // y of a class that weighs w and has probability t, but for the one-hot part of a class index
  FUSEDOPT_HD T dense(T w, T t) const {
    if constexpr (kTarget == Target::kIndex) return T(0);
    if constexpr (kTarget == Target::kSmoothedIndex) return spread * w;
    return w * (keep * t + spread);
  }
  // The sum of dense, where it is the same for every row
  FUSEDOPT_HD double dense_mass(const CrossEntropyArgs& a) const {
    return kTarget == Target::kSmoothedIndex ? double(spread) * a.weight_sum : 0.0;
  }
};

// --- one row ---

// What the arguments say of the target of a row whose classes lie side by side.
template <class S, Target kTarget, bool kWeighted>
struct RowTarget {
  using T = Compute<S>;
  const Smoothing<T, kTarget> smoothing;
  const S* probability;
  int64_t label;
  bool ignored;
  T one_hot;

  FUSEDOPT_HD RowTarget(const CrossEntropyArgs& a, int64_t row)
      : smoothing(a),
        probability(static_cast<const S*>(a.probabilities)),
        label(kTarget == Target::kProbability ? 0 : a.target[row]),
        ignored(smoothing.ignored(label)),
        one_hot(smoothing.one_hot(label)) {
    if (kTarget == Target::kProbability) probability += row * a.probabilities_stride;
    if (ignored) label = 0;
  }

  FUSEDOPT_HD T dense(int64_t c) const {
    const T w = kWeighted ? smoothing.weight[c] : T(1);
    if constexpr (kTarget == Target::kProbability) return smoothing.dense(w, load(probability[c]));
    return smoothing.dense(w, T(0));
  }
};

struct Sums {
  double exp = 0, mass = 0, dot = 0, exp_log = 0;  // of e = exp(s - max), y, y (s - max), e log e
};

// d loss / d lse: what multiplies softmax in the gradient
FUSEDOPT_HD double per_lse(double mass, double lse, double z_loss) { return mass + 2 * z_loss * lse; }

struct RowLoss {
  double loss, lse, entropy;

  FUSEDOPT_HD RowLoss(const Sums& sums, double max, double z_loss) {
    const double log_sum = std::log(sums.exp);
    lse = max + log_sum;
    loss = sums.mass * log_sum - sums.dot + z_loss * lse * lse;
    entropy = log_sum - sums.exp_log / sums.exp;
  }
};

}  // namespace fusedopt::FUSEDOPT_ISA
