// The optimizers on a CUDA device: one kernel to prepare a launch's tensors, one to update their elements, and between
// them, for rules that are kNormed, two that find each tensor's norms and tell its rule.
#include "step.h"

#include <algorithm>
#include <string>

#include "norms.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;

// --- the tables go up in kernel arguments: asynchronous, no pinned memory, and legal while a graph is captured ---

template <int kWords>
struct Parcel {
  uint64_t words[kWords];
};
using SmallParcel = Parcel<64>;
using LargeParcel = Parcel<4000>;  // a launch takes at most 32,764 bytes

template <class P>
__global__ void unpack(const __grid_constant__ P parcel, int n, uint64_t* to) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x))
    to[i] = parcel.words[i];
}

// Which row a chunk belongs to.
__global__ void map_chunks(const DeviceRow* rows, int64_t n_rows, int32_t* row_of_chunk) {
  for (int64_t r = blockIdx.x; r < n_rows; r += gridDim.x) {
    const int64_t first = rows[r].first_chunk, n = (rows[r].numel + kChunk - 1) / kChunk;
    for (int64_t c = threadIdx.x; c < n; c += blockDim.x) row_of_chunk[first + c] = int32_t(r);
  }
}

// --- prepare: a thread per tensor ---

// In a launch of its own: a block that advances a counter would race with the blocks that read it.
template <template <class> class RuleOf, class T>
__global__ void prepare(const DeviceRow* rows, const void* const* grads, int64_t n_rows, const DeviceGroup* groups,
                        const float* found_inf, const float* grad_scale, char* derived) {
  using Rule = RuleOf<T>;
  static_assert(sizeof(Derived<Rule, T>) <= kDerivedBytes);
  if (skips(found_inf)) return;
  const double scale = grad_scale ? double(*grad_scale) : 1.0;
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < n_rows; r += int64_t(gridDim.x) * blockDim.x) {
    const DeviceRow& row = rows[r];
    const DeviceGroup& group = groups[row.group];
    const bool counts = row.step && grads[r];
    const double step = counts ? double(*row.step += 1.0f) : 1;
    typename Rule::Hyper hyper;
    memcpy(&hyper, group.hyper, sizeof hyper);
    if (group.lr)
      hyper.lr =
          group.lr_is_double ? *static_cast<const double*>(group.lr) : double(*static_cast<const float*>(group.lr));
    *reinterpret_cast<Derived<Rule, T>*>(derived + r * int64_t(kDerivedBytes)) = {
        Rule(hyper, step), T(group.grad_factor / scale), counts ? uint32_t(step) : 0};
  }
}

// --- adapt: a block per tensor ---

template <template <class> class RuleOf, class T>
__global__ void adapt(const DeviceRow* rows, const void* const* grads, int64_t n_rows, const float* found_inf,
                      const Squares* partial, char* derived) {
  if (skips(found_inf)) return;
  for (int64_t r = blockIdx.x; r < n_rows; r += gridDim.x) {
    auto& rule = reinterpret_cast<Derived<RuleOf<T>, T>*>(derived + r * int64_t(kDerivedBytes))->rule;
    if (!grads[r] || !rule.adapts()) continue;
    const int64_t first = rows[r].first_chunk, n = (rows[r].numel + kChunk - 1) / kChunk;
    Squares sums{};
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      sums.weights += partial[first + c].weights;
      sums.direction += partial[first + c].direction;
    }
    sums = across_block(sums);
    if (threadIdx.x == 0)
      rule.adapt(sums.weights > 0 && sums.direction > 0 ? std::sqrt(sums.weights / sums.direction) : 1.0);
  }
}

// --- measure: the sum of a chunk's squares, in double, as no square overflows there ---

template <class G>
__global__ __launch_bounds__(kThreads) void sum_squares(const DeviceRow* rows, const void* const* grads,
                                                        const int32_t* row_of_chunk, int64_t chunks, double* partial) {
  static_assert(kThreads == kSumThreads);
  constexpr int kVector = 16 / int(sizeof(G)), kTurns = 4;
  struct alignas(16) Elements {
    G e[kVector];
  };
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int32_t r = row_of_chunk[chunk];
    const int64_t begin = (chunk - rows[r].first_chunk) * kChunk, left = rows[r].numel - begin;
    const int n = grads[r] ? int(left < kChunk ? left : kChunk) : 0;
    const G* const grad = static_cast<const G*>(grads[r]) + begin;
    const int vectors = reinterpret_cast<uintptr_t>(grad) % 16 == 0 ? n / kVector : 0;
    double sum = 0;
    const auto add = [&](G e) {
      const double value = double(load(e));
      sum += value * value;
    };
    for (int first = int(threadIdx.x); first < vectors; first += kTurns * kThreads) {
      Elements held[kTurns];
#pragma unroll
      for (int t = 0; t < kTurns; ++t)
        if (first + t * kThreads < vectors) {
          // not streamed: the update reads them again, from the cache where all of them fit
          const uint4 words = reinterpret_cast<const uint4*>(grad)[first + t * kThreads];
          memcpy(&held[t], &words, sizeof words);
        }
#pragma unroll
      for (int t = 0; t < kTurns; ++t)
        if (first + t * kThreads < vectors) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) add(held[t].e[i]);
        }
    }
    for (int i = vectors * kVector + int(threadIdx.x); i < n; i += kThreads) add(grad[i]);
    sum = across_block(sum);
    if (threadIdx.x == 0) partial[chunk] = sum;
    __syncthreads();  // the next chunk's sums come where these were
  }
}

__global__ void sum_partials(const double* partial, int64_t n, double* total) {
  const double sum = block_sum(n, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) *total = sum;
}

// --- host side ---

// What a rule needs ahead of its update.
struct Ahead {
  const char* rule;
  void (*prepare)(const DeviceRow*, const void* const*, int64_t, const DeviceGroup*, const float*, const float*, char*);
  // null where the rule is not kNormed
  void (*adapt)(const DeviceRow*, const void* const*, int64_t, const float*, const Squares*, char*);
};

template <template <class> class RuleOf, class T>
Ahead ahead_in() {
  Ahead ahead{RuleOf<T>::kName, prepare<RuleOf, T>, nullptr};
  if constexpr (kNormed<RuleOf<T>>) ahead.adapt = adapt<RuleOf, T>;
  return ahead;
}

template <template <class> class RuleOf>
Ahead ahead_of(Dtype param) {
  return param == Dtype::kF64   ? ahead_in<RuleOf, double>()
         : param == Dtype::kF32 ? ahead_in<RuleOf, float>()
                                : ahead_in<RuleOf, fast_float>();
}

Ahead ahead_of(int wanted, Dtype param) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (wanted == rule++) return ahead_of<R>(param);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return {};
}

UpdateKernel update_for(int rule, Dtype param, Dtype grad, Dtype state, bool precise) {
  const UpdateKernel plain = precise ? nullptr : plain_update(rule, param, grad, state);
  return plain ? plain : precise_update(rule, param, grad, state);
}

// Where a launch's tables lie in the step's memory. Sections start on multiples of 256 bytes.
struct Layout {
  size_t groups, end;
  struct Part {
    size_t rows, grads, row_of_chunk, derived, squares;
  };
  std::vector<Part> parts;

  Layout(const std::vector<DeviceLaunch>& launches, size_t n_groups) : groups(0), end(0) {
    const auto section = [&](size_t bytes) {
      const size_t begin = end;
      end = (end + bytes + 255) & ~size_t(255);
      return begin;
    };
    groups = section(n_groups * sizeof(DeviceGroup));
    for (const DeviceLaunch& l : launches) {
      const size_t n = l.rows.size();
      parts.push_back({section(n * sizeof(DeviceRow)), section(n * sizeof(void*)),
                       section(size_t(l.chunks) * sizeof(int32_t)), section(n * kDerivedBytes),
                       section(norms_kernel(l.rule, l.param) ? size_t(l.chunks) * sizeof(Squares) : 0)});
    }
  }
};

class Step {
 public:
  explicit Step(const CudaStepArgs& args) : args_(args), stream_(static_cast<cudaStream_t>(args.stream)) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != args.device) check(cudaSetDevice(args.device), "cudaSetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, args.device),
          "cudaDeviceGetAttribute");
  }
  ~Step() {
    if (previous_ != args_.device) cudaSetDevice(previous_);
  }

  int run() {
    const std::vector<DeviceLaunch>& launches = *args_.launches;
    const Layout layout(launches, args_.groups->size());
    send_tables(layout);
    for (size_t i = 0; i < launches.size(); ++i) update_all(launches[i], layout.parts[i]);
    return launched_;
  }

  int measure(double* partial, double* total) {
    const std::vector<DeviceLaunch>& launches = *args_.launches;
    const Layout layout(launches, args_.groups->size());
    send_tables(layout);
    int64_t done = 0;
    for (size_t i = 0; i < launches.size(); ++i) {
      if (launches[i].chunks) sum_squares_of(launches[i], layout.parts[i], partial + done);
      done += launches[i].chunks;
    }
    count(FUSEDOPT_LAUNCH(sum_partials, dim3(1), dim3(kSumThreads), 0, stream_, partial, done, total), "sum_partials");
    return launched_;
  }

 private:
  void send_tables(const Layout& layout) {
    const std::vector<DeviceLaunch>& launches = *args_.launches;
    if (args_.all_changed || args_.groups_changed) send(*args_.groups, layout.groups);
    for (size_t i = 0; i < launches.size(); ++i) {
      const DeviceLaunch& l = launches[i];
      const Layout::Part& part = layout.parts[i];
      const int64_t n = int64_t(l.rows.size());
      if (args_.all_changed || l.rows_changed) {
        send(l.rows, part.rows);
        count(FUSEDOPT_LAUNCH(map_chunks, dim3(unsigned(std::min<int64_t>(n, 4096))), dim3(128), 0, stream_,
                              at<DeviceRow>(part.rows), n, at<int32_t>(part.row_of_chunk)),
              "map_chunks");
      }
      if (args_.all_changed || l.grads_changed) send(l.grads, part.grads);
    }
  }

  void sum_squares_of(const DeviceLaunch& l, const Layout::Part& part, double* partial) {
    using Kernel = void (*)(const DeviceRow*, const void* const*, const int32_t*, int64_t, double*);
    const Kernel kernel = l.grad == Dtype::kF32    ? Kernel(sum_squares<float>)
                          : l.grad == Dtype::kBF16 ? Kernel(sum_squares<bf16>)
                          : l.grad == Dtype::kF16  ? Kernel(sum_squares<f16>)
                                                   : Kernel(sum_squares<double>);
    const int64_t grid = std::min<int64_t>(l.chunks, int64_t(8) * multiprocessors_);
    count(FUSEDOPT_LAUNCH(kernel, dim3(unsigned(grid)), dim3(kThreads), 0, stream_, at<DeviceRow>(part.rows),
                          at<const void*>(part.grads), at<int32_t>(part.row_of_chunk), l.chunks, partial),
          "sum_squares");
  }

  template <class E>
  E* at(size_t offset) const {
    return reinterpret_cast<E*>(static_cast<char*>(args_.memory) + offset);
  }

  void count(cudaError_t error, const std::string& what) {
    check(error, what.c_str());
    ++launched_;
  }

  template <class E>
  void send(const std::vector<E>& table, size_t offset) {
    static_assert(sizeof(E) % 8 == 0);
    const size_t words = table.size() * sizeof(E) / 8;
    if (words <= sizeof(SmallParcel) / 8)
      send_words<SmallParcel>(table.data(), words, at<uint64_t>(offset));
    else
      send_words<LargeParcel>(table.data(), words, at<uint64_t>(offset));
  }

  template <class P>
  void send_words(const void* from, size_t words, uint64_t* to) {
    constexpr size_t kCapacity = sizeof(P) / 8;
    P parcel;
    for (size_t i = 0; i < words; i += kCapacity) {
      const size_t n = std::min(words - i, kCapacity);
      memcpy(parcel.words, static_cast<const char*>(from) + 8 * i, 8 * n);
      count(FUSEDOPT_LAUNCH((unpack<P>), dim3(unsigned((n + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream_,
                            parcel, int(n), to + i),
            "unpack");
    }
  }

  void update_all(const DeviceLaunch& l, const Layout::Part& part) {
    const Ahead ahead = ahead_of(l.rule, l.param);
    const NormsKernel norms = norms_kernel(l.rule, l.param);
    const UpdateKernel update = update_for(l.rule, l.param, l.grad, l.state, args_.precision);
    const int64_t n = int64_t(l.rows.size());
    const UpdateArgs told{at<DeviceRow>(part.rows),
                          at<const void*>(part.grads),
                          at<int32_t>(part.row_of_chunk),
                          l.chunks,
                          at<char>(part.derived),
                          args_.found_inf,
                          l.param,
                          l.grad,
                          l.state,
                          args_.precision ? *args_.precision : Precision{}};
    const std::string rule = ahead.rule;
    const std::string partly = stepped_ ? ", after other tensors were stepped: reload a checkpoint" : "";
    const auto grid = [&](auto kernel) {
      int resident = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0),
            ("cudaOccupancyMaxActiveBlocksPerMultiprocessor" + partly).c_str());
      return dim3(unsigned(std::min<int64_t>(l.chunks, int64_t(resident) * multiprocessors_)));
    };
    const dim3 update_grid = grid(update), norms_grid = norms ? grid(norms) : dim3();
    count(FUSEDOPT_LAUNCH(ahead.prepare, dim3(unsigned(std::min<int64_t>((n + 63) / 64, 4096))), dim3(64), 0, stream_,
                          told.rows, told.grads, n, at<DeviceGroup>(0), args_.found_inf, args_.grad_scale,
                          at<char>(part.derived)),
          "prepare<" + rule + ">" + partly);
    stepped_ = true;
    if (l.chunks == 0) return;
    const std::string lost = "<" + rule + ">, after its step counters were advanced: reload a checkpoint";
    if (norms) {
      Squares* const squares = at<Squares>(part.squares);
      count(FUSEDOPT_LAUNCH(norms, norms_grid, dim3(kThreads), 0, stream_, told, squares), "norms" + lost);
      count(FUSEDOPT_LAUNCH(ahead.adapt, dim3(unsigned(std::min<int64_t>(n, 4096))), dim3(kThreads), 0, stream_,
                            told.rows, told.grads, n, args_.found_inf, squares, at<char>(part.derived)),
            "adapt" + lost);
    }
    count(FUSEDOPT_LAUNCH(update, update_grid, dim3(kThreads), 0, stream_, told), "update" + lost);
  }

  const CudaStepArgs& args_;
  cudaStream_t stream_;
  int previous_ = 0, multiprocessors_ = 0, launched_ = 0;
  bool stepped_ = false;  // some tensors, or their counters alone
};

}  // namespace

bool cuda_can_step(int rule, Dtype param, Dtype grad, Dtype state) {
  return update_for(rule, param, grad, state, false) != nullptr;
}

size_t cuda_step_bytes(const std::vector<DeviceLaunch>& launches, size_t n_groups) {
  return Layout(launches, n_groups).end;
}

int cuda_step(const CudaStepArgs& args) { return Step(args).run(); }

int cuda_sum_squares(const CudaStepArgs& args, double* partial, double* total) {
  return Step(args).measure(partial, total);
}

}  // namespace fusedopt
