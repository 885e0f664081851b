// SPDX-License-Identifier: BSD-3-Clause
// The kernels were compiled once per instruction set; this fills a table from the best set that the CPU has, once.
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

// From the plainest to the best: those that the build has (NORMFAST_CODE_PATHS).
static const CodePath paths[] = {
#if defined(NF_HAS_baseline)
    {"baseline", [] { return true; }, fill_baseline},
#endif
#if defined(NF_HAS_x86_64_v3)
    {"x86-64-v3", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, fill_x86_64_v3},
#endif
#if defined(NF_HAS_x86_64_v4)
    {"x86-64-v4", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, fill_x86_64_v4},
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
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
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
