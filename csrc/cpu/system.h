// SPDX-License-Identifier: BSD-3-Clause
// What the operating system is asked for: pages, facts about the machine, word of forks. One file for each kind of
// system, system_posix.cpp and system_windows.cpp.
#pragma once

#include <cstddef>

#include "memory.h"

namespace nf {

constexpr size_t huge_page = size_t(2) << 20;

// `bytes`, a multiple of huge_page, of zeroes that begin at a multiple of it; null where there is no memory.
char* map_pages(size_t bytes);
void unmap_pages(char* p, size_t bytes);

size_t physical_memory();
// Processors that this process may run on.
int allowed_cpus();
// Those of the first processor; what the system does not say stays as it is.
void find_caches(CacheSizes& sizes);

// Calls each around a fork of this process, wherever it comes from: before it, then in the parent and in the child.
void at_fork(void (*before)(), void (*parent)(), void (*child)());

}  // namespace nf
