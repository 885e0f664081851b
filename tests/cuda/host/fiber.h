// SPDX-License-Identifier: BSD-3-Clause
// Stacks of their own, and going from one to another.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define NF_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NF_ASAN 1
#endif
#endif
#if !defined(NF_ASAN)
#define NF_ASAN 0
#endif

#if NF_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// On x86-64 a switch is a dozen instructions; elsewhere swapcontext, which asks the kernel for the signal mask.
#if defined(__x86_64__) && !defined(NF_EMULATION_UCONTEXT)
#define NF_FAST_SWITCH 1
extern "C" void nf_emulation_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.local nf_emulation_switch
.type nf_emulation_switch, @function
nf_emulation_switch:
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
.size nf_emulation_switch, .-nf_emulation_switch
)");
#else
#define NF_FAST_SWITCH 0
#include <ucontext.h>
#endif

namespace nf::cuda::emulation {

// A stack that is not running, or (without memory of its own) the one that everything began on.
class Stack {
 public:
  static constexpr size_t size = NF_ASAN ? 256 << 10 : 64 << 10;
  static constexpr size_t guard = 4096;

  Stack() = default;
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Begins anew: the next switch to it calls `main`, which never returns.
  bool prepare(void (*main)(), unsigned colour) {
    if (memory_ == nullptr) {
      void* p = mmap(nullptr, size + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) return false;
      mprotect(p, guard, PROT_NONE);
      memory_ = static_cast<char*>(p) + guard;
    }
#if NF_ASAN
    __asan_unpoison_memory_region(memory_, size);
    fake_ = nullptr;
#endif
    // Stacks that begin at the same place in their pages would fight for the same lines of the cache.
    char* top = memory_ + size - 64 - 128 * (colour % 13);
#if NF_FAST_SWITCH
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where backtraces end
    *--sp = reinterpret_cast<void*>(main);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    sp_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_;
    context_.uc_stack.ss_size = size_t(top - memory_);
    context_.uc_link = nullptr;
    makecontext(&context_, main, 0);
#endif
    return true;
  }

  // Call it on the running stack. Comes back when something switches to this stack again. `leaving`: never.
  void switch_to(Stack& to) {
    came_from_ = this;
#if NF_ASAN
    __sanitizer_start_switch_fiber(&fake_, to.memory_, to.extent_);
#endif
#if NF_FAST_SWITCH
    nf_emulation_switch(&sp_, to.sp_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrive();
  }

  // First thing on a stack, and after each switch.
  void arrive() {
#if NF_ASAN
    const void* bottom;
    size_t extent;
    __sanitizer_finish_switch_fiber(fake_, &bottom, &extent);
    came_from_->memory_ = static_cast<char*>(const_cast<void*>(bottom));
    came_from_->extent_ = extent;
#endif
  }

 private:
  inline static Stack* came_from_ = nullptr;
  char* memory_ = nullptr;
  size_t extent_ = size;
#if NF_FAST_SWITCH
  void* sp_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_ = nullptr;
};

}  // namespace nf::cuda::emulation
