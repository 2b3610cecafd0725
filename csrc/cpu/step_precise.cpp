// Steps at a precision of the user's choice, but for states in codes (step_codes.cpp): states in other types than the
// parameter, masters, stochastic rounding, averages; and the norms ahead of such steps.
#include "blocks.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

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
    if (dtype == Dtype::kBF16) {
      bf16* const to = static_cast<bf16*>(row.state[k]) + begin;
      if (precision.stochastic) {
        narrow(values[k], n, Noise(precision, row, 1 + k, begin, n), to);
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

template <template <class> class RuleOf>
void step_floats(const Launch& launch, const Span& span) {
  using Rule = RuleOf<float>;
  const Precision precision = launch.precision ? *launch.precision : Precision{};
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    alignas(64) float room[2 + kMaxStates][kBlock];
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int n = int(last - begin < kBlock ? last - begin : kBlock);
      float* const w = weights(row, launch.param, begin, n, room[0]);
      if (row.grad) {
        const float* const g = floats(const_cast<void*>(row.grad), launch.grad, begin, n, room[1]);
        States<Rule> states{precision, row, launch.state, begin, n, {}};
        states.load_all(room + 2);
        update<Rule>(rule, w, g, states.values[0], states.values[1], states.values[2], n,
                     float(launch.groups[row.group].grad_factor));
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

template <template <class> class RuleOf>
CpuEngine::StepKernel for_dtypes(const Launch& l) {
  if (l.param == Dtype::kF64 && l.grad == Dtype::kF64 && l.state == Dtype::kF64) return step_doubles<RuleOf>;
  if (!is_float(l.param) || !is_float(l.grad)) return nullptr;
  return is_float(l.state) ? step_floats<RuleOf> : nullptr;
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
  if (launch.state == Dtype::kCode) return codes_step_kernel(launch);
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) return for_dtypes<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt::FUSEDOPT_ISA
