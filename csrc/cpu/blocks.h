// What steps at a precision of the user's choice do with a block of elements: as floats in the first-level cache, so
// that no combination of types needs a loop of its own; what is float in memory is worked on where it lies.
#pragma once
#include "../precision.h"
#include "random.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {

// The kernel of a launch whose states are codes; null where there is none.
CpuEngine::StepKernel codes_step_kernel(const Launch& launch);

namespace {

constexpr int kBlock = int(kCodeBlock);

// 16 random bits for each of a block's elements.
struct Noise {
  uint16_t bits[kBlock];

  Noise(const Precision& precision, const Row& row, uint32_t tensor, int64_t begin, int n) {
    const RandomKey key{precision.seed, uint32_t(int64_t(row.step)), uint32_t(row.extras.index)};
    random_block(key, tensor, row.place, begin, n, bits);
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
      narrow(w, n, Noise(precision, row, 0, begin, n), to);
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

inline bool is_float(Dtype dtype) { return dtype == Dtype::kF32 || dtype == Dtype::kBF16 || dtype == Dtype::kF16; }

}  // namespace
}  // namespace fusedopt::FUSEDOPT_ISA
