// Eight neighbouring elements of a lane, of a type that is known at run time.
#pragma once
#include "launch.h"
#include "../precision.h"

namespace fusedopt::FUSEDOPT_ISA {

constexpr int kLane = 8;  // as many elements as one call of philox() serves
static_assert(32 * kLane == kCodeBlock, "a warp holds a block of codes");

// As they lie in memory.
struct Raw {
  uint32_t words[kLane] = {};

  template <class Word>
  FUSEDOPT_HD uint32_t get(int i) const {
    constexpr int kPer = 4 / int(sizeof(Word));
    return Word(words[i / kPer] >> (8 * int(sizeof(Word)) * (i % kPer)));
  }
  // of an element that is still zero
  template <class Word>
  FUSEDOPT_HD void set(int i, uint32_t word) {
    constexpr int kPer = 4 / int(sizeof(Word));
    words[i / kPer] |= word << (8 * int(sizeof(Word)) * (i % kPer));
  }
};

// Where a lane's elements are in their tensor, and how many it has. `vector`: all eight, and every tensor is aligned.
struct Place {
  int64_t at;
  int count;
  bool vector;
};

FUSEDOPT_HD bool is_vector(const void* address, int element_bytes) {
  return reinterpret_cast<uintptr_t>(address) % (element_bytes == 1 ? 8 : 16) == 0;
}

// Streamed, as in step_plain.cu.
template <class Word>
__device__ __forceinline__ Raw fetch(const void* data, const Place& place) {
  const Word* const from = static_cast<const Word*>(data) + place.at;
  Raw raw;
  if (place.vector) {
    if constexpr (sizeof(Word) == 1) {
      const uint2 words = __ldcs(reinterpret_cast<const uint2*>(from));
      memcpy(raw.words, &words, sizeof words);
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(Word)) / 2; ++i) {
        const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from) + i);
        memcpy(raw.words + 4 * i, &words, sizeof words);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < place.count) raw.set<Word>(i, __ldca(from + i));
  }
  return raw;
}

template <class Word>
__device__ __forceinline__ void put(const Raw& raw, void* data, const Place& place) {
  Word* const to = static_cast<Word*>(data) + place.at;
  if (place.vector) {
    if constexpr (sizeof(Word) == 1) {
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(raw.words[0], raw.words[1]));
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(Word)) / 2; ++i) {
        uint4 words;
        memcpy(&words, raw.words + 4 * i, sizeof words);
        __stcs(reinterpret_cast<uint4*>(to) + i, words);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < place.count) __stwb(to + i, Word(raw.get<Word>(i)));
  }
}

__device__ __forceinline__ Raw fetch(const void* data, Dtype dtype, const Place& place) {
  if (dtype == Dtype::kF32) return fetch<uint32_t>(data, place);
  if (dtype == Dtype::kCode) return fetch<uint8_t>(data, place);
  return fetch<uint16_t>(data, place);
}

__device__ __forceinline__ void widen(const Raw& raw, Dtype dtype, float (&to)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    to[i] = dtype == Dtype::kF32    ? bit_cast<float>(raw.words[i])
            : dtype == Dtype::kBF16 ? load(bf16{uint16_t(raw.get<uint16_t>(i))})
                                    : load(f16{uint16_t(raw.get<uint16_t>(i))});
}

__device__ __forceinline__ void put_floats(const float (&from)[kLane], void* data, const Place& place) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < kLane; ++i) raw.words[i] = bit_cast<uint32_t>(from[i]);
  put<uint32_t>(raw, data, place);
}

// `narrow(i)`: element i, of 16 bits.
template <class Narrow>
__device__ __forceinline__ void put_halves(void* data, const Place& place, const Narrow& narrow) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < kLane; ++i) raw.set<uint16_t>(i, uint16_t(bit_cast<uint16_t>(narrow(i))));
  put<uint16_t>(raw, data, place);
}

}  // namespace fusedopt::FUSEDOPT_ISA
