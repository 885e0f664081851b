// SPDX-License-Identifier: BSD-3-Clause
// The thread pool: one parallel loop, claimed in pieces; the caller takes part.
#pragma once

#include <cstdint>

namespace nf {

// Runs body(context, begin, end, slot) over pieces of at most `grain` of [0, n). `slot` numbers the threads that
// take part, 0 <= slot < threads. Which thread gets which piece is not fixed: a body must give the same
// result whoever runs it. Runs inline when there is one piece, one thread, or the pool is busy (nested calls and
// callers on other Python threads).
using Body = void (*)(void* context, int64_t begin, int64_t end, int slot);
void parallel_for(int64_t n, int64_t grain, Body body, void* context, int threads);

int get_threads();
void set_threads(int n);
constexpr int max_threads = 1024;

}  // namespace nf
