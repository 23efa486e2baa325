// RMSNorm, plain and gated. Sums over lanes in a fixed order; see norm.py for what is computed.
#pragma once
#include "vec.h"

namespace hnet {

constexpr float NORM_EPS = 1e-5f;

inline float sum_of_squares(const float* x, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec v = load(x + i);
    sum = fma(v, v, sum);
  }
  if (i < n) {
    const Vec v = load_some(x + i, n - i);
    sum = fma(v, v, sum);
  }
  return sum_lanes(sum);
}

inline float dot(const float* x, const float* y, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum = fma(load(x + i), load(y + i), sum);
  if (i < n) sum = fma(load_some(x + i, n - i), load_some(y + i, n - i), sum);
  return sum_lanes(sum);
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float* out) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + NORM_EPS);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_some(out + i, load_some(x + i, n - i) * scale * load_some(weight + i, n - i), n - i);
}

// out = RMSNorm(y · SiLU(gate)); n is a multiple of LANES, out may be y.
inline void gated_rms_norm(const float* y, const float* gate, const float* weight, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, load(y + i) * silu(load(gate + i)));
  rms_norm(out, weight, n, out);
}

}  // namespace hnet
