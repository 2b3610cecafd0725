// Random bits for a block of elements, compiled once per instruction set.
#include "random.h"

#include "../precision.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedopt::FUSEDOPT_ISA {
namespace {

// A vector of 64-bit lanes, of which the low halves count: the product of two 32-bit numbers is then one instruction,
// and nothing has to be taken apart. gcc 12 makes of the same in plain C a product of 64-bit numbers, and all of it
// takes 2.5 times as long.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
Lanes product(Lanes a, Lanes b) { return Lanes(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b))); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
Lanes product(Lanes a, Lanes b) { return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#else
using Lanes = uint64_t;
Lanes product(Lanes a, Lanes b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
#endif
constexpr int kLanes = int(sizeof(Lanes) / sizeof(uint64_t));
constexpr int kCalls = int(kCodeBlock) / 8;

// precision.h's philox() of kLanes neighbouring eighths: words 0 and 1 of each, and words 2 and 3.
void philox_lanes(const RandomKey& key, uint32_t tensor, const Lanes& eighth, uint64_t* first, uint64_t* second) {
  Lanes a = eighth, b = (eighth >> 32 << 2) | tensor, c = Lanes() + key.step, d = Lanes() + key.parameter;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes x = product(a, Lanes() + 0xD2511F53u), y = product(c, Lanes() + 0xCD9E8D57u);
    a = (y >> 32) ^ b ^ k0;
    c = (x >> 32) ^ d ^ k1;
    b = y;
    d = x;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Lanes pairs[] = {(a & 0xffffffffu) | b << 32, (c & 0xffffffffu) | d << 32};
  std::memcpy(first, &pairs[0], sizeof(Lanes));
  std::memcpy(second, &pairs[1], sizeof(Lanes));
}

// Of kCodeBlock elements of the whole tensor from `begin`, a multiple of 8.
void random_elements(const RandomKey& key, uint32_t tensor, int64_t begin, uint16_t* bits) {
  uint64_t eighths[kCalls], first[kCalls], second[kCalls], words[2 * kCalls];
  for (int i = 0; i < kCalls; ++i) eighths[i] = uint64_t(begin / 8 + i);
  for (int i = 0; i < kCalls; i += kLanes) {
    Lanes eighth;
    std::memcpy(&eighth, eighths + i, sizeof eighth);
    philox_lanes(key, tensor, eighth, first + i, second + i);
  }
  for (int i = 0; i < kCalls; ++i) {
    words[2 * i] = first[i];
    words[2 * i + 1] = second[i];
  }
  std::memcpy(bits, words, sizeof words);  // little-endian: element 2 k has the low half of word k
}

}  // namespace

void random_block(const RandomKey& key, uint32_t tensor, const Origin& origin, int64_t begin, int n, uint16_t* bits) {
  if (origin.run == origin.stride && (origin.first + begin) % 8 == 0)
    return random_elements(key, tensor, origin.first + begin, bits);
  for (int done = 0; done < n;) {
    const int64_t in_run = (begin + done) % origin.run;
    const int64_t at = origin.first + (begin + done) / origin.run * origin.stride + in_run;
    const int before = int(at % 8);  // bits come for eight at a time
    uint16_t more[kCodeBlock];
    random_elements(key, tensor, at - before, more);
    int64_t take = origin.run == origin.stride ? n : origin.run - in_run;
    take = take < n - done ? take : n - done;
    take = take < kCodeBlock - before ? take : kCodeBlock - before;
    std::memcpy(bits + done, more + before, size_t(take) * sizeof(uint16_t));
    done += int(take);
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
