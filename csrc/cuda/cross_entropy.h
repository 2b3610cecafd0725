// Cross entropy on rows of logits on a CUDA device.
#pragma once
#include <cstdint>

#include "../step.h"

namespace fusedopt {

// As csrc/cross_entropy.h; all pointers are the device's. Float everywhere but logits, probabilities and grad.
struct CudaCrossEntropyArgs {
  Dtype dtype;         // of logits, grad and probabilities: float32, bfloat16 or float16
  const void* logits;  // (rows, classes), class stride 1
  int64_t rows, classes;
  int64_t logits_stride;
  const int64_t* target;      // (rows,) class indices, or null
  const void* probabilities;  // (rows, classes), class stride 1, or null
  int64_t probabilities_stride;
  const float* weight;  // (classes,) or null
  int64_t ignore_index;
  float label_smoothing, z_loss, logit_scale;
  float softcap;  // 0: none

  void* grad;  // (rows, classes), or null
  int64_t grad_stride;
  const float* grad_factor;  // one float
  const float* upstream;     // (rows,), backward only; null for ones
  float *loss, *lse;         // (rows,); lse is written forward, read backward
  int64_t* argmax;           // (rows,), forward only; all three or none
  bool* correct;
  float* entropy;
};

enum class CudaPass { kForward, kBackward };

// All asynchronous; they throw CudaError, or std::invalid_argument for a dtype that has no kernel.
void cuda_cross_entropy(const CudaCrossEntropyArgs& args, CudaPass pass, int device, void* stream);

// Where a target is out of range: 2 once the others are written, its row, its value. Host memory that the device sees.
struct BadTarget {
  int64_t state, row, value;
};

// *factor = 1 / (the targets' total weight), or 1 if not `mean`; all rows if target is null. `partial`: kPartials
// doubles.
inline constexpr int kPartials = 256;
void cuda_target_factor(const int64_t* target, int64_t rows, const float* weight, int64_t classes, int64_t ignore_index,
                        bool mean, double* partial, float* factor, BadTarget* bad, int device, void* stream);

// *loss = *factor * the sum of `rows` floats, in an order that depends on their number alone.
void cuda_total_loss(const float* losses, int64_t rows, const float* factor, double* partial, float* loss, int device,
                     void* stream);

// Multiplies a contiguous tensor by a float on the device; where that is 1, nothing is read or written.
void cuda_scale(void* tensor, Dtype dtype, int64_t numel, const float* factor, int device, void* stream);

}  // namespace fusedopt
