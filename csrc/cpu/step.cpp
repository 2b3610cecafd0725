// The element loops of the optimizers, compiled once per instruction set.
#include "engine.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kAhead = 512;  // elements

// Whether a loop does well to ask for what it will need. Where 16-bit types are converted, on every processor: their
// conversions fill the window in which it would find its own next loads (AdamW on an Intel one 0.87 -> 0.59 ns an
// element, on an AMD one 0.36 -> 0.31). With float32 on Intel's (1.11 -> 1.05), but not on AMD's, whose own guesses are
// better (Adagrad 0.27 without, 0.33 with).
template <class P>
bool asks_ahead() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  return sizeof(P) == 2 || !amd;
#else
  return true;
#endif
}

template <int64_t kBlock, class E>
FUSEDOPT_HD void prefetch(const E* block) {
  for (int64_t i = 0; i < kBlock; i += int64_t(64 / sizeof(E))) __builtin_prefetch(block + kAhead + i, 1);
}

// Two lines of each tensor at a time: with eight they wait for each other. A block's length is a constant, so that no
// loop looks for its end in every block.
template <bool kAsks, class Rule, class P, class G, class S>
FUSEDOPT_HD void update_blocks(const Rule rule, P* p, const G* g, S* s0, S* s1, S* s2, int64_t n,
                               Compute<P> grad_factor) {
  constexpr int64_t kBlock = 128 / int64_t(sizeof(P));
  int64_t i = 0;
  if (n >= 4 * kAhead)  // long enough to leave the cache
    for (; i + kBlock <= n; i += kBlock) {
      if constexpr (kAsks) {
        prefetch<kBlock>(p + i);
        prefetch<kBlock>(g + i);
        if constexpr (Rule::kStates > 0) prefetch<kBlock>(s0 + i);
        if constexpr (Rule::kStates > 1) prefetch<kBlock>(s1 + i);
        if constexpr (Rule::kStates > 2) prefetch<kBlock>(s2 + i);
      }
      update<Rule>(rule, p + i, g + i, s0 + i, s1 + i, s2 + i, kBlock, grad_factor);
    }
  update<Rule>(rule, p + i, g + i, s0 + i, s1 + i, s2 + i, n - i, grad_factor);
}

template <template <class> class RuleOf, class P, class G, class S>
void step_span(const Launch& launch, const Span& span) {
  using T = Compute<P>;
  using Rule = RuleOf<T>;
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t begin, int64_t end) {
    const auto state = [&](int k) { return k < Rule::kStates ? static_cast<S*>(row.state[k]) + begin : nullptr; };
    P* const p = static_cast<P*>(row.param) + begin;
    const G* const g = static_cast<const G*>(row.grad) + begin;
    const T grad_factor = T(launch.groups[row.group].grad_factor);
    if (asks_ahead<P>())
      update_blocks<true>(rule, p, g, state(0), state(1), state(2), end - begin, grad_factor);
    else
      update_blocks<false>(rule, p, g, state(0), state(1), state(2), end - begin, grad_factor);
  });
}

template <template <class> class RuleOf>
CpuEngine::StepKernel for_dtypes(const Launch& l) {
  if (l.precision || kNormed<RuleOf<float>>) return nullptr;
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
  CpuEngine::StepKernel kernel = nullptr;
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) kernel = for_dtypes<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return kernel ? kernel : precise_step_kernel(launch);
}

}  // namespace fusedopt::FUSEDOPT_ISA
