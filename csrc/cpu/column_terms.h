// SPDX-License-Identifier: BSD-3-Clause
// What is summed down the columns of a matrix (column_sums.h, batch_sums.h): pairs of terms for L columns of a row, and
// how the rows that come next are brought into the cache.
#pragma once

#include "sums.h"

namespace nf {
namespace {

// Walks a strip of rows in memory order, `bytes` of each row, one cache line at a time.
struct Walk {
  const char* at = nullptr;
  int64_t bytes = 0, pitch = 0, done = 0;
  __attribute__((always_inline)) inline void step(int64_t by) {
    __builtin_prefetch(at + done, 0, 2);
    done += by;
    if (done >= bytes) done = 0, at += pitch;
  }
};
struct Ahead2 {
  Walk first, second;
};

template <class C, class T> NF_INLINE Vec<C> cells_at(const T* p, int k) {
  return k == Lanes<C>::n ? Cells<C, T>::load(p) : Cells<C, T>::load_n(p, k, C(0));
}

template <class T> NF_INLINE Walk walk(const T* p, int64_t pitch, int64_t o, int64_t c0, int64_t c1) {
  return {reinterpret_cast<const char*>(p + o * pitch + c0), (c1 - c0) * int64_t(sizeof(T)), pitch * int64_t(sizeof(T)),
          0};
}

// Narrow matrices are summed as they lie in memory, sixteen rows (a lap) to as many vectors as there are columns: cell
// p of a lap is row p / width of it, which is the lane, and column p % width. `along(laps)` then gives the same terms
// with get(i, p, n, a, b, c) for n cells from cell i of the array, cell p of their lap; `laps` has room for the shifts.
constexpr int64_t narrow_width = 64;
template <class C> NF_INLINE bool is_narrow(int64_t width) { return width < narrow_width && width % Lanes<C>::n != 0; }
template <class C> NF_INLINE const C* repeat(const C* from, int64_t width, int64_t times, C* to) {
  for (int64_t i = 0; i < times * width; ++i) to[i] = i < width ? from[i] : to[i - width];
  return to;
}

// Terms down a column. `column(c, k)` fetches what belongs to the L columns from c (k < L: only the first k), and
// its get(o, a, b, c) gives row o: a for the first sum, b*c for the second. `ahead` walks over the strip from row o, a
// `line` (what one get reads) at a time. Terms that batch norm needs (batch_sums.h) also have `together`, the same
// terms with several rows taken for one, and `fetch`, which brings a vector into the cache. `strip`: how many vectors
// of columns go down together, 512 bytes of each row, or 1 KiB where two arrays are read; `at_once`: how many of them
// have their sums in registers at the same time (both by measurement).
#if defined(__AVX512F__)
constexpr int vectors_at_once = 4;
#else
constexpr int vectors_at_once = 1;  // sixteen registers hold no more, nor do those of NEON, four to a vector
#endif

// (x - shift, (x - shift)^2)
template <class C, class T> struct ColumnShifted {
  static constexpr bool by_laps = true;
  static constexpr int arrays = 1, strip = 8, at_once = vectors_at_once;
  const T* x;
  int64_t pitch;
  const C* shift;
  struct Laps {
    const T* x;
    const C* shift;
    __attribute__((always_inline)) inline void get(int64_t i, int64_t p, int n, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = cells_at<C>(x + i, n) - Cells<C, C>::load(shift + p);
      if (n < Lanes<C>::n) a = first_n(n, a, splat<C>(0));
      b = c = a;
    }
  };
  __attribute__((always_inline)) inline Laps along(C* laps) const {
    return {x, repeat(shift, pitch, Lanes<C>::n, laps)};
  }
  __attribute__((always_inline)) inline ColumnShifted together(int64_t rows, C* shifts) const {
    return {x, rows * pitch, repeat(shift, pitch, rows, shifts)};
  }
  __attribute__((always_inline)) inline void fetch(int64_t o, int64_t c) const {
    __builtin_prefetch(x + o * pitch + c, 0, 2);
  }
  __attribute__((always_inline)) inline Ahead2 ahead(int64_t o, int64_t c0, int64_t c1) const {
    return {walk(x, pitch, o, c0, c1), {}};
  }
  static constexpr int64_t line() { return int64_t(sizeof(T)) * Lanes<C>::n; }
  struct Column {
    const T* x;
    int64_t pitch;
    Vec<C> shift;
    int k;
    __attribute__((always_inline)) inline void get(int64_t o, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = b = c = cells_at<C>(x + o * pitch, k) - shift;
    }
  };
  __attribute__((always_inline)) inline Column column(int64_t c, int k) const {
    return {x + c, pitch, cells_at<C>(shift + c, k), k};
  }
};

// (0, x^2)
template <class C, class T> struct ColumnSquared {
  static constexpr bool by_laps = true;
  static constexpr int strip = 8, at_once = vectors_at_once;
  const T* x;
  int64_t pitch;
  struct Laps {
    const T* x;
    __attribute__((always_inline)) inline void get(int64_t i, int64_t, int n, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = splat<C>(0), b = c = cells_at<C>(x + i, n);
    }
  };
  __attribute__((always_inline)) inline Laps along(C*) const { return {x}; }
  __attribute__((always_inline)) inline Ahead2 ahead(int64_t o, int64_t c0, int64_t c1) const {
    return {walk(x, pitch, o, c0, c1), {}};
  }
  static constexpr int64_t line() { return int64_t(sizeof(T)) * Lanes<C>::n; }
  struct Column {
    const T* x;
    int64_t pitch;
    int k;
    __attribute__((always_inline)) inline void get(int64_t o, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = splat<C>(0), b = c = cells_at<C>(x + o * pitch, k);
    }
  };
  __attribute__((always_inline)) inline Column column(int64_t c, int k) const { return {x + c, pitch, k}; }
};

// (dy, dy*(x - shift))
template <class C, class T> struct ColumnSlopes {
  static constexpr bool by_laps = true;
  static constexpr int arrays = 2, strip = 16, at_once = 1;
  const T *dy, *x;
  int64_t pitch;
  const C* shift;
  struct Laps {
    const T *dy, *x;
    const C* shift;
    __attribute__((always_inline)) inline void get(int64_t i, int64_t p, int n, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = b = cells_at<C>(dy + i, n);
      c = cells_at<C>(x + i, n) - Cells<C, C>::load(shift + p);
      if (n < Lanes<C>::n) c = first_n(n, c, splat<C>(0));
    }
  };
  __attribute__((always_inline)) inline Laps along(C* laps) const {
    return {dy, x, repeat(shift, pitch, Lanes<C>::n, laps)};
  }
  __attribute__((always_inline)) inline ColumnSlopes together(int64_t rows, C* shifts) const {
    return {dy, x, rows * pitch, repeat(shift, pitch, rows, shifts)};
  }
  __attribute__((always_inline)) inline void fetch(int64_t o, int64_t c) const {
    __builtin_prefetch(dy + o * pitch + c, 0, 2), __builtin_prefetch(x + o * pitch + c, 0, 2);
  }
  __attribute__((always_inline)) inline Ahead2 ahead(int64_t o, int64_t c0, int64_t c1) const {
    return {walk(dy, pitch, o, c0, c1), walk(x, pitch, o, c0, c1)};
  }
  static constexpr int64_t line() { return int64_t(sizeof(T)) * Lanes<C>::n; }
  struct Column {
    const T *dy, *x;
    int64_t pitch;
    Vec<C> shift;
    int k;
    __attribute__((always_inline)) inline void get(int64_t o, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = b = cells_at<C>(dy + o * pitch, k);
      c = cells_at<C>(x + o * pitch, k) - shift;
    }
  };
  __attribute__((always_inline)) inline Column column(int64_t c, int k) const {
    return {dy + c, x + c, pitch, cells_at<C>(shift + c, k), k};
  }
};

// (dy*w, dy*w*xhat): one weight per row, null for ones
template <class C, class T, bool Center> struct ColumnWeighted {
  static constexpr bool by_laps = false;  // a weight per row would have to be expanded
  static constexpr int strip = 16, at_once = 1;
  const T *dy, *x;
  int64_t pitch;
  const C *w, *hi, *rs, *t;
  __attribute__((always_inline)) inline Ahead2 ahead(int64_t o, int64_t c0, int64_t c1) const {
    return {walk(dy, pitch, o, c0, c1), walk(x, pitch, o, c0, c1)};
  }
  static constexpr int64_t line() { return int64_t(sizeof(T)) * Lanes<C>::n; }
  struct Column {
    const T *dy, *x;
    int64_t pitch;
    const C* w;
    Vec<C> hi, rs, t;
    int k;
    __attribute__((always_inline)) inline void get(int64_t o, Vec<C>& a, Vec<C>& b, Vec<C>& c) const {
      a = cells_at<C>(dy + o * pitch, k);
      if (w != nullptr) a = a * splat<C>(w[o]);
      b = a;
      c = cells_at<C>(x + o * pitch, k);
      if constexpr (Center) c = fma(c - hi, rs, t);
      else c = c * rs;
    }
  };
  __attribute__((always_inline)) inline Column column(int64_t c, int k) const {
    return {dy + c, x + c, pitch, w, cells_at<C>(hi + c, k), cells_at<C>(rs + c, k), cells_at<C>(t + c, k), k};
  }
};

}  // namespace
}  // namespace nf
