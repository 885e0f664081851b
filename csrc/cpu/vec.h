// SPDX-License-Identifier: BSD-3-Clause
// Virtual vectors: sixteen float lanes (F32) and eight double lanes (F64), whatever the register width.
//
// One AVX-512 register, two AVX2 registers or four SSE/NEON registers hold the same lanes, and every reduction
// walks the same tree, so all code paths with fused multiply-add give the same bits. A wider virtual vector is a
// struct `Two` of two narrower ones rather than a wide compiler vector type: compilers lower the latter through
// the stack when the register is narrower.
//
// Compiled once per instruction set; everything lives in an anonymous namespace (see dtype.h for why).
#pragma once

#include "../dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NF_INLINE static inline __attribute__((always_inline))

namespace nf {
namespace {

// ---- register types ----------------------------------------------------------------------------------------

template <class H> struct Two {
  H lo, hi;
};
template <class H> NF_INLINE Two<H> operator+(Two<H> a, Two<H> b) { return {a.lo + b.lo, a.hi + b.hi}; }
template <class H> NF_INLINE Two<H> operator-(Two<H> a, Two<H> b) { return {a.lo - b.lo, a.hi - b.hi}; }
template <class H> NF_INLINE Two<H> operator*(Two<H> a, Two<H> b) { return {a.lo * b.lo, a.hi * b.hi}; }

#if defined(__AVX512F__)
using F32 = __m512;
using F64 = __m512d;
NF_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
NF_INLINE F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
NF_INLINE void set1(F32& v, float a) { v = _mm512_set1_ps(a); }
NF_INLINE void set1(F64& v, double a) { v = _mm512_set1_pd(a); }
NF_INLINE void load(F32& v, const float* p) { v = _mm512_loadu_ps(p); }
NF_INLINE void load(F64& v, const double* p) { v = _mm512_loadu_pd(p); }
NF_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
NF_INLINE void store(double* p, F64 v) { _mm512_storeu_pd(p, v); }
NF_INLINE void stream(float* p, F32 v) { _mm512_stream_ps(p, v); }
NF_INLINE void stream(double* p, F64 v) { _mm512_stream_pd(p, v); }
NF_INLINE __m256 lower8(F32 v) { return _mm512_castps512_ps256(v); }
NF_INLINE __m256 upper8(F32 v) { return _mm512_extractf32x8_ps(v, 1); }
NF_INLINE __m256d lower4(F64 v) { return _mm512_castpd512_pd256(v); }
NF_INLINE __m256d upper4(F64 v) { return _mm512_extractf64x4_pd(v, 1); }
NF_INLINE F64 widen8(__m256 v) { return _mm512_cvtps_pd(v); }
#elif defined(__AVX2__)
using F32 = Two<__m256>;
using F64 = Two<__m256d>;
NF_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
NF_INLINE F64 fma(F64 a, F64 b, F64 c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
NF_INLINE void set1(F32& v, float a) { v.lo = v.hi = _mm256_set1_ps(a); }
NF_INLINE void set1(F64& v, double a) { v.lo = v.hi = _mm256_set1_pd(a); }
NF_INLINE void load(F32& v, const float* p) { v = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
NF_INLINE void load(F64& v, const double* p) { v = {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
NF_INLINE void store(float* p, F32 v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
NF_INLINE void store(double* p, F64 v) { _mm256_storeu_pd(p, v.lo), _mm256_storeu_pd(p + 4, v.hi); }
NF_INLINE void stream(float* p, F32 v) { _mm256_stream_ps(p, v.lo), _mm256_stream_ps(p + 8, v.hi); }
NF_INLINE void stream(double* p, F64 v) { _mm256_stream_pd(p, v.lo), _mm256_stream_pd(p + 4, v.hi); }
NF_INLINE __m256 lower8(F32 v) { return v.lo; }
NF_INLINE __m256 upper8(F32 v) { return v.hi; }
NF_INLINE __m256d lower4(F64 v) { return v.lo; }
NF_INLINE __m256d upper4(F64 v) { return v.hi; }
NF_INLINE F64 widen8(__m256 v) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}
#elif defined(__SSE2__)
using F32 = Two<Two<__m128>>;
using F64 = Two<Two<__m128d>>;
// No fused multiply-add on this path: two roundings, so its bits may differ from the other paths.
NF_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
NF_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
NF_INLINE void set1(F32& v, float a) { v.lo.lo = v.lo.hi = v.hi.lo = v.hi.hi = _mm_set1_ps(a); }
NF_INLINE void set1(F64& v, double a) { v.lo.lo = v.lo.hi = v.hi.lo = v.hi.hi = _mm_set1_pd(a); }
NF_INLINE void load(F32& v, const float* p) {
  v = {{_mm_loadu_ps(p), _mm_loadu_ps(p + 4)}, {_mm_loadu_ps(p + 8), _mm_loadu_ps(p + 12)}};
}
NF_INLINE void load(F64& v, const double* p) {
  v = {{_mm_loadu_pd(p), _mm_loadu_pd(p + 2)}, {_mm_loadu_pd(p + 4), _mm_loadu_pd(p + 6)}};
}
NF_INLINE void store(float* p, F32 v) {
  _mm_storeu_ps(p, v.lo.lo), _mm_storeu_ps(p + 4, v.lo.hi), _mm_storeu_ps(p + 8, v.hi.lo),
      _mm_storeu_ps(p + 12, v.hi.hi);
}
NF_INLINE void store(double* p, F64 v) {
  _mm_storeu_pd(p, v.lo.lo), _mm_storeu_pd(p + 2, v.lo.hi), _mm_storeu_pd(p + 4, v.hi.lo),
      _mm_storeu_pd(p + 6, v.hi.hi);
}
NF_INLINE void stream(float* p, F32 v) {
  _mm_stream_ps(p, v.lo.lo), _mm_stream_ps(p + 4, v.lo.hi), _mm_stream_ps(p + 8, v.hi.lo),
      _mm_stream_ps(p + 12, v.hi.hi);
}
NF_INLINE void stream(double* p, F64 v) {
  _mm_stream_pd(p, v.lo.lo), _mm_stream_pd(p + 2, v.lo.hi), _mm_stream_pd(p + 4, v.hi.lo),
      _mm_stream_pd(p + 6, v.hi.hi);
}
NF_INLINE Two<__m128d> widen4(__m128 v) { return {_mm_cvtps_pd(v), _mm_cvtps_pd(_mm_movehl_ps(v, v))}; }
NF_INLINE F64 lower(F32 v) { return {widen4(v.lo.lo), widen4(v.lo.hi)}; }
NF_INLINE F64 upper(F32 v) { return {widen4(v.hi.lo), widen4(v.hi.hi)}; }
using H4 = Two<__m128d>;
NF_INLINE H4 halves(F64 v) { return v.lo + v.hi; }
#elif defined(__aarch64__)
using F32 = Two<Two<float32x4_t>>;
using F64 = Two<Two<float64x2_t>>;
NF_INLINE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
NF_INLINE float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
template <class H> NF_INLINE Two<H> fma(Two<H> a, Two<H> b, Two<H> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
NF_INLINE void set1(F32& v, float a) { v.lo.lo = v.lo.hi = v.hi.lo = v.hi.hi = vdupq_n_f32(a); }
NF_INLINE void set1(F64& v, double a) { v.lo.lo = v.lo.hi = v.hi.lo = v.hi.hi = vdupq_n_f64(a); }
NF_INLINE void load(F32& v, const float* p) {
  v = {{vld1q_f32(p), vld1q_f32(p + 4)}, {vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
NF_INLINE void load(F64& v, const double* p) {
  v = {{vld1q_f64(p), vld1q_f64(p + 2)}, {vld1q_f64(p + 4), vld1q_f64(p + 6)}};
}
NF_INLINE void store(float* p, F32 v) {
  vst1q_f32(p, v.lo.lo), vst1q_f32(p + 4, v.lo.hi), vst1q_f32(p + 8, v.hi.lo), vst1q_f32(p + 12, v.hi.hi);
}
NF_INLINE void store(double* p, F64 v) {
  vst1q_f64(p, v.lo.lo), vst1q_f64(p + 2, v.lo.hi), vst1q_f64(p + 4, v.hi.lo), vst1q_f64(p + 6, v.hi.hi);
}
NF_INLINE void stream(float* p, F32 v) { store(p, v); }  // arm64 has no portable streaming store
NF_INLINE void stream(double* p, F64 v) { store(p, v); }
NF_INLINE Two<float64x2_t> widen4(float32x4_t v) { return {vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)}; }
NF_INLINE F64 lower(F32 v) { return {widen4(v.lo.lo), widen4(v.lo.hi)}; }
NF_INLINE F64 upper(F32 v) { return {widen4(v.hi.lo), widen4(v.hi.hi)}; }
using H4 = Two<float64x2_t>;
NF_INLINE H4 halves(F64 v) { return v.lo + v.hi; }
#else
#error "no code path for this architecture"
#endif

#if defined(__AVX2__)
NF_INLINE F64 lower(F32 v) { return widen8(lower8(v)); }
NF_INLINE F64 upper(F32 v) { return widen8(upper8(v)); }
using H4 = __m256d;  // four doubles
NF_INLINE H4 halves(F64 v) { return lower4(v) + upper4(v); }
#endif

// One double, with the rounding of the vectors.
NF_INLINE double fma1(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

NF_INLINE float fma1f(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- sums over lanes: lane i meets i + 8, then i + 4, i + 2, i + 1 -------------------------------------------

#if defined(__x86_64__)
NF_INLINE double last2(__m128d v) { return _mm_cvtsd_f64(v) + _mm_cvtsd_f64(_mm_unpackhi_pd(v, v)); }
#if defined(__AVX2__)
NF_INLINE double last4(__m256d v) { return last2(_mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1)); }
#else
NF_INLINE double last4(Two<__m128d> v) { return last2(v.lo + v.hi); }
#endif
#else
NF_INLINE double last4(Two<float64x2_t> v) {
  const float64x2_t s = v.lo + v.hi;
  return vgetq_lane_f64(s, 0) + vgetq_lane_f64(s, 1);
}
#endif
NF_INLINE double sum_lanes(F64 v) { return last4(halves(v)); }
NF_INLINE double sum_lanes(F32 v) { return last4(halves(lower(v) + upper(v))); }

// sum_lanes of eight vectors at once: every addition serves several of them.
#if defined(__AVX512F__)
NF_INLINE F64 sum_lanes8(const F64* v) {
  const auto meet4 = [](F64 a, F64 b) { return _mm512_shuffle_f64x2(a, b, 0x44) + _mm512_shuffle_f64x2(a, b, 0xee); };
  const auto meet2 = [](F64 a, F64 b) { return _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd); };
  const F64 a = meet2(meet4(v[0], v[1]), meet4(v[2], v[3])), b = meet2(meet4(v[4], v[5]), meet4(v[6], v[7]));
  const F64 sums = _mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b);  // in the order 0, 4, 1, 5, 2, 6, 3, 7
  return _mm512_permutexvar_pd(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), sums);
}
#elif defined(__AVX2__)
NF_INLINE F64 sum_lanes8(const F64* v) {
  const auto meet2 = [](F64 a, F64 b) {
    const __m256d p = halves(a), q = halves(b);
    return _mm256_permute2f128_pd(p, q, 0x20) + _mm256_permute2f128_pd(p, q, 0x31);
  };
  const auto four = [](__m256d a, __m256d b) {
    return _mm256_permute4x64_pd(_mm256_unpacklo_pd(a, b) + _mm256_unpackhi_pd(a, b), 0xd8);
  };
  return {four(meet2(v[0], v[1]), meet2(v[2], v[3])), four(meet2(v[4], v[5]), meet2(v[6], v[7]))};
}
#else
NF_INLINE F64 sum_lanes8(const F64* v) {
  double sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = sum_lanes(v[i]);
  F64 out;
  load(out, sums);
  return out;
}
#endif

// ---- lanes of a compute type ---------------------------------------------------------------------------------

template <class C> struct Lanes;
template <> struct Lanes<float> {
  using V = F32;
  static constexpr int n = 16;
};
template <> struct Lanes<double> {
  using V = F64;
  static constexpr int n = 8;
};
template <class C> using Vec = typename Lanes<C>::V;

template <class C> NF_INLINE Vec<C> splat(C a) {
  Vec<C> v;
  set1(v, a);
  return v;
}

// ---- the first k lanes of a, the others of b -----------------------------------------------------------------

#if defined(__AVX512F__)
NF_INLINE F32 first_n(int k, F32 a, F32 b) { return _mm512_mask_mov_ps(b, __mmask16((1u << k) - 1u), a); }
NF_INLINE F64 first_n(int k, F64 a, F64 b) { return _mm512_mask_mov_pd(b, __mmask8((1u << k) - 1u), a); }
#elif defined(__AVX2__)
// Masks of eight and of four lanes: none for k <= 0, all from their number on.
NF_INLINE __m256i first8(int k) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
NF_INLINE __m256i first4(int k) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(k), _mm256_setr_epi64x(0, 1, 2, 3)); }
NF_INLINE F32 first_n(int k, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(first8(k))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(first8(k - 8)))};
}
NF_INLINE F64 first_n(int k, F64 a, F64 b) {
  return {_mm256_blendv_pd(b.lo, a.lo, _mm256_castsi256_pd(first4(k))),
          _mm256_blendv_pd(b.hi, a.hi, _mm256_castsi256_pd(first4(k - 4)))};
}
#else
template <class C, class V> NF_INLINE V first_lanes(int k, V a, V b) {
  C from[Lanes<C>::n], to[Lanes<C>::n];
  store(from, a), store(to, b);
  for (int i = 0; i < k; ++i) to[i] = from[i];
  load(b, to);
  return b;
}
NF_INLINE F32 first_n(int k, F32 a, F32 b) { return first_lanes<float>(k, a, b); }
NF_INLINE F64 first_n(int k, F64 a, F64 b) { return first_lanes<double>(k, a, b); }
#endif

// ---- cells of any storage type to and from lanes ---------------------------------------------------------------

// load_n and store_n: the first k lanes, all of them at most. load_n fills the others.
// Generic: lane by lane, out of line, for the pairs whose speed does not matter (float64 redoing what float32 could
// not, 16-bit data on a CPU without conversions). The pairs that matter are specialised below.
template <class C, class T> struct Cells {
  static constexpr int n = Lanes<C>::n;
  static __attribute__((noinline)) Vec<C> load_n(const T* p, int k, C fill) {
    C buf[n];
    for (int i = 0; i < n; ++i) buf[i] = i < k ? C(Cast<T>::get(p[i])) : fill;
    Vec<C> v;
    nf::load(v, buf);
    return v;
  }
  static __attribute__((noinline)) void store_n(T* p, Vec<C> v, int k) {
    C buf[n];
    nf::store(buf, v);
    for (int i = 0; i < k; ++i) p[i] = Cast<T>::from(buf[i]);
  }
  NF_INLINE Vec<C> load(const T* p) { return load_n(p, n, C(0)); }
  NF_INLINE void store(T* p, Vec<C> v) { store_n(p, v, n); }
  NF_INLINE void stream(T* p, Vec<C> v) { store(p, v); }
};

template <class T> struct PlainCells {  // storage type == compute type
  using V = Vec<T>;
  NF_INLINE V load(const T* p) {
    V v;
    nf::load(v, p);
    return v;
  }
  NF_INLINE void store(T* p, V v) { nf::store(p, v); }
  NF_INLINE void stream(T* p, V v) { nf::stream(p, v); }
#if !defined(__AVX2__)
  NF_INLINE V load_n(const T* p, int k, T fill) {
    T buf[Lanes<T>::n];
    nf::store(buf, splat<T>(fill));
    for (int i = 0; i < k; ++i) buf[i] = p[i];
    return load(buf);
  }
  NF_INLINE void store_n(T* p, V v, int k) {
    T buf[Lanes<T>::n];
    nf::store(buf, v);
    for (int i = 0; i < k; ++i) p[i] = buf[i];
  }
#endif
};

#if defined(__AVX2__)
template <> struct Cells<float, float> : PlainCells<float> {
#if defined(__AVX512F__)
  NF_INLINE F32 load_n(const float* p, int k, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << k) - 1u), p);
  }
#else
  NF_INLINE F32 load_n(const float* p, int k, float fill) {
    const F32 v = {_mm256_maskload_ps(p, first8(k)), _mm256_maskload_ps(p + 8, first8(k - 8))};
    return first_n(k, v, splat<float>(fill));
  }
#endif
  // Piece by piece: masked stores are slow on some CPUs, most of all where the vector lies on two cache lines.
  NF_INLINE void store_n(float* p, F32 v, int k) {
    if (k & 16) return nf::store(p, v);
    __m256 a = lower8(v);
    if (k & 8) _mm256_storeu_ps(p, a), p += 8, a = upper8(v);
    __m128 b = _mm256_castps256_ps128(a);
    if (k & 4) _mm_storeu_ps(p, b), p += 4, b = _mm256_extractf128_ps(a, 1);
    if (k & 2) _mm_storel_pi(reinterpret_cast<__m64*>(p), b), p += 2, b = _mm_movehl_ps(b, b);
    if (k & 1) _mm_store_ss(p, b);
  }
};
template <> struct Cells<double, double> : PlainCells<double> {
#if defined(__AVX512F__)
  NF_INLINE F64 load_n(const double* p, int k, double fill) {
    return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), __mmask8((1u << k) - 1u), p);
  }
#else
  NF_INLINE F64 load_n(const double* p, int k, double fill) {
    const F64 v = {_mm256_maskload_pd(p, first4(k)), _mm256_maskload_pd(p + 4, first4(k - 4))};
    return first_n(k, v, splat<double>(fill));
  }
#endif
  NF_INLINE void store_n(double* p, F64 v, int k) {
    if (k & 8) return nf::store(p, v);
    __m256d a = lower4(v);
    if (k & 4) _mm256_storeu_pd(p, a), p += 4, a = upper4(v);
    __m128d b = _mm256_castpd256_pd128(a);
    if (k & 2) _mm_storeu_pd(p, b), p += 2, b = _mm256_extractf128_pd(a, 1);
    if (k & 1) _mm_store_sd(p, b);
  }
};
#else
template <> struct Cells<float, float> : PlainCells<float> {};
template <> struct Cells<double, double> : PlainCells<double> {};
#endif

// Eight floats widened to double, for rows so short that they are summed in double from the start.
#if defined(__AVX2__)
template <> struct Cells<double, float> {
  NF_INLINE F64 load(const float* p) { return widen8(_mm256_loadu_ps(p)); }
#if defined(__AVX512F__)
  NF_INLINE F64 load_n(const float* p, int k, double fill) {
    const __mmask8 lanes = __mmask8((1u << k) - 1u);
    return _mm512_mask_cvtps_pd(_mm512_set1_pd(fill), lanes, _mm256_maskz_loadu_ps(lanes, p));
  }
#else
  NF_INLINE F64 load_n(const float* p, int k, double fill) {
    return first_n(k, widen8(_mm256_maskload_ps(p, first8(k))), splat<double>(fill));
  }
#endif
};
#endif

#if defined(__AVX2__)  // 16-bit cells: sixteen of them are one 256-bit register

#if defined(__AVX512F__)
// Word i goes to the upper half of lane i: one permutation instead of a widening and a shift.
NF_INLINE F32 widen(__m256i h, bf16) {
  const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, _mm512_castsi256_si512(h)));
}
// The upper halves of the sixteen 32-bit lanes, in the lower half of the register.
NF_INLINE __m256i upper_halves(__m512i v) {
  const __m512i odd = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23,
                                       21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, v));
}
NF_INLINE F32 widen(__m256i h, f16) { return _mm512_cvtph_ps(h); }
NF_INLINE __m256i narrow(F32 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NF_INLINE __m256i narrow(F32 v, bf16) {
  const __m512i u = _mm512_castps_si512(v);
  // Half a unit of the last place that stays, less one where that place is even: ties go to even.
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i near =
      _mm512_mask_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd, u, _mm512_set1_epi32(0x8000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return upper_halves(_mm512_mask_or_epi32(near, nan, u, _mm512_set1_epi32(0x400000)));
}
NF_INLINE __m256i load16_n(const void* p, int k) { return _mm256_maskz_loadu_epi16(__mmask16((1u << k) - 1u), p); }
#else
NF_INLINE F32 widen(__m256i h, bf16) {
  const __m256i zero = _mm256_setzero_si256(), quarters = _mm256_permute4x64_epi64(h, 0xd8);  // 0, 2, 1, 3
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, quarters)),
          _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, quarters))};
}
NF_INLINE F32 widen(__m256i h, f16) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
NF_INLINE __m256i narrow(F32 v, f16) {
  const auto half = [](__m256 h) { return _mm256_cvtps_ph(h, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); };
  return _mm256_set_m128i(half(v.hi), half(v.lo));
}
// The upper halves of the lanes, rounded to nearest even, in the lower ones; a NaN becomes anything.
NF_INLINE __m256i rounded8(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
}
NF_INLINE __m256i rounded8_or_nan(__m256 v) {
  const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded8(v), _mm256_srli_epi32(quiet, 16), nan);
}
NF_INLINE __m256i narrow(F32 v, bf16) {
  const auto pack = [](__m256i lo, __m256i hi) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8); };
  // One comparison sees a NaN in either half. NaN are rare: a branch costs less than selecting them.
  const __m256 nan = _mm256_cmp_ps(v.lo, v.hi, _CMP_UNORD_Q);
  if (__builtin_expect(!_mm256_testz_ps(nan, nan), 0)) return pack(rounded8_or_nan(v.lo), rounded8_or_nan(v.hi));
  return pack(rounded8(v.lo), rounded8(v.hi));
}
// Pairs of cells by a mask, the odd one by itself.
NF_INLINE __m256i load16_n(const void* p, int k) {
  const __m256i pairs = _mm256_maskload_epi32(static_cast<const int*>(p), first8(k / 2));
  if (k % 2 == 0) return pairs;
  uint16_t last;
  std::memcpy(&last, static_cast<const uint16_t*>(p) + k - 1, 2);
  const __m256i place = _mm256_andnot_si256(first8(k / 2), first8(k / 2 + 1));
  return _mm256_or_si256(pairs, _mm256_and_si256(place, _mm256_set1_epi32(last)));
}
#endif
NF_INLINE void store16_n(void* to, __m256i h, int k) {
  if (k & 16) return _mm256_storeu_si256(static_cast<__m256i*>(to), h);
  uint16_t* p = static_cast<uint16_t*>(to);
  __m128i a = _mm256_castsi256_si128(h);
  if (k & 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a), p += 8, a = _mm256_extracti128_si256(h, 1);
  if (k & 4) _mm_storel_epi64(reinterpret_cast<__m128i*>(p), a), p += 4, a = _mm_unpackhi_epi64(a, a);
  uint64_t rest = uint64_t(_mm_cvtsi128_si64(a));
  if (k & 2) std::memcpy(p, &rest, 4), p += 2, rest >>= 32;
  if (k & 1) std::memcpy(p, &rest, 2);
}

template <class T> struct HalfCells {
  NF_INLINE F32 load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{}); }
  NF_INLINE F32 load_n(const T* p, int k, float fill) {
    return first_n(k, widen(load16_n(p, k), T{}), splat<float>(fill));
  }
  NF_INLINE void store(T* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{})); }
  NF_INLINE void stream(T* p, F32 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{})); }
  NF_INLINE void store_n(T* p, F32 v, int k) { store16_n(p, narrow(v, T{}), k); }
};
template <> struct Cells<float, f16> : HalfCells<f16> {};
template <> struct Cells<float, bf16> : HalfCells<bf16> {};
#endif

template <bool Stream, class C, class T> NF_INLINE void put(T* p, Vec<C> v) {
  if constexpr (Stream) Cells<C, T>::stream(p, v);
  else Cells<C, T>::store(p, v);
}

// One cache line past the cache; `to` begins on one, `from` anywhere.
NF_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
  std::memcpy(to, from, 64);
#endif
}

// Streaming stores bypass the cache; the fence makes them visible before the task is reported as done.
NF_INLINE void stream_fence(bool streamed) {
#if defined(__x86_64__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

// Brings the lines that hold n cells into a cache: `near` 3 the first-level one, 2 the second-level one.
template <int64_t n, int near, class T> NF_INLINE void fetch_lines(const T* p) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, near);
}

}  // namespace
}  // namespace nf
