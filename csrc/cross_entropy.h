// What one cross entropy is told: plain structs, shared by every backend.
#pragma once
#include "step.h"

namespace fusedopt {

// loss_i = (1 - label_smoothing) * -w[y] log p[y]  +  label_smoothing / V * sum_c -w[c] log p[c]      (class indices)
// loss_i = sum_c -w[c] ((1 - label_smoothing) t[c] + label_smoothing / V) log p[c]                    (probabilities)
struct CrossEntropyArgs {
  Dtype dtype;         // of logits, grad and probabilities
  const void* logits;  // (rows, classes), class stride 1
  int64_t rows, classes;
  int64_t logits_stride;      // elements from row to row
  const int64_t* target;      // (rows,) class indices, or null
  const void* probabilities;  // (rows, classes), class stride 1, or null
  int64_t probabilities_stride;
  const void* weight;  // (classes,) float, double for double logits; null for ones
  double weight_sum;   // sum of weight; classes where weight is null
  int64_t ignore_index;
  double label_smoothing;

  void* grad;  // (rows, classes) or null: d(loss) / d(logits) * grad_factor [* upstream[row]]
  int64_t grad_stride;
  double grad_factor;
  const void* upstream;  // (rows,) float or double, backward only; null for ones
  void* loss;            // (rows,) float or double
  void* lse;             // (rows,) float or double; written forward, read backward
};

}  // namespace fusedopt
