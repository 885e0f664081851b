// SPDX-License-Identifier: BSD-3-Clause
// Makes requests to the system fail while one Python callable runs: the k-th, or all from the k-th on. To be loaded
// before everything else (LD_PRELOAD), and called through ctypes.PyDLL.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { HEAP = 1, MAPS = 2, THREADS = 4 };

static atomic_int kinds;  // those that are counted; 0: nothing fails
static atomic_long seen, failures;
static long first;
static int forever;

static int fails(int kind) {
  if (!(atomic_load_explicit(&kinds, memory_order_relaxed) & kind)) return 0;
  const long n = atomic_fetch_add(&seen, 1) + 1;
  if (n < first || (n > first && !forever)) return 0;
  atomic_fetch_add(&failures, 1);
  errno = kind == THREADS ? EAGAIN : ENOMEM;
  return 1;
}

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) { return fails(HEAP) ? NULL : __libc_malloc(bytes); }
void* calloc(size_t n, size_t bytes) { return fails(HEAP) ? NULL : __libc_calloc(n, bytes); }
void* realloc(void* p, size_t bytes) { return fails(HEAP) ? NULL : __libc_realloc(p, bytes); }
void* memalign(size_t alignment, size_t bytes) { return fails(HEAP) ? NULL : __libc_memalign(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  void* p = memalign(alignment, bytes);
  if (p == NULL) return ENOMEM;
  *out = p;
  return 0;
}

void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (fails(MAPS)) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}

typedef int Create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
static Create* create;
__attribute__((constructor)) static void find(void) { create = (Create*)dlsym(RTLD_NEXT, "pthread_create"); }
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
  return fails(THREADS) ? EAGAIN : create(thread, attributes, body, argument);
}

// Python's, from whichever process this is loaded into.
extern void* PyObject_CallNoArgs(void*) __attribute__((weak));

// Calls `callable()` while requests of these kinds fail, from the k-th on or the k-th alone.
void* failing_call(void* callable, int which, long k, int for_ever) {
  first = k, forever = for_ever;
  atomic_store(&seen, 0), atomic_store(&failures, 0);
  atomic_store(&kinds, which);
  void* result = PyObject_CallNoArgs(callable);
  atomic_store(&kinds, 0);
  return result;
}
long failing_count(void) { return atomic_load(&failures); }
