// What one optimizer step is told: plain structs, shared by every backend.
#pragma once
#include <cstdint>

namespace fusedopt {

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxHyper = 8;

// kCode: states as 8-bit codes, a float32 scale for each kCodeBlock of them; see precision.h.
enum class Dtype : int8_t { kF64, kF32, kBF16, kF16, kCode, kOther };

inline constexpr int64_t kCodeBlock = 256;

// What is kept of a tensor beside the states of its rule, each null where it is not kept.
struct Extras {
  float* scale[kMaxStates];  // of the states' codes
  void* master;              // of a bf16 parameter: the int16 that it lacks of a float32; of f16: a float32
  void* ema;                 // the average, in the compute type
  int64_t index;             // of the parameter in its optimizer: tells its random bits from others'
};

// Where a part lies in the tensor that processes share: its element i is element first + i / run * stride + i % run.
// Random bits follow from that, so that they are the same however many share.
struct Origin {
  int64_t first, run, stride;
};

// One tensor of a step. `numel` elements lie densely behind each pointer, in the same order.
struct Row {
  void* param;
  const void* grad;  // null: the average moves, nothing else does
  void* state[kMaxStates];
  int64_t numel;
  double step;  // already advanced: 1 at a tensor's first step
  int32_t group;
  Extras extras;
  Origin origin;
};

// How a step rounds and averages, beyond storing to the nearest.
struct Precision {
  double ema_weight;  // of the new weights
  bool stochastic;    // bf16 parameters without a master, bf16 states, and the codes of squares
  uint64_t seed;
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
  const Precision* precision;      // null: a plain step, without extras and codes
  const double* ratios = nullptr;  // of rules that are kNormed: what each row's rule adapts to
};

}  // namespace fusedopt
