// What one optimizer step is told: plain structs, shared by every backend.
#pragma once
#include <cstdint>
#include <vector>

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

// --- the same step for a device, as 64-bit words of its memory ---

// Elements of a tensor that one block of threads takes at a time. A multiple of every vector width, so that all chunks
// of a tensor are aligned alike.
inline constexpr int64_t kChunk = 16384;

struct DeviceRow {
  void* param;
  void* state[kMaxStates];
  float* step;  // advanced by the step itself; null where the rule counts no steps
  int64_t numel;
  int64_t first_chunk;
  int64_t group;
};

struct DeviceGroup {
  double hyper[kMaxHyper];
  double grad_factor;  // 1, or -1 under maximize; the step divides it by GradScaler's scale
  const void* lr;      // replaces hyper[0], the first of every rule; or null
  int64_t lr_is_double;
};

// All rows of a device that share one rule and one set of dtypes. Gradients stand apart: they move from step to step,
// the rest hardly ever does.
struct DeviceLaunch {
  int rule;
  Dtype param, grad, state;
  std::vector<DeviceRow> rows;
  std::vector<const void*> grads;
  int64_t chunks;     // of all rows
  bool rows_changed;  // since the last step, and so have the chunks
  bool grads_changed;
};

}  // namespace fusedopt
