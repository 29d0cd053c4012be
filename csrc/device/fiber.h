// Fibers: each has a stack of its own and runs until it hands over to another. All belong to one OS thread.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#define HLIP_EMULATED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HLIP_EMULATED_ASAN 1
#endif
#endif
#ifdef HLIP_EMULATED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext asks the kernel for the signal mask each time, which would be most of what a collective costs.
#if defined(__x86_64__) && defined(__linux__) && !defined(HLIP_EMULATED_UCONTEXT)
#define HLIP_EMULATED_SWAP 1
// Leaves the callee-saved registers on this stack, its pointer in *save, and goes on with what `load` has.
extern "C" void hlip_swap_stacks(void** save, void* load);
asm(R"(
.pushsection .text
.weak hlip_swap_stacks
.type hlip_swap_stacks, @function
hlip_swap_stacks:
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
.size hlip_swap_stacks, . - hlip_swap_stacks
.popsection
)");
#else
#include <ucontext.h>
#endif

namespace hlip::emulation {

struct Fiber {
  char* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef HLIP_EMULATED_SWAP
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024, kGuard = 64 * 1024;  // whole pages, of any usual size

struct Fibers {
  Fiber runner;  // the OS thread's own
  Fiber* previous = nullptr;
  char* stacks = nullptr;
};

inline Fibers fibers;

inline void arrived_in_fiber(Fiber& self) {  // the first thing after every switch
#ifdef HLIP_EMULATED_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
  if (fibers.previous != &fibers.runner) return;
  fibers.runner.stack = static_cast<char*>(const_cast<void*>(bottom));  // how a fiber learns where to switch back to
  fibers.runner.size = size;
#else
  (void)self;
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
  fibers.previous = &from;
#ifdef HLIP_EMULATED_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#ifdef HLIP_EMULATED_SWAP
  hlip_swap_stacks(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in_fiber(from);
}

// Reserves the stacks of all fibers, with memory that nobody may touch below each.
inline void make_stacks() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const memory = mmap(nullptr, kMostThreads * (kGuard + kStack), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("hlip emulator: no memory for stacks");
  fibers.stacks = static_cast<char*>(memory);
  for (int t = 0; t < kMostThreads; ++t) mprotect(fibers.stacks + t * (kGuard + kStack), kGuard, PROT_NONE);
}

// Gives a fiber the stack of thread `t`, and what to do: `main`, which never returns.
inline void make_fiber(Fiber& fiber, int t, void (*main)()) {
  fiber.stack = fibers.stacks + t * (kGuard + kStack) + kGuard;
  fiber.size = kStack;
  fiber.fake_stack = nullptr;
#ifdef HLIP_EMULATED_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.size);  // frames of a fiber that was given up
#endif
#ifdef HLIP_EMULATED_SWAP
  // Six registers, then where to go, then the return address of that: none. Aligned as if main had been called.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.size) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(main);
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, main, 0);
#endif
}

}  // namespace hlip::emulation
