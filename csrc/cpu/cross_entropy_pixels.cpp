// Cross entropy on logits whose rows lie side by side, (batch, classes, pixels): vectors over neighbouring pixels,
// loops over classes, compiled once per instruction set. Memory is read once, into a scratch block that the cache
// holds: planes are often a power of two apart, so that the logits of one pixel would evict each other.
#include "cross_entropy_kernels.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kBlock = 128;  // classes summed in T before the sum goes on in double

template <class S>
FUSEDOPT_HD S* plane(const void* matrix, const CrossEntropyArgs& a, int64_t row, int64_t stride) {
  return static_cast<S*>(const_cast<void*>(matrix)) + row / a.pixels * stride + row % a.pixels;
}

// x, or 0 without its bits: gcc would thread a select through the rounding to float16, and not vectorise it.
FUSEDOPT_HD float masked(float x, int32_t bits) { return bit_cast<float>(bit_cast<uint32_t>(x) & uint32_t(bits)); }
FUSEDOPT_HD double masked(double x, int32_t bits) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & uint64_t(int64_t(bits)));
}

// Up to kMaxPixels rows, one after the other in one image.
template <class S, Target kTarget>
struct Block {
  using T = Compute<S>;
  static constexpr bool kIndexed = kTarget != Target::kProbability;
  const CrossEntropyArgs& a;
  const Smoothing<T, kTarget> smoothing;
  const int64_t row, n;
  const S* x;
  const S* probability;
  int32_t label[kMaxPixels];  // -1 where ignored
  int32_t live[kMaxPixels];   // all bits, or none where ignored
  T one_hot[kMaxPixels];
  double mass[kMaxPixels];

  FUSEDOPT_HD Block(const CrossEntropyArgs& args, int64_t first, int64_t count)
      : a(args),
        smoothing(args),
        row(first),
        n(count),
        x(plane<S>(args.logits, args, first, args.logits_stride)),
        probability(kIndexed ? nullptr : plane<S>(args.probabilities, args, first, args.probabilities_stride)) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t index = kIndexed ? a.target[row + i] : 0;
      live[i] = smoothing.ignored(index) ? 0 : -1;
      label[i] = live[i] ? int32_t(index) : -1;
      one_hot[i] = smoothing.one_hot(index);
      mass[i] = smoothing.dense_mass(a) + one_hot[i];
    }
  }

  FUSEDOPT_HD T weight(int64_t c) const { return smoothing.weight ? smoothing.weight[c] : T(1); }
  FUSEDOPT_HD T probability_of(int64_t c, int64_t i) const {
    if constexpr (kIndexed) return T(0);
    return load(probability[c * a.probabilities_class_stride + i]);
  }
  // y of class c, which weighs w
  FUSEDOPT_HD T target(int64_t c, T w, int64_t i) const {
    const T dense = smoothing.dense(w, probability_of(c, i));
    if constexpr (kIndexed) return label[i] == int32_t(c) ? dense + one_hot[i] : dense;
    return dense;
  }

  // `exp_of_logit(s, i)` and `logit_of(c, i)` give e and s
  template <Scaling kScaling, class Exp, class Read>
  FUSEDOPT_HD void write_grad(const Logit<T, kScaling>& logit, const T* softmax, const T* factor,
                              const Exp& exp_of_logit, const Read& logit_of) const {
    S* grad = plane<S>(a.grad, a, row, a.grad_stride);
    const bool streamed = writes_past_cache<S>(a);
    alignas(kLine) S lines[kMaxPixels + kLine / int64_t(sizeof(S))];
    for (int64_t c = 0; c < a.classes; ++c, grad += a.grad_class_stride) {
      const T w = weight(c);
      S* const out = streamed ? lines + line_offset(grad) : grad;
      FUSEDOPT_IVDEP
      for (int64_t i = 0; i < n; ++i) {
        const T s = logit_of(c, i);
        const T g = logit.gradient({softmax[i], factor[i]}, exp_of_logit(s, i), s, target(c, w, i));
        store(out[i], kIndexed ? masked(g, live[i]) : g);
      }
      if (streamed) stream_out(grad, out, n);
    }
    if (streamed) end_streams();
  }
};

// The first largest of `classes` values for each of n pixels, as torch.argmax has it.
template <class T, class Read>
void first_max(int64_t classes, int64_t n, const Read& read, T* max, int32_t* arg) {
  int32_t nans[kMaxPixels];
  for (int64_t i = 0; i < n; ++i) {
    max[i] = -__builtin_inf();
    arg[i] = nans[i] = 0;
  }
  for (int64_t c = 0; c < classes; ++c) {
    FUSEDOPT_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      const T v = read(c, i);
      arg[i] = v > max[i] ? int32_t(c) : arg[i];
      max[i] = v > max[i] ? v : max[i];
      nans[i] += v != v;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!nans[i]) continue;
    int64_t c = 0;
    for (T v = read(c, i); v == v; v = read(c, i)) ++c;
    arg[i] = int32_t(c);
  }
}

template <class S, Target kTarget, Scaling kScaling, bool kEntropy>
void forward_block(const CrossEntropyArgs& a, int64_t row, int64_t n, int64_t width, Compute<S>* scratch) {
  using T = Compute<S>;
  const Logit<T, kScaling> logit(a);
  Block<S, kTarget> block(a, row, n);
  T max[kMaxPixels];
  double exps[kMaxPixels], dots[kMaxPixels], exp_logs[kMaxPixels];
  for (int64_t i = 0; i < n; ++i) {
    max[i] = -__builtin_inf();
    exps[i] = dots[i] = exp_logs[i] = 0;
  }

  for (int64_t c = 0; c < a.classes; ++c) {
    const S* x = block.x + c * a.logits_class_stride;
    T* s = scratch + c * width;
    FUSEDOPT_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      const T scaled = logit.scaled(load(x[i]));
      max[i] = scaled > max[i] ? scaled : max[i];
      s[i] = scaled;
    }
  }
  if (a.argmax) {
    T top[kMaxPixels];
    int32_t arg[kMaxPixels], target_arg[kMaxPixels];
    first_max(a.classes, n, [=](int64_t c, int64_t i) { return scratch[c * width + i]; }, top, arg);
    if constexpr (kTarget == Target::kProbability)
      first_max(a.classes, n, [&](int64_t c, int64_t i) { return block.probability_of(c, i); }, top, target_arg);
    for (int64_t i = 0; i < n; ++i) {
      a.argmax[row + i] = arg[i];
      a.correct[row + i] = arg[i] == (kTarget == Target::kProbability ? target_arg[i] : block.label[i]);
    }
  }
  for (int64_t i = 0; i < n; ++i) max[i] = logit.capped(max[i]);

  const int64_t left = a.pixels - row % a.pixels - n;  // in this image, of which the next block is asked for
  const S* next = block.x + n;
  for (int64_t first = 0; first < a.classes; first += kBlock) {
    const int64_t stop = a.classes < first + kBlock ? a.classes : first + kBlock;
    T exp[kMaxPixels] = {}, mass[kMaxPixels] = {}, dot[kMaxPixels] = {}, exp_log[kMaxPixels] = {};
    for (int64_t c = first; c < stop; ++c) {
      const T w = block.weight(c);
      T* kept = scratch + c * width;
      prefetch_lines(next + c * a.logits_class_stride, left < n ? left : n);
      FUSEDOPT_IVDEP
      for (int64_t i = 0; i < n; ++i) {
        const T s = logit.capped(kept[i]);
        const T from_max = s - max[i];
        const T e = exp_of(from_max);
        exp[i] += e;
        if constexpr (kTarget == Target::kIndex)
          dot[i] = block.label[i] == int32_t(c) ? block.one_hot[i] * from_max : dot[i];
        else
          dot[i] += block.target(c, w, i) * from_max;
        if constexpr (kTarget == Target::kProbability) mass[i] += block.target(c, w, i);
        if constexpr (kEntropy) exp_log[i] += times_log(e, from_max);
        kept[i] = kScaling == Scaling::kCapped ? s : e;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      exps[i] += exp[i];
      block.mass[i] += mass[i];
      dots[i] += dot[i];
      exp_logs[i] += exp_log[i];
    }
  }

  const double scaled_factor = a.grad_factor * a.logit_scale;
  T softmax[kMaxPixels], factor[kMaxPixels];
  for (int64_t i = 0; i < n; ++i) {
    const RowLoss of({exps[i], block.mass[i], dots[i], exp_logs[i]}, max[i], a.z_loss);
    static_cast<T*>(a.loss)[row + i] = block.live[i] ? T(of.loss) : T(0);
    static_cast<T*>(a.lse)[row + i] = T(of.lse);
    if (a.argmax) static_cast<T*>(a.entropy)[row + i] = T(of.entropy);
    softmax[i] = T(scaled_factor * per_lse(block.mass[i], of.lse, a.z_loss) / exps[i]);
    factor[i] = T(scaled_factor);
  }
  if (!a.grad) return;
  block.write_grad(
      logit, softmax, factor,
      [&](T kept, int64_t i) { return kScaling == Scaling::kCapped ? exp_of(kept - max[i]) : kept; },
      [=](int64_t c, int64_t i) { return scratch[c * width + i]; });
}

template <class S, Target kTarget, Scaling kScaling>
void backward_block(const CrossEntropyArgs& a, int64_t row, int64_t n) {
  using T = Compute<S>;
  const Logit<T, kScaling> logit(a);
  Block<S, kTarget> block(a, row, n);
  if constexpr (kTarget == Target::kProbability)
    for (int64_t c = 0; c < a.classes; ++c) {
      const T w = block.weight(c);
      FUSEDOPT_IVDEP
      for (int64_t i = 0; i < n; ++i) block.mass[i] += block.target(c, w, i);
    }
  const T* lse = static_cast<const T*>(a.lse) + row;
  T softmax[kMaxPixels], factor[kMaxPixels];
  for (int64_t i = 0; i < n; ++i) {
    const T upstream = a.upstream ? static_cast<const T*>(a.upstream)[row + i] : T(1);
    const double scaled_factor = a.grad_factor * a.logit_scale * upstream;
    softmax[i] = T(scaled_factor * per_lse(block.mass[i], lse[i], a.z_loss));
    factor[i] = T(scaled_factor);
  }
  block.write_grad(
      logit, softmax, factor, [=](T s, int64_t i) { return exp_of(s - lse[i]); },
      [&](int64_t c, int64_t i) { return logit(load(block.x[c * a.logits_class_stride + i])); });
}

// Rows [begin, end) as blocks of `width` pixels that end where an image does.
template <class Work>
void for_blocks(const CrossEntropyArgs& a, int64_t begin, int64_t end, int64_t width, const Work& work) {
  for (int64_t row = begin, n; row < end; row += n) {
    n = a.pixels - row % a.pixels;
    n = n < width ? n : width;
    n = n < end - row ? n : end - row;
    work(row, n);
  }
}

// A class weighs the same for all pixels of a block: whether there are weights is asked once per class.
template <class S, Scaling kScaling, bool kEntropy>
struct Forward {
  template <Target kTarget, bool>
  static constexpr CrossEntropyKernel kernel =
      [](const CrossEntropyArgs& a, int64_t begin, int64_t end, void* scratch) {
        const int64_t width = pixel_block(a.classes);
        for_blocks(a, begin, end, width, [&](int64_t row, int64_t n) {
          forward_block<S, kTarget, kScaling, kEntropy>(a, row, n, width, static_cast<Compute<S>*>(scratch));
        });
      };
};
template <class S, Scaling kScaling, bool>
struct Backward {
  template <Target kTarget, bool>
  static constexpr CrossEntropyKernel kernel = [](const CrossEntropyArgs& a, int64_t begin, int64_t end, void*) {
    for_blocks(a, begin, end, kMaxPixels,
               [&](int64_t row, int64_t n) { backward_block<S, kTarget, kScaling>(a, row, n); });
  };
};

}  // namespace

CrossEntropyKernel pixels_forward(const CrossEntropyArgs& a) { return cross_entropy_kernel<Forward>(a); }
CrossEntropyKernel pixels_backward(const CrossEntropyArgs& a) { return cross_entropy_kernel<Backward>(a); }

}  // namespace fusedopt::FUSEDOPT_ISA
