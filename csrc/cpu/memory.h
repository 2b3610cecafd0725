// How loops ask for memory, and write past the cache.
#pragma once
#include "../element.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace fusedopt::FUSEDOPT_ISA {
namespace {

constexpr int64_t kLine = 64, kPage = 4096;  // bytes

// Ask for the lines of n elements.
template <class S>
FUSEDOPT_HD void prefetch_lines(const S* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine / int64_t(sizeof(S))) __builtin_prefetch(from + i, 0, 2);
}

// Before n elements are read: to find where a page lies takes as long as to read from memory, and holds up all that
// comes behind it. Asked for side by side the pages are found at once.
template <class S>
FUSEDOPT_HD void find_pages(const S* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kPage / int64_t(sizeof(S))) __builtin_prefetch(from + i, 0, 2);
  if (n > 0) __builtin_prefetch(from + n - 1, 0, 2);
}

// Whether `elements` written apart from what was read go past the cache, where nobody would find them again anyway:
// their lines are then not fetched from memory before they are written, a third of all that moves.
template <class S>
FUSEDOPT_HD bool goes_past_cache([[maybe_unused]] int64_t elements) {
#if defined(__AVX__)
  constexpr int64_t kCached = 32 << 20;  // bytes
  return elements * int64_t(sizeof(S)) >= kCached;
#else
  return false;
#endif
}

// Elements between the start of a line and `to`.
template <class S>
FUSEDOPT_HD int64_t line_offset(const S* to) {
  return int64_t(reinterpret_cast<uintptr_t>(to) % kLine / sizeof(S));
}

// Copy n elements past the cache, whole lines of them. `from` is as far from the start of a line as `to`.
template <class S>
FUSEDOPT_HD void stream_out(S* to, const S* from, int64_t n) {
  int64_t done = 0;
#if defined(__AVX__)
  constexpr int64_t kElements = kLine / int64_t(sizeof(S));
  const int64_t head = (kElements - line_offset(to)) % kElements;
  if (head < n) {
    std::memcpy(static_cast<void*>(to), from, size_t(head) * sizeof(S));
    for (done = head; done + kElements <= n; done += kElements)
      for (int64_t i = done; i < done + kElements; i += kElements / 2)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#endif
  std::memcpy(static_cast<void*>(to + done), from + done, size_t(n - done) * sizeof(S));
}

// Before other threads may read what was streamed out.
FUSEDOPT_HD void end_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fusedopt::FUSEDOPT_ISA
