// Found before CUDA's own header of this name: blocks, clusters and warp tiles, see ../harness/simt.h.
#pragma once
#include <cuda_runtime.h>

namespace cooperative_groups {

struct thread_block {
  static void sync(SIMT_HERE) { __syncthreads(file, line); }
  static unsigned thread_rank() { return fusedopt_simt::thread_rank(); }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned size() { return num_threads(); }
  static dim3 group_index() { return blockIdx; }
  static dim3 thread_index() { return threadIdx; }
  static dim3 group_dim() { return blockDim; }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  static void sync(SIMT_HERE) { fusedopt_simt::cluster_barrier({"cluster.sync", file, line}); }
  static unsigned block_rank() { return fusedopt_simt::cluster_rank(); }
  static dim3 dim_blocks() { return fusedopt_simt::cluster_dim(); }
  static unsigned num_blocks() { return dim_blocks().x * dim_blocks().y * dim_blocks().z; }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }
  static unsigned thread_rank() { return block_rank() * thread_block::num_threads() + thread_block::thread_rank(); }
  template <class T>
  static T* map_shared_rank(T* address, unsigned rank, SIMT_HERE) {
    return static_cast<T*>(fusedopt_simt::map_shared({"map_shared_rank", file, line}, address, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

template <unsigned N>
struct thread_block_tile {
  static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0, "a tile lies in one warp");
  static unsigned num_threads() { return N; }
  static unsigned size() { return N; }
  static unsigned thread_rank() { return fusedopt_simt::thread_rank() % N; }
  static unsigned meta_group_rank() { return fusedopt_simt::thread_rank() / N; }
  static unsigned meta_group_size() { return (thread_block::num_threads() + N - 1) / N; }
  static unsigned first() { return fusedopt_simt::lane() & ~(N - 1); }
  static unsigned mask() { return unsigned((1ull << N) - 1) << first(); }

  void sync(SIMT_HERE) const { __syncwarp(mask(), file, line); }
  // clang-format off
  template <class T> T shfl(T v, int source, SIMT_HERE) const { return __shfl_sync(mask(), v, source, N, file, line); }
  template <class T> T shfl_up(T v, unsigned delta, SIMT_HERE) const { return __shfl_up_sync(mask(), v, delta, N, file, line); }
  template <class T> T shfl_down(T v, unsigned delta, SIMT_HERE) const { return __shfl_down_sync(mask(), v, delta, N, file, line); }
  template <class T> T shfl_xor(T v, int lanes, SIMT_HERE) const { return __shfl_xor_sync(mask(), v, lanes, N, file, line); }
  // clang-format on
  unsigned ballot(int predicate, SIMT_HERE) const { return __ballot_sync(mask(), predicate, file, line) >> first(); }
  int any(int predicate, SIMT_HERE) const { return __any_sync(mask(), predicate, file, line); }
  int all(int predicate, SIMT_HERE) const { return __all_sync(mask(), predicate, file, line); }
};
template <unsigned N>
thread_block_tile<N> tiled_partition(const thread_block&) {
  return {};
}

template <class Group>
void sync(const Group& group, SIMT_HERE) {
  group.sync(file, line);
}

}  // namespace cooperative_groups
