// The CPU engine as the bindings see it: instruction set chosen, work spread over threads.
#pragma once
#include <vector>

#include "engine.h"

namespace fusedopt {

// Instruction sets this build holds and this machine runs, best first; the list ends with null.
const char* const* cpu_isas();
const char* cpu_isa();               // the one in use
bool use_cpu_isa(const char* name);  // false when this machine or build lacks it
bool has_openmp();

// False when there is no loop for these dtypes; nothing has been written then.
bool cpu_can_step(const Launch& launch);
bool cpu_step(const Launch& launch);
bool cpu_cross_entropy_forward(const CrossEntropyArgs& args, int threads);
bool cpu_cross_entropy_backward(const CrossEntropyArgs& args, int threads);
double cpu_mse(const MseArgs& args, int threads);  // args.dtype is a floating-point one

// Elements that lie densely.
struct Array {
  const void* data;
  Dtype dtype;  // a floating-point one
  int64_t numel;
};
double cpu_sum_squares(const std::vector<Array>& arrays, int threads);

// Ask for huge pages behind [data, data + bytes) before it is first touched; a hint, without effect where unsupported.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fusedopt
