// Runs a grid: cluster after cluster, the threads of one as fibers that take turns where they wait for each other.
//
// A thread begins on whatever fiber is at hand and keeps it while it waits; one that never waits leaves the fiber to
// the next thread, so that a kernel without barriers runs as a plain loop. Who waits is parked with its value and its
// place; the last to arrive works out everybody's result.
#include "grid.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fusedopt_simt {

bool atomics_watched = false;

const Launch* running = nullptr;
std::vector<Thread> threads;
std::vector<Block> blocks;
Barrier cluster;
Thread* current = nullptr;
std::string error;

namespace {

enum class Order { kForward, kReverse, kSeeded } order = Order::kForward;
uint64_t random_state = 0;
bool order_is_set = false;

void (*body)(void*);
void* body_data;
std::vector<Thread*> turns;
size_t turn;
unsigned unfinished;
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

// --- turns ---

void switch_to(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
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
    wreck_shared(block);  // another block of the cluster may still look at it, and must not
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

}  // namespace

// --- what grid.h and simt.h declare ---

void park(State state) {
  Thread& me = *current;
  me.state = state;
  me.fiber->leave();
}

void go_on() {
  if (order == Order::kSeeded) park(State::kReady);
}

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

void atomic_point() {
  if (random_bits() & 1) park(State::kReady);
}

}  // namespace fusedopt_simt
