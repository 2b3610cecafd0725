// What one build of the CPU engine (one instruction set) offers. Builds share no symbol: see element.h.
#pragma once
#include "../cross_entropy.h"
#include "../mse.h"
#include "../step.h"

namespace fusedopt {

// A contiguous piece of a launch's elements: from element `begin` of row `first_row`, up to element `end` of
// `last_row`.
struct Span {
  int64_t first_row, begin;
  int64_t last_row, end;
};

// Rows that lie side by side are taken in blocks of neighbours, as many as keep a block of logits in the cache.
inline constexpr int64_t kMaxPixels = 128;

static inline int64_t pixel_block(int64_t classes) {
  constexpr int64_t kLogits = 1 << 16, kMinPixels = 16;
  const int64_t fits = kLogits / classes & ~(kMinPixels - 1);
  return fits > kMaxPixels ? kMaxPixels : fits < kMinPixels ? kMinPixels : fits;
}

static inline int64_t scratch_bytes(const CrossEntropyArgs& a) {
  const int64_t width = a.pixels ? pixel_block(a.classes) : 1;
  return a.classes * width * int64_t(a.dtype == Dtype::kF64 ? sizeof(double) : sizeof(float));
}

struct CpuEngine {
  const char* isa;
  // The loop for a rule and its dtypes; null where there is none.
  using StepKernel = void (*)(const Launch&, const Span&);
  StepKernel (*step_kernel)(const Launch&);
  // Of rules whose step depends on norms, null for others: adds the squares of each row's parameter and direction
  // within the span to sums[2 * (row - first_row)] and the next.
  using NormsKernel = void (*)(const Launch&, const Span&, double* sums);
  NormsKernel (*norms_kernel)(const Launch&);
  // Rows [begin, end) of a cross entropy: forward (with the gradient when args.grad is set), or backward from lse.
  // `scratch` holds scratch_bytes(args), the calling thread's own.
  using CrossEntropyKernel = void (*)(const CrossEntropyArgs&, int64_t begin, int64_t end, void* scratch);
  CrossEntropyKernel (*cross_entropy_forward)(const CrossEntropyArgs&);
  CrossEntropyKernel (*cross_entropy_backward)(const CrossEntropyArgs&);
  // The sum of squares of elements [begin, end), with the gradient when args.grad is set.
  using MseKernel = double (*)(const MseArgs&, int64_t begin, int64_t end);
  MseKernel (*mse)(const MseArgs&);
  // The sum of squares of elements [begin, end).
  using NormKernel = double (*)(const void*, int64_t begin, int64_t end);
  NormKernel (*norm)(Dtype);
};

}  // namespace fusedopt
