// SPDX-License-Identifier: BSD-3-Clause
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "system.h"

namespace nf {

char* map_pages(size_t bytes) {
  const size_t reserve = bytes + huge_page;
  void* p = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(p);
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + huge_page - 1) / huge_page * huge_page);
  if (aligned > start) munmap(start, size_t(aligned - start));
  char* tail = aligned + bytes;
  if (tail < start + reserve) munmap(tail, size_t(start + reserve - tail));
#if defined(MADV_HUGEPAGE)
  madvise(aligned, bytes, MADV_HUGEPAGE);
#endif
  return aligned;
}

void unmap_pages(char* p, size_t bytes) { munmap(p, bytes); }

size_t physical_memory() { return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)); }

int allowed_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? int(n) : 1;
}

// A number from the description of CPU 0's cache `index`, with its suffix K or M; 0 when there is none.
static size_t cache_fact(int index, const char* what) {
  char path[96], text[32] = {};
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return 0;
  const size_t n = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  if (n == 0) return 0;
  char* end = nullptr;
  const size_t value = std::strtoul(text, &end, 10);
  return *end == 'K' ? value << 10 : *end == 'M' ? value << 20 : value;
}

void find_caches(CacheSizes& sizes) {
  // The kernel's description rather than sysconf: in virtual machines the latter may add up the slices of a
  // last-level cache of which this CPU reaches only one.
  bool last_known = false;
  for (int index = 0; index < 8; ++index) {
    const size_t level = cache_fact(index, "level"), size = cache_fact(index, "size");
    if (size == 0) continue;
    if (level == 1 && index == 0) sizes.l1 = size;
    if (level == 2) sizes.l2 = size;
    if (level >= 2 && (size >= sizes.last || !last_known)) sizes.last = size, last_known = true;
  }
}

void at_fork(void (*before)(), void (*parent)(), void (*child)()) { pthread_atfork(before, parent, child); }

}  // namespace nf
