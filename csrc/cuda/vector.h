// 16 bytes of elements in registers.
#pragma once
#include <cuda_runtime.h>

#include "../element.h"

namespace fusedopt::FUSEDOPT_ISA {

// As words, because ptxas gives each 16-bit variable a register of its own.
template <class S>
struct Vector {
  static constexpr int kSize = 16 / int(sizeof(S));
  unsigned words[4] = {};

  __device__ __forceinline__ S get(int i) const {
    if constexpr (sizeof(S) == 4) return bit_cast<S>(words[i]);
    if constexpr (sizeof(S) == 2) return bit_cast<S>(uint16_t(words[i / 2] >> (16 * (i % 2))));
  }
  // of an element that is still zero
  __device__ __forceinline__ void set(int i, S e) {
    if constexpr (sizeof(S) == 4) words[i] = bit_cast<unsigned>(e);
    if constexpr (sizeof(S) == 2) words[i / 2] |= unsigned(bit_cast<uint16_t>(e)) << (16 * (i % 2));
  }
};

// An array as vectors; the last may be ragged. Where it does not begin at a multiple of 16 bytes, elements move one by
// one, but every vector is the same thread's as ever.
template <class S>
struct Vectors {
  static constexpr int kSize = Vector<S>::kSize;
  S* first;
  int64_t numel;
  bool aligned;

  __device__ Vectors(S* first, int64_t numel)
      : first(first), numel(numel), aligned(reinterpret_cast<uintptr_t>(first) % 16 == 0) {}
  __device__ int64_t count() const { return (numel + kSize - 1) / kSize; }

  // Zeros beyond the end.
  __device__ __forceinline__ Vector<S> load(int64_t vector) const {
    const int64_t begin = vector * kSize;
    Vector<S> v;
    if (aligned && begin + kSize <= numel) {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(first + begin));
      memcpy(v.words, &words, sizeof words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (begin + i < numel) v.set(i, first[begin + i]);
    }
    return v;
  }
  __device__ __forceinline__ void write(int64_t vector, const Vector<S>& v) const {
    const int64_t begin = vector * kSize;
    if (aligned && begin + kSize <= numel) {
      uint4 words;
      memcpy(&words, v.words, sizeof words);
      __stcs(reinterpret_cast<uint4*>(first + begin), words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (begin + i < numel) first[begin + i] = v.get(i);
    }
  }
};

}  // namespace fusedopt::FUSEDOPT_ISA
