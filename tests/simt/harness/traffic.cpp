// In TSAN's place, under code compiled for it: adds up the bytes that kernels read and write in watched memory, with
// whatever instruction. What is on a thread's stack, in shared memory or in tables is not watched.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt.h"

namespace fusedopt_simt {

namespace {
struct Range {
  uintptr_t begin, end;
};
std::vector<Range> watched;
size_t bytes_read, bytes_written;

bool is_watched(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const Range& range : watched)
    if (at >= range.begin && at < range.end) return true;
  return false;
}
}  // namespace

void watch(void* begin, size_t bytes) SIMT_CONTROL("watch");
void unwatch() SIMT_CONTROL("unwatch");            // all of it, and forget what was counted
size_t bytes(bool written) SIMT_CONTROL("bytes");  // read or written since

void watch(void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  watched.push_back({at, at + bytes});
}
void unwatch() {
  watched.clear();
  bytes_read = bytes_written = 0;
}
size_t bytes(bool written) { return written ? bytes_written : bytes_read; }

}  // namespace fusedopt_simt

using namespace fusedopt_simt;

#define SIMT_SEEN(name, counter, bytes)        \
  void name(void* address) {                   \
    if (is_watched(address)) counter += bytes; \
  }
#define SIMT_SIZE(bytes)                                     \
  SIMT_SEEN(__tsan_read##bytes, bytes_read, bytes)           \
  SIMT_SEEN(__tsan_write##bytes, bytes_written, bytes)       \
  SIMT_SEEN(__tsan_unaligned_read##bytes, bytes_read, bytes) \
  SIMT_SEEN(__tsan_unaligned_write##bytes, bytes_written, bytes)
#define SIMT_ATOMICS(bits, T)                                                                                   \
  T __tsan_atomic##bits##_load(const volatile T* from, int) { return __atomic_load_n(from, __ATOMIC_RELAXED); } \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* old, T wanted, int, int) {              \
    return __atomic_compare_exchange_n(at, old, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);             \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* address, size_t bytes) {
  if (is_watched(address)) bytes_read += bytes;
}
void __tsan_write_range(void* address, size_t bytes) {
  if (is_watched(address)) bytes_written += bytes;
}
// clang-format off
SIMT_SIZE(1) SIMT_SIZE(2) SIMT_SIZE(4) SIMT_SIZE(8) SIMT_SIZE(16)
SIMT_ATOMICS(16, uint16_t) SIMT_ATOMICS(32, uint32_t) SIMT_ATOMICS(64, uint64_t)
// clang-format on
}
