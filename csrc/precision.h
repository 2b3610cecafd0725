// How weights and states are kept in fewer bits: blockwise 8-bit codes, split master weights, stochastic rounding.
// Scalar code for host and device; fusedopt/optim/precision.py says the same in PyTorch's operations.
#pragma once
#include "element.h"
#include "step.h"

namespace fusedopt::FUSEDOPT_ISA {

FUSEDOPT_HD uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

FUSEDOPT_HD uint32_t to_bits(float x) { return bit_cast<uint32_t>(x); }
FUSEDOPT_HD float magnitude(float x) { return bit_cast<float>(magnitude_bits(x)); }
FUSEDOPT_HD float with_sign(float x, float sign) {
  return bit_cast<float>(bit_cast<uint32_t>(x) | (bit_cast<uint32_t>(sign) & 0x80000000u));
}
FUSEDOPT_HD float larger(float x, float least) { return x > least ? x : least; }

// --- 8-bit codes: a block's largest magnitude is its scale; codes are finer near zero, in closed form ---
//
// signed    c in -127..127   value scale * u |u|, u = c / 127
// unsigned  c in 0..255      value scale * u^4,   u = c / 255; what is above 0 stays above it
//
// To the nearest code; unsigned ones at random where the step is stochastic: squares decay by less than half a code.
//
// The largest element has the largest code, which is the scale's exact value: quantising what was dequantised gives the
// same codes and the same scale.

// `largest`: magnitude_bits, whose order puts NaN above infinity above numbers. A block that holds either has the scale
// NaN, and so are its values: what is broken must show. Below 2^-90 the scale stays there, so that 255^4 over it is
// finite.
FUSEDOPT_HD float scale_of(uint32_t largest) {
  const uint32_t normal = largest < 0x12800000u ? 0x12800000u : largest;
  return bit_cast<float>(normal >= 0x7f800000u ? 0x7fc00000u : normal);
}

// What `quantize` multiplies magnitudes by: the largest's root is then the largest code.
template <bool kSigned>
FUSEDOPT_HD float factor_of(float scale) {
  return (kSigned ? 127.0f * 127 : 255.0f * 255 * 255 * 255) / scale;
}

// Of a code as a number; F: float, or several of them (cpu/lanes.h).
template <bool kSigned, class F>
FUSEDOPT_HD F dequantized(F code, F scale) {
  if constexpr (kSigned) {
    const F u = code * F(1.0f / 127);
    return scale * (u * magnitude(u));
  } else {
    const F u = code * F(1.0f / 255);
    const F square = u * u;
    return scale * (square * square);
  }
}

template <bool kSigned>
FUSEDOPT_HD float dequantize(uint8_t code, float scale) {
  return dequantized<kSigned>(kSigned ? float(int8_t(code)) : float(code), scale);
}

// By Newton's iteration for the inverse, of normal numbers and 0: within 5e-6 and 6e-7 of the root, a hundredth and a
// thousandth of what would change a code, and without the divisions and square roots that an update is already busy
// with. A GPU's own square root is one instruction.
FUSEDOPT_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  const float half = 0.5f * x;
  float inverse = bit_cast<float>(0x5f375a86u - (bit_cast<uint32_t>(x) >> 1));
  inverse *= 1.5f - half * inverse * inverse;  // from the left: at 0 the square overflows, but not this
  inverse *= 1.5f - half * inverse * inverse;
  return x * inverse;
#endif
}

FUSEDOPT_HD float fourth_root(float x) {
#if defined(__CUDA_ARCH__)
  return root(root(x));
#else
  const float quarter = 0.25f * x;
  float inverse = bit_cast<float>(0x4f584000u - (bit_cast<uint32_t>(x) >> 2));
  const auto nearer = [&](float near) { return near * (1.25f - quarter * (near * near) * (near * near)); };
  inverse = nearer(nearer(nearer(inverse)));
  return x * (inverse * inverse * inverse);
#endif
}

// A float of 2^23 has no bits below 1: adding it rounds what is smaller to the nearest integer, which is then in the
// lowest bits. Half as much again, and negative integers are there as in two's complement.
inline constexpr float kInteger = 8388608.0f, kAnyInteger = 12582912.0f;

// Bits of which the lowest 8 are the nearest code.
template <bool kSigned, class F>
FUSEDOPT_HD auto quantized(F x, F factor) {
  const F part = magnitude(x) * factor;
  if constexpr (kSigned) {
    return to_bits(with_sign(root(part), x) + F(kAnyInteger));
  } else {
    const F near = fourth_root(part);
    return to_bits(choose(x > F(0.0f), larger(near, F(1.0f)), near) + F(kInteger));
  }
}

template <bool kSigned>
FUSEDOPT_HD uint8_t quantize(float x, float factor) {
  return uint8_t(quantized<kSigned>(x, factor));
}

// Bits of which the lowest 8 are the unsigned code below or above a value, each with the probability that makes the
// mean the value. A root that is off does no harm, and the largest has the largest code, whatever the random bits: its
// part is within an ulp of 255^4. `random16`: an integer.
template <class F>
FUSEDOPT_HD auto either(F x, F factor, F random16) {
  const F part = magnitude(x) * factor;
  const F near = (fourth_root(part) + F(kInteger)) - F(kInteger);
  const F below = choose((near * near) * (near * near) > part, near - F(1.0f), near);
  const F low = choose(below > F(254.0f), F(254.0f), below);
  const F square = low * low;
  const F width = (F(2.0f) * low + F(1.0f)) * (F(2.0f) * square + (F(2.0f) * low + F(1.0f)));  // (low + 1)^4 - low^4
  const F chance = (random16 + F(0.5f)) * F(1.0f / 65536);
  const F code = choose(chance * width < part - square * square, low + F(1.0f), low);
  return to_bits(choose(x > F(0.0f), larger(code, F(1.0f)), code) + F(kInteger));
}

// --- a float32 as a bfloat16 and the 16 bits that it lacks ---

// Rounded half away from zero, so that the rest is a signed 16-bit number: to nearest even, the two together would not
// tell which of two neighbours a tie came from.
FUSEDOPT_HD void split(float x, bf16& high, int16_t& low) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = magnitude_bits(x) > 0x7f800000u;
  high.bits = uint16_t((nan ? 0x7fc00000u : bits + 0x8000u) >> 16);
  low = int16_t(uint16_t(nan ? 0u : bits & 0xffffu));
}

FUSEDOPT_HD float join(bf16 high, int16_t low) {
  return bit_cast<float>((uint32_t(high.bits) << 16) + uint32_t(int32_t(low)));
}

// A float16 weight and its float32 master. Where the weight is not the master's rounding somebody has set it since:
// then it is the master.
FUSEDOPT_HD float master_of(f16 weight, float master) {
  f16 rounded;
  store(rounded, master);
  return rounded.bits == weight.bits ? master : load(weight);
}

// --- stochastic rounding ---

// 16 random bits above the 16 that are cut off: rounds up with the probability of the part cut off.
FUSEDOPT_HD bf16 stochastic(float x, uint32_t random16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {uint16_t((magnitude_bits(x) > 0x7f800000u ? 0x7fc00000u : bits + random16) >> 16)};
}

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x32-10. One call serves eight neighbouring
// elements of one tensor: element i takes half i % 2 of word i / 2. `tensor`: 0 for the parameter, 1 + k for state k.
struct Random4 {
  uint32_t word[4];
};

FUSEDOPT_HD Random4 philox(uint64_t seed, uint32_t step, uint32_t parameter, uint32_t tensor, uint64_t eighth) {
  uint32_t a = uint32_t(eighth), b = uint32_t(eighth >> 32) << 2 | tensor, c = step, d = parameter;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t(0xD2511F53u) * a, y = uint64_t(0xCD9E8D57u) * c;
    const uint32_t next_a = uint32_t(y >> 32) ^ b ^ k0, next_c = uint32_t(x >> 32) ^ d ^ k1;
    b = uint32_t(y);
    d = uint32_t(x);
    a = next_a;
    c = next_c;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

FUSEDOPT_HD uint32_t random16(const Random4& random, int element) {
  return random.word[element / 2] >> (16 * (element % 2)) & 0xffffu;
}

}  // namespace fusedopt::FUSEDOPT_ISA
