// The update of tensors whose parameter, gradient and states are all that there is, in the usual combinations of
// dtypes.
#include "update.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;

// N neighbouring elements in registers.
template <class E, int N>
struct alignas(sizeof(E) * N < 16 ? sizeof(E) * N : 16) Pack {
  E e[N];
};

FUSEDOPT_HD bool is_vector(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class E>
using Word = std::conditional_t<sizeof(E) == 8, unsigned long long,
                                std::conditional_t<sizeof(E) == 4, unsigned, unsigned short>>;

// Vectors stream: a step is longer than the cache, and reads nothing twice. Neighbouring threads' single elements share
// cache lines.
template <class E, int N>
__device__ __forceinline__ Pack<E, N> read(const E* from, bool vector) {
  Pack<E, N> pack;
  if (N > 1 && vector) {
    uint4 words[sizeof pack / 16 + (sizeof pack < 16)];
#pragma unroll
    for (int i = 0; i < int(sizeof pack / 16); ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.e[i] = bit_cast<E>(__ldca(reinterpret_cast<const Word<E>*>(from) + i));
  }
  return pack;
}

template <class E, int N>
__device__ __forceinline__ void write(E* to, const Pack<E, N>& pack, bool vector) {
  if (N > 1 && vector) {
    uint4 words[sizeof pack / 16 + (sizeof pack < 16)];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < int(sizeof pack / 16); ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) __stwb(reinterpret_cast<Word<E>*>(to) + i, bit_cast<Word<E>>(pack.e[i]));
  }
}

// A chunk's tensors, each at the same element.
template <int kStates, class P, class G, class S>
struct Lane {
  P* p;
  const G* g;
  S* s[kStates ? kStates : 1];

  __device__ __forceinline__ Lane at(int64_t i) const {
    Lane lane{p + i, g + i, {}};
#pragma unroll
    for (int k = 0; k < kStates; ++k) lane.s[k] = s[k] + i;
    return lane;
  }
};

// Which of them may be read 16 bytes at a time.
template <int kStates>
struct Aligned {
  bool p, g, s[kStates ? kStates : 1];

  template <class L>
  __device__ __forceinline__ explicit Aligned(const L& lane) : p(is_vector(lane.p)), g(is_vector(lane.g)) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) s[k] = is_vector(lane.s[k]);
  }
  __device__ __forceinline__ bool all() const {
    bool all = p && g;
#pragma unroll
    for (int k = 0; k < kStates; ++k) all = all && s[k];
    return all;
  }
};

template <class Rule, class P, class G, class S, int N>
struct Elements {
  using T = Arithmetic<P>;
  static constexpr int kStates = Rule::kStates;
  Pack<P, N> p;
  Pack<G, N> g;
  Pack<S, N> s[kStates ? kStates : 1];

  template <class A>
  __device__ __forceinline__ void load_from(const Lane<kStates, P, G, S>& lane, const A& aligned) {
    p = read<P, N>(lane.p, aligned.p);
    g = read<G, N>(lane.g, aligned.g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) s[k] = read<S, N>(lane.s[k], aligned.s[k]);
  }

  __device__ __forceinline__ void update(const Rule& rule, T grad_factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T param = load(p.e[i]);
      const T grad = T(load(g.e[i])) * grad_factor;
      if constexpr (kStates == 0) {
        rule(param, grad);
      } else if constexpr (kStates == 1) {
        T a = load(s[0].e[i]);
        rule(param, grad, a);
        store(s[0].e[i], a);
      } else if constexpr (kStates == 2) {
        T a = load(s[0].e[i]), b = load(s[1].e[i]);
        rule(param, grad, a, b);
        store(s[0].e[i], a);
        store(s[1].e[i], b);
      } else {
        T a = load(s[0].e[i]), b = load(s[1].e[i]), c = load(s[2].e[i]);
        rule(param, grad, a, b, c);
        store(s[0].e[i], a);
        store(s[1].e[i], b);
        store(s[2].e[i], c);
      }
      store(p.e[i], param);
    }
  }

  template <class A>
  __device__ __forceinline__ void store_to(const Lane<kStates, P, G, S>& lane, const A& aligned) const {
    write(lane.p, p, aligned.p);
#pragma unroll
    for (int k = 0; k < kStates; ++k) write(lane.s[k], s[k], aligned.s[k]);
  }
};

struct AllAligned {
  bool p = true, g = true, s[kMaxStates] = {true, true, true};
};

// `n` vectors of kVector elements each. All loads of a turn are asked for before the first is waited for.
template <class Rule, class P, class G, class S, class A>
__device__ __forceinline__ void walk(const Rule& rule, const Lane<Rule::kStates, P, G, S>& lane, int n,
                                     const A& aligned, Arithmetic<P> grad_factor) {
  constexpr int kVector = 16 / int(sizeof(P));
  constexpr int kTurns = sizeof(P) == 8 || Rule::kStates == 3 ? 1 : 2;
  for (int first = int(threadIdx.x); first < n; first += kTurns * kThreads) {
    Elements<Rule, P, G, S, kVector> elements[kTurns];
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      if (first + t * kThreads < n) elements[t].load_from(lane.at((first + t * kThreads) * kVector), aligned);
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      if (first + t * kThreads < n) {
        elements[t].update(rule, grad_factor);
        elements[t].store_to(lane.at((first + t * kThreads) * kVector), aligned);
      }
  }
}

template <template <class> class RuleOf, class P, class G, class S>
__global__ __launch_bounds__(kThreads, 2) void update(const UpdateArgs args) {
  using T = Arithmetic<P>;
  using Rule = RuleOf<T>;
  constexpr int kVector = 16 / int(sizeof(P));
  if (skips(args.found_inf)) return;
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    const int32_t r = args.row_of_chunk[chunk];
    const DeviceRow& row = args.rows[r];
    const auto told = *reinterpret_cast<const Derived<Rule, T>*>(args.derived + r * int64_t(kDerivedBytes));
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int n = int(row.numel - begin < kChunk ? row.numel - begin : kChunk);
    Lane<Rule::kStates, P, G, S> lane{static_cast<P*>(row.param), static_cast<const G*>(args.grads[r]), {}};
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) lane.s[k] = static_cast<S*>(row.state[k]);
    lane = lane.at(begin);

    // the parameter's first 16-byte boundary; where another tensor has none there, it alone is read element by element
    int head = int((16 - reinterpret_cast<uintptr_t>(lane.p) % 16) % 16 / sizeof(P));
    head = head < n ? head : n;
    const int vectors = (n - head) / kVector, tail = head + vectors * kVector;
    const auto body = lane.at(head);
    const Aligned<Rule::kStates> aligned(body);
    if (aligned.all())
      walk<Rule>(told.rule, body, vectors, AllAligned(), told.grad_factor);
    else
      walk<Rule>(told.rule, body, vectors, aligned, told.grad_factor);

#pragma unroll 1
    for (int i = int(threadIdx.x); i < head + n - tail; i += kThreads) {
      const auto one = lane.at(i < head ? i : tail + i - head);
      Elements<Rule, P, G, S, 1> element;
      element.load_from(one, AllAligned());
      element.update(told.rule, told.grad_factor);
      element.store_to(one, AllAligned());
    }
  }
}

template <template <class> class RuleOf>
UpdateKernel for_dtypes(Dtype param, Dtype grad, Dtype state) {
  if constexpr (kNormed<RuleOf<float>>) return nullptr;
  const auto is = [&](Dtype p, Dtype g, Dtype s) { return param == p && grad == g && state == s; };
  if (is(Dtype::kF32, Dtype::kF32, Dtype::kF32)) return update<RuleOf, float, float, float>;
  if (is(Dtype::kBF16, Dtype::kBF16, Dtype::kBF16)) return update<RuleOf, bf16, bf16, bf16>;
  if (is(Dtype::kBF16, Dtype::kF32, Dtype::kBF16)) return update<RuleOf, bf16, float, bf16>;
  if (is(Dtype::kF16, Dtype::kF16, Dtype::kF16)) return update<RuleOf, f16, f16, f16>;
  if (is(Dtype::kF16, Dtype::kF32, Dtype::kF16)) return update<RuleOf, f16, float, f16>;
  if (is(Dtype::kF64, Dtype::kF64, Dtype::kF64)) return update<RuleOf, double, double, double>;
  return nullptr;
}

}  // namespace

UpdateKernel plain_update(int wanted, Dtype param, Dtype grad, Dtype state) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (wanted == rule++) return for_dtypes<R>(param, grad, state);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt
