// Steps from 8-bit states, compiled once per instruction set: a block's codes become floats and are updated in one
// pass, and in a second, which knows the largest of them, become codes again.
#include "blocks.h"
#include "lanes.h"

namespace fusedopt::FUSEDOPT_ISA {
namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kCode ? 1 : 2; }

// A part of a block asks for what the same part of the block after next will read: work on a block's floats hides the
// loads of the next from the processor, and all of a block's at once would wait for each other.
constexpr int kPart = 32, kAhead = 2 * kBlock;

// All of it inline: gcc takes a function that only prefetches for one without effect, and drops the call.
FUSEDOPT_HD void prefetch(const void* data, int64_t begin, int64_t bytes) {
  if (!data) return;
  const char* const first = static_cast<const char*>(data) + begin * bytes;
  for (int64_t line = 0; line < kPart * bytes; line += 64) __builtin_prefetch(first + line, 1);
}

FUSEDOPT_HD void prefetch_part(const Launch& launch, const Row& row, int64_t begin) {
  prefetch(row.param, begin, bytes_of(launch.param));
  prefetch(row.grad, begin, bytes_of(launch.grad));
  for (const void* state : row.state) prefetch(state, begin, bytes_of(launch.state));
  prefetch(row.extras.master, begin, launch.param == Dtype::kBF16 ? 2 : 4);
  prefetch(row.extras.ema, begin, 4);
}

// A block of codes and their scale.
struct Codes {
  uint8_t* of;
  float* scale;
};

template <int k>
using Index = std::integral_constant<int, k>;

// work(Index<k>) for every state of a rule.
template <class Rule, class Work>
FUSEDOPT_HD void for_states(const Work& work) {
  if constexpr (Rule::kStates > 0) work(Index<0>{});
  if constexpr (Rule::kStates > 1) work(Index<1>{});
  if constexpr (Rule::kStates > 2) work(Index<2>{});
}

template <class Rule, int k>
constexpr bool is_signed(Index<k>) {
  return Rule::kSigned >> k & 1;
}

template <class Rule>
FUSEDOPT_HD void apply(const Rule& rule, Lanes& param, Lanes grad, Lanes (&state)[kMaxStates]) {
  if constexpr (Rule::kStates == 0) rule(param, grad);
  if constexpr (Rule::kStates == 1) rule(param, grad, state[0]);
  if constexpr (Rule::kStates == 2) rule(param, grad, state[0], state[1]);
  if constexpr (Rule::kStates == 3) rule(param, grad, state[0], state[1], state[2]);
}

// Of a whole block; the new states go to `room`, the bits of their largest magnitudes to `largest`.
template <class Rule, class Ahead>
FUSEDOPT_HD void update_from(const Codes* codes, const Rule rule, float* w, const float* g, Lanes grad_factor,
                             float (*room)[kBlock], uint32_t* largest, const Ahead& ahead) {
  Lanes scale[kMaxStates];
  IntLanes most[kMaxStates] = {};
  for_states<Rule>([&](auto k) { scale[k] = *codes[k].scale; });
  for (int part = 0; part < kBlock; part += kPart) {
    ahead(part);
    FUSEDOPT_IVDEP
    for (int i = part; i < part + kPart; i += kLanes) {
      Lanes param = load_lanes(w + i), state[kMaxStates];
      for_states<Rule>([&](auto k) { state[k] = load_codes<is_signed<Rule>(k)>(codes[k].of + i, scale[k]); });
      apply(rule, param, load_lanes(g + i) * grad_factor, state);
      store_lanes(w + i, param);
      for_states<Rule>([&](auto k) {
        store_lanes(room[k] + i, state[k]);
        most[k] = larger(most[k], magnitude_bits(state[k]));
      });
    }
  }
  for_states<Rule>([&](auto k) { largest[k] = largest_of(most[k]); });
}

template <bool kSigned>
void encode(const float* from, uint32_t largest, const Codes& to) {
  *to.scale = scale_of(largest);
  const Lanes factor = factor_of<kSigned>(*to.scale);
  FUSEDOPT_IVDEP
  for (int i = 0; i < kBlock; i += kLanes) store_bytes(to.of + i, quantized<kSigned>(load_lanes(from + i), factor));
}

void encode(const float* from, uint32_t largest, const Noise& noise, const Codes& to) {
  *to.scale = scale_of(largest);
  const Lanes factor = factor_of<false>(*to.scale);
  FUSEDOPT_IVDEP
  for (int i = 0; i < kBlock; i += kLanes)
    store_bytes(to.of + i, either(load_lanes(from + i), factor, load_random(noise.bits + i)));
}

// `n` elements and the last of them repeated: no magnitude and no NaN is new.
template <class E>
E* filled(const E* from, int n, E* room) {
  if (from != room) std::memcpy(room, from, size_t(n) * sizeof(E));
  for (int i = n; i < kBlock; ++i) room[i] = room[n - 1];
  return room;
}

template <template <class> class RuleOf>
void step_codes(const Launch& launch, const Span& span) {
  using Rule = RuleOf<Lanes>;
  const Precision precision = launch.precision ? *launch.precision : Precision{};
  for_rows<Rule>(launch, span, [&](const Rule& rule, const Row& row, int64_t first, int64_t last) {
    alignas(64) float room[2 + kMaxStates][kBlock];
    uint8_t ragged[kMaxStates][kBlock];
    const Lanes grad_factor = launch.groups[row.group].grad_factor;
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int n = int(last - begin < kBlock ? last - begin : kBlock);
      float* w = weights(row, launch.param, begin, n, room[0]);
      if (row.grad) {
        const float* g = floats(const_cast<void*>(row.grad), launch.grad, begin, n, room[1]);
        Codes codes[kMaxStates];
        for_states<Rule>([&](auto k) {
          codes[k] = {static_cast<uint8_t*>(row.state[k]) + begin, row.extras.scale[k] + begin / kBlock};
        });
        if (n < kBlock) {
          w = filled(w, n, room[0]);
          g = filled(g, n, room[1]);
          for_states<Rule>([&](auto k) { codes[k].of = filled(codes[k].of, n, ragged[k]); });
        }
        uint32_t largest[kMaxStates];
        update_from(codes, rule, w, g, grad_factor, room + 2, largest, [&](int part) __attribute__((always_inline)) {
          if (begin + 3 * kBlock <= last) prefetch_part(launch, row, begin + kAhead + part);
        });
        for_states<Rule>([&](auto k) {
          if (precision.stochastic && !is_signed<Rule>(k))
            encode(room[2 + k], largest[k], Noise(precision, row, 1 + k, begin, kBlock), codes[k]);
          else
            encode<is_signed<Rule>(k)>(room[2 + k], largest[k], codes[k]);
        });
        if (n < kBlock) {
          for_states<Rule>(
              [&](auto k) { std::memcpy(static_cast<uint8_t*>(row.state[k]) + begin, ragged[k], size_t(n)); });
          if (launch.param == Dtype::kF32) std::memcpy(static_cast<float*>(row.param) + begin, w, size_t(n) * 4);
        }
        store_weights(precision, row, launch.param, begin, n, w);
      }
      if (row.extras.ema) average(precision, static_cast<float*>(row.extras.ema) + begin, w, n);
    }
  });
}

template <template <class> class RuleOf>
CpuEngine::StepKernel for_dtypes(const Launch& l) {
  return is_float(l.param) && is_float(l.grad) ? step_codes<RuleOf> : nullptr;
}

}  // namespace

CpuEngine::StepKernel codes_step_kernel(const Launch& launch) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (launch.rule == rule++) return for_dtypes<R>(launch);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt::FUSEDOPT_ISA
