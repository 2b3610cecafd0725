// What one optimizer step is told on a device: step.h's tables as 64-bit words of the device's memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "step.h"

namespace fusedopt {

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
  Extras extras;
};

struct DeviceGroup {
  double hyper[kMaxHyper];
  double grad_factor;  // 1, or -1 under maximize; the step divides it by GradScaler's scale
  const void* lr;      // replaces hyper[0], the first of every rule; or null
  int64_t lr_is_double;
};

// All rows of a device that share one rule, one set of dtypes and their holders. Gradients stand apart: they move from
// step to step, the rest hardly ever does.
struct DeviceLaunch {
  int rule;
  Dtype param, grad, state;
  int32_t holders;  // see gather.h's Slot
  std::vector<DeviceRow> rows;
  std::vector<const void*> grads;
  int64_t chunks;     // of all rows
  bool rows_changed;  // since the last step, and so have the chunks
  bool grads_changed;
  std::vector<int32_t> row_of_chunk;  // by map_chunks(), for a device that cannot make it itself

  void map_chunks() {
    row_of_chunk.clear();
    for (size_t r = 0; r < rows.size(); ++r)
      row_of_chunk.insert(row_of_chunk.end(), size_t((rows[r].numel + kChunk - 1) / kChunk), int32_t(r));
  }
};

}  // namespace fusedopt
