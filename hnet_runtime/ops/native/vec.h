// A register of floats at a time, in the compiler's own vector types: one source for AVX-512 (16 lanes), AVX2 (8),
// and any other target (4, which is a register of SSE or NEON).
//
// A lane never sees another one, and reductions over lanes have one order, so a number does not depend on where
// it stands. Products and sums are fused where `fma` says so and nowhere else: this is built with -ffp-contract=off,
// since a compiler that fuses at will may do it in one copy of a loop and not in another.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hnet {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t LooseIntVec __attribute__((vector_size(4 * LANES), aligned(4)));

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline IntVec load_int(const void* p) { return *reinterpret_cast<const LooseIntVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

inline Vec load_some(const float* p, int64_t n) {  // n < LANES; the rest is 0
  alignas(64) float lanes[LANES] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
inline void store_some(float* p, Vec v, int64_t n) {
  alignas(64) float lanes[LANES];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(float));
}

// a · b + c, rounded once where the target can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline Vec fma(Vec a, float b, Vec c) { return fma(a, splat(b), c); }

typedef float Four __attribute__((vector_size(16)));

// Halves are added to halves until four lanes are left.
inline Four fold(Vec v) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const Eight eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const Vec eight = v;
#endif
#if defined(__AVX2__)
  return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  return v;
#endif
}

// And further, until one is left.
inline float sum_lanes(Vec v) {
  const Four four = fold(v);
  const Four two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

// The sums of four registers, each in the order of sum_lanes.
inline Four sum_lanes(const Vec (&v)[4]) {
  const Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
  const Four ab02 = __builtin_shufflevector(a, b, 0, 4, 2, 6), ab13 = __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const Four cd02 = __builtin_shufflevector(c, d, 0, 4, 2, 6), cd13 = __builtin_shufflevector(c, d, 1, 5, 3, 7);
  return (__builtin_shufflevector(ab02, cd02, 0, 1, 4, 5) + __builtin_shufflevector(ab02, cd02, 2, 3, 6, 7)) +
         (__builtin_shufflevector(ab13, cd13, 0, 1, 4, 5) + __builtin_shufflevector(ab13, cd13, 2, 3, 6, 7));
}

inline Vec as_float(IntVec v) { Vec f; std::memcpy(&f, &v, sizeof f); return f; }
inline IntVec as_int(Vec v) { IntVec i; std::memcpy(&i, &v, sizeof i); return i; }

// bfloat16: a value from each 32-bit word, the even element in the low half.
inline Vec low_halves(IntVec w) { return as_float(w << 16); }
inline Vec high_halves(IntVec w) { return as_float(w & static_cast<int32_t>(0xffff0000u)); }
inline float from_bf16(uint16_t b) {
  uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// e^x to about one unit in the last place; 0 far below, the largest float's neighbourhood far above, NaN for NaN.
inline Vec exp(Vec x) {
  const Vec clamped = x > 88.0f ? splat(88.0f) : (x < -87.3365479f ? splat(-87.3365479f) : x);
  const Vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  const Vec shifted = fma(clamped, 1.44269504f, magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, clamped));
  Vec p = fma(r, 1.9875691500e-4f, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const IntVec power = (as_int(shifted) + 127) << 23;
  const Vec y = p * as_float(power);
  return x < -87.3365479f ? Vec{} : y;
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace hnet
