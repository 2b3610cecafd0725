// How weights and states are kept in fewer bits: blockwise 8-bit codes, split master weights, stochastic rounding.
// Scalar code for host and device; fusedopt/optim/precision.py says the same in PyTorch's operations.
#pragma once
#include "element.h"
#include "step.h"

namespace fusedopt::FUSEDOPT_ISA {

FUSEDOPT_HD uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

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

template <bool kSigned>
FUSEDOPT_HD float dequantize(uint8_t code, float scale) {
  if constexpr (kSigned) {
    const float u = float(int8_t(code)) * (1.0f / 127);
    return scale * (u * (u < 0 ? -u : u));
  } else {
    const float u = float(code) * (1.0f / 255);
    const float square = u * u;
    return scale * (square * square);
  }
}

// To the nearest integer, of 0 <= x < 2^22. A float of 2^23 has no bits below 1, so the addition rounds.
FUSEDOPT_HD int32_t nearest(float x) { return bit_cast<int32_t>(x + 8388608.0f) - 0x4b000000; }

// A GPU's own square root of one instruction. Else by Newton's iteration for the inverse, of normal numbers and 0:
// within 5e-6 and 6e-7 of the root, a hundredth and a thousandth of what would change a code, and without the divisions
// and square roots that an update is already busy with.
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

template <bool kSigned>
FUSEDOPT_HD uint8_t quantize(float x, float factor) {
  const float part = bit_cast<float>(magnitude_bits(x)) * factor;
  if constexpr (kSigned) {
    const int32_t code = nearest(root(part));
    return uint8_t(x < 0 ? -code : code);
  } else {
    const int32_t code = nearest(fourth_root(part));
    return uint8_t(code == 0 && x > 0 ? 1 : code);
  }
}

// The unsigned code below or above a value, each with the probability that makes the mean the value. A root off by one
// does no harm, and the largest has the largest code, whatever the bits: its part is within an ulp of 255^4.
FUSEDOPT_HD uint8_t either(float x, float factor, uint32_t random16) {
  constexpr float kInteger = 8388608.0f;  // a float of 2^23 has no bits below 1
  const float part = bit_cast<float>(magnitude_bits(x)) * factor;
  const float near = (fourth_root(part) + kInteger) - kInteger;
  const float below = (near * near) * (near * near) > part ? near - 1.0f : near;
  const float low = below > 254.0f ? 254.0f : below;
  const float square = low * low;
  const float width = (2.0f * low + 1.0f) * (2.0f * square + 2.0f * low + 1.0f);  // (low + 1)^4 - low^4
  const float chance = (float(int32_t(random16)) + 0.5f) * (1.0f / 65536);
  const float code = chance * width < part - square * square ? low + 1.0f : low;
  const int32_t whole = bit_cast<int32_t>(code + kInteger) - 0x4b000000;
  return uint8_t(whole == 0 && x > 0 ? 1 : whole);
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
