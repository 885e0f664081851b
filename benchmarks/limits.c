/* The streaming limits of this machine: how fast can memory be copied, with n threads, at a given working set?
 *
 *   copy    dst[i] = a[i]           what a forward pass must move at least
 *   triad   dst[i] = a[i] + b[i]    what a backward pass must move at least (integers: no denormals, any dtype)
 *
 * each with ordinary stores and with non-temporal ones, which skip reading the destination's cache lines. Every thread
 * works on a slice of its own and repeats it without waiting for the others, so that the cost of handing out work is
 * not part of the limit. Compiled with -march=native, because this file only ever measures the machine it is built on.
 */

#define _GNU_SOURCE /* CPUs of threads */
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512i vec;
static inline vec load(const char* p) { return _mm512_loadu_si512((const void*)p); }
static inline void store(char* p, vec v) { _mm512_storeu_si512((void*)p, v); }
static inline void stream(char* p, vec v) { _mm512_stream_si512((__m512i*)p, v); }
static inline vec add(vec a, vec b) { return _mm512_add_epi32(a, b); }
static inline void fence(void) { _mm_sfence(); }
#define NON_TEMPORAL 1
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i vec;
static inline vec load(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store(char* p, vec v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline void stream(char* p, vec v) { _mm256_stream_si256((__m256i*)p, v); }
static inline vec add(vec a, vec b) { return _mm256_add_epi32(a, b); }
static inline void fence(void) { _mm_sfence(); }
#define NON_TEMPORAL 1
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef __m128i vec;
static inline vec load(const char* p) { return _mm_loadu_si128((const __m128i*)p); }
static inline void store(char* p, vec v) { _mm_storeu_si128((__m128i*)p, v); }
static inline void stream(char* p, vec v) { _mm_stream_si128((__m128i*)p, v); }
static inline vec add(vec a, vec b) { return _mm_add_epi32(a, b); }
static inline void fence(void) { _mm_sfence(); }
#define NON_TEMPORAL 1
#else
#include <string.h>
typedef struct {
  uint64_t lane[8];
} vec;
static inline vec load(const char* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(char* p, vec v) { memcpy(p, &v, sizeof v); }
static inline void stream(char* p, vec v) { store(p, v); }
static inline vec add(vec a, vec b) {
  for (int i = 0; i < 8; ++i) a.lane[i] += b.lane[i];
  return a;
}
static inline void fence(void) {}
#define NON_TEMPORAL 0
#endif

enum { COPY, COPY_NT, TRIAD, TRIAD_NT };
enum { V = sizeof(vec), STEP = 4 * V };

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* bytes is a multiple of STEP and dst is aligned to 64: `limit_run` sees to both. */
static void sweep(int kind, char* dst, const char* a, const char* b, size_t bytes) {
#define LOOP(PUT, VALUE)                     \
  for (size_t i = 0; i < bytes; i += STEP) { \
    vec v0 = VALUE(0), v1 = VALUE(1);        \
    vec v2 = VALUE(2), v3 = VALUE(3);        \
    PUT(dst + i, v0);                        \
    PUT(dst + i + V, v1);                    \
    PUT(dst + i + 2 * V, v2);                \
    PUT(dst + i + 3 * V, v3);                \
  }
#define ONE(k) load(a + i + (k) * V)
#define SUM(k) add(load(a + i + (k) * V), load(b + i + (k) * V))
  switch (kind) {
    case COPY: LOOP(store, ONE) break;
    case COPY_NT: LOOP(stream, ONE) fence(); break;
    case TRIAD: LOOP(store, SUM) break;
    default: LOOP(stream, SUM) fence(); break;
  }
}

struct slice {
  int kind;
  char* dst;
  const char *a, *b;
  size_t bytes;
  long repeats;
  int* ready;
  int* go;
  double end;
  pthread_t thread;
};

static void* work(void* argument) {
  struct slice* s = argument;
  __atomic_fetch_add(s->ready, 1, __ATOMIC_ACQ_REL);
  while (!__atomic_load_n(s->go, __ATOMIC_ACQUIRE)) {
  }
  for (long r = 0; r < s->repeats; ++r) {
    sweep(s->kind, s->dst, s->a, s->b, s->bytes);
    __asm__ volatile("" ::: "memory"); /* every repetition counts */
  }
  s->end = seconds();
  return NULL;
}

/* A thread starts on the CPU of its maker, and both may stay there, each for half of the time, as long as a sample
 * lasts. So thread t gets a CPU of its own: the t-th after the one of the caller, who is thread 0. */
static void place(pthread_attr_t* thread, int t) {
#if defined(__linux__)
  cpu_set_t ours, one;
  int cpu = sched_getcpu();
  if (cpu < 0 || sched_getaffinity(0, sizeof ours, &ours) || CPU_COUNT(&ours) == 0) return;
  for (int left = t % CPU_COUNT(&ours); left > 0;) {
    cpu = (cpu + 1) % CPU_SETSIZE;
    if (CPU_ISSET(cpu, &ours)) --left;
  }
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  pthread_attr_setaffinity_np(thread, sizeof one, &one);
#else
  (void)thread, (void)t;
#endif
}

int limit_has_non_temporal(void) { return NON_TEMPORAL; }

/* Seconds for `repeats` sweeps over `bytes` bytes of dst by `threads` threads, or -1 if a thread cannot be made.
 * The tail that does not fill a step per thread is left out; `moved` receives the bytes of dst that were written. */
double limit_run(int kind, char* dst, const char* a, const char* b, size_t bytes, int threads, long repeats,
                 size_t* moved) {
  enum { MOST = 256 };
  struct slice slices[MOST];
  int ready = 0, go = 0;
  if (threads < 1) threads = 1;
  if (threads > MOST) threads = MOST;
  size_t part = bytes / (size_t)threads / STEP * STEP;
  *moved = part * (size_t)threads;
  for (int t = 0; t < threads; ++t) {
    size_t at = part * (size_t)t;
    slices[t] = (struct slice){.kind = kind,
                               .dst = dst + at,
                               .a = a + at,
                               .b = b + at,
                               .bytes = part,
                               .repeats = repeats,
                               .ready = &ready,
                               .go = &go};
  }
  for (int t = 1; t < threads; ++t) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    place(&attributes, t);
    int refused = pthread_create(&slices[t].thread, &attributes, work, &slices[t]);
    pthread_attr_destroy(&attributes);
    if (refused) {
      for (int u = 1; u < t; ++u) slices[u].repeats = 0;
      __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
      for (int u = 1; u < t; ++u) pthread_join(slices[u].thread, NULL);
      return -1;
    }
  }
  while (__atomic_load_n(&ready, __ATOMIC_ACQUIRE) < threads - 1) {
  }
  double start = seconds();
  __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
  work(&slices[0]);
  double end = slices[0].end;
  for (int t = 1; t < threads; ++t) {
    pthread_join(slices[t].thread, NULL);
    if (slices[t].end > end) end = slices[t].end;
  }
  return end - start;
}

/* ---- what one thread reaches: ceilings.py ---- */

enum { READ, WRITE, COPY_ALL, TWO_STEPS, IN_TURNS, RUNS, RUNS_FETCHED_L1, RUNS_FETCHED_L2 };

/* The caller looks at the sum, so that no load may be left out. */
static vec read_all(vec sum, const char* a, size_t bytes) {
  vec s0 = sum, s1 = sum, s2 = sum, s3 = sum;
  for (size_t i = 0; i < bytes; i += STEP) {
    s0 = add(s0, load(a + i)), s1 = add(s1, load(a + i + V));
    s2 = add(s2, load(a + i + 2 * V)), s3 = add(s3, load(a + i + 3 * V));
  }
  return add(add(s0, s1), add(s2, s3));
}

static void write_all(char* dst, vec v, size_t bytes) {
  for (size_t i = 0; i < bytes; i += STEP)
    stream(dst + i, v), stream(dst + i + V, v), stream(dst + i + 2 * V, v), stream(dst + i + 3 * V, v);
  fence();
}

/* Bytes [at, at + bytes) of `rows` runs of `run` bytes that lie `pitch` apart, while what comes 4 KiB later is fetched. */
#define FETCHED(NAME, NEAR)                                                                      \
  static vec NAME(vec sum, const char* a, size_t rows, size_t run, size_t pitch) {               \
    const size_t ahead = 4096;                                                                   \
    for (size_t r = 0; r < rows; ++r)                                                            \
      for (size_t i = 0; i < run; i += 256) {                                                    \
        const size_t later = i + ahead, nr = r + later / run, ni = later % run;                  \
        const char* next = a + (nr < rows ? nr : r) * pitch + ni;                                \
        for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(next + line, 0, NEAR);  \
        sum = read_all(sum, a + r * pitch + i, 256);                                             \
      }                                                                                          \
    return sum;                                                                                  \
  }
FETCHED(read_fetched_l1, 3)
FETCHED(read_fetched_l2, 2)

/* Seconds for `repeats` times: bytes is a multiple of 32 parts, part of 4096. */
double ceiling_run(int kind, char* dst, const char* a, size_t bytes, size_t part, long repeats) {
  enum { ROWS = 32, TURN = 4096 };
  const size_t parts = bytes / part, columns = parts / ROWS, pitch = columns * part;
  vec sum = load(a);
  double start = seconds();
  for (long r = 0; r < repeats; ++r) {
    switch (kind) {
      case READ: sum = read_all(sum, a, bytes); break;
      case WRITE: write_all(dst, sum, bytes); break;
      case COPY_ALL: sweep(COPY_NT, dst, a, a, bytes); break;
      case TWO_STEPS:
        for (size_t p = 0; p < parts; ++p) {
          sum = read_all(sum, a + p * part, part);
          sweep(COPY_NT, dst + p * part, a + p * part, a, part);
        }
        break;
      case IN_TURNS:
        for (size_t p = 0; p < parts; ++p)
          for (size_t i = p * part; i < (p + 1) * part; i += TURN) {
            sweep(COPY_NT, dst + i, a + i, a, TURN);
            sum = read_all(sum, a + (p + 1 < parts ? i + part : i), TURN);
          }
        break;
      default:
        for (size_t c = 0; c < columns; ++c) {
          const char* first = a + c * part;
          if (kind == RUNS)
            for (size_t row = 0; row < ROWS; ++row) sum = read_all(sum, first + row * pitch, part);
          else if (kind == RUNS_FETCHED_L1) sum = read_fetched_l1(sum, first, ROWS, part, pitch);
          else sum = read_fetched_l2(sum, first, ROWS, part, pitch);
        }
    }
    __asm__ volatile("" : : "m"(sum) : "memory");
  }
  return seconds() - start;
}
