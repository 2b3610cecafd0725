// Steps at a precision of the user's choice: states in other types than the parameter, codes, masters, stochastic
// rounding, averages. A block of elements at a time, as floats in the first-level cache, so that no combination of
// types needs a loop of its own; what is float in memory is worked on where it lies.
#include "../float_with.h"
#include "../precision.h"
#include "random.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int kBlock = int(kCodeBlock);

// The arithmetic of updates from codes: a division and a square root take as long as all else, and the states are good
// to a hundredth. Roots are within 1e-5, by multiplications; the divider does the quotients meanwhile.
struct NewtonOps {
  static FUSEDOPT_HD float divide(float a, float b) { return a / b; }
  static FUSEDOPT_HD float root(float a) { return FUSEDOPT_ISA::root(a); }
};
using newton_float = float_with<NewtonOps>;

// 16 random bits for each of a block's elements.
struct Noise {
  uint16_t bits[kBlock];

  Noise(const Precision& precision, const Row& row, uint32_t tensor, int64_t begin) {
    random_block({precision.seed, uint32_t(int64_t(row.step)), uint32_t(row.extras.index)}, tensor, begin, bits);
  }
};

template <class E>
void widen(const E* from, int n, float* to) {
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class E>
void narrow(const float* from, int n, E* to) {
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) store(to[i], from[i]);
}

void narrow(const float* from, int n, const Noise& noise, bf16* to) {
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) to[i] = stochastic(from[i], noise.bits[i]);
}

// Elements from `begin` as floats: in place, or in `room`.
float* floats(void* data, Dtype dtype, int64_t begin, int n, float* room) {
  if (dtype == Dtype::kF32) return static_cast<float*>(data) + begin;
  if (dtype == Dtype::kBF16)
    widen(static_cast<const bf16*>(data) + begin, n, room);
  else
    widen(static_cast<const f16*>(data) + begin, n, room);
  return room;
}

template <bool kSigned>
void decode(const uint8_t* codes, float scale, int n, float* to) {
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) to[i] = dequantize<kSigned>(codes[i], scale);
}

float scale_of_block(const float* from, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = magnitude_bits(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return scale_of(largest);
}

template <bool kSigned>
void encode(const float* from, int n, uint8_t* codes, float* scale) {
  *scale = scale_of_block(from, n);
  const float factor = factor_of<kSigned>(*scale);
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) codes[i] = quantize<kSigned>(from[i], factor);
}

void encode(const float* from, int n, const Noise& noise, uint8_t* codes, float* scale) {
  *scale = scale_of_block(from, n);
  const float factor = factor_of<false>(*scale);
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) codes[i] = either(from[i], factor, noise.bits[i]);
}

// The weights of a block: joined with their master, where they have one.
float* weights(const Row& row, Dtype dtype, int64_t begin, int n, float* room) {
  const void* const master = row.extras.master;
  if (!master) return floats(row.param, dtype, begin, n, room);
  if (dtype == Dtype::kBF16) {
    const bf16* high = static_cast<const bf16*>(row.param) + begin;
    const int16_t* low = static_cast<const int16_t*>(master) + begin;
    FUSEDOPT_IVDEP
    for (int i = 0; i < n; ++i) room[i] = join(high[i], low[i]);
  } else {
    const f16* weight = static_cast<const f16*>(row.param) + begin;
    const float* whole = static_cast<const float*>(master) + begin;
    FUSEDOPT_IVDEP
    for (int i = 0; i < n; ++i) room[i] = master_of(weight[i], whole[i]);
  }
  return room;
}

// `w`, and what it becomes where the parameter is rounded.
void store_weights(const Precision& precision, const Row& row, Dtype dtype, int64_t begin, int n, float* w) {
  void* const master = row.extras.master;
  if (dtype == Dtype::kBF16) {
    bf16* const to = static_cast<bf16*>(row.param) + begin;
    if (master) {
      int16_t* const low = static_cast<int16_t*>(master) + begin;
      FUSEDOPT_IVDEP
      for (int i = 0; i < n; ++i) split(w[i], to[i], low[i]);
      return;
    }
    if (precision.stochastic) {
      narrow(w, n, Noise(precision, row, 0, begin), to);
    } else {
      narrow(w, n, to);
    }
    if (row.extras.ema) widen(to, n, w);
  } else if (dtype == Dtype::kF16) {
    f16* const to = static_cast<f16*>(row.param) + begin;
    narrow(w, n, to);
    if (master)
      std::memcpy(static_cast<float*>(master) + begin, w, size_t(n) * sizeof(float));
    else if (row.extras.ema)
      widen(to, n, w);
  }
}

template <class T>
void average(const Precision& precision, T* ema, const T* weights, int n) {
  const Lerp<T> lerp(precision.ema_weight);
  FUSEDOPT_IVDEP
  for (int i = 0; i < n; ++i) ema[i] = lerp(ema[i], weights[i]);
}

template <class Rule>
struct States {
  const Precision& precision;
  const Row& row;
  Dtype dtype;
  int64_t begin;
  int n;
  float* values[kMaxStates];

  template <int k>
  void load_one(float (*room)[kBlock]) {
    constexpr bool is_signed = Rule::kSigned >> k & 1;
    if (dtype == Dtype::kCode) {
      values[k] = room[k];
      decode<is_signed>(static_cast<const uint8_t*>(row.state[k]) + begin, row.extras.scale[k][begin / kBlock], n,
                        room[k]);
    } else {
      values[k] = floats(row.state[k], dtype, begin, n, room[k]);
    }
  }

  template <int k>
  void store_one() const {
    constexpr bool is_signed = Rule::kSigned >> k & 1;
    if (dtype == Dtype::kCode) {
      uint8_t* const to = static_cast<uint8_t*>(row.state[k]) + begin;
      float* const scale = row.extras.scale[k] + begin / kBlock;
      if (precision.stochastic && !is_signed) {
        encode(values[k], n, Noise(precision, row, 1 + k, begin), to, scale);
      } else {
        encode<is_signed>(values[k], n, to, scale);
      }
    } else if (dtype == Dtype::kBF16) {
      bf16* const to = static_cast<bf16*>(row.state[k]) + begin;
      if (precision.stochastic) {
        narrow(values[k], n, Noise(precision, row, 1 + k, begin), to);
      } else {
        narrow(values[k], n, to);
      }
    } else if (dtype == Dtype::kF16) {
      narrow(values[k], n, static_cast<f16*>(row.state[k]) + begin);
    }
  }

  void load_all(float (*room)[kBlock]) {
    if constexpr (Rule::kStates > 0) load_one<0>(room);
    if constexpr (Rule::kStates > 1) load_one<1>(room);
    if constexpr (Rule::kStates > 2) load_one<2>(room);
  }
  void store_all() const {
    if constexpr (Rule::kStates > 0) store_one<0>();
    if constexpr (Rule::kStates > 1) store_one<1>();
    if constexpr (Rule::kStates > 2) store_one<2>();
  }
};

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kCode ? 1 : 2; }

// What the block after next will read: work on a block's floats hides the loads of the next from the processor.
void prefetch_block(const Launch& launch, const Row& row, int64_t begin) {
  const auto ask = [&](const void* data, int64_t bytes) {
    if (!data) return;
    const char* const first = static_cast<const char*>(data) + begin * bytes;
    for (int64_t line = 0; line < kBlock * bytes; line += 64) __builtin_prefetch(first + line, 1);
  };
  ask(row.param, bytes_of(launch.param));
  ask(row.grad, bytes_of(launch.grad));
  for (const void* state : row.state) ask(state, bytes_of(launch.state));
  ask(row.extras.master, launch.param == Dtype::kBF16 ? 2 : 4);
  ask(row.extras.ema, 4);
}

// T: how a rule computes.
template <template <class> class RuleOf, class T>
void step_floats(const Launch& launch, const Span& span) {
  using Rule = RuleOf<T>;
  const Precision precision = launch.precision ? *launch.precision : Precision{};
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    alignas(64) float room[2 + kMaxStates][kBlock];
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int n = int(last - begin < kBlock ? last - begin : kBlock);
      if (begin + 3 * kBlock <= last) prefetch_block(launch, row, begin + 2 * kBlock);
      float* const w = weights(row, launch.param, begin, n, room[0]);
      if (row.grad) {
        const float* const g = floats(const_cast<void*>(row.grad), launch.grad, begin, n, room[1]);
        States<Rule> states{precision, row, launch.state, begin, n, {}};
        states.load_all(room + 2);
        update<Rule>(rule, w, g, states.values[0], states.values[1], states.values[2], n,
                     T(launch.groups[row.group].grad_factor));
        states.store_all();
        store_weights(precision, row, launch.param, begin, n, w);
      }
      if (row.extras.ema) average(precision, static_cast<float*>(row.extras.ema) + begin, w, n);
    }
  });
}

// float64 is kept as it is; it may have an average.
template <template <class> class RuleOf>
void step_doubles(const Launch& launch, const Span& span) {
  using Rule = RuleOf<double>;
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int n = int(last - begin < kBlock ? last - begin : kBlock);
      double* const w = static_cast<double*>(row.param) + begin;
      const auto state = [&](int k) {
        return k < Rule::kStates && row.grad ? static_cast<double*>(row.state[k]) + begin : nullptr;
      };
      if (row.grad)
        update<Rule>(rule, w, static_cast<const double*>(row.grad) + begin, state(0), state(1), state(2), n,
                     launch.groups[row.group].grad_factor);
      if (row.extras.ema) average(*launch.precision, static_cast<double*>(row.extras.ema) + begin, w, n);
    }
  });
}

// --- norms ahead of the step ---

template <class Rule, class T>
void add_squares(const Rule& rule, const T* w, const T* g, const T* m, const T* v, int n, T grad_factor, double* sums) {
  using Real = Compute<T>;
  Real of_weights = 0, of_direction = 0;
#pragma omp simd reduction(+ : of_weights, of_direction)
  for (int i = 0; i < n; ++i) {
    const T along = rule.direction(w[i], g[i] * grad_factor, m[i], v[i]);
    of_weights += w[i] * w[i];
    of_direction += along * along;
  }
  sums[0] += double(of_weights);
  sums[1] += double(of_direction);
}

template <template <class> class RuleOf>
void norms_of_floats(const Launch& launch, const Span& span, double* sums) {
  using Rule = RuleOf<float>;
  static_assert(Rule::kStates == 2);
  const Precision precision{};
  const Row* const first_row = launch.rows + span.first_row;
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    if (!row.grad || !rule.adapts()) return;
    alignas(64) float room[2 + kMaxStates][kBlock];
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int n = int(last - begin < kBlock ? last - begin : kBlock);
      const float* const w = weights(row, launch.param, begin, n, room[0]);
      const float* const g = floats(const_cast<void*>(row.grad), launch.grad, begin, n, room[1]);
      States<Rule> states{precision, row, launch.state, begin, n, {}};
      states.load_all(room + 2);
      add_squares(rule, w, g, states.values[0], states.values[1], n, float(launch.groups[row.group].grad_factor),
                  sums + 2 * (&row - first_row));
    }
  });
}

template <template <class> class RuleOf>
void norms_of_doubles(const Launch& launch, const Span& span, double* sums) {
  using Rule = RuleOf<double>;
  const Row* const first_row = launch.rows + span.first_row;
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    if (!row.grad || !rule.adapts()) return;
    const auto at = [&](const void* data, int64_t begin) { return static_cast<const double*>(data) + begin; };
    for (int64_t begin = first; begin < last; begin += kBlock)
      add_squares(rule, at(row.param, begin), at(row.grad, begin), at(row.state[0], begin), at(row.state[1], begin),
                  int(last - begin < kBlock ? last - begin : kBlock), launch.groups[row.group].grad_factor,
                  sums + 2 * (&row - first_row));
  });
}

bool is_float(Dtype dtype) { return dtype == Dtype::kF32 || dtype == Dtype::kBF16 || dtype == Dtype::kF16; }

template <template <class> class RuleOf>
CpuEngine::StepKernel for_dtypes(const Launch& l) {
  if (l.param == Dtype::kF64 && l.grad == Dtype::kF64 && l.state == Dtype::kF64) return step_doubles<RuleOf>;
  if (!is_float(l.param) || !is_float(l.grad)) return nullptr;
  if (is_float(l.state)) return step_floats<RuleOf, float>;
  if (l.state == Dtype::kCode) return step_floats<RuleOf, newton_float>;
  return nullptr;
}

template <template <class> class RuleOf>
CpuEngine::NormsKernel norms_for(const Launch& l) {
  if constexpr (kNormed<RuleOf<float>>)
    return l.param == Dtype::kF64 ? norms_of_doubles<RuleOf> : norms_of_floats<RuleOf>;
  return nullptr;
}

}  // namespace

CpuEngine::NormsKernel norms_kernel(const Launch& launch) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) return norms_for<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

CpuEngine::StepKernel precise_step_kernel(const Launch& launch) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) return for_dtypes<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt::FUSEDOPT_ISA
