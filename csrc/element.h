// Storage types. Arithmetic is float (double for double); these convert at load and store only.
//
// The headers that engines compile once per instruction set live in namespace fusedopt::FUSEDOPT_ISA: a template
// instantiated by two builds in one namespace would be one weak symbol, the linker would keep either, and an old
// machine would die of an illegal instruction.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif
// The loop's iterations do not depend on each other.
#if defined(__clang__)
#define FUSEDOPT_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_IVDEP _Pragma("GCC ivdep")
#endif
#ifndef FUSEDOPT_ISA
#define FUSEDOPT_ISA portable
#endif

namespace fusedopt::FUSEDOPT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class To, class From>
FUSEDOPT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// `choose(c, a, b)` for `c ? a : b`: a conditional between values of class type is a branch, which does not vectorise.
FUSEDOPT_HD float choose(bool c, float a, float b) { return c ? a : b; }
FUSEDOPT_HD double choose(bool c, double a, double b) { return c ? a : b; }

FUSEDOPT_HD float load(float x) { return x; }
FUSEDOPT_HD double load(double x) { return x; }
FUSEDOPT_HD float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Branch-free, so that it vectorises: the exponent is moved by a multiplication, which is exact and turns a subnormal
// into a normal number; infinity and NaN get float's own exponent.
FUSEDOPT_HD float load(f16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu);
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  // 2^-14 * (1 + mantissa) - 2^-14: exact, and no float subnormal on the way, so that flush-to-zero mode cannot bite
  const float subnormal = bit_cast<float>((113u << 23) + (magnitude << 13)) - bit_cast<float>(113u << 23);
  uint32_t bits = magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal;
  bits = magnitude >= 0x7c00u ? special : bits;
  return bit_cast<float>(bits | sign);
#endif
}

FUSEDOPT_HD void store(float& to, float x) { to = x; }
FUSEDOPT_HD void store(double& to, double x) { to = x; }

// Round to nearest even. NaN is told apart first: the carry would turn some into infinity or zero.
FUSEDOPT_HD void store(bf16& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // an integer comparison: gcc 12 vectorises the loop with it, but not with x != x
  to.bits = uint16_t(((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded) >> 16);
#endif
}

FUSEDOPT_HD void store(f16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // adding 0.5 lines a subnormal result's last place up with float's, so the addition itself rounds to nearest even
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | sign);
#endif
}

}  // namespace fusedopt::FUSEDOPT_ISA
