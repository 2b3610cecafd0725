// Cross entropy on rows of logits, compiled once per instruction set. A row is read from memory once: the passes after
// the first find it in the cache.
#include "engine.h"

#include "../softmax.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kBlock = 512;  // elements summed in T before the sum goes on in double
constexpr int64_t kPrefetchBlock = 256;

enum class Target { kIndex, kSmoothedIndex, kProbability };

// Ask for the row that comes next while this one is computed: memory is then busy in both walks, one half of the row in
// each.
template <class S>
FUSEDOPT_HD void prefetch_half(const S* half, int64_t begin, int64_t end) {
  for (int64_t c = begin / 2; c < end / 2; c += int64_t(64 / sizeof(S))) __builtin_prefetch(half + c, 0, 2);
}

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

  // grad[c] = scale * e(c) - factor * y[c], where e(c) is exp(x[c] - max) and e_label its value at the label. `next` is
  // the row that this thread will read after this one.
  template <class Exp>
  FUSEDOPT_HD void write_grad(const Exp& e, T e_label, S* grad, int64_t n, T scale, T factor, const S* next) const {
    for (int64_t block = 0; block < n; block += kPrefetchBlock) {
      const int64_t stop = n < block + kPrefetchBlock ? n : block + kPrefetchBlock;
      if (next) prefetch_half(next + n / 2, block, stop);
      FUSEDOPT_IVDEP
      for (int64_t c = block; c < stop; ++c) {
        T d = scale * e(c);
        if constexpr (kTarget != Target::kIndex) d -= factor * dense(c);
        store(grad[c], d);
      }
    }
    if constexpr (kTarget != Target::kProbability)
      store(grad[label], scale * e_label - factor * (dense(label) + one_hot));
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

struct Sums {
  double exp = 0, mass = 0, dot = 0;  // of exp(x - max), y, y (x - max)
};

// kKeep: leave exp(x - max) in `kept`, which may lie over x; a second exp would cost more than reading it back.
template <bool kKeep, class S, Target kTarget, bool kWeighted>
Sums sum_row(const RowTarget<S, kTarget, kWeighted>& y, const S* x, int64_t n, Compute<S> max, Compute<S>* kept,
             const S* next) {
  using T = Compute<S>;
  Sums sums;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n < block + kBlock ? n : block + kBlock;
    if (next) prefetch_half(next, block, stop);
    T exps = 0, mass = 0, dot = 0;
#pragma omp simd reduction(+ : exps, mass, dot)
    for (int64_t c = block; c < stop; ++c) {
      const T from_max = T(load(x[c])) - max;
      const T e = exp_of(from_max);
      exps += e;
      if constexpr (kTarget != Target::kIndex) dot += y.dense(c) * from_max;
      if constexpr (kTarget == Target::kProbability) mass += y.dense(c);
      if constexpr (kKeep) kept[c] = e;
    }
    sums.exp += exps;
    sums.mass += mass;
    sums.dot += dot;
  }
  return sums;
}

template <class S, Target kTarget, bool kWeighted>
void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end, [[maybe_unused]] float* scratch) {
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
    const T from_max =
        kTarget == Target::kProbability ? T(0) : T(load(x[y.label])) - max;  // read before grad lies over x
    T* kept = nullptr;
    if constexpr (sizeof(S) == sizeof(T))
      kept = grad;
    else if (grad)
      kept = scratch;  // a 16-bit exp would be rounded twice
    const S* next = row + 1 < end ? x + a.logits_stride : nullptr;
    Sums sums = kept ? sum_row<true>(y, x, n, max, kept, next) : sum_row<false>(y, x, n, max, kept, next);
    if constexpr (kTarget == Target::kSmoothedIndex) sums.mass = double(y.spread) * a.weight_sum;
    if constexpr (kTarget != Target::kProbability) {
      sums.mass += y.one_hot;
      sums.dot += y.one_hot * from_max;
    }
    const double log_sum = std::log(sums.exp);
    loss = T(sums.mass * log_sum - sums.dot);
    lse = T(double(max) + log_sum);
    if (!grad) continue;
    const T factor = T(a.grad_factor), scale = T(a.grad_factor * sums.mass / sums.exp);
    const T e_label = exp_of(from_max);
    y.write_grad([=](int64_t c) { return kept[c]; }, e_label, grad, n, scale, factor, next);
  }
}

// From lse alone, for the losses whose upstream gradient must come in before the rounding: reduction "none", float16.
template <class S, Target kTarget, bool kWeighted>
void backward(const CrossEntropyArgs& a, int64_t begin, int64_t end, float*) {
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
    const T lse = static_cast<const T*>(a.lse)[row];
    const T e_label = kTarget == Target::kProbability ? T(0) : exp_of(T(load(x[y.label])) - lse);
    y.write_grad([=](int64_t c) { return exp_of(T(load(x[c])) - lse); }, e_label, grad, n, T(factor * mass), T(factor),
                 static_cast<const S*>(nullptr));
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
    case Dtype::kF64:
      return for_target<Pass<double>>(a);
    case Dtype::kF32:
      return for_target<Pass<float>>(a);
    case Dtype::kBF16:
      return for_target<Pass<bf16>>(a);
    case Dtype::kF16:
      return for_target<Pass<f16>>(a);
    default:
      return nullptr;
  }
}

}  // namespace

CpuEngine::CrossEntropyKernel cross_entropy_forward(const CrossEntropyArgs& a) { return for_dtype<Forward>(a); }
CpuEngine::CrossEntropyKernel cross_entropy_backward(const CrossEntropyArgs& a) { return for_dtype<Backward>(a); }

}  // namespace fusedopt::FUSEDOPT_ISA
