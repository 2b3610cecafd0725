// What is said of a kernel that cannot go on.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "grid.h"

namespace fusedopt_simt {

static std::string text(const uint3& i) {
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

void stop(const Thread& who, const Where& where, const std::string& why) {
  error = text(where) + " in " + running->kernel + ", " + text(who) + ": " + why;
  if (current) current->fiber->leave();
}

bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && !std::strcmp(a.what, b.what) && !std::strcmp(a.file, b.file);
}
static bool waits(const Thread& thread) { return thread.state == State::kAtBarrier || thread.state == State::kInWarp; }

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

void fail(Where where, const char* why) {
  stop(*current, where, why);
  std::abort();  // never reached: stop() does not come back to a fiber
}

}  // namespace fusedopt_simt
