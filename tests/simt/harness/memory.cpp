// Shared memory: a heap block of the exact size for each variable of each block.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "grid.h"

namespace fusedopt_simt {

// A block's variable, made when the first thread of any block comes to its declaration.
static char* variable(Where where, Block& block, const void* key, size_t bytes, size_t alignment) {
  size_t total = running->smem + (key ? bytes : 0);
  for (const Allocation& a : block.shared) {
    if (a.key == key) return a.data;
    if (a.key) total += a.bytes;
  }
  if (total > smem_limit)
    stop(*current, where, "more than " + std::to_string(smem_limit) + " bytes of shared memory in all");
  void* data = nullptr;
  const IgnoreWrites ours;
  if (posix_memalign(&data, std::max(alignment, sizeof(void*)), bytes)) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);  // NaN, until something is stored
  block.shared.push_back({key, static_cast<char*>(data), bytes, alignment});
  return static_cast<char*>(data);
}

void wreck_shared(Block& block) {
  for (Allocation& a : block.shared) {
    std::memset(a.data, 0xFF, a.bytes);
    asan_poison(a.data, a.bytes);
  }
}

void free_shared(Block& block) {
  const IgnoreWrites ours;
  for (Allocation& a : block.shared) {
    asan_unpoison(a.data, a.bytes);
    std::free(a.data);
  }
  block.shared.clear();
}

void* shared(Where where, const void* key, size_t bytes, size_t alignment) {
  return variable(where, *current->block, key, key ? bytes : running->smem, alignment);
}

void* map_shared(Where where, const void* address, unsigned rank) {
  if (rank >= blocks.size()) fail(where, "there is no block of that rank in the cluster");
  Block& other = blocks.data()[rank];
  if (!other.live) fail(where, "that block of the cluster has exited");
  for (const Allocation& a : current->block->shared) {
    const ptrdiff_t offset = static_cast<const char*>(address) - a.data;
    if (offset >= 0 && size_t(offset) < a.bytes) return variable(where, other, a.key, a.bytes, a.alignment) + offset;
  }
  fail(where, "the address is not in this block's shared memory");
}

}  // namespace fusedopt_simt
