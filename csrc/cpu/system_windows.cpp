// SPDX-License-Identifier: BSD-3-Clause
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <cstdint>
#include <memory>
#include <new>

#include "system.h"

namespace nf {

// Nothing of a mapping can be given back here but all of it. So a place is looked for that is large enough to hold the
// pages wherever they begin, given back, and the pages are put there, unless another thread was faster.
char* map_pages(size_t bytes) {
  for (int tries = 0; tries < 16; ++tries) {
    void* room = VirtualAlloc(nullptr, bytes + huge_page, MEM_RESERVE, PAGE_NOACCESS);
    if (room == nullptr) return nullptr;
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(room) + huge_page - 1) / huge_page * huge_page;
    VirtualFree(room, 0, MEM_RELEASE);
    void* p = VirtualAlloc(reinterpret_cast<void*>(aligned), bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    if (p != nullptr) return static_cast<char*>(p);
    if (GetLastError() != ERROR_INVALID_ADDRESS) return nullptr;
  }
  return nullptr;
}

void unmap_pages(char* p, size_t) { VirtualFree(p, 0, MEM_RELEASE); }

size_t physical_memory() {
  MEMORYSTATUSEX status{};
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? size_t(status.ullTotalPhys) : 0;
}

int allowed_cpus() {
  DWORD_PTR ours = 0, all = 0;
  if (!GetProcessAffinityMask(GetCurrentProcess(), &ours, &all) || ours == 0) return 1;
  return __builtin_popcountll(ours);
}

void find_caches(CacheSizes& sizes) {
  DWORD bytes = 0;
  GetLogicalProcessorInformation(nullptr, &bytes);
  using Fact = SYSTEM_LOGICAL_PROCESSOR_INFORMATION;
  const size_t count = bytes / sizeof(Fact);
  const std::unique_ptr<Fact[]> facts(new (std::nothrow) Fact[count]);
  if (facts == nullptr || !GetLogicalProcessorInformation(facts.get(), &bytes)) return;
  bool last_known = false;
  for (size_t i = 0; i < count; ++i) {
    const CACHE_DESCRIPTOR& cache = facts[i].Cache;
    if (facts[i].Relationship != RelationCache || cache.Type == CacheInstruction || cache.Size == 0) continue;
    if ((facts[i].ProcessorMask & 1) == 0) continue;  // another processor's
    if (cache.Level == 1) sizes.l1 = cache.Size;
    if (cache.Level == 2) sizes.l2 = cache.Size;
    if (cache.Level >= 2 && (cache.Size >= sizes.last || !last_known)) sizes.last = cache.Size, last_known = true;
  }
}

void at_fork(void (*)(), void (*)(), void (*)()) {}  // processes do not fork here

}  // namespace nf
