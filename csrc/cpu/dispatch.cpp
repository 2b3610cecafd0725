#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedopt {

// setup.py names the builds it makes: FUSEDOPT_ISAS is X(avx512) X(avx2) X(baseline), X(neon), ...; best first
#define FUSEDOPT_DECLARE(isa)                                                    \
  namespace isa {                                                                \
  CpuEngine::StepKernel step_kernel(const Launch&);                              \
  CpuEngine::NormsKernel norms_kernel(const Launch&);                            \
  CpuEngine::CrossEntropyKernel cross_entropy_forward(const CrossEntropyArgs&);  \
  CpuEngine::CrossEntropyKernel cross_entropy_backward(const CrossEntropyArgs&); \
  CpuEngine::MseKernel mse(const MseArgs&);                                      \
  CpuEngine::NormKernel norm(Dtype);                                             \
  }
FUSEDOPT_ISAS(FUSEDOPT_DECLARE)
#undef FUSEDOPT_DECLARE

namespace {

#define FUSEDOPT_ENGINE(isa)                                                                               \
  {#isa,     isa::step_kernel, isa::norms_kernel, isa::cross_entropy_forward, isa::cross_entropy_backward, \
   isa::mse, isa::norm},
const CpuEngine kEngines[] = {FUSEDOPT_ISAS(FUSEDOPT_ENGINE)};
#undef FUSEDOPT_ENGINE
constexpr int kEngineCount = int(sizeof(kEngines) / sizeof(kEngines[0]));

bool machine_runs([[maybe_unused]] const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!std::strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#endif
  return true;  // baseline, neon: part of the architecture
}

const CpuEngine* best_engine() {
  for (const CpuEngine& engine : kEngines)
    if (machine_runs(engine.isa)) return &engine;
  return &kEngines[kEngineCount - 1];
}

const CpuEngine*& engine() {
  static const CpuEngine* current = best_engine();
  return current;
}

constexpr int64_t kSpan = 1 << 16;    // elements that one thread takes at a time
constexpr int64_t kRowCost = 32;      // a tensor's own overhead, in elements
constexpr int64_t kSerial = 1 << 14;  // less work than this is not worth waking a second thread

// Cut the launch into spans of about equal work: many small tensors share one, a large tensor fills many.
std::vector<Span> cut(const Launch& launch, int64_t span_size) {
  std::vector<Span> spans;
  Span span{0, 0, 0, 0};
  int64_t filled = 0;
  for (int64_t r = 0; r < launch.n_rows; ++r) {
    const int64_t numel = launch.rows[r].numel;
    filled += kRowCost;
    int64_t done = 0;
    while (numel - done >= span_size - filled && numel > done) {
      // whole blocks of codes, which are whole cache lines of an aligned tensor: no two threads write one
      const int64_t take =
          std::min(numel - done, std::max<int64_t>((span_size - filled) & ~(kCodeBlock - 1), kCodeBlock));
      done += take;
      span.last_row = r;
      span.end = done;
      spans.push_back(span);
      span.first_row = done == numel ? r + 1 : r;
      span.begin = done == numel ? 0 : done;
      filled = 0;
    }
    filled += numel - done;
  }
  if (span.first_row < launch.n_rows) {
    span.last_row = launch.n_rows - 1;
    span.end = launch.rows[span.last_row].numel;
    spans.push_back(span);
  }
  return spans;
}

template <class Work>
void parallel_for([[maybe_unused]] int threads, int64_t n, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) work(i);
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The norm of each row's parameter over that of its direction; 1 where either is 0. Cut without regard to the number of
// threads, and summed in order: the same bits whatever that number.
std::vector<double> trust_ratios(const Launch& launch, CpuEngine::NormsKernel kernel, int threads) {
  const std::vector<Span> spans = cut(launch, kSpan);
  std::vector<size_t> at{0};
  for (const Span& span : spans) at.push_back(at.back() + 2 * size_t(span.last_row - span.first_row + 1));
  std::vector<double> sums(at.back(), 0.0), rows(2 * size_t(launch.n_rows), 0.0);
  parallel_for(threads, int64_t(spans.size()),
               [&](int64_t i) { kernel(launch, spans[size_t(i)], sums.data() + at[size_t(i)]); });
  for (size_t i = 0; i < spans.size(); ++i)
    for (size_t k = at[i]; k < at[i + 1]; ++k) rows[2 * size_t(spans[i].first_row) + k - at[i]] += sums[k];
  std::vector<double> ratios;
  for (size_t r = 0; r < rows.size(); r += 2)
    ratios.push_back(rows[r] > 0 && rows[r + 1] > 0 ? std::sqrt(rows[r] / rows[r + 1]) : 1.0);
  return ratios;
}

bool over_rows(CpuEngine::CrossEntropyKernel kernel, const CrossEntropyArgs& args, int threads) {
  if (!kernel) return false;
  // enough pieces to balance, large enough to be worth a turn; a thread prefetches the next row of its piece
  int64_t per_piece =
      std::max<int64_t>({1, kSpan / std::max<int64_t>(1, args.classes), args.rows / (8 * int64_t(threads))});
  if (args.pixels) per_piece = (per_piece + kMaxPixels - 1) / kMaxPixels * kMaxPixels;
  const int64_t pieces = (args.rows + per_piece - 1) / per_piece;
  if (args.rows * args.classes < kSerial) threads = 1;
  const int64_t bytes = (scratch_bytes(args) + 63) / 64 * 64;
  const std::unique_ptr<char[]> scratch(new char[size_t(threads) * size_t(bytes)]);
  parallel_for(threads, pieces, [&](int64_t i) {
    kernel(args, i * per_piece, std::min(args.rows, (i + 1) * per_piece), scratch.get() + thread_index() * bytes);
  });
  return true;
}

}  // namespace

const char* const* cpu_isas() {
  static const std::vector<const char*> isas = [] {
    std::vector<const char*> names;
    for (const CpuEngine& e : kEngines)
      if (machine_runs(e.isa)) names.push_back(e.isa);
    names.push_back(nullptr);
    return names;
  }();
  return isas.data();
}

const char* cpu_isa() { return engine()->isa; }

bool use_cpu_isa(const char* name) {
  for (const CpuEngine& e : kEngines)
    if (!std::strcmp(e.isa, name) && machine_runs(name)) {
      engine() = &e;
      return true;
    }
  return false;
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

bool cpu_can_step(const Launch& launch) { return engine()->step_kernel(launch) != nullptr; }

bool cpu_step(const Launch& launch) {
  const CpuEngine::StepKernel kernel = engine()->step_kernel(launch);
  if (!kernel) return false;
  int64_t total = 0;
  for (int64_t r = 0; r < launch.n_rows; ++r) total += launch.rows[r].numel + kRowCost;
  const int threads = total < kSerial ? 1 : launch.threads;
  // Every thread gets several spans of a small step. Of a large one it gets some dozens, each as long as that allows:
  // at its start the processor has to find out anew what will be read (kSpan elements each: 2 to 4 % slower).
  const int64_t span_size =
      std::max(std::clamp<int64_t>(total / (4 * threads), 4096, kSpan), total / (32 * int64_t(threads)));
  const std::vector<Span> spans = cut(launch, span_size);
  Launch adapted = launch;
  std::vector<double> ratios;
  if (const CpuEngine::NormsKernel norms = engine()->norms_kernel(launch)) {
    ratios = trust_ratios(launch, norms, threads);
    adapted.ratios = ratios.data();
  }
  parallel_for(threads, int64_t(spans.size()), [&](int64_t i) { kernel(adapted, spans[i]); });
  return true;
}

bool cpu_cross_entropy_forward(const CrossEntropyArgs& args, int threads) {
  return over_rows(engine()->cross_entropy_forward(args), args, threads);
}

bool cpu_cross_entropy_backward(const CrossEntropyArgs& args, int threads) {
  return over_rows(engine()->cross_entropy_backward(args), args, threads);
}

double cpu_mse(const MseArgs& args, int threads) {
  const CpuEngine::MseKernel kernel = engine()->mse(args);
  // cut without regard to the number of threads, and summed in order: the same bits whatever that number
  std::vector<double> sums(size_t((args.numel + kSpan - 1) / kSpan));
  if (args.numel < kSerial) threads = 1;
  parallel_for(threads, int64_t(sums.size()),
               [&](int64_t i) { sums[size_t(i)] = kernel(args, i * kSpan, std::min(args.numel, (i + 1) * kSpan)); });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

double cpu_sum_squares(const std::vector<Array>& arrays, int threads) {
  struct Piece {
    const Array* array;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  std::vector<size_t> turns{0};  // the pieces that a thread takes at a time: many small arrays, or one piece of a large
  int64_t filled = 0, all = 0;
  for (const Array& array : arrays)
    for (int64_t begin = 0; begin < array.numel; begin += kSpan) {
      pieces.push_back({&array, begin, std::min(array.numel, begin + kSpan)});
      filled += pieces.back().end - begin + kRowCost;
      all += pieces.back().end - begin + kRowCost;
      if (filled >= kSpan) {
        turns.push_back(pieces.size());
        filled = 0;
      }
    }
  if (turns.back() != pieces.size()) turns.push_back(pieces.size());
  std::vector<double> sums(pieces.size());
  if (all < kSerial) threads = 1;
  // from the end: the step starts with the gradients that were read last, and are still in the cache
  parallel_for(threads, int64_t(turns.size()) - 1, [&](int64_t t) {
    const size_t turn = turns.size() - 2 - size_t(t);
    for (size_t i = turns[turn]; i < turns[turn + 1]; ++i)
      sums[i] = engine()->norm(pieces[i].array->dtype)(pieces[i].array->data, pieces[i].begin, pieces[i].end);
  });
  double total = 0;  // in order: the same bits whatever the number of threads
  for (double sum : sums) total += sum;
  return total;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedopt
