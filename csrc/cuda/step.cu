// The optimizers on a CUDA device: one kernel to prepare a launch's tensors, one to update their elements.
#include "step.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "../rules.h"
#include "fast_float.h"
#include "launch.h"
#include "sums.h"

namespace fusedopt {
namespace {

using namespace FUSEDOPT_ISA;

template <class P>
using Arithmetic = std::conditional_t<sizeof(P) == 2, fast_float, Compute<P>>;

// --- the tables go up in kernel arguments: asynchronous, no pinned memory, and legal while a graph is captured ---

constexpr int kThreads = 256;

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

// What the update needs of a tensor beyond its row. One size for all rules, so that tables do not depend on them.
constexpr size_t kDerivedBytes = 128;

template <class Rule, class T>
struct Derived {
  Rule rule;
  T grad_factor;
};

FUSEDOPT_HD bool skips(const float* found_inf) { return found_inf && *found_inf != 0.0f; }

// In a launch of its own: a block that advances a counter would race with the blocks that read it.
template <template <class> class RuleOf, class T>
__global__ void prepare(const DeviceRow* rows, int64_t n_rows, const DeviceGroup* groups, const float* found_inf,
                        const float* grad_scale, char* derived) {
  using Rule = RuleOf<T>;
  static_assert(sizeof(Derived<Rule, T>) <= kDerivedBytes);
  if (skips(found_inf)) return;
  const double scale = grad_scale ? double(*grad_scale) : 1.0;
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < n_rows; r += int64_t(gridDim.x) * blockDim.x) {
    const DeviceRow& row = rows[r];
    const DeviceGroup& group = groups[row.group];
    double step = 1;
    if (row.step) step = double(*row.step += 1.0f);
    typename Rule::Hyper hyper;
    memcpy(&hyper, group.hyper, sizeof hyper);
    if (group.lr)
      hyper.lr =
          group.lr_is_double ? *static_cast<const double*>(group.lr) : double(*static_cast<const float*>(group.lr));
    *reinterpret_cast<Derived<Rule, T>*>(derived + r * int64_t(kDerivedBytes)) = {Rule(hyper, step),
                                                                                  T(group.grad_factor / scale)};
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
    const int n = int(left < kChunk ? left : kChunk);
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

// --- update: a persistent grid walks the chunks ---

// N neighbouring elements in registers.
template <class E, int N>
struct alignas(sizeof(E) * N < 16 ? sizeof(E) * N : 16) Pack {
  E e[N];
};

FUSEDOPT_HD bool is_vector(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class E>
using Word = std::conditional_t<sizeof(E) == 8, unsigned long long,
                                std::conditional_t<sizeof(E) == 4, unsigned, unsigned short>>;

// Vectors stream: a step is longer than the cache, and reads nothing twice. Neighbouring threads' single elements share
// cache lines.
template <class E, int N>
__device__ __forceinline__ Pack<E, N> read(const E* from, bool vector) {
  Pack<E, N> pack;
  if (N > 1 && vector) {
    uint4 words[sizeof pack / 16 + (sizeof pack < 16)];
#pragma unroll
    for (int i = 0; i < int(sizeof pack / 16); ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.e[i] = bit_cast<E>(__ldca(reinterpret_cast<const Word<E>*>(from) + i));
  }
  return pack;
}

template <class E, int N>
__device__ __forceinline__ void write(E* to, const Pack<E, N>& pack, bool vector) {
  if (N > 1 && vector) {
    uint4 words[sizeof pack / 16 + (sizeof pack < 16)];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < int(sizeof pack / 16); ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) __stwb(reinterpret_cast<Word<E>*>(to) + i, bit_cast<Word<E>>(pack.e[i]));
  }
}

// A chunk's tensors, each at the same element.
template <int kStates, class P, class G, class S>
struct Lane {
  P* p;
  const G* g;
  S* s[kStates ? kStates : 1];

  __device__ __forceinline__ Lane at(int64_t i) const {
    Lane lane{p + i, g + i, {}};
#pragma unroll
    for (int k = 0; k < kStates; ++k) lane.s[k] = s[k] + i;
    return lane;
  }
};

// Which of them may be read 16 bytes at a time.
template <int kStates>
struct Aligned {
  bool p, g, s[kStates ? kStates : 1];

  template <class L>
  __device__ __forceinline__ explicit Aligned(const L& lane) : p(is_vector(lane.p)), g(is_vector(lane.g)) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) s[k] = is_vector(lane.s[k]);
  }
  __device__ __forceinline__ bool all() const {
    bool all = p && g;
#pragma unroll
    for (int k = 0; k < kStates; ++k) all = all && s[k];
    return all;
  }
};

template <class Rule, class P, class G, class S, int N>
struct Elements {
  using T = Arithmetic<P>;
  static constexpr int kStates = Rule::kStates;
  Pack<P, N> p;
  Pack<G, N> g;
  Pack<S, N> s[kStates ? kStates : 1];

  template <class A>
  __device__ __forceinline__ void load_from(const Lane<kStates, P, G, S>& lane, const A& aligned) {
    p = read<P, N>(lane.p, aligned.p);
    g = read<G, N>(lane.g, aligned.g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) s[k] = read<S, N>(lane.s[k], aligned.s[k]);
  }

  __device__ __forceinline__ void update(const Rule& rule, T grad_factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T param = load(p.e[i]);
      const T grad = T(load(g.e[i])) * grad_factor;
      if constexpr (kStates == 0) {
        rule(param, grad);
      } else if constexpr (kStates == 1) {
        T a = load(s[0].e[i]);
        rule(param, grad, a);
        store(s[0].e[i], a);
      } else if constexpr (kStates == 2) {
        T a = load(s[0].e[i]), b = load(s[1].e[i]);
        rule(param, grad, a, b);
        store(s[0].e[i], a);
        store(s[1].e[i], b);
      } else {
        T a = load(s[0].e[i]), b = load(s[1].e[i]), c = load(s[2].e[i]);
        rule(param, grad, a, b, c);
        store(s[0].e[i], a);
        store(s[1].e[i], b);
        store(s[2].e[i], c);
      }
      store(p.e[i], param);
    }
  }

  template <class A>
  __device__ __forceinline__ void store_to(const Lane<kStates, P, G, S>& lane, const A& aligned) const {
    write(lane.p, p, aligned.p);
#pragma unroll
    for (int k = 0; k < kStates; ++k) write(lane.s[k], s[k], aligned.s[k]);
  }
};

struct AllAligned {
  bool p = true, g = true, s[kMaxStates] = {true, true, true};
};

// `n` vectors of kVector elements each. All loads of a turn are asked for before the first is waited for.
template <class Rule, class P, class G, class S, class A>
__device__ __forceinline__ void walk(const Rule& rule, const Lane<Rule::kStates, P, G, S>& lane, int n,
                                     const A& aligned, Arithmetic<P> grad_factor) {
  constexpr int kVector = 16 / int(sizeof(P));
  constexpr int kTurns = sizeof(P) == 8 || Rule::kStates == 3 ? 1 : 2;
  for (int first = int(threadIdx.x); first < n; first += kTurns * kThreads) {
    Elements<Rule, P, G, S, kVector> elements[kTurns];
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      if (first + t * kThreads < n) elements[t].load_from(lane.at((first + t * kThreads) * kVector), aligned);
#pragma unroll
    for (int t = 0; t < kTurns; ++t)
      if (first + t * kThreads < n) {
        elements[t].update(rule, grad_factor);
        elements[t].store_to(lane.at((first + t * kThreads) * kVector), aligned);
      }
  }
}

template <template <class> class RuleOf, class P, class G, class S>
__global__ __launch_bounds__(kThreads, 2) void update(const DeviceRow* rows, const void* const* grads,
                                                      const int32_t* row_of_chunk, int64_t chunks, const char* derived,
                                                      const float* found_inf) {
  using T = Arithmetic<P>;
  using Rule = RuleOf<T>;
  constexpr int kVector = 16 / int(sizeof(P));
  if (skips(found_inf)) return;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int32_t r = row_of_chunk[chunk];
    const DeviceRow& row = rows[r];
    const auto told = *reinterpret_cast<const Derived<Rule, T>*>(derived + r * int64_t(kDerivedBytes));
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int n = int(row.numel - begin < kChunk ? row.numel - begin : kChunk);
    Lane<Rule::kStates, P, G, S> lane{static_cast<P*>(row.param), static_cast<const G*>(grads[r]), {}};
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) lane.s[k] = static_cast<S*>(row.state[k]);
    lane = lane.at(begin);

    // the parameter's first 16-byte boundary; where another tensor has none there, it alone is read element by element
    int head = int((16 - reinterpret_cast<uintptr_t>(lane.p) % 16) % 16 / sizeof(P));
    head = head < n ? head : n;
    const int vectors = (n - head) / kVector, tail = head + vectors * kVector;
    const auto body = lane.at(head);
    const Aligned<Rule::kStates> aligned(body);
    if (aligned.all())
      walk<Rule>(told.rule, body, vectors, AllAligned(), told.grad_factor);
    else
      walk<Rule>(told.rule, body, vectors, aligned, told.grad_factor);

#pragma unroll 1
    for (int i = int(threadIdx.x); i < head + n - tail; i += kThreads) {
      const auto one = lane.at(i < head ? i : tail + i - head);
      Elements<Rule, P, G, S, 1> element;
      element.load_from(one, AllAligned());
      element.update(told.rule, told.grad_factor);
      element.store_to(one, AllAligned());
    }
  }
}

// --- host side ---

struct Kernels {
  using Prepare = void (*)(const DeviceRow*, int64_t, const DeviceGroup*, const float*, const float*, char*);
  using Update = void (*)(const DeviceRow*, const void* const*, const int32_t*, int64_t, const char*, const float*);
  const char* rule = nullptr;
  Prepare prepare = nullptr;
  Update update = nullptr;
};

template <template <class> class RuleOf, class P, class G, class S>
Kernels kernels_of() {
  return {RuleOf<float>::kName, prepare<RuleOf, Arithmetic<P>>, update<RuleOf, P, G, S>};
}

template <template <class> class RuleOf>
Kernels for_dtypes(Dtype param, Dtype grad, Dtype state) {
  const auto is = [&](Dtype p, Dtype g, Dtype s) { return param == p && grad == g && state == s; };
  if (is(Dtype::kF32, Dtype::kF32, Dtype::kF32)) return kernels_of<RuleOf, float, float, float>();
  if (is(Dtype::kBF16, Dtype::kBF16, Dtype::kBF16)) return kernels_of<RuleOf, bf16, bf16, bf16>();
  if (is(Dtype::kBF16, Dtype::kF32, Dtype::kBF16)) return kernels_of<RuleOf, bf16, float, bf16>();
  if (is(Dtype::kF16, Dtype::kF16, Dtype::kF16)) return kernels_of<RuleOf, f16, f16, f16>();
  if (is(Dtype::kF16, Dtype::kF32, Dtype::kF16)) return kernels_of<RuleOf, f16, float, f16>();
  if (is(Dtype::kF64, Dtype::kF64, Dtype::kF64)) return kernels_of<RuleOf, double, double, double>();
  return {};
}

Kernels kernels_for(int wanted, Dtype param, Dtype grad, Dtype state) {
  int rule = 0;
#define FUSEDOPT_TRY(R) \
  if (wanted == rule++) return for_dtypes<R>(param, grad, state);
  FUSEDOPT_RULES(FUSEDOPT_TRY)
#undef FUSEDOPT_TRY
  return {};
}

// Where a launch's tables lie in the step's memory. Sections start on multiples of 256 bytes.
struct Layout {
  size_t groups, end;
  struct Part {
    size_t rows, grads, row_of_chunk, derived;
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
                       section(size_t(l.chunks) * sizeof(int32_t)), section(n * kDerivedBytes)});
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
    const Kernels kernels = kernels_for(l.rule, l.param, l.grad, l.state);
    const int64_t n = int64_t(l.rows.size());
    const DeviceRow* rows = at<DeviceRow>(part.rows);
    char* derived = at<char>(part.derived);
    const std::string rule = kernels.rule;
    const std::string partly = stepped_ ? ", after other tensors were stepped: reload a checkpoint" : "";
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernels.update, kThreads, 0),
          ("cudaOccupancyMaxActiveBlocksPerMultiprocessor" + partly).c_str());
    count(FUSEDOPT_LAUNCH(kernels.prepare, dim3(unsigned(std::min<int64_t>((n + 63) / 64, 4096))), dim3(64), 0, stream_,
                          rows, n, at<DeviceGroup>(0), args_.found_inf, args_.grad_scale, derived),
          "prepare<" + rule + ">" + partly);
    stepped_ = true;
    if (l.chunks == 0) return;
    const int64_t grid = std::min<int64_t>(l.chunks, int64_t(resident) * multiprocessors_);
    count(FUSEDOPT_LAUNCH(kernels.update, dim3(unsigned(grid)), dim3(kThreads), 0, stream_, rows,
                          at<const void*>(part.grads), at<int32_t>(part.row_of_chunk), l.chunks, derived,
                          args_.found_inf),
          "update<" + rule + ">, after its step counters were advanced: reload a checkpoint");
  }

  const CudaStepArgs& args_;
  cudaStream_t stream_;
  int previous_ = 0, multiprocessors_ = 0, launched_ = 0;
  bool stepped_ = false;  // some tensors, or their counters alone
};

}  // namespace

bool cuda_can_step(int rule, Dtype param, Dtype grad, Dtype state) {
  return kernels_for(rule, param, grad, state).update != nullptr;
}

size_t cuda_step_bytes(const std::vector<DeviceLaunch>& launches, size_t n_groups) {
  return Layout(launches, n_groups).end;
}

int cuda_step(const CudaStepArgs& args) { return Step(args).run(); }

int cuda_sum_squares(const CudaStepArgs& args, double* partial, double* total) {
  return Step(args).measure(partial, total);
}

}  // namespace fusedopt
