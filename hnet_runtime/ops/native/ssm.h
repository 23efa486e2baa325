// The Mamba-2 recurrence, sequential in time; see ssm.py.
#pragma once
#include <algorithm>

#include "spans.h"
#include "vec.h"

namespace hnet {

constexpr int64_t HEAD_DIM = 64;  // P

constexpr int64_t ABREAST = 4;  // channels whose sums are taken side by side

// One position of ABREAST channels: state ← decay · state + step x Bᵀ, and y = state C + d x. A channel's sum runs over n
// in order, lane by lane. state [ABREAST, N]; b, c [N]; x, y [ABREAST].
__attribute__((noinline)) inline void advance(float* state, int64_t states, const float* b, const float* c,
                                              const float* x, float step, float decay, float d, float* y) {
  Vec sum[ABREAST], scaled[ABREAST];
#pragma GCC unroll 4
  for (int64_t i = 0; i < ABREAST; i++) sum[i] = Vec{}, scaled[i] = splat(step * x[i]);
  const Vec keep = splat(decay);
  float* s[ABREAST] = {state, state + states, state + 2 * states, state + 3 * states};
  int64_t n = 0;
  for (; n + LANES <= states; n += LANES) {
    const Vec bn = load(b + n), cn = load(c + n);
#pragma GCC unroll 4
    for (int64_t i = 0; i < ABREAST; i++) {
      const Vec now = fma(bn, scaled[i], load(s[i] + n) * keep);
      store(s[i] + n, now);
      sum[i] = fma(now, cn, sum[i]);
    }
  }
  if (n < states) {
    const int64_t some = states - n;
    const Vec bn = load_some(b + n, some), cn = load_some(c + n, some);
    for (int64_t i = 0; i < ABREAST; i++) {
      const Vec now = fma(bn, scaled[i], load_some(s[i] + n, some) * keep);
      store_some(s[i] + n, now, some);
      sum[i] = fma(now, cn, sum[i]);
    }
  }
  const Four sums = sum_lanes(sum);
  for (int64_t i = 0; i < ABREAST; i++) y[i] = sums[i] + d * x[i];
}

// One head of one span. x, y [length, …] at this head's first channel; dt [length, …] at this head; b, c [length, N];
// state [P, N]. `ldx` strides x, b and c alike (they are parts of one row), `ldd` dt, `ldy` y.
//
// A few channels pass a few positions before the next ones do, so that their states and those positions' B and C are
// read from the nearest cache; the next channels' states are asked for meanwhile.
inline void selective_scan(const float* x, const float* b, const float* c, int64_t ldx, const float* dt, int64_t ldd,
                           float a, float d, float dt_bias, int64_t length, int64_t states, float* state, float* y,
                           int64_t ldy) {
  constexpr int64_t TIMES = 16, GROUP_CHANNELS = 2 * ABREAST, LINE = 16;
  static_assert(ABREAST == 4 && HEAD_DIM % GROUP_CHANNELS == 0);
  float steps[TIMES], decays[TIMES];
  for (int64_t first = 0; first < length; first += TIMES) {
    const int64_t last = std::min(first + TIMES, length);
    for (int64_t t = first; t < last; t++) {
      steps[t - first] = softplus(dt[t * ldd] + dt_bias);
      decays[t - first] = exp(splat(steps[t - first] * a))[0];
    }
    for (int64_t group = 0; group < HEAD_DIM; group += GROUP_CHANNELS)
      for (int64_t t = first; t < last; t++)
        for (int64_t p = group; p < group + GROUP_CHANNELS; p += ABREAST) {
          if (t == first)
            for (int64_t i = 0; i < ABREAST * states; i += LINE)
              __builtin_prefetch(state + (p + GROUP_CHANNELS) * states + i, 1);
          advance(state + p * states, states, b + t * ldx, c + t * ldx, x + t * ldx + p, steps[t - first],
                  decays[t - first], d, y + t * ldy + p);
        }
  }
}

}  // namespace hnet
