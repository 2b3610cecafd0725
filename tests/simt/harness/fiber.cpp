#include "fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#error "fiber.cpp switches stacks in x86-64 assembly"
#endif

// What the calling convention lets a callee change need not be kept.
__asm__(R"(
.text
.type fusedopt_simt_switch, @function
fusedopt_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedopt_simt_switch, .-fusedopt_simt_switch
)");
extern "C" void fusedopt_simt_switch(void** save, void* load) __attribute__((visibility("hidden")));

#if defined(FUSEDOPT_SIMT_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace fusedopt_simt {
namespace {

// Pages are taken at the first touch only; the lowest stays forbidden, so that an overflow stops the process.
constexpr size_t kGuard = 4096, kStack = 256 * 1024;

struct Host {
  void *stack_pointer, *fake_stack, *tsan;
  const void* bottom;
  size_t size;
} host;
Fiber* entered = nullptr;

}  // namespace

Fiber::Fiber(void (*run)()) : run_(run) {
  void* mapping = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kGuard, PROT_NONE);
  // what the switch pops: six registers and where to go; above it no caller
  void** top = reinterpret_cast<void**>(mapping_ + kGuard + kStack) - 8;
  top[6] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = top;
#if defined(FUSEDOPT_SIMT_TSAN)
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(FUSEDOPT_SIMT_TSAN)
  __tsan_destroy_fiber(tsan_);
#endif
  asan_unpoison(mapping_ + kGuard, kStack);
  munmap(mapping_, kGuard + kStack);
}

void Fiber::start() {
  __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.size);
  entered->run_();
}

void Fiber::enter() {
  entered = this;
#if defined(FUSEDOPT_SIMT_TSAN)
  host.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, kNoSync);
#endif
  __sanitizer_start_switch_fiber(&host.fake_stack, mapping_ + kGuard, kStack);
  fusedopt_simt_switch(&host.stack_pointer, stack_pointer_);
  __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
}

void Fiber::leave() {
#if defined(FUSEDOPT_SIMT_TSAN)
  __tsan_switch_to_fiber(host.tsan, kNoSync);
#endif
  __sanitizer_start_switch_fiber(&fake_stack_, host.bottom, host.size);
  fusedopt_simt_switch(&stack_pointer_, host.stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack_, &host.bottom, &host.size);
}

}  // namespace fusedopt_simt
