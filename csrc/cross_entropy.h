// What one cross entropy is told: plain structs, shared by every backend.
#pragma once
#include "step.h"

namespace fusedopt {

// With s = logit_scale * x, then s = softcap * tanh(s / softcap) if there is a softcap, and p = softmax(s):
// loss_i = (1 - label_smoothing) * -w[y] log p[y]  +  label_smoothing / V * sum_c -w[c] log p[c]      (class indices)
// loss_i = sum_c -w[c] ((1 - label_smoothing) t[c] + label_smoothing / V) log p[c]                    (probabilities)
// and z_loss * logsumexp(s)^2 on top of either.
struct CrossEntropyArgs {
  Dtype dtype;  // of logits, grad and probabilities; "compute" below is float, or double for double logits
  int64_t rows, classes;
  // 0: the matrices are (rows, classes) with class stride 1, and a stride leads from row to row. Otherwise they are
  // (rows / pixels, classes, pixels) with pixel stride 1, and a stride leads from image to image.
  int64_t pixels;
  const void* logits;
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;      // (rows,) class indices, or null
  const void* probabilities;  // a matrix, or null
  int64_t probabilities_stride, probabilities_class_stride;
  const void* weight;  // (classes,) compute; null for ones
  double weight_sum;   // sum of weight; classes where weight is null
  int64_t ignore_index;
  double label_smoothing, z_loss, logit_scale;
  double softcap;  // 0 for none

  void* grad;  // a matrix or null: d(loss) / d(logits) * grad_factor [* upstream[row]]; may be logits
  int64_t grad_stride, grad_class_stride;
  double grad_factor;
  const void* upstream;  // (rows,) compute, backward only; null for ones
  void* loss;            // (rows,) compute
  void* lse;             // (rows,) compute: logsumexp(s), NaN where it is infinite; written forward, read backward

  // Statistics, forward only: all of them or, null, none. Of ignored rows too, which are not read otherwise.
  int64_t* argmax;  // (rows,) of logit_scale * x, as torch has it: the first maximum, or the first NaN
  bool* correct;    // (rows,) argmax is the target, or the first largest probability; false for ignored rows
  void* entropy;    // (rows,) compute: -sum_c p[c] log p[c], where 0 log 0 = 0
};

}  // namespace fusedopt
