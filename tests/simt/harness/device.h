// What device code finds built in: collectives, atomics, cached loads and stores, bit casts, mathematics.
#pragma once
#include <cmath>
#include <cstring>
#include <math.h>

#include "simt.h"

namespace fusedopt_simt {

inline unsigned thread_rank() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline unsigned lane() { return thread_rank() % 32; }

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(Where where, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_shuffle(where, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint64_t fold_or(uint64_t a, uint64_t b) { return a | b; }

template <class T, class... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);
template <class T>
struct Same {
  using type = T;
};

// The old value; `next` computes the new one.
template <class T, class Next>
T atomic(T* address, Next next) {
  if (atomics_watched) atomic_point();
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do wanted = next(old);
  while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace fusedopt_simt

// ---- barriers, votes, shuffles ----
// clang-format off
inline void __syncthreads(SIMT_HERE) { fusedopt_simt::block_barrier({"__syncthreads", file, line}, 0); }
inline int __syncthreads_count(int p, SIMT_HERE) { return int(fusedopt_simt::block_barrier({"__syncthreads_count", file, line}, p != 0)); }
inline int __syncthreads_or(int p, SIMT_HERE) { return fusedopt_simt::block_barrier({"__syncthreads_or", file, line}, p != 0) != 0; }
inline int __syncthreads_and(int p, SIMT_HERE) { return fusedopt_simt::block_barrier({"__syncthreads_and", file, line}, p == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) { fusedopt_simt::warp_barrier({"__syncwarp", file, line}, mask); }

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
  return unsigned(fusedopt_simt::warp_fold({"__ballot_sync", file, line}, mask, uint64_t(p != 0) << fusedopt_simt::lane(), fusedopt_simt::fold_or));
}
inline int __any_sync(unsigned mask, int p, SIMT_HERE) {
  return fusedopt_simt::warp_fold({"__any_sync", file, line}, mask, p != 0, fusedopt_simt::fold_or) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_HERE) {
  return fusedopt_simt::warp_fold({"__all_sync", file, line}, mask, p == 0, fusedopt_simt::fold_or) == 0;
}
#define SIMT_REDUCE(name, expression)                                                                       \
  template <class T>                                                                                        \
  T name(unsigned mask, T value, SIMT_HERE) {                                                               \
    static_assert(fusedopt_simt::one_of<T, int, unsigned>);                                                 \
    const auto fold = [](uint64_t x, uint64_t y) -> uint64_t { const T a = T(x), b = T(y); return unsigned(expression); }; \
    return T(fusedopt_simt::warp_fold({#name, file, line}, mask, unsigned(value), fold));                   \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned(a) + unsigned(b))
SIMT_REDUCE(__reduce_min_sync, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, a > b ? a : b)
SIMT_REDUCE(__reduce_and_sync, a & b)
SIMT_REDUCE(__reduce_or_sync, a | b)
SIMT_REDUCE(__reduce_xor_sync, a ^ b)
#undef SIMT_REDUCE

// `expression` is the source lane, from this lane `l`, the argument `k` and the last lane `end` of its segment.
#define SIMT_SHUFFLE(name, K, expression)                                                \
  template <class T>                                                                     \
  T name(unsigned mask, T value, K k, int width = 32, SIMT_HERE) {                       \
    const unsigned l = fusedopt_simt::lane(), first = l & ~unsigned(width - 1);          \
    [[maybe_unused]] const unsigned end = first + unsigned(width) - 1;                   \
    return fusedopt_simt::shuffle({#name, file, line}, mask, value, expression);         \
  }
SIMT_SHUFFLE(__shfl_sync, int, first + (unsigned(k) & (end - first)))
SIMT_SHUFFLE(__shfl_up_sync, unsigned, l - first < k ? l : l - k)
SIMT_SHUFFLE(__shfl_down_sync, unsigned, end - l < k ? l : l + k)
SIMT_SHUFFLE(__shfl_xor_sync, int, (l ^ unsigned(k)) > end ? l : l ^ unsigned(k))
#undef SIMT_SHUFFLE

// ---- atomics: relaxed, as in CUDA ----
#define SIMT_ATOMIC(name, expression, ...)                                                                  \
  template <class T>                                                                                        \
  T name(T* address, typename fusedopt_simt::Same<T>::type value) {                                         \
    static_assert(fusedopt_simt::one_of<T, __VA_ARGS__>, #name " does not take this type in CUDA");         \
    return fusedopt_simt::atomic(address, [&](T old) -> T { return expression; });                          \
  }
SIMT_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
SIMT_ATOMIC(atomicSub, old - value, int, unsigned)
SIMT_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)
SIMT_ATOMIC(atomicMax, old > value ? old : value, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicMin, old < value ? old : value, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicAnd, old & value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* address, typename fusedopt_simt::Same<T>::type compare, typename fusedopt_simt::Same<T>::type value) {
  static_assert(fusedopt_simt::one_of<T, int, unsigned, unsigned long long, unsigned short>, "atomicCAS does not take this type in CUDA");
  return fusedopt_simt::atomic(address, [&](T old) { return old == compare ? value : old; });
}

inline void __threadfence() { fusedopt_simt::fence(); }
inline void __threadfence_block() { fusedopt_simt::fence(); }
inline void __threadfence_system() { fusedopt_simt::fence(); }

// ---- loads and stores with cache hints ----
#define SIMT_LOAD(name) template <class T> T name(const T* address) { return *address; }
#define SIMT_STORE(name) template <class T> void name(T* address, typename fusedopt_simt::Same<T>::type value) { *address = value; }
SIMT_LOAD(__ldg) SIMT_LOAD(__ldcs) SIMT_LOAD(__ldcg) SIMT_LOAD(__ldca) SIMT_LOAD(__ldlu) SIMT_LOAD(__ldcv)
SIMT_STORE(__stcs) SIMT_STORE(__stcg) SIMT_STORE(__stwb) SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

// ---- bits ----
inline int __float_as_int(float x) { return fusedopt_simt::cast<int>(x); }
inline unsigned __float_as_uint(float x) { return fusedopt_simt::cast<unsigned>(x); }
inline float __int_as_float(int x) { return fusedopt_simt::cast<float>(x); }
inline float __uint_as_float(unsigned x) { return fusedopt_simt::cast<float>(x); }
inline long long __double_as_longlong(double x) { return fusedopt_simt::cast<long long>(x); }
inline double __longlong_as_double(long long x) { return fusedopt_simt::cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }

// ---- mathematics. glibc declares some of these names, noexcept, in <cmath>: hence noexcept, and after it. ----
inline float rsqrtf(float x) noexcept { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) noexcept { return 1.0 / sqrt(x); }
inline float __expf(float x) noexcept { return expf(x); }
inline float __exp10f(float x) noexcept { return powf(10.0f, x); }
inline float __logf(float x) noexcept { return logf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }
inline float __log10f(float x) noexcept { return log10f(x); }
inline float __powf(float x, float y) noexcept { return powf(x, y); }
inline float __sinf(float x) noexcept { return sinf(x); }
inline float __cosf(float x) noexcept { return cosf(x); }
inline float __fdividef(float x, float y) noexcept { return x / y; }
inline float __saturatef(float x) noexcept { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __frcp_rn(float x) noexcept { return 1.0f / x; }
inline float __frsqrt_rn(float x) noexcept { return float(1.0 / sqrt(double(x))); }
inline float __fsqrt_rn(float x) noexcept { return sqrtf(x); }
inline float __fadd_rn(float x, float y) noexcept { return x + y; }
inline float __fsub_rn(float x, float y) noexcept { return x - y; }
inline float __fmul_rn(float x, float y) noexcept { return x * y; }
inline float __fdiv_rn(float x, float y) noexcept { return x / y; }
inline float __fmaf_rn(float x, float y, float z) noexcept { return fmaf(x, y, z); }
inline double __drcp_rn(double x) noexcept { return 1.0 / x; }
inline double __dsqrt_rn(double x) noexcept { return sqrt(x); }
inline double __dadd_rn(double x, double y) noexcept { return x + y; }
inline double __dmul_rn(double x, double y) noexcept { return x * y; }
inline double __ddiv_rn(double x, double y) noexcept { return x / y; }
inline double __fma_rn(double x, double y, double z) noexcept { return fma(x, y, z); }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
// clang-format on

[[noreturn]] inline void __trap(SIMT_HERE) { fusedopt_simt::fail({"__trap", file, line}, "the kernel trapped"); }
