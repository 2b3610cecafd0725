// Runs a grid: cluster after cluster, the threads of one as fibers that take turns where they wait for each other.
//
// A thread begins on whatever fiber is at hand and keeps it while it waits; one that never waits leaves the fiber to
// the next thread, so that a kernel without barriers runs as a plain loop. Who waits is parked with its value and its
// place; the last to arrive works out everybody's result.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fusedopt_simt {

bool atomics_watched = false;

// What fibers touch is of types of this file alone: a std::vector<int> here could be linked to an instrumented copy.
namespace {

enum class State : uint8_t { kFresh, kReady, kAtBarrier, kInWarp, kDone };

struct Block;

struct Thread {
  State state;
  unsigned mask, source;  // of a warp's exchange
  uint64_t value;         // what it brings to where it waits, then what it gets there
  Where where;
  Fiber* fiber;
  Block* block;
  uint3 index;
};

struct Barrier {
  Thread* first;  // its members, side by side
  unsigned size, arrived;
  uint64_t sum, result;
  Where where;
  const Thread* exited;  // any of them
};

struct Warp {
  unsigned parked, exited;  // lanes; those beyond the block's end count as exited
};

struct Allocation {
  const void* key;  // null: the launch's dynamic memory
  char* data;
  size_t bytes, alignment;
};

struct Block {
  uint3 index;
  unsigned live;
  Thread* threads;
  Barrier barrier;
  Warp warps[32];
  std::vector<Allocation> shared;
};

enum class Order { kForward, kReverse, kSeeded } order = Order::kForward;
uint64_t random_state = 0;
bool order_is_set = false;

// The launch that runs.
const Launch* running = nullptr;
void (*body)(void*);
void* body_data;
std::vector<Thread> threads;  // of a cluster
std::vector<Block> blocks;
Barrier cluster;
std::vector<Thread*> turns;
size_t turn;
unsigned unfinished;
Thread* current = nullptr;
std::string error;
char launched, ended;  // what TSAN orders a launch's begin and end by

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;

uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

template <class T>
void arrange(std::vector<T>& items) {
  if (order == Order::kReverse) std::reverse(items.begin(), items.end());
  if (order == Order::kSeeded)
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_bits() % i]);
}

// --- errors ---

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}
std::string text(const Thread& thread) {
  return "thread " + text(thread.index) + " of block " + text(thread.block->index);
}
std::string text(const Where& where) {
  return std::string(where.file) + ":" + std::to_string(where.line) + ": " + where.what;
}
std::string hex(unsigned mask) {
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", mask);
  return digits;
}

// On a fiber: to the scheduler, and never back.
void stop(const Thread& who, const Where& where, const std::string& why) {
  error = text(where) + " in " + running->kernel + ", " + text(who) + ": " + why;
  if (current) current->fiber->leave();
}

bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && !std::strcmp(a.what, b.what) && !std::strcmp(a.file, b.file);
}
bool waits(const Thread& thread) { return thread.state == State::kAtBarrier || thread.state == State::kInWarp; }
unsigned rank_of(const Thread& thread) { return unsigned(&thread - thread.block->threads); }

// Nobody can go on.
void explain_deadlock() {
  for (const Thread& a : threads)
    for (unsigned l = 0; a.state == State::kInWarp && l < 32; ++l) {
      const Thread& b = a.block->threads[rank_of(a) / 32 * 32 + l];
      if (!(a.mask >> l & 1) || b.state != State::kInWarp || !same_place(a.where, b.where) || a.mask == b.mask)
        continue;
      return stop(
          a, a.where,
          "mask mismatch: its mask is " + hex(a.mask) + ", that of lane " + std::to_string(l) + " is " + hex(b.mask));
    }
  std::string list;
  std::vector<Thread*> first;
  for (Thread& a : threads) {
    const auto at_same = [&a](const Thread* b) { return same_place(a.where, b->where); };
    if (waits(a) && std::none_of(first.begin(), first.end(), at_same)) first.push_back(&a);
  }
  for (const Thread* a : first) {
    const auto n = std::count_if(threads.begin(), threads.end(),
                                 [a](const Thread& b) { return waits(b) && same_place(a->where, b.where); });
    list += "\n  " + text(a->where) + ": " + std::to_string(n) + " wait, " + text(*a) + " the first" +
            (a->state == State::kInWarp ? ", its mask " + hex(a->mask) : "");
  }
  stop(*first[0], first[0]->where, "deadlock:" + list);
}

// --- turns ---

void switch_to(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
}

void park(State state) {
  Thread& me = *current;
  me.state = state;
  me.fiber->leave();
}

void wake(Thread& thread) {
  if (&thread != current) thread.state = State::kReady;
}

// After `arrived` threads came together the last of them goes on at once; seeded, in its turn.
void go_on() {
  if (order == Order::kSeeded) park(State::kReady);
}

// TSAN: each of them has now seen what all did before. Done for them by the last to arrive, so that nobody seems to
// have seen what a faster one does afterwards.
template <class ForEach>
void order_memory(void* sync, ForEach for_each) {
  if constexpr (kTsan) {
    for_each([sync](Thread& t) {
      AsTsanThread as(*t.fiber);
      tsan_release(sync);
    });
    for_each([sync](Thread& t) {
      AsTsanThread as(*t.fiber);
      tsan_acquire(sync);
    });
  }
}

// A block's variable, made when the first thread of any block comes to its declaration.
char* shared_of(Block& block, const void* key, size_t bytes, size_t alignment) {
  size_t total = running->smem + (key ? bytes : 0);
  for (const Allocation& a : block.shared) {
    if (a.key == key) return a.data;
    if (a.key) total += a.bytes;
  }
  if (total > smem_limit)
    stop(*current, {"shared memory", running->kernel, 0}, "more than " + std::to_string(smem_limit) + " bytes in all");
  void* data = nullptr;
  const IgnoreWrites ours;
  if (posix_memalign(&data, std::max(alignment, sizeof(void*)), bytes)) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);  // NaN, until something is stored
  block.shared.push_back({key, static_cast<char*>(data), bytes, alignment});
  return static_cast<char*>(data);
}

void free_shared(Block& block) {
  const IgnoreWrites ours;
  for (Allocation& a : block.shared) {
    asan_unpoison(a.data, a.bytes);
    std::free(a.data);
  }
  block.shared.clear();
}

void finish() {
  Thread& me = *current;
  Block& block = *me.block;
  const unsigned lane = rank_of(me) % 32;
  Warp& warp = block.warps[rank_of(me) / 32];
  for (Barrier* barrier : {&block.barrier, &cluster}) {
    if (barrier->arrived) stop(me, barrier->where, "divergent barrier: it has exited, others wait");
    barrier->exited = &me;
  }
  for (unsigned l = 0; l < 32; ++l)
    if (warp.parked >> l & 1) {
      const Thread& other = block.threads[rank_of(me) / 32 * 32 + l];
      if (other.mask >> lane & 1)
        stop(other, other.where, "lane " + std::to_string(lane) + " of its mask " + hex(other.mask) + " has exited");
    }
  warp.exited |= 1u << lane;
  me.state = State::kDone;
  --unfinished;
  tsan_release(&block);
  if (--block.live == 0 && blocks.size() > 1) {
    tsan_acquire(&block);
    for (Allocation& a : block.shared) {  // another block of the cluster may still look at it, and must not
      std::memset(a.data, 0xFF, a.bytes);
      asan_poison(a.data, a.bytes);
    }
  }
  tsan_release(&ended);
}

// Without TSAN a fiber goes on with the next thread that has not begun.
bool take_next() {
  if (kTsan || turn + 1 >= turns.size() || turns.data()[turn + 1]->state != State::kFresh) return false;
  Thread& next = *turns.data()[++turn];
  next.fiber = current->fiber;
  switch_to(next);
  return true;
}

void fiber_main() {
  for (;;) {
    do {
      current->state = State::kReady;
      tsan_acquire(&launched);
      body(body_data);
      finish();
    } while (take_next());
    current->fiber->leave();
  }
}

Fiber* take_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>(fiber_main));
    return fibers.back().get();
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

void run(Thread& thread) {
  if (thread.state == State::kFresh) thread.fiber = take_fiber();
  switch_to(thread);
  thread.fiber->enter();
  if (current->state == State::kDone && !kTsan) idle.push_back(current->fiber);  // to TSAN each thread is one
  current = nullptr;
}

// Starts the blocks of a cluster anew, the first of them at `origin`.
void set_up(const uint3& origin) {
  const dim3 shape = running->cluster;
  const unsigned n = unsigned(threads.size() / blocks.size());
  cluster = {threads.data(), unsigned(threads.size()), 0, 0, 0, {}, nullptr};
  for (unsigned b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    free_shared(block);
    block.index = {origin.x + b % shape.x, origin.y + b / shape.x % shape.y, origin.z + b / shape.x / shape.y};
    block.live = n;
    block.threads = &threads[b * n];
    block.barrier = {block.threads, n, 0, 0, 0, {}, nullptr};
    for (unsigned w = 0; w < 32; ++w)
      block.warps[w] = {0, n >= 32 * w + 32 ? 0 : n <= 32 * w ? ~0u : ~0u << (n - 32 * w)};
    for (unsigned t = 0; t < n; ++t) {
      block.threads[t].state = State::kFresh;
      block.threads[t].block = &block;
    }
  }
  unfinished = cluster.size;
  idle.clear();
  for (const auto& fiber : fibers) idle.push_back(fiber.get());
}

void run_cluster() {
  turns.clear();
  for (Thread& thread : threads) turns.push_back(&thread);
  arrange(turns);
  while (unfinished && error.empty()) {
    bool moved = false;
    for (turn = 0; turn < turns.size() && error.empty(); ++turn)
      if (turns[turn]->state == State::kFresh || turns[turn]->state == State::kReady) {
        moved = true;
        run(*turns[turn]);
      }
    if (!moved) explain_deadlock();
    if (order == Order::kSeeded) arrange(turns);
  }
}

void tear_down() {
  for (Block& block : blocks) free_shared(block);
  for (Thread& thread : threads)  // that an error stopped
    if (thread.state != State::kDone && thread.state != State::kFresh) {
      AsTsanThread as(*thread.fiber);
      tsan_release(&ended);
    }
  tsan_acquire(&ended);
  running = nullptr;
  if (error.empty()) return;
  fibers.clear();  // their stacks hold kernels that will never end
  idle.clear();
  throw Error(std::exchange(error, {}));
}

uint64_t arrive(Barrier& barrier, Where where, uint64_t value) {
  Thread& me = *current;
  if (barrier.exited) stop(me, where, "divergent barrier: " + text(*barrier.exited) + " has exited");
  if (barrier.arrived && !same_place(barrier.where, where))
    stop(me, where, "divergent barrier: others wait at " + text(barrier.where));
  me.where = barrier.where = where;
  barrier.sum += value;
  if (++barrier.arrived < barrier.size) {
    park(State::kAtBarrier);
  } else {
    barrier.result = std::exchange(barrier.sum, 0);
    barrier.arrived = 0;
    const auto for_each = [&barrier](auto act) { std::for_each_n(barrier.first, barrier.size, act); };
    order_memory(&barrier, for_each);
    for_each(wake);
    go_on();
  }
  return barrier.result;
}

// Waits until every lane of the mask is there with the same mask; the last of them calls `settle`.
template <class Settle>
uint64_t exchange(Where where, unsigned mask, uint64_t value, unsigned source, Settle settle) {
  Thread& me = *current;
  const unsigned lane = rank_of(me) % 32;
  Thread* const lanes = &me - lane;
  Warp& warp = me.block->warps[rank_of(me) / 32];
  if (!(mask >> lane & 1)) stop(me, where, "its lane " + std::to_string(lane) + " is not in its mask " + hex(mask));
  if (const unsigned gone = mask & warp.exited)
    stop(me, where, "lane " + std::to_string(__builtin_ctz(gone)) + " of its mask " + hex(mask) + " has exited");
  me.where = where;
  me.mask = mask;
  me.value = value;
  me.source = source;
  warp.parked |= 1u << lane;
  const auto for_each = [lanes, mask](auto act) {
    for (unsigned rest = mask; rest; rest &= rest - 1) act(lanes[__builtin_ctz(rest)]);
  };
  bool complete = (warp.parked & mask) == mask;
  if (complete) for_each([&](const Thread& t) { complete &= t.mask == mask && same_place(t.where, where); });
  if (!complete) {
    park(State::kInWarp);
  } else {
    warp.parked &= ~mask;
    settle(lanes, for_each, warp);
    for_each(wake);
    go_on();
  }
  return me.value;
}

}  // namespace

// --- what simt.h declares ---

bool set_order(const char* name) {
  char* end = nullptr;
  if (!std::strcmp(name, "forward"))
    order = Order::kForward;
  else if (!std::strcmp(name, "reverse"))
    order = Order::kReverse;
  else if (!std::strncmp(name, "seed:", 5) && name[5] && (random_state = std::strtoull(name + 5, &end, 10), !*end))
    order = Order::kSeeded;
  else
    return false;
  order_is_set = true;
  atomics_watched = order == Order::kSeeded;
  return true;
}

void run_grid(const Launch& config, void (*kernel)(void*), void* data) {
  static std::mutex one_at_a_time;  // autograd's threads launch too
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  const char* asked = std::getenv("FUSEDOPT_SIMT_ORDER");
  if (!order_is_set && asked && !set_order(asked))
    throw Error(std::string("FUSEDOPT_SIMT_ORDER=") + asked + " is not forward, reverse or seed:N");

  running = &config;
  body = kernel;
  body_data = data;
  gridDim = config.grid;
  blockDim = config.block;
  const dim3 c = config.cluster, b = config.block, clusters(gridDim.x / c.x, gridDim.y / c.y, gridDim.z / c.z);
  blocks.resize(size_t(c.x) * c.y * c.z);
  threads.resize(blocks.size() * b.x * b.y * b.z);
  for (unsigned i = 0; i < threads.size(); ++i) threads[i].index = {i % b.x, i / b.x % b.y, i / b.x / b.y % b.z};
  std::vector<unsigned> sequence(size_t(clusters.x) * clusters.y * clusters.z);
  for (unsigned i = 0; i < sequence.size(); ++i) sequence[i] = i;
  arrange(sequence);

  tsan_release(&launched);
  for (size_t i = 0; i < sequence.size() && error.empty(); ++i) {
    const unsigned s = sequence[i];
    set_up({s % clusters.x * c.x, s / clusters.x % clusters.y * c.y, s / clusters.x / clusters.y * c.z});
    run_cluster();
  }
  tear_down();
}

void* shared(const void* key, size_t bytes, size_t alignment) {
  return shared_of(*current->block, key, key ? bytes : running->smem, alignment);
}

void* map_shared(Where where, const void* address, unsigned rank) {
  if (rank >= blocks.size()) fail(where, "there is no block of that rank in the cluster");
  Block& other = blocks.data()[rank];
  if (!other.live) fail(where, "that block of the cluster has exited");
  for (const Allocation& a : current->block->shared) {
    const ptrdiff_t offset = static_cast<const char*>(address) - a.data;
    if (offset >= 0 && size_t(offset) < a.bytes) return shared_of(other, a.key, a.bytes, a.alignment) + offset;
  }
  fail(where, "the address is not in this block's shared memory");
}

unsigned cluster_rank() { return unsigned(current->block - blocks.data()); }
dim3 cluster_dim() { return running->cluster; }

uint64_t block_barrier(Where where, uint64_t value) { return arrive(current->block->barrier, where, value); }
void cluster_barrier(Where where) { arrive(cluster, where, 0); }

void warp_barrier(Where where, unsigned mask) {
  exchange(where, mask, 0, 0, [](Thread*, auto for_each, Warp& warp) { order_memory(&warp, for_each); });
}

// Shuffles and votes pass values, and order no memory. A lane outside the mask gives all ones, NaN to a float.
uint64_t warp_shuffle(Where where, unsigned mask, uint64_t value, unsigned source) {
  return exchange(where, mask, value, source, [mask](Thread* lanes, auto for_each, Warp&) {
    uint64_t values[32];
    for (unsigned l = 0; l < 32; ++l) values[l] = mask >> l & 1 ? lanes[l].value : ~uint64_t(0);
    for_each([&values](Thread& t) { t.value = values[t.source]; });
  });
}

uint64_t warp_fold(Where where, unsigned mask, uint64_t value, Fold fold) {
  return exchange(where, mask, value, 0, [mask, fold](Thread* lanes, auto for_each, Warp&) {
    unsigned rest = mask;
    uint64_t all = lanes[__builtin_ctz(rest)].value;
    while (rest &= rest - 1) all = fold(all, lanes[__builtin_ctz(rest)].value);
    for_each([all](Thread& t) { t.value = all; });
  });
}

void fail(Where where, const char* why) {
  stop(*current, where, why);
  std::abort();  // never reached: stop() does not come back to a fiber
}

void atomic_point() {
  if (random_bits() & 1) park(State::kReady);
}

void fence() {
  static char fenced;
  tsan_release(&fenced);
  tsan_acquire(&fenced);
}

}  // namespace fusedopt_simt
