// Stacks that take turns on one OS thread, and what the sanitizers must be told of them.
#pragma once

namespace fusedopt_simt {

class Fiber {
 public:
  explicit Fiber(void (*run)());  // `run` never returns, and starts at the first enter()
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void enter();  // comes back when the fiber leaves
  void leave();  // from the fiber itself

 private:
  static void start();

  void (*const run_)();
  char* mapping_;
  void *stack_pointer_, *fake_stack_ = nullptr, *tsan_ = nullptr;
  friend struct AsTsanThread;
};

// The harness itself is built without sanitizers: a thread that waits here has then done nothing that races.
#if defined(FUSEDOPT_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
constexpr bool kTsan = true;
constexpr unsigned kNoSync = 1;

inline void tsan_acquire(void* what) { __tsan_acquire(what); }
inline void tsan_release(void* what) { __tsan_release(what); }

// What another fiber has seen can be changed on its behalf.
struct AsTsanThread {
  explicit AsTsanThread(const Fiber& fiber) : self(__tsan_get_current_fiber()) {
    __tsan_switch_to_fiber(fiber.tsan_, kNoSync);
  }
  ~AsTsanThread() { __tsan_switch_to_fiber(self, kNoSync); }
  void* self;
};
struct IgnoreWrites {
  IgnoreWrites() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~IgnoreWrites() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
};
#else
constexpr bool kTsan = false;
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
struct AsTsanThread {
  explicit AsTsanThread(const Fiber&) {}
};
struct IgnoreWrites {
  IgnoreWrites() {}
};
#endif

#if defined(FUSEDOPT_SIMT_ASAN)
extern "C" {
void __asan_poison_memory_region(void const volatile*, decltype(sizeof 0));
void __asan_unpoison_memory_region(void const volatile*, decltype(sizeof 0));
}
inline void asan_poison(void* p, decltype(sizeof 0) bytes) { __asan_poison_memory_region(p, bytes); }
inline void asan_unpoison(void* p, decltype(sizeof 0) bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void asan_poison(void*, decltype(sizeof 0)) {}
inline void asan_unpoison(void*, decltype(sizeof 0)) {}
#endif

}  // namespace fusedopt_simt
