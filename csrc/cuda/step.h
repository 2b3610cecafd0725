// One optimizer step on a CUDA device: the tables of gather.h's DevicePlan go up, two kernels per launch do the work,
// four where a rule needs norms.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../device_step.h"

namespace fusedopt {

struct CudaStepArgs {
  std::vector<DeviceLaunch>* launches;
  const std::vector<DeviceGroup>* groups;
  bool all_changed;  // nothing of the tables is in `memory` yet
  bool groups_changed;
  void* memory;                         // cuda_step_bytes() on the device, the step's own until its next step
  const float *found_inf, *grad_scale;  // device scalars, or null
  const Precision* precision;           // null: a plain step, without extras and codes
  int device;
  void* stream;
};

// Whether there is a kernel for a launch's rule and dtypes.
bool cuda_can_step(int rule, Dtype param, Dtype grad, Dtype state);

// Device memory that a step needs.
size_t cuda_step_bytes(const std::vector<DeviceLaunch>& launches, size_t n_groups);

// Asynchronous. Returns the number of kernels launched. Throws CudaError.
int cuda_step(const CudaStepArgs& args);

// *total = the sum of all gradients' squares, in an order that depends on their sizes alone; nothing is updated, but
// the tables go up. `partial`: a double for each chunk of the launches.
int cuda_sum_squares(const CudaStepArgs& args, double* partial, double* total);

}  // namespace fusedopt
