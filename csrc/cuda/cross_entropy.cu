// Cross entropy on a CUDA device. A row lies in the registers of one block, or of the blocks of a cluster: each logit
// is read once and its gradient written once. Longer rows are walked in tiles and read again for the gradient.
#include "cross_entropy.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "launch.h"
#include "sums.h"
#include "vector.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;
namespace cg = cooperative_groups;

constexpr int kPacks = 8;         // 16-byte vectors that a thread holds
constexpr int kMaxThreads = 256;  // of a row, in one block
constexpr int kMaxCluster = 8;    // the most that every device with clusters grants
constexpr float kInfinity = __builtin_huge_valf();

// What a row's targets are: a class, smoothed evenly or not at all; or something read of every class.
enum class Target { kIndex, kDense };
// Kernels cost compile time. The usual case, forward without a soft cap or statistics, has its own; the others ask.
enum class Variant { kPlain, kGeneral, kBackward };

// --- what is known of a row after some of its classes, and how two such parts become one ---

FUSEDOPT_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
constexpr float kLog2E = 1.44269504088896341f;
FUSEDOPT_HD float exp_of(float x) { return exp2_of(x * kLog2E); }

// Sums count from here: from the maximum, and from 0 as long as no logit was above -inf.
FUSEDOPT_HD float reference(float max) { return max == -kInfinity ? 0.0f : max; }

struct Sums {
  float max = -kInfinity;
  float exp = 0;   // of exp(x - reference)
  float mass = 0;  // of y
  float dot = 0;   // of y (x - reference)

  FUSEDOPT_HD void move_to(float new_max) {
    const float step = reference(max) - reference(new_max);
    if (max != new_max) exp *= max == -kInfinity ? 1.0f : exp_of(step);
    dot += mass != 0.0f ? mass * step : 0.0f;
    max = new_max;
  }
  FUSEDOPT_HD void merge(Sums other) {
    const float both = fmaxf(max, other.max);
    move_to(both);
    other.move_to(both);
    exp += other.exp;
    mass += other.mass;
    dot += other.dot;
  }
  template <class Exchange>
  __device__ Sums through(const Exchange& exchange) const {
    Sums sums;
    sums.max = exchange(max);
    sums.exp = exchange(exp);
    sums.mass = exchange(mass);
    sums.dot = exchange(dot);
    return sums;
  }
};

// The first class that has the largest value.
struct Best {
  float value = -kInfinity;
  int at = 0x7fffffff;

  FUSEDOPT_HD void see(float v, int c) {
    if (v > value || (v == value && c < at)) {
      value = v;
      at = c;
    }
  }
  template <class Exchange>
  __device__ Best through(const Exchange& exchange) const {
    Best best;
    best.value = exchange(value);
    best.at = exchange(at);
    return best;
  }
};

struct SumsAndStats : Sums {
  float moment = 0;  // of exp(x - reference) (x - reference)
  Best logit, target;

  FUSEDOPT_HD void move_to(float new_max) {
    const float step = reference(max) - reference(new_max);
    if (max != new_max && exp != 0.0f) moment = (moment + exp * step) * (max == -kInfinity ? 1.0f : exp_of(step));
    Sums::move_to(new_max);
  }
  FUSEDOPT_HD void merge(SumsAndStats other) {
    const float both = fmaxf(max, other.max);
    move_to(both);
    other.move_to(both);
    Sums::merge(other);
    moment += other.moment;
    logit.see(other.logit.value, other.logit.at);
    target.see(other.target.value, other.target.at);
  }
  template <class Exchange>
  __device__ SumsAndStats through(const Exchange& exchange) const {
    SumsAndStats all;
    static_cast<Sums&>(all) = Sums::through(exchange);
    all.moment = exchange(moment);
    all.logit = logit.through(exchange);
    all.target = target.through(exchange);
    return all;
  }
};

// The parts of `lanes` neighbouring lanes, a power of two, in each of them.
template <class Part>
__device__ Part across_lanes(Part part, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    part.merge(part.through([&](auto value) { return __shfl_xor_sync(~0u, value, distance); }));
  return part;
}

// A row's blocks: one, or a cluster.
struct Team {
#if defined(FUSEDOPT_SIMT) || __CUDA_ARCH__ >= 900
  static __device__ int size() { return int(cg::this_cluster().num_blocks()); }
  static __device__ int rank() { return int(cg::this_cluster().block_rank()); }
  static __device__ void sync() { cg::this_cluster().sync(); }
  template <class T>
  static __device__ T& of(T& shared, int rank) {
    return *cg::this_cluster().map_shared_rank(&shared, unsigned(rank));
  }
#else
  static __device__ int size() { return 1; }
  static __device__ int rank() { return 0; }
  static __device__ void sync() { __syncthreads(); }
  template <class T>
  static __device__ T& of(T& shared, int) {
    return shared;
  }
#endif
};

// The parts of all threads of a row, in each of them. What a thread read before, no other overwrites until then. A row
// of one warp has its block's other warps for neighbours, and waits for none of them. The caller must Team::sync()
// before it ends if the team has several blocks.
template <class Part>
__device__ Part across_row(Part part) {
  __syncwarp();
  part = across_lanes(part, kWarp);
  const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (warps == 1 && Team::size() == 1) return part;
  FUSEDOPT_SHARED(Part, of_warp, [kMaxThreads / kWarp]);
  FUSEDOPT_SHARED(Part, of_block, [1]);
  if (lane == 0) of_warp[threadIdx.x / kWarp] = part;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    part = across_lanes(lane < warps ? of_warp[lane] : Part(), kWarp);
    if (lane == 0) of_block[0] = part;
  }
  Team::sync();
  const int rank = lane % kMaxCluster;
  return across_lanes(rank < Team::size() ? Team::of(of_block[0], rank) : Part(), kMaxCluster);
}

// --- one row ---

// A row of classes as 16-byte vectors of memory: the first and the last may lie partly outside.
template <class S>
struct RowOf {
  static constexpr int kSize = Vector<S>::kSize;
  S* first;
  int shift;  // elements of the first vector that lie before the row

  __device__ RowOf(S* first) : first(first), shift(int(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(S))) {}
  __device__ int vectors(int classes) const { return (shift + classes + kSize - 1) / kSize; }
  __device__ int class_of(int vector) const { return vector * kSize - shift; }

  __device__ __forceinline__ Vector<S> load(int begin, int classes, bool once) const {
    Vector<S> v;
    if (begin >= 0 && begin + kSize <= classes) {
      const auto* from = reinterpret_cast<const uint4*>(first + begin);
      const uint4 words = once ? __ldcs(from) : *from;
      memcpy(v.words, &words, sizeof words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        S e;
        store(e, -kInfinity);
        if (unsigned(begin + i) < unsigned(classes)) e = first[begin + i];
        v.set(i, e);
      }
    }
    return v;
  }
  // `aligned`: the vectors of this row are those of the row that `begin` was made for.
  __device__ __forceinline__ void write(int begin, int classes, const Vector<S>& v, bool aligned) const {
    if (aligned && begin >= 0 && begin + kSize <= classes) {
      uint4 words;
      memcpy(&words, v.words, sizeof words);
      __stcs(reinterpret_cast<uint4*>(first + begin), words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (unsigned(begin + i) < unsigned(classes)) first[begin + i] = v.get(i);
    }
  }
};

template <class S, Target kTarget, Variant kVariant>
struct Row {
  static constexpr int kSize = Vector<S>::kSize;
  const CudaCrossEntropyArgs& a;
  const S* probability = nullptr;
  int label = -1;
  bool ignored = false, invalid = false;
  float keep, spread, one_hot = 0;

  __device__ Row(const CudaCrossEntropyArgs& a, int64_t row)
      : a(a), keep(1 - a.label_smoothing), spread(a.label_smoothing / float(a.classes)) {
    if (kTarget == Target::kDense && a.probabilities) {
      probability = static_cast<const S*>(a.probabilities) + row * a.probabilities_stride;
    } else {
      const int64_t target = a.target[row];
      ignored = target == a.ignore_index;
      invalid = !ignored && (target < 0 || target >= a.classes);
      if (!ignored && !invalid) {
        label = int(target);
        one_hot = keep * (a.weight ? a.weight[label] : 1.0f);
      }
    }
  }

  // y[c], but for the one-hot part of a class index
  __device__ __forceinline__ float dense(int c) const {
    if constexpr (kTarget == Target::kIndex) return spread;
    const float even = probability ? keep * load(probability[c]) + spread : spread;
    return a.weight ? a.weight[c] * even : even;
  }
  __device__ bool has_dense() const { return kTarget != Target::kIndex || spread != 0.0f; }

  __device__ bool has_cap() const { return kVariant != Variant::kPlain && a.softcap != 0.0f; }
  __device__ __forceinline__ float scaled(S stored) const {
    return __fmul_rn(a.logit_scale, load(stored));  // fused with `- max`, it would leave max's rounding error
  }
  __device__ __forceinline__ float capped(float x) const { return a.softcap * tanh_of(x / a.softcap); }
  __device__ float logit(S stored) const { return has_cap() ? capped(scaled(stored)) : scaled(stored); }
  // asks once for a vector: of memory outside the row too
  __device__ __forceinline__ void logits(const Vector<S>& v, float (&x)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = scaled(v.get(i));
    if (!has_cap()) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = capped(x[i]);
  }
  // d logit / d stored
  __device__ __forceinline__ float slope(float logit) const {
    const float tanh = logit / a.softcap;
    return has_cap() ? a.logit_scale * (1 - tanh * tanh) : a.logit_scale;
  }
  static __device__ __forceinline__ float tanh_of(float x) {
    return 1 - 2 / (exp_of(2 * x) + 1);  // to 1e-7, absolute: logits are not told apart any closer
  }
};

template <class S, Target kTarget, Variant kVariant, class Part>
__device__ __forceinline__ void see_logits(Part& part, const Row<S, kTarget, kVariant>& row, const Vector<S>& v,
                                           int begin) {
  constexpr int kSize = Vector<S>::kSize;
  const bool stats = std::is_same_v<Part, SumsAndStats> && row.a.argmax;
  const auto is_class = [&](int c) { return unsigned(c) < unsigned(row.a.classes); };
  float x[kSize], max = -kInfinity;
  row.logits(v, x);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (kVariant != Variant::kPlain && !is_class(begin + i)) x[i] = -kInfinity;  // the cap has made -inf finite
    max = fmaxf(max, x[i]);
  }
  if (max > part.max) part.move_to(max);
  const float from = reference(part.max);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float e = exp_of(x[i] - from);
    part.exp += e;
    if constexpr (std::is_same_v<Part, SumsAndStats>)
      if (stats) {
        if (e != 0.0f) part.moment += e * (x[i] - from);
        if (is_class(begin + i)) part.logit.see(x[i], begin + i);
      }
  }
  if (!row.has_dense()) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    if (is_class(begin + i)) {
      const float y = row.dense(begin + i);
      part.mass += y;
      part.dot += y * (x[i] - from);
      if constexpr (std::is_same_v<Part, SumsAndStats>)
        if (stats && row.probability) part.target.see(load(row.probability[begin + i]), begin + i);
    }
}

// A thread's share of a row: tiles of kPacks vectors, neighbouring threads at neighbouring vectors.
struct Tiles {
  int vectors, per_tile, first;

  __device__ explicit Tiles(int vectors)
      : vectors(vectors),
        per_tile(Team::size() * int(blockDim.x) * kPacks),
        first(Team::rank() * int(blockDim.x) * kPacks + int(threadIdx.x)) {}
  __device__ int count() const { return (vectors + per_tile - 1) / per_tile; }

  // work(pack, vector) for this thread's vectors of a tile
  template <class Work>
  __device__ __forceinline__ void each(int tile, const Work& work) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int vector = tile * per_tile + pack * int(blockDim.x) + first;
      if (vector < vectors) work(pack, vector);
    }
  }
};

// Blocks at once on a multiprocessor, so that while one reduces, others load and store: as many as registers allow.
template <Target kTarget, Variant kVariant>
constexpr int kBlocks = kTarget == Target::kIndex && kVariant != Variant::kGeneral ? 3 : 2;

template <class S, Target kTarget, Variant kVariant>
__global__ __launch_bounds__(kMaxThreads, (kBlocks<kTarget, kVariant>)) void row_kernel(
    const __grid_constant__ CudaCrossEntropyArgs a) {
  using Part = std::conditional_t<kVariant == Variant::kGeneral, SumsAndStats, Sums>;
  constexpr bool kForward = kVariant != Variant::kBackward;
  const bool stats = kVariant == Variant::kGeneral && a.argmax;
  const int64_t r = int64_t(blockIdx.x) / Team::size() * blockDim.y + threadIdx.y;
  if (r >= a.rows) return;  // whole warps: blockDim.y > 1 only where a row is one warp's
  const int classes = int(a.classes);
  const Row<S, kTarget, kVariant> row(a, r);
  const RowOf<S> logits(static_cast<S*>(const_cast<void*>(a.logits)) + r * a.logits_stride);
  const RowOf<S> grad(static_cast<S*>(a.grad) + (a.grad ? r * a.grad_stride : 0));
  const bool aligned = logits.shift == grad.shift;
  const Tiles tiles(logits.vectors(classes));
  const bool once = tiles.count() == 1;
  const bool leads = threadIdx.x == 0 && Team::rank() == 0;
  const bool skipped = row.ignored || row.invalid;
  Vector<S> held[kPacks];
  const auto load_tile = [&](int tile) {
    tiles.each(tile, [&](int pack, int vector) {
      held[pack] = logits.load(logits.class_of(vector), classes, once || tile > 0);
    });
  };

  Part part;
  float max = 0, lse = 0;
  if (kForward && (!skipped || stats)) {
    const float x_label = leads && row.label >= 0 ? row.logit(logits.first[row.label]) : 0.0f;
    for (int tile = 0; tile < tiles.count(); ++tile) {
      load_tile(tile);
      tiles.each(tile, [&](int pack, int vector) { see_logits(part, row, held[pack], logits.class_of(vector)); });
    }
    part = across_row(part);
    const float log_sum = part.max == -kInfinity ? nanf("") : logf(part.exp);  // all -inf: NaN, as in torch
    max = part.max;
    lse = max + log_sum;
    if (leads) {
      const float dot = part.dot + (row.one_hot != 0.0f ? row.one_hot * (x_label - max) : 0.0f);
      a.loss[r] = (part.mass + row.one_hot) * log_sum - dot + (a.z_loss != 0.0f ? a.z_loss * lse * lse : 0.0f);
      a.lse[r] = lse;
      if constexpr (kVariant == Variant::kGeneral)
        if (stats) {
          const int truth = row.probability ? part.target.at : row.label;
          a.argmax[r] = part.logit.at < classes ? part.logit.at : 0;
          a.correct[r] = !skipped && part.logit.at == truth;
          a.entropy[r] = log_sum - part.moment / part.exp;
        }
    }
  } else if (!skipped) {
    if (kTarget == Target::kIndex) {
      part.mass = row.spread * float(classes);
    } else {
      for (int tile = 0; tile < tiles.count(); ++tile)
        tiles.each(tile, [&](int, int vector) {
          const int begin = logits.class_of(vector);
          for (int c = begin < 0 ? 0 : begin; c < begin + RowOf<S>::kSize && c < classes; ++c)
            part.mass += row.dense(c);
        });
      part = across_row(part);
    }
    max = lse = a.lse[r];
    part.exp = 1;
  }
  if (kForward && leads && skipped) {
    a.loss[r] = row.invalid ? nanf("") : 0.0f;
    if (!stats) a.lse[r] = 0;
  }

  if (a.grad) {
    const float factor = *a.grad_factor * (a.upstream ? a.upstream[r] : 1.0f);
    const float scale = factor * (part.mass + row.one_hot + 2 * a.z_loss * lse) / part.exp;
    for (int tile = 0; tile < tiles.count(); ++tile) {
      if (!skipped && !(kForward && once)) load_tile(tile);
      tiles.each(tile, [&](int pack, int vector) {
        const int begin = logits.class_of(vector);
        constexpr int kSize = RowOf<S>::kSize;
        const bool has_label = unsigned(row.label - begin) < unsigned(kSize);
        float x[kSize];
        row.logits(held[pack], x);
        Vector<S> out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          float d = scale * exp_of(x[i] - max);
          if (kTarget == Target::kIndex)
            d -= factor * row.spread;
          else if (unsigned(begin + i) < unsigned(classes))
            d -= factor * row.dense(begin + i);
          if (has_label && begin + i == row.label) d -= factor * row.one_hot;
          S e;
          store(e, skipped ? 0.0f : d * row.slope(x[i]));
          out.set(i, e);
        }
        grad.write(begin, classes, out, aligned);
      });
    }
  }
  if (Team::size() > 1) Team::sync();  // others read this block's sums
}

// --- sums over the rows: what the mean divides by, and the loss ---

struct Targets {
  const int64_t* target;
  const float* weight;
  int64_t classes, ignore_index;
  BadTarget* bad;

  __device__ double operator()(int64_t row) const {
    const int64_t t = target[row];
    if (t == ignore_index) return 0;
    if (t >= 0 && t < classes) return weight ? double(weight[t]) : 1.0;
    auto* const state = reinterpret_cast<unsigned long long*>(&bad->state);
    if (atomicCAS(state, 0ull, 1ull) == 0ull) {
      bad->row = row;
      bad->value = t;
      __threadfence_system();
      atomicExch(state, 2ull);
    }
    return 0;
  }
};

struct Floats {
  const float* values;
  __device__ double operator()(int64_t row) const { return double(values[row]); }
};

template <class Term>
__global__ void sum_rows(const Term term, int64_t rows, double* partial) {
  const double sum = block_sum(rows, term);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void finish_factor(const double* partial, int n, float* factor) {
  const double total = block_sum(n, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) *factor = float(1 / total);
}

__global__ void finish_loss(const double* partial, int n, const float* factor, float* loss) {
  const double total = block_sum(n, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) *loss = float(total * double(*factor));
}

__global__ void set(float* to, float value) { *to = value; }

template <class S>
__global__ void scale(S* tensor, int64_t numel, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  constexpr int kSize = Vector<S>::kSize;
  const RowOf<S> row(tensor);
  const int64_t vectors = (row.shift + numel + kSize - 1) / kSize;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += int64_t(gridDim.x) * blockDim.x) {
    const RowOf<S> one(tensor + v * kSize - row.shift);
    // the first and the last vector may lie partly outside
    const int before = v == 0 ? row.shift : 0;
    const int end = int(v == vectors - 1 ? row.shift + numel - v * kSize : kSize);
    if (before == 0 && end == kSize) {
      const Vector<S> in = one.load(0, kSize, true);
      Vector<S> out;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        S e;
        store(e, load(in.get(i)) * by);
        out.set(i, e);
      }
      one.write(0, kSize, out, true);
    } else {
      for (int i = before; i < end; ++i) store(one.first[i], load(one.first[i]) * by);
    }
  }
}

// --- host side ---

using Kernel = void (*)(CudaCrossEntropyArgs);

template <class S, Target kTarget>
Kernel for_pass(const CudaCrossEntropyArgs& a, CudaPass pass) {
  if (pass == CudaPass::kBackward) return row_kernel<S, kTarget, Variant::kBackward>;
  return a.argmax || a.softcap != 0.0f ? row_kernel<S, kTarget, Variant::kGeneral>
                                       : row_kernel<S, kTarget, Variant::kPlain>;
}

template <class S>
Kernel for_target(const CudaCrossEntropyArgs& a, CudaPass pass) {
  const bool dense = a.probabilities || (a.weight && a.label_smoothing != 0.0f);
  return dense ? for_pass<S, Target::kDense>(a, pass) : for_pass<S, Target::kIndex>(a, pass);
}

Kernel kernel_for(const CudaCrossEntropyArgs& a, CudaPass pass) {
  switch (a.dtype) {
    case Dtype::kF32:
      return for_target<float>(a, pass);
    case Dtype::kBF16:
      return for_target<bf16>(a, pass);
    case Dtype::kF16:
      return for_target<f16>(a, pass);
    default:
      throw std::invalid_argument("cross entropy has no CUDA kernel for these logits");
  }
}

// The code of an older architecture, which a newer device also runs, knows of no clusters.
bool has_clusters(Kernel kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int blocks_for_sum(int64_t rows) {
  return int(std::clamp<int64_t>((rows + 16 * kSumThreads - 1) / (16 * kSumThreads), 1, kPartials));
}

}  // namespace

void cuda_cross_entropy(const CudaCrossEntropyArgs& a, CudaPass pass, int device, void* stream) {
  const Kernel kernel = kernel_for(a, pass);
  if (a.rows == 0) return;
  const OnDevice current(device);
  const int per_vector = 16 / int((a.dtype == Dtype::kF32 ? 4 : 2));
  const int64_t vectors = (a.classes + 2 * (per_vector - 1)) / per_vector;  // wherever the row begins
  int threads = kWarp;
  while (threads < kMaxThreads && int64_t(threads) * kPacks < vectors) threads *= 2;
  int cluster = 1;
  if (threads == kMaxThreads && int64_t(threads) * kPacks < vectors && has_clusters(kernel))
    while (cluster < kMaxCluster && int64_t(cluster) * threads * kPacks < vectors) cluster *= 2;
  const int rows_per_block = threads == kWarp ? 4 : 1;
  const int64_t blocks = rounded_up(a.rows, rows_per_block) / rows_per_block * cluster;
  if (blocks > 0x7fffffff) throw std::invalid_argument("cross entropy of more rows than a grid has blocks");
  check(FUSEDOPT_LAUNCH_CLUSTER(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads), unsigned(rows_per_block)),
                                unsigned(cluster), 0, static_cast<cudaStream_t>(stream), a),
        pass == CudaPass::kForward ? "cross_entropy" : "cross_entropy_backward");
}

void cuda_target_factor(const int64_t* target, int64_t rows, const float* weight, int64_t classes, int64_t ignore_index,
                        bool mean, double* partial, float* factor, BadTarget* bad, int device, void* stream) {
  const OnDevice current(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int blocks = blocks_for_sum(rows);
  if (target)  // whatever the reduction: targets out of range are found here
    check(FUSEDOPT_LAUNCH((sum_rows<Targets>), dim3(unsigned(blocks)), dim3(kSumThreads), 0, on,
                          Targets{target, weight, classes, ignore_index, bad}, rows, partial),
          "cross_entropy's sum of targets");
  if (target && mean)
    check(FUSEDOPT_LAUNCH(finish_factor, dim3(1), dim3(kSumThreads), 0, on, partial, blocks, factor),
          "cross_entropy's sum of targets");
  else
    check(FUSEDOPT_LAUNCH(set, dim3(1), dim3(1), 0, on, factor, mean ? 1.0f / float(rows) : 1.0f),
          "cross_entropy's sum of targets");
}

void cuda_total_loss(const float* losses, int64_t rows, const float* factor, double* partial, float* loss, int device,
                     void* stream) {
  const OnDevice current(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int blocks = blocks_for_sum(rows);
  check(FUSEDOPT_LAUNCH((sum_rows<Floats>), dim3(unsigned(blocks)), dim3(kSumThreads), 0, on, Floats{losses}, rows,
                        partial),
        "cross_entropy's sum of losses");
  check(FUSEDOPT_LAUNCH(finish_loss, dim3(1), dim3(kSumThreads), 0, on, partial, blocks, factor, loss),
        "cross_entropy's sum of losses");
}

template <class S>
static void scale_on(S* tensor, int64_t numel, const float* factor, cudaStream_t stream) {
  const int64_t blocks = numel / (Vector<S>::kSize * kSumThreads) + 1;
  check(FUSEDOPT_LAUNCH((scale<S>), dim3(unsigned(std::min<int64_t>(blocks, 4096))), dim3(kSumThreads), 0, stream,
                        tensor, numel, factor),
        "cross_entropy's scaling by the upstream gradient");
}

void cuda_scale(void* tensor, Dtype dtype, int64_t numel, const float* factor, int device, void* stream) {
  const OnDevice current(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::kF32) return scale_on(static_cast<float*>(tensor), numel, factor, on);
  if (dtype == Dtype::kBF16) return scale_on(static_cast<bf16*>(tensor), numel, factor, on);
  if (dtype == Dtype::kF16) return scale_on(static_cast<f16*>(tensor), numel, factor, on);
  throw std::invalid_argument("no CUDA kernel scales this dtype");
}

}  // namespace fusedopt
