// The element loops of the optimizers, compiled once per instruction set.
#include "engine.h"

#include "../rules.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

// Separate pointers, not an array of them: gcc 12 does not vectorise the latter.
template <class Rule, class P, class G, class S>
FUSEDOPT_HD void update(const Rule rule, P* p, const G* g, S* s0, S* s1, S* s2, int64_t n, Compute<P> grad_factor) {
  using T = Compute<P>;
  FUSEDOPT_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    T param = load(p[i]);
    const T grad = T(load(g[i])) * grad_factor;
    if constexpr (Rule::kStates == 0) {
      rule(param, grad);
    } else if constexpr (Rule::kStates == 1) {
      T a = load(s0[i]);
      rule(param, grad, a);
      store(s0[i], a);
    } else if constexpr (Rule::kStates == 2) {
      T a = load(s0[i]), b = load(s1[i]);
      rule(param, grad, a, b);
      store(s0[i], a);
      store(s1[i], b);
    } else {
      T a = load(s0[i]), b = load(s1[i]), c = load(s2[i]);
      rule(param, grad, a, b, c);
      store(s0[i], a);
      store(s1[i], b);
      store(s2[i], c);
    }
    store(p[i], param);
  }
}

constexpr int64_t kBlock = 128, kAhead = 512;  // elements

template <class E>
FUSEDOPT_HD void prefetch(const E* block) {
  for (int64_t i = 0; i < kBlock; i += int64_t(64 / sizeof(E))) __builtin_prefetch(block + kAhead + i, 1);
}

// A loop long enough to leave the cache asks for what it will need: the conversions of 16-bit types fill the window in
// which the processor would find its own next loads. 0.87 -> 0.59 ns per bf16 AdamW element, f32 1.11 -> 1.05.
template <class Rule, class P, class G, class S>
void update_ahead(const Rule rule, P* p, const G* g, S* s0, S* s1, S* s2, int64_t n, Compute<P> grad_factor) {
  const bool leaves_cache = n >= 4 * kAhead;
  for (int64_t i = 0; i < n; i += kBlock) {
    if (leaves_cache) {
      prefetch(p + i);
      prefetch(g + i);
      if constexpr (Rule::kStates > 0) prefetch(s0 + i);
      if constexpr (Rule::kStates > 1) prefetch(s1 + i);
      if constexpr (Rule::kStates > 2) prefetch(s2 + i);
    }
    update<Rule>(rule, p + i, g + i, s0 + i, s1 + i, s2 + i, n - i < kBlock ? n - i : kBlock, grad_factor);
  }
}

// Small tensors lie scattered: no hardware prefetcher sees the next one coming.
FUSEDOPT_HD void prefetch_row(const Row& row) {
  const void* const starts[] = {row.param, row.grad, row.state[0], row.state[1]};
  for (const void* start : starts)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(start) + 64 * line, 1);
}

template <template <class> class RuleOf, class P, class G, class S>
void step_span(const Launch& launch, const Span& span) {
  using T = Compute<P>;
  using Rule = RuleOf<T>;
  static_assert(sizeof(typename Rule::Hyper) <= sizeof(Group::hyper));
  const auto derive = [&](const Row& row) {
    typename Rule::Hyper hyper;
    std::memcpy(&hyper, launch.groups[row.group].hyper, sizeof hyper);
    return Rule(hyper, row.step);
  };
  // Neighbours mostly share group and step: two pow() per tensor would cost more than a small tensor's update.
  const Row* derived_for = &launch.rows[span.first_row];
  Rule rule = derive(*derived_for);
  for (int64_t r = span.first_row; r <= span.last_row; ++r) {
    const Row& row = launch.rows[r];
    if (row.group != derived_for->group || row.step != derived_for->step) {
      rule = derive(row);
      derived_for = &row;
    }
    if (r + 2 <= span.last_row) prefetch_row(launch.rows[r + 2]);
    const int64_t begin = r == span.first_row ? span.begin : 0;
    const int64_t end = r == span.last_row ? span.end : row.numel;
    const auto state = [&](int k) { return k < Rule::kStates ? static_cast<S*>(row.state[k]) + begin : nullptr; };
    update_ahead<Rule>(rule, static_cast<P*>(row.param) + begin, static_cast<const G*>(row.grad) + begin, state(0),
                       state(1), state(2), end - begin, T(launch.groups[row.group].grad_factor));
  }
}

template <template <class> class RuleOf>
CpuEngine::StepKernel for_dtypes(const Launch& l) {
  const auto is = [&](Dtype p, Dtype g, Dtype s) { return l.param == p && l.grad == g && l.state == s; };
  if (is(Dtype::kF32, Dtype::kF32, Dtype::kF32)) return step_span<RuleOf, float, float, float>;
  if (is(Dtype::kBF16, Dtype::kBF16, Dtype::kBF16)) return step_span<RuleOf, bf16, bf16, bf16>;
  if (is(Dtype::kBF16, Dtype::kF32, Dtype::kBF16)) return step_span<RuleOf, bf16, float, bf16>;
  if (is(Dtype::kF16, Dtype::kF16, Dtype::kF16)) return step_span<RuleOf, f16, f16, f16>;
  if (is(Dtype::kF16, Dtype::kF32, Dtype::kF16)) return step_span<RuleOf, f16, float, f16>;
  if (is(Dtype::kF64, Dtype::kF64, Dtype::kF64)) return step_span<RuleOf, double, double, double>;
  return nullptr;
}

}  // namespace

CpuEngine::StepKernel step_kernel(const Launch& launch) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) return for_dtypes<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt::FUSEDOPT_ISA
