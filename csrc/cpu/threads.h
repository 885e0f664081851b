// SPDX-License-Identifier: BSD-3-Clause
// The thread pool: one parallel loop, claimed in pieces; the caller takes part.
#pragma once

#include <cstdint>

namespace nf {

// Runs body(context, begin, end, slot) over pieces of at most `grain` of [0, n). `slot` numbers the threads that
// take part, 0 <= slot < threads. Each has a share of neighbouring pieces, the same in every loop over as many, so that
// what it left in its own cache is what it needs next; who is done takes from the others. Which thread runs a piece is
// therefore not fixed: a body must give the same result whoever runs it. Runs inline when there is one piece, one
// thread, or the pool is busy (nested calls and callers on other Python threads).
using Body = void (*)(void* context, int64_t begin, int64_t end, int slot);
// Backwards: the last pieces of each share first, of which most is cached.
enum class Direction { forwards, backwards };
void parallel_for(int64_t n, int64_t grain, Body body, void* context, int threads,
                  Direction direction = Direction::forwards);

// Do the workers spin, so that they start within a microsecond? Asleep, they take many times as long.
bool workers_awake();
// Was this asked a short while ago already? Then the caller is in a loop, and workers will be worth their waking.
bool calls_in_a_row();

int get_threads();
void set_threads(int n);
constexpr int max_threads = 1024;

}  // namespace nf
