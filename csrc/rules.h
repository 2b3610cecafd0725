// The update rules, one struct each, for host and device. A rule is scalar arithmetic in T (float or double):
//
//   Hyper       what a parameter group says, in the order that Python and Triton repeat
//   names       of the rule, its hyperparameters and its states (a test compares them with Python's)
//   kSigned     bit k: state k takes either sign
//   Rule(h, t)  once per tensor: scalars derived in double, then cast to T; t counts this tensor's steps from 1
//   operator()  once per element: parameter, gradient, states
//
// A rule whose step depends on norms of a whole tensor (kNormed<Rule>) has besides
//
//   adapts()         whether this tensor's step does
//   direction(...)   once per element, ahead of the update: what the step will go along; p, g, states by value
//   adapt(r)         once per tensor: r is the norm of the parameter over that of its direction, or 1 if either is 0
//
// Precision, rounding, scaling and vectorisation belong to the engine around a rule. The order of operations is that of
// torch.optim's single-tensor functions, so that infinities and NaNs come out alike.
#pragma once
#include "element.h"

#include <cmath>
#include <type_traits>

// A rule's hyperparameters and their names, from one list.
#define FUSEDOPT_HYPER(...) \
  struct Hyper {            \
    double __VA_ARGS__;     \
  };                        \
  static constexpr const char* kHyper = #__VA_ARGS__

namespace fusedopt::FUSEDOPT_ISA {

FUSEDOPT_HD float sqrt_of(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_HD double sqrt_of(double x) { return __builtin_sqrt(x); }

// a * b + c, contracted. Said where the compiler has a choice, two products to add or one across a select: gcc 12 makes
// another in a loop's tail, and the parts of a tensor that processes share would step otherwise than it does whole.
template <class T>
FUSEDOPT_HD T multiply_add(T a, T b, T c) {
  return a * b + c;
}
#if defined(__CUDA_ARCH__)
FUSEDOPT_HD float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FUSEDOPT_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
FUSEDOPT_HD float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FUSEDOPT_HD double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// torch.lerp, exact at both ends: it starts from the nearer one. `side` is a T, not a bool: gcc 12 does not vectorise a
// select between 16-bit elements by an 8-bit condition.
template <class T>
struct Lerp {
  T side, weight;
  FUSEDOPT_HD explicit Lerp(double w) : side(w < 0.5 ? -1 : 1), weight(T(w < 0.5 ? w : w - 1)) {}
  FUSEDOPT_HD T operator()(T from, T to) const { return choose(side > T(0), to, from) + weight * (to - from); }
};

// Not `g + weight_decay * p` at zero: an infinite parameter must not turn the gradient into NaN.
template <class T>
FUSEDOPT_HD T with_l2(T g, T p, T weight_decay) {
  return choose(weight_decay != T(0), g + weight_decay * p, g);
}

// Kingma & Ba 2015 (torch.optim.Adam), decoupled decay of Loshchilov & Hutter 2019 (torch.optim.AdamW), and AMSGrad of
// Reddi, Kale & Kumar 2018.
template <class T, bool kDecoupled, bool kAmsgrad>
struct AdamRule {
  FUSEDOPT_HYPER(lr, beta1, beta2, eps, weight_decay);
  static constexpr const char* kName =
      kDecoupled ? (kAmsgrad ? "adamw_amsgrad" : "adamw") : (kAmsgrad ? "adam_amsgrad" : "adam");
  static constexpr const char* kStateNames = kAmsgrad ? "exp_avg, exp_avg_sq, max_exp_avg_sq" : "exp_avg, exp_avg_sq";
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr unsigned kSigned = 0b001;

  Lerp<T> first_moment;
  T decay, l2, beta2, one_minus_beta2, minus_step_size, inv_sqrt_correction2, eps;

  FUSEDOPT_HD AdamRule(const Hyper& h, double step) : first_moment(1 - h.beta1) {
    const double correction1 = 1 - std::pow(h.beta1, step);
    const double correction2 = 1 - std::pow(h.beta2, step);
    decay = T(kDecoupled ? 1 - h.lr * h.weight_decay : 1);
    l2 = T(kDecoupled ? 0 : h.weight_decay);
    beta2 = T(h.beta2);
    one_minus_beta2 = T(1 - h.beta2);
    minus_step_size = T(-h.lr / correction1);
    inv_sqrt_correction2 = T(1 / std::sqrt(correction2));
    eps = T(h.eps);
  }

  FUSEDOPT_HD void moments(T& p, T& g, T& m, T& v) const {
    if (!kDecoupled) g = with_l2(g, p, l2);
    m = first_moment(m, g);
    v = multiply_add(one_minus_beta2 * g, g, v * beta2);
  }
  FUSEDOPT_HD void move(T& p, T m, T v) const {
    p = multiply_add(p, decay, minus_step_size * m / (sqrt_of(v) * inv_sqrt_correction2 + eps));
  }

  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    moments(p, g, m, v);
    move(p, m, v);
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v, T& v_max) const {
    moments(p, g, m, v);
    v_max = choose(v_max < v || v != v, v, v_max);  // torch.maximum: NaN wins
    move(p, m, v_max);
  }
};

// Hinton 2012 (torch.optim.RMSprop); centered after Graves 2013.
template <class T, bool kCentered, bool kMomentum>
struct RMSpropRule {
  FUSEDOPT_HYPER(lr, alpha, eps, weight_decay, momentum);
  static constexpr const char* kName = kCentered ? (kMomentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
                                                 : (kMomentum ? "rmsprop_momentum" : "rmsprop");
  static constexpr const char* kStateNames =
      kCentered ? (kMomentum ? "square_avg, grad_avg, momentum_buffer" : "square_avg, grad_avg")
                : (kMomentum ? "square_avg, momentum_buffer" : "square_avg");
  static constexpr int kStates = 1 + kCentered + kMomentum;
  static constexpr unsigned kSigned = 0b110;

  Lerp<T> mean;
  T lr, alpha, one_minus_alpha, eps, l2, momentum;

  FUSEDOPT_HD RMSpropRule(const Hyper& h, double) : mean(1 - h.alpha) {
    lr = T(h.lr);
    alpha = T(h.alpha);
    one_minus_alpha = T(1 - h.alpha);
    eps = T(h.eps);
    l2 = T(h.weight_decay);
    momentum = T(h.momentum);
  }

  FUSEDOPT_HD void average(T p, T& g, T& sq) const {
    g = with_l2(g, p, l2);
    sq = multiply_add(one_minus_alpha * g, g, sq * alpha);
  }
  // The variance of a constant gradient is zero, and rounds below it: clamped, where stock's square root gives NaN.
  FUSEDOPT_HD T centered(T g, T sq, T& g_avg) const {
    g_avg = mean(g_avg, g);
    const T variance = sq - g_avg * g_avg;
    return choose(variance < T(0), T(0), variance);
  }
  FUSEDOPT_HD void move(T& p, T g, T variance) const { p -= lr * g / (sqrt_of(variance) + eps); }
  FUSEDOPT_HD void move(T& p, T g, T variance, T& buffer) const {
    buffer = momentum * buffer + g / (sqrt_of(variance) + eps);
    p -= lr * buffer;
  }

  FUSEDOPT_HD void operator()(T& p, T g, T& sq) const {
    average(p, g, sq);
    move(p, g, sq);
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& sq, T& second) const {
    average(p, g, sq);
    if constexpr (kCentered)
      move(p, g, centered(g, sq, second));
    else
      move(p, g, sq, second);
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& sq, T& g_avg, T& buffer) const {
    average(p, g, sq);
    move(p, g, centered(g, sq, g_avg), buffer);
  }
};

// Duchi, Hazan & Singer 2011; torch.optim.Adagrad.
template <class T>
struct AdagradRule {
  FUSEDOPT_HYPER(lr, lr_decay, eps, weight_decay);
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kStateNames = "sum";
  static constexpr int kStates = 1;
  static constexpr unsigned kSigned = 0;

  T step_size, eps, l2;

  FUSEDOPT_HD AdagradRule(const Hyper& h, double step) {
    step_size = T(h.lr / (1 + (step - 1) * h.lr_decay));
    eps = T(h.eps);
    l2 = T(h.weight_decay);
  }

  FUSEDOPT_HD void operator()(T& p, T g, T& sum) const {
    g = with_l2(g, p, l2);
    sum += g * g;
    p -= step_size * g / (sqrt_of(sum) + eps);
  }
};

// torch.optim.SGD; Sutskever et al. 2013 for the momentum. The first step of a tensor fills the buffer, undampened.
template <class T, bool kMomentum>
struct SGDRule {
  FUSEDOPT_HYPER(lr, weight_decay, momentum, dampening, nesterov);
  static constexpr const char* kName = kMomentum ? "sgd_momentum" : "sgd";
  static constexpr const char* kStateNames = kMomentum ? "momentum_buffer" : "";
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr unsigned kSigned = 1;

  T lr, l2, momentum, keep, take, nesterov;

  FUSEDOPT_HD SGDRule(const Hyper& h, double step) {
    lr = T(h.lr);
    l2 = T(h.weight_decay);
    momentum = T(h.momentum);
    keep = step == 1 ? T(0) : T(h.momentum);
    take = step == 1 ? T(1) : T(1 - h.dampening);
    nesterov = T(h.nesterov);
  }

  FUSEDOPT_HD void operator()(T& p, T g) const {
    g = with_l2(g, p, l2);
    p -= lr * g;
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& buffer) const {
    g = with_l2(g, p, l2);
    buffer = multiply_add(take, g, keep * buffer);
    p -= lr * choose(nesterov > T(0), g + momentum * buffer, buffer);
  }
};

// Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms".
template <class T>
struct LionRule {
  FUSEDOPT_HYPER(lr, beta1, beta2, weight_decay);
  static constexpr const char* kName = "lion";
  static constexpr const char* kStateNames = "exp_avg";
  static constexpr int kStates = 1;
  static constexpr unsigned kSigned = 1;

  Lerp<T> blend, average;
  T minus_lr, decay;

  FUSEDOPT_HD LionRule(const Hyper& h, double) : blend(1 - h.beta1), average(1 - h.beta2) {
    minus_lr = T(-h.lr);
    decay = T(1 - h.lr * h.weight_decay);
  }

  FUSEDOPT_HD void operator()(T& p, T g, T& m) const {
    const T direction = blend(m, g);
    const T sign = choose(direction > T(0), T(1), choose(direction < T(0), T(-1), direction));  // 0 and NaN stay
    p = multiply_add(minus_lr, sign, p * decay);
    m = average(m, g);
  }
};

// You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes": AdamW's direction, as
// long as the tensor itself. Tensors without weight decay (biases, norms) step as Adam's unless `always_adapt`.
template <class T>
struct LAMBRule {
  FUSEDOPT_HYPER(lr, beta1, beta2, eps, weight_decay, always_adapt);
  static constexpr const char* kName = "lamb";
  static constexpr const char* kStateNames = "exp_avg, exp_avg_sq";
  static constexpr int kStates = 2;
  static constexpr unsigned kSigned = 0b01;

  Lerp<T> first_moment;
  T lr, beta2, one_minus_beta2, inv_correction1, inv_sqrt_correction2, eps, decay, adapted;

  FUSEDOPT_HD LAMBRule(const Hyper& h, double step) : first_moment(1 - h.beta1) {
    lr = T(h.lr);
    beta2 = T(h.beta2);
    one_minus_beta2 = T(1 - h.beta2);
    inv_correction1 = T(1 / (1 - std::pow(h.beta1, step)));
    inv_sqrt_correction2 = T(1 / std::sqrt(1 - std::pow(h.beta2, step)));
    eps = T(h.eps);
    decay = T(h.weight_decay);
    adapted = T(h.weight_decay != 0 || h.always_adapt != 0);
  }

  FUSEDOPT_HD bool adapts() const { return adapted != T(0); }
  FUSEDOPT_HD void adapt(double ratio) { lr *= T(ratio); }

  FUSEDOPT_HD T move(T p, T g, T& m, T& v) const {
    m = first_moment(m, g);
    v = multiply_add(one_minus_beta2 * g, g, v * beta2);
    return m * inv_correction1 / (sqrt_of(v) * inv_sqrt_correction2 + eps) + decay * p;
  }
  FUSEDOPT_HD T direction(T p, T g, T m, T v) const { return move(p, g, m, v); }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const { p -= lr * move(p, g, m, v); }
};

template <class Rule, class = void>
inline constexpr bool kNormed = false;
template <class Rule>
inline constexpr bool kNormed<Rule, std::void_t<decltype(&Rule::adapts)>> = true;

// Every rule, in the order of Launch::rule. X(rule of T)
// clang-format off
template <class T> using Adam = AdamRule<T, false, false>;
template <class T> using AdamAmsgrad = AdamRule<T, false, true>;
template <class T> using AdamW = AdamRule<T, true, false>;
template <class T> using AdamWAmsgrad = AdamRule<T, true, true>;
template <class T> using RMSprop = RMSpropRule<T, false, false>;
template <class T> using RMSpropMomentum = RMSpropRule<T, false, true>;
template <class T> using RMSpropCentered = RMSpropRule<T, true, false>;
template <class T> using RMSpropCenteredMomentum = RMSpropRule<T, true, true>;
template <class T> using Adagrad = AdagradRule<T>;
template <class T> using SGD = SGDRule<T, false>;
template <class T> using SGDMomentum = SGDRule<T, true>;
template <class T> using Lion = LionRule<T>;
template <class T> using LAMB = LAMBRule<T>;

#define FUSEDOPT_RULES(X)                                                                                  \
  X(Adam) X(AdamAmsgrad) X(AdamW) X(AdamWAmsgrad) X(RMSprop) X(RMSpropMomentum) X(RMSpropCentered)         \
  X(RMSpropCenteredMomentum) X(Adagrad) X(SGD) X(SGDMomentum) X(Lion) X(LAMB)
// clang-format on

}  // namespace fusedopt::FUSEDOPT_ISA
