// What the kernels of an update share, the plain ones and those at a chosen precision.
#pragma once
#include <type_traits>

#include "../device_step.h"
#include "../rules.h"
#include "fast_float.h"
#include "launch.h"

namespace fusedopt {

// For a persistent grid of blocks of kThreads, which walks the chunks. Taken by value, not as a __grid_constant__:
// loops are then specialised for what holds for a whole tensor.
struct UpdateArgs {
  const DeviceRow* rows;
  const void* const* grads;
  const int32_t* row_of_chunk;
  int64_t chunks;
  const char* derived;  // of each row, kDerivedBytes apart
  const float* found_inf;
  Dtype param, grad, state;
  Precision precision;
};

constexpr int kThreads = 256;

using UpdateKernel = void (*)(UpdateArgs);

// Null where there is none.
UpdateKernel plain_update(int rule, Dtype param, Dtype grad, Dtype state);
UpdateKernel precise_update(int rule, Dtype param, Dtype grad, Dtype state);

namespace FUSEDOPT_ISA {

template <class P>
using Arithmetic = std::conditional_t<sizeof(P) == 2, fast_float, Compute<P>>;

// What an update needs of a tensor beyond its row. One size for all rules, so that tables do not depend on them.
constexpr size_t kDerivedBytes = 128;

template <class Rule, class T>
struct Derived {
  Rule rule;
  T grad_factor;
  uint32_t step;  // 0 where none are counted
};

FUSEDOPT_HD bool skips(const float* found_inf) { return found_inf && *found_inf != 0.0f; }

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
