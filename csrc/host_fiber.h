// Fibers for host.h: places to go on from, each on a stack of its own, and the ways between them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
extern "C" void host_switch(void*** from, void** to);
#endif

namespace host {

// On x86-64 without the system call that swapcontext makes for the signal mask, which would be half of a run's time.
#ifdef __x86_64__
struct Place {
  void** top;  // of the stack, with the registers that a call keeps and where to return to (System V ABI)
};

asm(R"(
.text
.weak host_switch
.type host_switch, @function
host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline void go(Place& from, Place& to) { host_switch(&from.top, to.top); }

inline void start_at(Place& place, char* stack, size_t bytes, void (*main)()) {
  place.top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16) - 8;
  std::fill(place.top, place.top + 8, nullptr);
  place.top[6] = reinterpret_cast<void*>(main);
}
#else
using Place = ucontext_t;

inline void go(Place& from, Place& to) { swapcontext(&from, &to); }

inline void start_at(Place& place, char* stack, size_t bytes, void (*main)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack, place.uc_stack.ss_size = bytes;
  makecontext(&place, main, 0);
}
#endif

// What AddressSanitizer is told, which must know the stack in use: before a fiber leaves for `stack` (`fake` null if for
// good), and after it has come back, from where in `stack` and `bytes` if these are not null.
inline void leave_for([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

inline void come_back([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

}  // namespace host
