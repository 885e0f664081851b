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

// From the plainest to the best.
#if defined(__x86_64__)
NF_DECLARE(baseline)
NF_DECLARE(x86_64_v3)
NF_DECLARE(x86_64_v4)
static const CodePath paths[] = {
    {"baseline", [] { return true; }, fill_baseline},
    {"x86-64-v3", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, fill_x86_64_v3},
    {"x86-64-v4", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, fill_x86_64_v4},
};
#else
NF_DECLARE(arm64)
static const CodePath paths[] = {{"arm64", [] { return true; }, fill_arm64}};
#endif
constexpr int path_count = sizeof paths / sizeof paths[0];

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
  }
  table.name = chosen->name;
  chosen->fill(table);
  return nullptr;
}

}  // namespace nf
