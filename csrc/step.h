// What one optimizer step is told: plain structs, shared by every backend.
#pragma once
#include <cstdint>

namespace fusedopt {

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxHyper = 8;

enum class Dtype : int8_t { kF64, kF32, kBF16, kF16, kOther };

// One tensor of a step. `numel` elements lie densely behind each pointer, in the same order.
struct Row {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t numel;
  double step;  // already advanced: 1 at a tensor's first step
  int32_t group;
};

// One parameter group, as its rule reads it.
struct Group {
  double hyper[kMaxHyper];  // in the order of the rule's Hyper
  double grad_factor;       // multiplies every gradient: 1 / GradScaler's scale, negative under maximize
};

// All rows that share one rule and one set of dtypes.
struct Launch {
  int rule;  // index into rules.h's list
  Dtype param, grad, state;
  const Row* rows;
  int64_t n_rows;
  const Group* groups;
  int threads;
};

}  // namespace fusedopt
