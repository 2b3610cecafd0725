#pragma once
#include "../element.h"
#include "../step.h"

namespace fusedopt::FUSEDOPT_ISA {

struct RandomKey {
  uint64_t seed;
  uint32_t step, parameter;
};

// 16 random bits for each of kCodeBlock elements from `begin`; `tensor` and the rest as precision.h's philox().
void random_block(const RandomKey& key, uint32_t tensor, int64_t begin, uint16_t* bits);

}  // namespace fusedopt::FUSEDOPT_ISA
