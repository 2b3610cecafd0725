// Cross entropy on rows of logits, compiled once per instruction set. A row is read from memory once: the passes after
// the first find it in the cache.
#include "cross_entropy_kernels.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kBlock = 512;  // elements summed in T before the sum goes on in double
constexpr int64_t kWriteBlock = 256;

// A row that is asked for while the one before it is computed, so that memory is busy throughout.
template <class S>
struct Ahead {
  const S* row;  // null: none
  int64_t n;

  FUSEDOPT_HD void pages() const {
    if (row) find_pages(row, n);
  }
  // While elements [begin, end) are computed: three quarters in the walk that takes exponentials, which is the longest,
  // the rest in the one that writes.
  FUSEDOPT_HD void early(int64_t begin, int64_t end) const { lines(begin * 3 / 4, end * 3 / 4); }
  FUSEDOPT_HD void late(int64_t begin, int64_t end) const { lines(n * 3 / 4 + begin / 4, n * 3 / 4 + end / 4); }

 private:
  FUSEDOPT_HD void lines(int64_t begin, int64_t end) const {
    if (row) prefetch_lines(row + begin, end - begin);
  }
};

template <class S, class L>
Compute<S> row_max(const S* x, int64_t n, const L& logit) {
  using T = Compute<S>;
  // Lanes of a fixed width: `a > b ? a : b` is no reduction that gcc would reorder by itself.
  constexpr int kLanes = 64;
  T lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = -__builtin_inf();
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const T v = logit.scaled(load(x[c + j]));
      lane[j] = v > lane[j] ? v : lane[j];
    }
  for (int j = 0; j < n - c; ++j) {
    const T v = logit.scaled(load(x[c + j]));
    lane[j] = v > lane[j] ? v : lane[j];
  }
  // by halves: one after the other the comparisons would wait for each other, for longer than a short row takes
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = lane[j + half] > lane[j] ? lane[j + half] : lane[j];
  return lane[0];
}

// torch.argmax of the scaled x, whose largest number is `max`: the first NaN, or the first `max`.
template <class S, class L>
int64_t row_argmax(const S* x, int64_t n, const L& logit, Compute<S> max) {
  using T = Compute<S>;
  int64_t first = n;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n < block + kBlock ? n : block + kBlock;
    int nans = 0, hits = 0;
#pragma omp simd reduction(+ : nans, hits)
    for (int64_t c = block; c < stop; ++c) {
      const T v = logit.scaled(load(x[c]));
      nans += v != v;
      hits += v == max;
    }
    if (!nans && (!hits || first < n)) continue;
    for (int64_t c = block; c < stop; ++c) {
      const T v = logit.scaled(load(x[c]));
      if (v != v) return c;
      if (v == max && first == n) first = c;
    }
  }
  return first;
}

// kKeep: leave what the gradient is made of in `kept`, which may lie over x: exp(s - max), since a second exp would
// cost more than reading it back; under a cap s itself, for the slope.
template <bool kKeep, bool kEntropy, class S, Target kTarget, bool kWeighted, Scaling kScaling>
Sums sum_row(const RowTarget<S, kTarget, kWeighted>& y, Logit<Compute<S>, kScaling> logit, const S* x, int64_t n,
             Compute<S> max, Compute<S>* kept, Ahead<S> next) {
  using T = Compute<S>;
  Sums sums;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n < block + kBlock ? n : block + kBlock;
    next.early(block, stop);
    T exps = 0, mass = 0, dot = 0, exp_log = 0;
#pragma omp simd reduction(+ : exps, mass, dot, exp_log)
    for (int64_t c = block; c < stop; ++c) {
      const T s = logit(load(x[c]));
      const T from_max = s - max;
      const T e = exp_of(from_max);
      exps += e;
      if constexpr (kTarget != Target::kIndex) dot += y.dense(c) * from_max;
      if constexpr (kTarget == Target::kProbability) mass += y.dense(c);
      if constexpr (kEntropy) exp_log += times_log(e, from_max);
      if constexpr (kKeep) kept[c] = kScaling == Scaling::kCapped ? s : e;
    }
    sums.exp += exps;
    sums.mass += mass;
    sums.dot += dot;
    sums.exp_log += exp_log;
  }
  return sums;
}

template <class T>
struct ExpAndLogit {
  T e, s;
};

// `read(c)` gives exp(s - max) and s of a class. `streamed`: the gradient goes past the cache.
template <class S, Target kTarget, bool kWeighted, Scaling kScaling, class T, class Read>
void write_grad(const RowTarget<S, kTarget, kWeighted>& y, Logit<T, kScaling> logit, Factors<T> factors,
                const Read& read, ExpAndLogit<T> at_label, S* grad, int64_t n, Ahead<S> next, bool streamed) {
  alignas(kLine) S block_of_grad[kWriteBlock];
  // blocks that end where a line of memory does
  for (int64_t block = 0, offset = line_offset(grad), stop; block < n; block = stop, offset = 0) {
    stop = block + kWriteBlock - offset;
    stop = n < stop ? n : stop;
    next.late(block, stop);
    S* const out = streamed ? block_of_grad + offset : grad + block;
    FUSEDOPT_IVDEP
    for (int64_t c = block; c < stop; ++c) {
      const ExpAndLogit<T> at = read(c);
      store(out[c - block], logit.gradient(factors, at.e, at.s, y.dense(c)));
    }
    if (streamed) stream_out(grad + block, out, stop - block);
  }
  if constexpr (kTarget != Target::kProbability)
    store(grad[y.label], logit.gradient(factors, at_label.e, at_label.s, y.dense(y.label) + y.one_hot));
}

template <class S, Target kTarget, bool kWeighted>
bool is_correct(const CrossEntropyArgs& a, const RowTarget<S, kTarget, kWeighted>& y, int64_t argmax) {
  using T = Compute<S>;
  if constexpr (kTarget != Target::kProbability) return !y.ignored && argmax == y.label;
  const Logit<T, Scaling::kNone> as_it_is(a);
  return argmax == row_argmax(y.probability, a.classes, as_it_is, row_max(y.probability, a.classes, as_it_is));
}

template <class S, Target kTarget, bool kWeighted, Scaling kScaling, bool kEntropy>
void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end, [[maybe_unused]] void* scratch) {
  using T = Compute<S>;
  const int64_t n = a.classes;
  const Logit<T, kScaling> logit(a);
  constexpr bool kKeptInGrad = sizeof(S) == sizeof(T);  // a 16-bit exp would be rounded twice
  const bool streamed = !kKeptInGrad && writes_past_cache<S>(a);
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(a.logits) + row * a.logits_stride;
    S* grad = a.grad ? static_cast<S*>(a.grad) + row * a.grad_stride : nullptr;
    T& loss = static_cast<T*>(a.loss)[row];
    T& lse = static_cast<T*>(a.lse)[row];
    const RowTarget<S, kTarget, kWeighted> y(a, row);
    if (!y.ignored || a.argmax) {
      const T top = row_max(x, n, logit), max = logit.capped(top);
      const T s_label = logit(load(x[y.label]));  // read before grad lies over x
      if (a.argmax) {
        a.argmax[row] = row_argmax(x, n, logit, top);
        a.correct[row] = is_correct(a, y, a.argmax[row]);
      }
      T* kept = nullptr;
      if (grad && !y.ignored) {
        if constexpr (kKeptInGrad)
          kept = grad;
        else
          kept = static_cast<T*>(scratch);
      }
      const Ahead<S> next{row + 1 < end ? x + a.logits_stride : nullptr, n};
      next.pages();
      Sums sums = kept ? sum_row<true, kEntropy>(y, logit, x, n, max, kept, next)
                       : sum_row<false, kEntropy>(y, logit, x, n, max, kept, next);
      if constexpr (kTarget != Target::kProbability) {
        sums.mass = y.smoothing.dense_mass(a) + y.one_hot;
        sums.dot += y.one_hot * (s_label - max);
      }
      const RowLoss of(sums, max, a.z_loss);
      loss = T(of.loss);
      lse = T(of.lse);
      if (a.argmax) static_cast<T*>(a.entropy)[row] = T(of.entropy);
      if (kept) {
        const double factor = a.grad_factor * a.logit_scale;
        const Factors<T> factors{T(factor * per_lse(sums.mass, of.lse, a.z_loss) / sums.exp), T(factor)};
        const auto read = [=](int64_t c) -> ExpAndLogit<T> {
          return {kScaling == Scaling::kCapped ? exp_of(kept[c] - max) : kept[c], kept[c]};
        };
        write_grad(y, logit, factors, read, {exp_of(s_label - max), s_label}, grad, n, next, streamed);
      }
    }
    if (y.ignored) {
      loss = 0;
      if (!a.argmax) lse = 0;
      if (grad) std::memset(static_cast<void*>(grad), 0, size_t(n) * sizeof(S));
    }
  }
  if (streamed) end_streams();
}

// From lse alone, for the losses whose upstream gradient must come in before the rounding: reduction "none", float16.
template <class S, Target kTarget, bool kWeighted, Scaling kScaling>
void backward(const CrossEntropyArgs& a, int64_t begin, int64_t end, void*) {
  using T = Compute<S>;
  const int64_t n = a.classes;
  const Logit<T, kScaling> logit(a);
  const bool streamed = writes_past_cache<S>(a);
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(a.logits) + row * a.logits_stride;
    S* grad = static_cast<S*>(a.grad) + row * a.grad_stride;
    const RowTarget<S, kTarget, kWeighted> y(a, row);
    if (y.ignored) {
      std::memset(static_cast<void*>(grad), 0, size_t(n) * sizeof(S));
      continue;
    }
    double mass = y.smoothing.dense_mass(a) + y.one_hot;
    if constexpr (kTarget == Target::kProbability)
      for (int64_t c = 0; c < n; ++c) mass += y.dense(c);
    const T upstream = a.upstream ? static_cast<const T*>(a.upstream)[row] : T(1);
    const double factor = a.grad_factor * a.logit_scale * upstream;
    const T lse = static_cast<const T*>(a.lse)[row];
    const auto read = [=](int64_t c) -> ExpAndLogit<T> {
      const T s = logit(load(x[c]));
      return {exp_of(s - lse), s};
    };
    const Factors<T> factors{T(factor * per_lse(mass, lse, a.z_loss)), T(factor)};
    write_grad(y, logit, factors, read, read(y.label), grad, n, {nullptr, n}, streamed);
  }
  if (streamed) end_streams();
}

template <class S, Scaling kScaling, bool kEntropy>
struct Forward {
  template <Target kTarget, bool kWeighted>
  static constexpr CrossEntropyKernel kernel = forward<S, kTarget, kWeighted, kScaling, kEntropy>;
};
template <class S, Scaling kScaling, bool>
struct Backward {
  template <Target kTarget, bool kWeighted>
  static constexpr CrossEntropyKernel kernel = backward<S, kTarget, kWeighted, kScaling>;
};

}  // namespace

CrossEntropyKernel cross_entropy_forward(const CrossEntropyArgs& a) {
  return a.pixels ? pixels_forward(a) : cross_entropy_kernel<Forward>(a);
}
CrossEntropyKernel cross_entropy_backward(const CrossEntropyArgs& a) {
  return a.pixels ? pixels_backward(a) : cross_entropy_kernel<Backward>(a);
}

}  // namespace fusedopt::FUSEDOPT_ISA
