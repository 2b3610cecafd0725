// Steps at a precision of the user's choice, as cpu/step_precise.cpp has them: states in other types than the
// parameter, codes, masters, stochastic rounding, averages. A warp takes a block of kCodeBlock elements at a time;
// which types they have is asked at run time, the same of all threads, so that no combination needs a kernel of its
// own.
#include "lane.h"
#include "norms.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;

constexpr int kWarps = kThreads / 32;
static_assert(kChunk % kCodeBlock == 0);

template <class E>
__device__ __forceinline__ E rounded(float x) {
  E e;
  store(e, x);
  return e;
}

struct Split {
  bf16 high;
  int16_t low;
  __device__ __forceinline__ explicit Split(float x) { split(x, high, low); }
};

template <class Rule, class T>
__device__ __forceinline__ void apply(const Rule& rule, T& param, T grad, T (&state)[kMaxStates]) {
  if constexpr (Rule::kStates == 0) rule(param, grad);
  if constexpr (Rule::kStates == 1) rule(param, grad, state[0]);
  if constexpr (Rule::kStates == 2) rule(param, grad, state[0], state[1]);
  if constexpr (Rule::kStates == 3) rule(param, grad, state[0], state[1], state[2]);
}

// A tensor, and what its update is told.
template <class Rule, class T>
struct Tensor {
  static constexpr int kStates = Rule::kStates;
  // a float32 parameter has no master, and is not rounded
  static constexpr bool kHalf = std::is_same_v<T, fast_float>;

  const UpdateArgs& args;
  DeviceRow row;
  const void* grad;
  Rule rule;
  T grad_factor;
  uint32_t step;
  Lerp<float> lerp;
  bool aligned;

  __device__ __forceinline__ Tensor(const UpdateArgs& args, int32_t r)
      : Tensor(args, r, *reinterpret_cast<const Derived<Rule, T>*>(args.derived + r * int64_t(kDerivedBytes))) {}

  __device__ __forceinline__ Tensor(const UpdateArgs& args, int32_t r, const Derived<Rule, T>& told)
      : args(args),
        row(args.rows[r]),
        grad(args.grads[r]),
        rule(told.rule),
        grad_factor(told.grad_factor),
        step(told.step),
        lerp(args.precision.ema_weight) {
    aligned = is_vector(row.param, 2) && is_vector(grad, 2) && is_vector(row.extras.master, 2) &&
              is_vector(row.extras.ema, 2);
#pragma unroll
    for (int k = 0; k < kStates; ++k) aligned = aligned && is_vector(row.state[k], args.state == Dtype::kCode ? 1 : 2);
  }

  __device__ __forceinline__ Random4 noise(uint32_t tensor, const Place& place) const {
    return philox(args.precision.seed, step, uint32_t(row.extras.index), tensor, uint64_t(place.at / kLane));
  }

  __device__ __forceinline__ void weights(const Raw& param, const Raw& master, float (&w)[kLane]) const {
    widen(param, kHalf ? args.param : Dtype::kF32, w);
    if constexpr (kHalf) {
      if (!row.extras.master) return;
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const uint16_t bits = uint16_t(param.get<uint16_t>(i));
        w[i] = args.param == Dtype::kBF16 ? join(bf16{bits}, int16_t(master.get<uint16_t>(i)))
                                          : master_of(f16{bits}, bit_cast<float>(master.words[i]));
      }
    }
  }

  // `w`, and what it becomes where the parameter is rounded.
  __device__ __forceinline__ void store_weights(float (&w)[kLane], const Place& place) const {
    if (!kHalf) {
      put_floats(w, row.param, place);
    } else if (args.param == Dtype::kF16) {
      put_halves(row.param, place, [&](int i) { return rounded<f16>(w[i]); });
      if (row.extras.master) {
        put_floats(w, row.extras.master, place);
      } else {
#pragma unroll
        for (int i = 0; i < kLane; ++i) w[i] = load(rounded<f16>(w[i]));
      }
    } else if (row.extras.master) {
      put_halves(row.param, place, [&](int i) { return Split(w[i]).high; });
      put_halves(row.extras.master, place, [&](int i) { return Split(w[i]).low; });
    } else {
      if (args.precision.stochastic) {
        const Random4 random = noise(0, place);
#pragma unroll
        for (int i = 0; i < kLane; ++i) w[i] = load(stochastic(w[i], random16(random, i)));
      }
      put_halves(row.param, place, [&](int i) { return rounded<bf16>(w[i]); });
#pragma unroll
      for (int i = 0; i < kLane; ++i) w[i] = load(rounded<bf16>(w[i]));
    }
  }

  __device__ __forceinline__ float* scale(int k, const Place& place) const {
    return row.extras.scale[k] + place.at / kCodeBlock;
  }

  __device__ __forceinline__ void decode(const Raw& raw, int k, float scale, float (&to)[kLane]) const {
    const bool is_signed = Rule::kSigned >> k & 1;
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const uint8_t code = uint8_t(raw.get<uint8_t>(i));
      to[i] = is_signed ? dequantize<true>(code, scale) : dequantize<false>(code, scale);
    }
  }

  // The whole warp, lanes beyond the tensor's end too.
  __device__ __forceinline__ void store_codes(const float (&from)[kLane], int k, const Place& place) const {
    const bool is_signed = Rule::kSigned >> k & 1;
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < place.count) largest = max(largest, magnitude_bits(from[i]));
    for (int distance = 16; distance > 0; distance /= 2)
      largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
    const float new_scale = scale_of(largest);
    const float factor = is_signed ? factor_of<true>(new_scale) : factor_of<false>(new_scale);
    Raw raw;
    if (args.precision.stochastic && !is_signed) {
      const Random4 random = noise(1 + k, place);
#pragma unroll
      for (int i = 0; i < kLane; ++i) raw.set<uint8_t>(i, uint8_t(either(from[i], factor, float(random16(random, i)))));
    } else {
#pragma unroll
      for (int i = 0; i < kLane; ++i)
        raw.set<uint8_t>(i, is_signed ? quantize<true>(from[i], factor) : quantize<false>(from[i], factor));
    }
    put<uint8_t>(raw, row.state[k], place);
    __syncwarp();  // all have read the old scale
    if (threadIdx.x % 32 == 0) *scale(k, place) = new_scale;
  }

  __device__ __forceinline__ void store_state(const float (&from)[kLane], int k, const Place& place) const {
    void* const to = row.state[k];
    if (args.state == Dtype::kCode) {
      store_codes(from, k, place);
    } else if (args.state == Dtype::kF32) {
      put_floats(from, to, place);
    } else if (args.state == Dtype::kF16) {
      put_halves(to, place, [&](int i) { return rounded<f16>(from[i]); });
    } else if (args.precision.stochastic) {
      const Random4 random = noise(1 + k, place);
      put_halves(to, place, [&](int i) { return stochastic(from[i], random16(random, i)); });
    } else {
      put_halves(to, place, [&](int i) { return rounded<bf16>(from[i]); });
    }
  }

  // A lane's elements as they lie in memory.
  struct Held {
    Raw param, master, grad, state[kMaxStates];
    float scale[kMaxStates];
  };

  // Everything is asked for before anything is waited for.
  __device__ __forceinline__ void ask(Held& held, const Place& place) const {
    held.param = fetch(row.param, kHalf ? args.param : Dtype::kF32, place);
    if (kHalf && row.extras.master)
      held.master = fetch(row.extras.master, args.param == Dtype::kF16 ? Dtype::kF32 : args.param, place);
    if (!grad) return;
    held.grad = fetch(grad, args.grad, place);
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      held.state[k] = fetch(row.state[k], args.state, place);
      if (args.state == Dtype::kCode) held.scale[k] = *scale(k, place);
    }
  }

  __device__ __forceinline__ void gradient_and_states(const Held& held, float (&g)[kLane],
                                                      float (&s)[kMaxStates][kLane]) const {
    widen(held.grad, args.grad, g);
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (args.state == Dtype::kCode)
        decode(held.state[k], k, held.scale[k], s[k]);
      else
        widen(held.state[k], args.state, s[k]);
  }

  __device__ __forceinline__ void update(const Place& place) const {
    Held held;
    ask(held, place);
    Raw raw_ema;
    if (row.extras.ema) raw_ema = fetch<uint32_t>(row.extras.ema, place);

    float w[kLane];
    weights(held.param, held.master, w);
    if (grad) {
      float g[kLane], s[kMaxStates][kLane];
      gradient_and_states(held, g, s);
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        T param = w[i], state[kMaxStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) state[k] = s[k][i];
        apply(rule, param, T(g[i]) * grad_factor, state);
#pragma unroll
        for (int k = 0; k < kStates; ++k) store(s[k][i], state[k]);
        store(w[i], param);
      }
#pragma unroll
      for (int k = 0; k < kStates; ++k) store_state(s[k], k, place);
      store_weights(w, place);
    }
    if (row.extras.ema) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) w[i] = lerp(bit_cast<float>(raw_ema.words[i]), w[i]);
      put_floats(w, row.extras.ema, place);
    }
  }

  __device__ __forceinline__ void add_squares(const Place& place, Squares& sums) const {
    static_assert(kStates == 2);
    Held held;
    ask(held, place);
    float w[kLane], g[kLane], s[kMaxStates][kLane];
    weights(held.param, held.master, w);
    gradient_and_states(held, g, s);
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < place.count) {
        float along;
        store(along, rule.direction(T(w[i]), T(g[i]) * grad_factor, T(s[0][i]), T(s[1][i])));
        sums.weights += double(w[i]) * double(w[i]);
        sums.direction += double(along) * double(along);
      }
  }

  // work(place) for what a lane has of a chunk.
  template <class Work>
  __device__ __forceinline__ void walk(int64_t chunk, const Work& work) const {
    const int64_t begin = (chunk - row.first_chunk) * kChunk, end = min(begin + kChunk, row.numel);
    for (int64_t block = begin + threadIdx.x / 32 * kCodeBlock; block < end; block += kWarps * kCodeBlock) {
      const int64_t at = block + threadIdx.x % 32 * kLane;
      const int count = int(max(int64_t(0), min(int64_t(kLane), end - at)));
      work(Place{at, count, aligned && count == kLane});
    }
  }
};

template <template <class> class RuleOf, class T>
__global__ __launch_bounds__(kThreads, 2) void step_floats(const UpdateArgs args) {
  if (skips(args.found_inf)) return;
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    const Tensor<RuleOf<T>, T> tensor(args, args.row_of_chunk[chunk]);
    tensor.walk(chunk, [&](const Place& place) { tensor.update(place); });
  }
}

template <template <class> class RuleOf, class T>
__global__ __launch_bounds__(kThreads, 2) void norms_of_floats(const UpdateArgs args, Squares* partial) {
  if (skips(args.found_inf)) return;
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    const Tensor<RuleOf<T>, T> tensor(args, args.row_of_chunk[chunk]);
    if (!tensor.grad || !tensor.rule.adapts()) continue;
    Squares sums{};
    tensor.walk(chunk, [&](const Place& place) { tensor.add_squares(place, sums); });
    sums = across_block(sums);
    if (threadIdx.x == 0) partial[chunk] = sums;
  }
}

// float64 is kept as it is; it may have an average.
template <template <class> class RuleOf>
__global__ __launch_bounds__(kThreads, 2) void step_doubles(const UpdateArgs args) {
  using Rule = RuleOf<double>;
  if (skips(args.found_inf)) return;
  const Lerp<double> lerp(args.precision.ema_weight);
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    const int32_t r = args.row_of_chunk[chunk];
    const DeviceRow row = args.rows[r];
    const auto told = *reinterpret_cast<const Derived<Rule, double>*>(args.derived + r * int64_t(kDerivedBytes));
    const auto* const grad = static_cast<const double*>(args.grads[r]);
    const int64_t begin = (chunk - row.first_chunk) * kChunk, end = min(begin + kChunk, row.numel);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const auto state = [&](int k) -> double& { return static_cast<double*>(row.state[k])[i]; };
      double& param = static_cast<double*>(row.param)[i];
      double w = param, s[kMaxStates];
      if (grad) {
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) s[k] = state(k);
        apply(told.rule, w, grad[i] * told.grad_factor, s);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) state(k) = s[k];
        param = w;
      }
      if (row.extras.ema) {
        double& ema = static_cast<double*>(row.extras.ema)[i];
        ema = lerp(ema, w);
      }
    }
  }
}

template <template <class> class RuleOf>
__global__ __launch_bounds__(kThreads, 2) void norms_of_doubles(const UpdateArgs args, Squares* partial) {
  using Rule = RuleOf<double>;
  static_assert(Rule::kStates == 2);
  if (skips(args.found_inf)) return;
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    const int32_t r = args.row_of_chunk[chunk];
    const DeviceRow row = args.rows[r];
    const auto told = *reinterpret_cast<const Derived<Rule, double>*>(args.derived + r * int64_t(kDerivedBytes));
    if (!args.grads[r] || !told.rule.adapts()) continue;
    const int64_t begin = (chunk - row.first_chunk) * kChunk, end = min(begin + kChunk, row.numel);
    Squares sums{};
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const auto at = [&](const void* data) { return static_cast<const double*>(data)[i]; };
      const double w = at(row.param);
      const double along =
          told.rule.direction(w, at(args.grads[r]) * told.grad_factor, at(row.state[0]), at(row.state[1]));
      sums.weights += w * w;
      sums.direction += along * along;
    }
    sums = across_block(sums);
    if (threadIdx.x == 0) partial[chunk] = sums;
  }
}

bool is_float(Dtype dtype) { return dtype == Dtype::kF32 || dtype == Dtype::kBF16 || dtype == Dtype::kF16; }

template <template <class> class RuleOf>
UpdateKernel for_dtypes(Dtype param, Dtype grad, Dtype state) {
  if (param == Dtype::kF64 && grad == Dtype::kF64 && state == Dtype::kF64) return step_doubles<RuleOf>;
  if (!is_float(param) || !is_float(grad) || !(is_float(state) || state == Dtype::kCode)) return nullptr;
  if (param == Dtype::kF32) return step_floats<RuleOf, float>;
  return step_floats<RuleOf, fast_float>;
}

template <template <class> class RuleOf>
NormsKernel norms_for(Dtype param) {
  if constexpr (kNormed<RuleOf<float>>)
    return param == Dtype::kF64   ? norms_of_doubles<RuleOf>
           : param == Dtype::kF32 ? norms_of_floats<RuleOf, float>
                                  : norms_of_floats<RuleOf, fast_float>;
  return nullptr;
}

}  // namespace

NormsKernel norms_kernel(int wanted, Dtype param) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (wanted == rule++) return norms_for<R>(param);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

UpdateKernel precise_update(int wanted, Dtype param, Dtype grad, Dtype state) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (wanted == rule++) return for_dtypes<R>(param, grad, state);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return nullptr;
}

}  // namespace fusedopt
