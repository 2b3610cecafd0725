// What the harness's files share: the threads of a cluster, and where they wait.
//
// What fibers touch is of types declared here: a std::vector<int> could be linked to the kernels' instrumented copy of
// its functions, and a sanitizer would take the scheduler's work for the threads'.
#pragma once
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "fiber.h"

namespace fusedopt_simt {

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

// scheduler.cpp: the launch that runs.
extern const Launch* running;
extern std::vector<Thread> threads;  // of a cluster
extern std::vector<Block> blocks;
extern Barrier cluster;
extern Thread* current;
extern std::string error;

void park(State state);  // until somebody makes the thread ready
void go_on();            // the last to arrive goes on at once; seeded, in its turn

// memory.cpp
void wreck_shared(Block& block);
void free_shared(Block& block);

// errors.cpp
inline unsigned rank_of(const Thread& thread) { return unsigned(&thread - thread.block->threads); }
bool same_place(const Where& a, const Where& b);
std::string text(const Thread& thread);
std::string text(const Where& where);
std::string hex(unsigned mask);
void stop(const Thread& who, const Where& where, const std::string& why);  // on a fiber: never comes back
void explain_deadlock();                                                   // nobody can go on

}  // namespace fusedopt_simt
