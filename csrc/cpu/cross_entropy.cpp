// Cross entropy on rows of logits, compiled once per instruction set. A row is read from memory once: the passes after
// the first find it in the cache.
#include "engine.h"

#include "../softmax.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements summed in T before the sum goes on in double

enum class Target { kIndex, kSmoothedIndex, kProbability };

// What the arguments say of one row's target.
template <class S, Target kTarget, bool kWeighted>
struct RowTarget {
  using T = Compute<S>;
  const T* weight;
  const S* probability;
  int64_t label;
  T keep, spread;  // 1 - label_smoothing, label_smoothing / classes
  T one_hot;       // y[label], less its dense part

  RowTarget(const CrossEntropyArgs& a, int64_t row)
      : weight(static_cast<const T*>(a.weight)),
        probability(static_cast<const S*>(a.probabilities)),
        label(0),
        keep(T(1 - a.label_smoothing)),
        spread(T(a.label_smoothing / double(a.classes))),
        one_hot(0) {
    if constexpr (kTarget == Target::kProbability) {
      probability += row * a.probabilities_stride;
    } else {
      label = a.target[row];
      if (label != a.ignore_index) one_hot = keep * (weight ? weight[label] : T(1));
    }
  }

  FUSEDOPT_HD bool ignored(const CrossEntropyArgs& a) const {
    return kTarget != Target::kProbability && label == a.ignore_index;
  }

  // y[c], but for the one-hot part of a class index
  FUSEDOPT_HD T dense(int64_t c) const {
    if constexpr (kTarget == Target::kIndex) return T(0);
    const T w = kWeighted ? weight[c] : T(1);
    if constexpr (kTarget == Target::kSmoothedIndex) return spread * w;
    return w * (keep * T(load(probability[c])) + spread);
  }

  // grad[c] = factor * (mass * exp(x[c] - shift) / exp(...) - y[c]); `scale` is factor * mass / exp(...)
  FUSEDOPT_HD void write_grad(const S* x, S* grad, int64_t n, T shift, T scale, T factor) const {
    const T x_label = kTarget == Target::kProbability ? T(0) : T(load(x[label]));  // grad may lie over x
FUSEDOPT_IVDEP
    for (int64_t c = 0; c < n; ++c) {
      T d = scale * exp_of(T(load(x[c])) - shift);
      if constexpr (kTarget != Target::kIndex) d -= factor * dense(c);
      store(grad[c], d);
    }
    if constexpr (kTarget != Target::kProbability)
      store(grad[label], scale * exp_of(x_label - shift) - factor * (dense(label) + one_hot));
  }
};

template <class S>
Compute<S> row_max(const S* x, int64_t n) {
  using T = Compute<S>;
  // Lanes of a fixed width: `a > b ? a : b` is no reduction that gcc would reorder by itself.
  constexpr int kLanes = 64;
  T lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = -__builtin_inf();
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const T v = load(x[c + j]);
      lane[j] = v > lane[j] ? v : lane[j];
    }
  T max = -__builtin_inf();
  for (int j = 0; j < kLanes; ++j) max = lane[j] > max ? lane[j] : max;
  for (; c < n; ++c) {
    const T v = load(x[c]);
    max = v > max ? v : max;
  }
  return max;
}

template <class S, Target kTarget, bool kWeighted>
void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t n = a.classes;
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(a.logits) + row * a.logits_stride;
    S* grad = a.grad ? static_cast<S*>(a.grad) + row * a.grad_stride : nullptr;
    T& loss = static_cast<T*>(a.loss)[row];
    T& lse = static_cast<T*>(a.lse)[row];
    const RowTarget<S, kTarget, kWeighted> y(a, row);
    if (y.ignored(a)) {
      loss = lse = 0;
      if (grad) std::memset(static_cast<void*>(grad), 0, size_t(n) * sizeof(S));
      continue;
    }
    const T max = row_max(x, n);
    double sum = 0, mass = 0, dot = 0;
    for (int64_t block = 0; block < n; block += kBlock) {
      const int64_t stop = n < block + kBlock ? n : block + kBlock;
      T block_sum = 0, block_mass = 0, block_dot = 0;
#pragma omp simd reduction(+ : block_sum, block_mass, block_dot)
      for (int64_t c = block; c < stop; ++c) {
        const T from_max = T(load(x[c])) - max;
        block_sum += exp_of(from_max);
        if constexpr (kTarget != Target::kIndex) block_dot += y.dense(c) * from_max;
        if constexpr (kTarget == Target::kProbability) block_mass += y.dense(c);
      }
      sum += block_sum;
      mass += block_mass;
      dot += block_dot;
    }
    if constexpr (kTarget == Target::kSmoothedIndex) mass = double(y.spread) * a.weight_sum;
    if constexpr (kTarget != Target::kProbability) {
      mass += y.one_hot;
      dot += y.one_hot * (load(x[y.label]) - max);
    }
    const double log_sum = std::log(sum);
    loss = T(mass * log_sum - dot);
    lse = T(double(max) + log_sum);
    if (grad) y.write_grad(x, grad, n, max, T(a.grad_factor * mass / sum), T(a.grad_factor));
  }
}

// From lse alone, for the losses whose upstream gradient must come in before the rounding: reduction "none", float16.
template <class S, Target kTarget, bool kWeighted>
void backward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t n = a.classes;
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(a.logits) + row * a.logits_stride;
    S* grad = static_cast<S*>(a.grad) + row * a.grad_stride;
    const RowTarget<S, kTarget, kWeighted> y(a, row);
    if (y.ignored(a)) {
      std::memset(static_cast<void*>(grad), 0, size_t(n) * sizeof(S));
      continue;
    }
    double mass = y.one_hot;
    if constexpr (kTarget == Target::kSmoothedIndex) mass += double(y.spread) * a.weight_sum;
    if constexpr (kTarget == Target::kProbability)
      for (int64_t c = 0; c < n; ++c) mass += y.dense(c);
    const T upstream = a.upstream ? static_cast<const T*>(a.upstream)[row] : T(1);
    const double factor = a.grad_factor * upstream;
    y.write_grad(x, grad, n, static_cast<const T*>(a.lse)[row], T(factor * mass), T(factor));
  }
}

template <class S>
struct Forward {
  template <Target kTarget, bool kWeighted>
  static constexpr CpuEngine::CrossEntropyKernel kernel = forward<S, kTarget, kWeighted>;
};
template <class S>
struct Backward {
  template <Target kTarget, bool kWeighted>
  static constexpr CpuEngine::CrossEntropyKernel kernel = backward<S, kTarget, kWeighted>;
};

template <class Pass>
CpuEngine::CrossEntropyKernel for_target(const CrossEntropyArgs& a) {
  if (a.probabilities)
    return a.weight ? Pass::template kernel<Target::kProbability, true>
                    : Pass::template kernel<Target::kProbability, false>;
  if (a.label_smoothing == 0) return Pass::template kernel<Target::kIndex, false>;
  return a.weight ? Pass::template kernel<Target::kSmoothedIndex, true>
                  : Pass::template kernel<Target::kSmoothedIndex, false>;
}

template <template <class> class Pass>
CpuEngine::CrossEntropyKernel for_dtype(const CrossEntropyArgs& a) {
  switch (a.dtype) {
    case Dtype::kF64: return for_target<Pass<double>>(a);
    case Dtype::kF32: return for_target<Pass<float>>(a);
    case Dtype::kBF16: return for_target<Pass<bf16>>(a);
    case Dtype::kF16: return for_target<Pass<f16>>(a);
    default: return nullptr;
  }
}

}  // namespace

CpuEngine::CrossEntropyKernel cross_entropy_forward(const CrossEntropyArgs& a) { return for_dtype<Forward>(a); }
CpuEngine::CrossEntropyKernel cross_entropy_backward(const CrossEntropyArgs& a) { return for_dtype<Backward>(a); }

}  // namespace fusedopt::FUSEDOPT_ISA
