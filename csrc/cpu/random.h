#pragma once
#include "../element.h"
#include "../step.h"

namespace fusedopt::FUSEDOPT_ISA {

struct RandomKey {
  uint64_t seed;
  uint32_t step, parameter;
};

// 16 random bits for each of n <= kCodeBlock elements of a part from `begin`; `tensor` and the rest as precision.h's
// philox(). Room for kCodeBlock is written.
void random_block(const RandomKey& key, uint32_t tensor, const Origin& origin, int64_t begin, int n, uint16_t* bits);

}  // namespace fusedopt::FUSEDOPT_ISA
