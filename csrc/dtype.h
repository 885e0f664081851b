// SPDX-License-Identifier: BSD-3-Clause
// The four storage types and the type that each is computed in.
//
// Everything is `static`: this header is compiled once per instruction set, and a weak copy of an inline
// function compiled for AVX-512 must never be the one that the linker keeps for every CPU.
#pragma once

#include <cstdint>
#include <cstring>

// Usable on the device too.
#if defined(__CUDACC__)
#define NF_BOTH __host__ __device__
#else
#define NF_BOTH
#endif

namespace nf {

enum class DType : int { f64, f32, f16, bf16 };

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Type of the arithmetic (and of converted weight and bias) and of the statistics, for cells stored as T.
template <class T> struct TypeOf {
  using compute = float;
  using stat = float;  // 16-bit data
};
template <> struct TypeOf<float> {
  using compute = float;
  using stat = double;  // float32 cannot hold the mean of float32 data far from zero
};
template <> struct TypeOf<double> {
  using compute = double;
  using stat = double;
};

NF_BOTH static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
NF_BOTH static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

NF_BOTH static inline float to_float(bf16 h) { return bits_to_float(uint32_t(h.bits) << 16); }

NF_BOTH static inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t rest = h.bits & 0x7fffu;
  if (rest >= 0x7c00u)
    return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00u ? 0x400000u : 0u));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = float(rest) * 0x1p-24f;  // subnormal: a small integer times 2^-24, exact
  return bits_to_float(sign | float_to_bits(magnitude));
}

// Round to nearest, ties to even; NaN stays NaN.
NF_BOTH static inline bf16 to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 0x40u)};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

NF_BOTH static inline f16 to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return {uint16_t(sign | 0x7e00u | (mag >> 13 & 0x3ffu))};
  if (mag >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (mag >= 0x38800000u) return {uint16_t(sign | ((mag - 0x38000000u + 0xfffu + (mag >> 13 & 1u)) >> 13))};
  // Subnormal: adding 0.5 lines the last bit of the sum up with 2^-24, so the addition does the rounding.
  const float shifted = bits_to_float(mag) + 0.5f;
  return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
}

// A double goes to a 16-bit type through float rounded to odd, so that it is rounded only once.
NF_BOTH static inline float to_odd_float(double d) {
  const float f = static_cast<float>(d);
  const double back = f;
  if (back == d || d != d) return f;
  uint32_t u = float_to_bits(f);
  if (u & 1u) return f;
  const bool away = (back > d) == (d > 0);  // the rounded value is larger in magnitude
  if ((u & 0x7f800000u) == 0x7f800000u) return f;
  u = away ? u - 1 : u + 1;
  return bits_to_float(u);
}

template <class T> struct Cast;
template <> struct Cast<double> {
  NF_BOTH static inline __attribute__((always_inline)) double from(double v) { return v; }
  NF_BOTH static inline __attribute__((always_inline)) double get(double v) { return v; }
};
template <> struct Cast<float> {
  NF_BOTH static inline __attribute__((always_inline)) float from(double v) { return static_cast<float>(v); }
  NF_BOTH static inline __attribute__((always_inline)) float get(float v) { return v; }
};
template <> struct Cast<f16> {
  NF_BOTH static inline __attribute__((always_inline)) f16 from(float v) { return to_f16(v); }
  NF_BOTH static inline __attribute__((always_inline)) f16 from(double v) { return to_f16(to_odd_float(v)); }
  NF_BOTH static inline __attribute__((always_inline)) float get(f16 v) { return to_float(v); }
};
template <> struct Cast<bf16> {
  NF_BOTH static inline __attribute__((always_inline)) bf16 from(float v) { return to_bf16(v); }
  NF_BOTH static inline __attribute__((always_inline)) bf16 from(double v) { return to_bf16(to_odd_float(v)); }
  NF_BOTH static inline __attribute__((always_inline)) float get(bf16 v) { return to_float(v); }
};

}  // namespace nf
