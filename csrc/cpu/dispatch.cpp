// SPDX-License-Identifier: BSD-3-Clause
// The kernels were compiled once per instruction set; this fills a table from the best set that the CPU has, once.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace nf {

#define NF_DECLARE(isa)                       \
  void fill_rows_forward_##isa(Kernels&);     \
  void fill_rows_backward_##isa(Kernels&);    \
  void fill_columns_forward_##isa(Kernels&);  \
  void fill_columns_backward_##isa(Kernels&); \
  void fill_affine_##isa(Kernels&);           \
  static void fill_##isa(Kernels& k) {        \
    fill_rows_forward_##isa(k);               \
    fill_rows_backward_##isa(k);              \
    fill_columns_forward_##isa(k);            \
    fill_columns_backward_##isa(k);           \
    fill_affine_##isa(k);                     \
  }

namespace {
struct CodePath {
  const char* name;
  bool (*supported)();
  void (*fill)(Kernels&);
};
}  // namespace

#if defined(NF_HAS_baseline)
NF_DECLARE(baseline)
#endif
#if defined(NF_HAS_x86_64_v3)
NF_DECLARE(x86_64_v3)
#endif
#if defined(NF_HAS_x86_64_v4)
NF_DECLARE(x86_64_v4)
#endif
#if defined(NF_HAS_arm64)
NF_DECLARE(arm64)
#endif

#if defined(__x86_64__)
// Does the CPU have what the psABI asks of a level of x86-64, and does the system save its registers? The compilers'
// own answer, __builtin_cpu_supports, comes from a runtime library that may not know the levels: it says no, and nobody
// notices but by the time that calls take.
static bool has_level(int level) {
  constexpr auto bits = [](std::initializer_list<int> all) {
    unsigned sum = 0;
    for (const int bit : all) sum |= 1u << bit;
    return sum;
  };
  constexpr unsigned basic = bits({0, 9, 13, 19, 20, 23}) |  // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT
                             bits({12, 22, 27, 28, 29});     // FMA, MOVBE, OSXSAVE, AVX, F16C
  constexpr unsigned v3 = bits({3, 5, 8});                   // BMI1, AVX2, BMI2
  constexpr unsigned v4 = bits({16, 17, 28, 30, 31});        // AVX512F, DQ, CD, BW, VL
  constexpr unsigned lzcnt = bits({5}), ymm = bits({1, 2}), zmm = bits({5, 6, 7});
  unsigned a, b, c, d, b7, c81, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic) return false;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d) || !__get_cpuid(0x80000001, &a, &b, &c81, &d)) return false;
  // volatile: not to be moved above the return of a CPU that lacks the instruction
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const unsigned extended = level >= 4 ? v3 | v4 : v3, registers = level >= 4 ? ymm | zmm : ymm;
  return (b7 & extended) == extended && (c81 & lzcnt) == lzcnt && (saved & registers) == registers;
}
#endif

// From the plainest to the best: those that the build has (NORMFAST_CODE_PATHS).
static const CodePath paths[] = {
#if defined(NF_HAS_baseline)
    {"baseline", [] { return true; }, fill_baseline},
#endif
#if defined(NF_HAS_x86_64_v3)
    {"x86-64-v3", [] { return has_level(3); }, fill_x86_64_v3},
#endif
#if defined(NF_HAS_x86_64_v4)
    {"x86-64-v4", [] { return has_level(4); }, fill_x86_64_v4},
#endif
#if defined(NF_HAS_arm64)
    {"arm64", [] { return true; }, fill_arm64},
#endif
};

static Kernels table;

const Kernels& kernels() { return table; }

CodePaths built_code_paths() {
  CodePaths all{};
  for (const CodePath& p : paths) all.names[all.count++] = p.name;
  return all;
}

const char* choose_kernels() {
  static char message[256];
  const CodePath* chosen = nullptr;
  const char* wanted = std::getenv("NORMFAST_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    char built[96] = "";
    for (const CodePath& p : paths) {
      if (std::strcmp(p.name, wanted) == 0) chosen = &p;
      std::strcat(std::strcat(built, *built ? ", " : ""), p.name);
    }
    if (chosen == nullptr) {
      std::snprintf(message, sizeof message,
                    "normfast: NORMFAST_ISA must be one of the code paths of this build (%s), got '%.40s'", built,
                    wanted);
      return message;
    }
    if (!chosen->supported()) {
      std::snprintf(
          message, sizeof message,
          "normfast: NORMFAST_ISA=%s asks for a code path that this CPU cannot run; unset it to use the best one",
          wanted);
      return message;
    }
  } else {
    for (const CodePath& p : paths)
      if (p.supported()) chosen = &p;
    if (chosen == nullptr)
      return "normfast: this CPU runs none of the code paths of this build; build again with NORMFAST_CODE_PATHS empty";
  }
  table.name = chosen->name;
  chosen->fill(table);
  return nullptr;
}

}  // namespace nf
