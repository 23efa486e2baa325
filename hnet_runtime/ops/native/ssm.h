// The Mamba-2 recurrence, sequential in time; see ssm.py.
#pragma once
#include "spans.h"
#include "vec.h"

namespace hnet {

constexpr int64_t HEAD_DIM = 64;  // P

// One head of one span. x, y [length, …] at this head's first channel; dt [length, …] at this head; b, c [length, N];
// state [P, N]. `ldx` strides x, b and c alike (they are parts of one row), `ldd` dt, `ldy` y.
inline void selective_scan(const float* x, const float* b, const float* c, int64_t ldx, const float* dt, int64_t ldd,
                           float a, float d, float dt_bias, int64_t length, int64_t states, float* state, float* y,
                           int64_t ldy) {
  for (int64_t t = 0; t < length; t++) {
    const float *xt = x + t * ldx, *bt = b + t * ldx, *ct = c + t * ldx;
    const float step = softplus(dt[t * ldd] + dt_bias);
    const float decay = exp(splat(step * a))[0];
    for (int64_t p = 0; p < HEAD_DIM; p++) {
      float* s = state + p * states;
      const float scaled = step * xt[p];
      Vec sum{};
      int64_t n = 0;
      for (; n + LANES <= states; n += LANES) {
        const Vec now = fma(load(bt + n), scaled, load(s + n) * decay);
        store(s + n, now);
        sum = fma(now, load(ct + n), sum);
      }
      if (n < states) {
        const int64_t some = states - n;
        const Vec now = fma(load_some(bt + n, some), scaled, load_some(s + n, some) * decay);
        store_some(s + n, now, some);
        sum = fma(now, load_some(ct + n, some), sum);
      }
      y[t * ldy + p] = sum_lanes(sum) + d * xt[p];
    }
  }
}

}  // namespace hnet
