// What the optimizers' element loops share.
#pragma once
#include "../rules.h"
#include "engine.h"

namespace fusedopt::FUSEDOPT_ISA {

// The kernel of a launch that is not plain; null where there is none.
CpuEngine::StepKernel precise_step_kernel(const Launch& launch);

namespace {

// Separate pointers, not an array of them: gcc 12 does not vectorise the latter.
template <class Rule, class T, class P, class G, class S>
FUSEDOPT_HD void update(const Rule rule, P* p, const G* g, S* s0, S* s1, S* s2, int64_t n, T grad_factor) {
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

// Small tensors lie scattered: no hardware prefetcher sees the next one coming.
FUSEDOPT_HD void prefetch_row(const Row& row) {
  const void* const starts[] = {row.param, row.grad, row.state[0], row.state[1]};
  for (const void* start : starts)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(start) + 64 * line, 1);
}

// work(rule, row, begin, end) for the elements of a span.
template <class Rule, class Work>
FUSEDOPT_HD void for_rows(const Launch& launch, const Span& span, const Work& work) {
  static_assert(sizeof(typename Rule::Hyper) <= sizeof(Group::hyper));
  const auto derive = [&](const Row& row) {
    typename Rule::Hyper hyper;
    std::memcpy(&hyper, launch.groups[row.group].hyper, sizeof hyper);
    Rule rule(hyper, row.step);
    if constexpr (kNormed<Rule>)
      if (launch.ratios && rule.adapts()) rule.adapt(launch.ratios[&row - launch.rows]);
    return rule;
  };
  // Neighbours mostly share group and step: two pow() per tensor would cost more than a small tensor's update.
  const Row* derived_for = &launch.rows[span.first_row];
  Rule rule = derive(*derived_for);
  for (int64_t r = span.first_row; r <= span.last_row; ++r) {
    const Row& row = launch.rows[r];
    if (kNormed<Rule> || row.group != derived_for->group || row.step != derived_for->step) {
      rule = derive(row);
      derived_for = &row;
    }
    if (r + 2 <= span.last_row) prefetch_row(launch.rows[r + 2]);
    work(rule, row, r == span.first_row ? span.begin : 0, r == span.last_row ? span.end : row.numel);
  }
}

}  // namespace
}  // namespace fusedopt::FUSEDOPT_ISA
