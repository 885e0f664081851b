// SPDX-License-Identifier: BSD-3-Clause
// Misuses recycled memory in the way that its argument names, in a build with AddressSanitizer and NF_POISON.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cpu/memory.h"

int main(int, char** arguments) {
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  constexpr size_t cells = 300'000;
  const auto take = [&] { return static_cast<float*>(nf::pool_alloc(cells * sizeof(float), nullptr)); };
  float* volatile p = take();
  float* const first = p;
  bool nan = std::isnan(p[0]) && std::isnan(p[cells / 2]) && std::isnan(p[cells - 1]);
  for (size_t i = 0; i < cells; ++i) p[i] = 1;
  if (is("beyond")) p[cells] = 1;
  if (is("before")) p[-1] = 1;
  nf::pool_free(p);
  if (is("returned")) p[5] = 1;
  p = take();  // the same block
  nan = nan && std::isnan(p[0]) && std::isnan(p[cells - 1]);
  nf::pool_free(p);
  nf::pool_release();
  std::puts(p != first ? "another block" : nan ? "NaN" : "stale data");
}
