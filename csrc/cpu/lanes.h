// As many floats as a register holds, as the T of a rule (rules.h) and of precision.h's formulas: what gcc does not
// make of loops over scalars is the conversion of codes without a detour over 16-bit lanes, and the estimates of roots.
// Where nothing of that is to be had a lane is one float, and the compiler vectorises the loop.
#pragma once
#include <type_traits>

#include "../precision.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedopt::FUSEDOPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 1;
#endif

#if defined(__AVX2__)
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
using Truths = IntLanes;
#else
using FloatLanes = float;
using IntLanes = int32_t;
using Truths = bool;
#endif

struct Mask {
  Truths of;
  friend FUSEDOPT_HD Mask operator||(Mask a, Mask b) { return {a.of || b.of}; }
  // Of what is the same in all lanes.
#if defined(__AVX2__)
  FUSEDOPT_HD operator bool() const { return of[0] != 0; }
#else
  FUSEDOPT_HD operator bool() const { return of; }
#endif
};

struct Lanes {
  FloatLanes of;

  Lanes() = default;
  FUSEDOPT_HD Lanes(float value) : of(value - FloatLanes{}) {}
  FUSEDOPT_HD Lanes(double value) : Lanes(float(value)) {}
  FUSEDOPT_HD Lanes(int value) : Lanes(float(value)) {}
  FUSEDOPT_HD Lanes(bool value) : Lanes(float(value)) {}
  template <class V, class = std::enable_if_t<(kLanes > 1) && std::is_same_v<V, FloatLanes>>>
  FUSEDOPT_HD Lanes(V value) : of(value) {}

  friend FUSEDOPT_HD Lanes operator+(Lanes a, Lanes b) { return a.of + b.of; }
  friend FUSEDOPT_HD Lanes operator-(Lanes a, Lanes b) { return a.of - b.of; }
  friend FUSEDOPT_HD Lanes operator*(Lanes a, Lanes b) { return a.of * b.of; }
  friend FUSEDOPT_HD Lanes operator/(Lanes a, Lanes b) { return a.of / b.of; }
  FUSEDOPT_HD Lanes& operator+=(Lanes b) { return *this = *this + b; }
  FUSEDOPT_HD Lanes& operator-=(Lanes b) { return *this = *this - b; }
  FUSEDOPT_HD Lanes& operator*=(Lanes b) { return *this = *this * b; }
  friend FUSEDOPT_HD Mask operator<(Lanes a, Lanes b) { return {a.of < b.of}; }
  friend FUSEDOPT_HD Mask operator>(Lanes a, Lanes b) { return {a.of > b.of}; }
  friend FUSEDOPT_HD Mask operator!=(Lanes a, Lanes b) { return {a.of != b.of}; }
};

FUSEDOPT_HD Lanes choose(Mask mask, Lanes a, Lanes b) { return mask.of ? a.of : b.of; }
FUSEDOPT_HD IntLanes to_bits(Lanes a) { return bit_cast<IntLanes>(a.of); }
FUSEDOPT_HD IntLanes magnitude_bits(Lanes a) { return to_bits(a) & 0x7fffffff; }
FUSEDOPT_HD IntLanes larger(IntLanes a, IntLanes b) { return a > b ? a : b; }
FUSEDOPT_HD Lanes magnitude(Lanes a) { return bit_cast<FloatLanes>(magnitude_bits(a)); }
FUSEDOPT_HD Lanes with_sign(Lanes a, Lanes sign) {
  return bit_cast<FloatLanes>(to_bits(a) | (to_bits(sign) & int32_t(0x80000000u)));
}

FUSEDOPT_HD Lanes load_lanes(const float* from) {
  FloatLanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
FUSEDOPT_HD void store_lanes(float* to, Lanes lanes) { std::memcpy(to, &lanes.of, sizeof lanes.of); }

#if defined(__AVX2__)
FUSEDOPT_HD uint32_t largest_of(__m256i lanes) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}
#endif

#if defined(__AVX512F__)

// Under a mask of all, which costs nothing: gcc 12 takes what else stands for the lanes that are left out for a
// variable that was never set, and warns.
constexpr __mmask16 kAll = 0xffff;

FUSEDOPT_HD Lanes load_bytes(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return FloatLanes(_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, bytes)));
}
FUSEDOPT_HD Lanes load_bytes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return FloatLanes(_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes)));
}
FUSEDOPT_HD Lanes load_random(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return FloatLanes(_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bits)));
}
// The lowest byte of each lane.
FUSEDOPT_HD void store_bytes(void* to, IntLanes lanes) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, __m512i(lanes)));
}

FUSEDOPT_HD uint32_t largest_of(IntLanes lanes) {
  const __m256i low = _mm512_maskz_extracti64x4_epi64(0xf, __m512i(lanes), 0);
  return largest_of(_mm256_max_epi32(low, _mm512_maskz_extracti64x4_epi64(0xf, __m512i(lanes), 1)));
}
FUSEDOPT_HD Lanes larger(Lanes a, Lanes b) { return FloatLanes(_mm512_maskz_max_ps(kAll, a.of, b.of)); }
FUSEDOPT_HD Lanes sqrt_of(Lanes a) { return FloatLanes(_mm512_maskz_sqrt_ps(kAll, a.of)); }
FUSEDOPT_HD Lanes inverse_root(Lanes a) { return FloatLanes(_mm512_maskz_rsqrt14_ps(kAll, a.of)); }
// Within 2^-14 and 1.5 2^-14: a hundredth and a 40th of a code at the most.
FUSEDOPT_HD Lanes root(Lanes a) {
  const Lanes part = larger(a, 1e-30f);  // 0 times infinity is not 0
  return part * inverse_root(part);
}
FUSEDOPT_HD Lanes fourth_root(Lanes a) { return inverse_root(inverse_root(a)); }

#elif defined(__AVX2__)

FUSEDOPT_HD Lanes load_bytes(const int8_t* from) {
  return FloatLanes(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
}
FUSEDOPT_HD Lanes load_bytes(const uint8_t* from) {
  return FloatLanes(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
}
FUSEDOPT_HD Lanes load_random(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return FloatLanes(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(bits)));
}
FUSEDOPT_HD void store_bytes(void* to, IntLanes lanes) {
  const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(__m256i(lanes), first);
  const __m128i both = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), both);
}

FUSEDOPT_HD uint32_t largest_of(IntLanes lanes) { return largest_of(__m256i(lanes)); }
FUSEDOPT_HD Lanes larger(Lanes a, Lanes b) { return FloatLanes(_mm256_max_ps(a.of, b.of)); }
FUSEDOPT_HD Lanes sqrt_of(Lanes a) { return FloatLanes(_mm256_sqrt_ps(a.of)); }
// A step of Newton's iteration from estimates within 1.5 2^-12, which alone would be a tenth of a code off.
FUSEDOPT_HD Lanes root(Lanes a) {
  const __m256 part = _mm256_max_ps(a.of, _mm256_set1_ps(1e-30f));  // 0 times infinity is not 0
  const __m256 inverse = _mm256_rsqrt_ps(part), near = part * inverse;
  return FloatLanes(near + 0.5f * inverse * (part - near * near));
}
FUSEDOPT_HD Lanes fourth_root(Lanes a) {
  const __m256 part = _mm256_max_ps(a.of, _mm256_set1_ps(1e-30f));
  const __m256 inverse = _mm256_rsqrt_ps(part), near = _mm256_rsqrt_ps(inverse), square = near * near;
  return FloatLanes(near + 0.25f * near * (inverse * inverse) * (part - square * square));
}

#else

FUSEDOPT_HD Lanes load_bytes(const int8_t* from) { return float(*from); }
FUSEDOPT_HD Lanes load_bytes(const uint8_t* from) { return float(*from); }
FUSEDOPT_HD Lanes load_random(const uint16_t* from) { return float(*from); }
FUSEDOPT_HD void store_bytes(void* to, IntLanes lanes) { *static_cast<uint8_t*>(to) = uint8_t(lanes); }

FUSEDOPT_HD uint32_t largest_of(IntLanes lanes) { return uint32_t(lanes); }
FUSEDOPT_HD Lanes larger(Lanes a, Lanes b) { return a.of > b.of ? a.of : b.of; }
// A division and a square root take as long as all else, and the states are good to a hundredth. Roots are within 1e-5,
// by multiplications; the divider does the quotients meanwhile.
FUSEDOPT_HD Lanes sqrt_of(Lanes a) { return FUSEDOPT_ISA::root(a.of); }
FUSEDOPT_HD Lanes root(Lanes a) { return FUSEDOPT_ISA::root(a.of); }
FUSEDOPT_HD Lanes fourth_root(Lanes a) { return FUSEDOPT_ISA::fourth_root(a.of); }

#endif

template <bool kSigned>
FUSEDOPT_HD Lanes load_codes(const uint8_t* from, Lanes scale) {
  using Code = std::conditional_t<kSigned, int8_t, uint8_t>;
  return dequantized<kSigned>(load_bytes(reinterpret_cast<const Code*>(from)), scale);
}

}  // namespace
}  // namespace fusedopt::FUSEDOPT_ISA
