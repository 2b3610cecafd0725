// Where threads wait for each other: each parks with its value and its place; the last to arrive works out all results.
#include <algorithm>
#include <utility>

#include "grid.h"

namespace fusedopt_simt {
namespace {

void wake(Thread& thread) {
  if (&thread != current) thread.state = State::kReady;
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

void fence() {
  static char fenced;
  tsan_release(&fenced);
  tsan_acquire(&fenced);
}

}  // namespace fusedopt_simt
