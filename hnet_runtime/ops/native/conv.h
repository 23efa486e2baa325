// The causal depthwise convolution, and SiLU; see conv.py. Channels are lanes.
#pragma once
#include "spans.h"
#include "vec.h"

namespace hnet {

// One span: x [length, ldx] in, out [length, ldo]; state [taps − 1, channels] of the row; weight [taps, channels].
// Channels begin…end only, begin a multiple of LANES.
inline void causal_conv(const float* x, int64_t ldx, int64_t length, float* state, const float* weight,
                        const float* bias, int64_t taps, int64_t channels, int64_t begin, int64_t end, float* out,
                        int64_t ldo) {
  const int64_t depth = taps - 1;
  for (int64_t c = begin; c < end; c += LANES) {
    const int64_t some = end - c < LANES ? end - c : LANES;
    const auto get = [&](const float* p) { return some == LANES ? load(p) : load_some(p, some); };
    const auto put = [&](float* p, Vec v) { some == LANES ? store(p, v) : store_some(p, v, some); };
    for (int64_t t = 0; t < length; t++) {
      Vec sum = get(bias + c);
      for (int64_t k = 0; k < taps; k++) {
        const int64_t from = t - depth + k;  // before 0 it lies in the state
        const float* input = from < 0 ? state + (depth + from) * channels + c : x + from * ldx + c;
        sum = fma(get(weight + k * channels + c), get(input), sum);
      }
      put(out + t * ldo + c, silu(sum));
    }
    for (int64_t k = 0; k < depth; k++) {  // oldest first: what is read lies at or after what is written
      const int64_t from = length - depth + k;
      put(state + k * channels + c, get(from < 0 ? state + (depth + from) * channels + c : x + from * ldx + c));
    }
  }
}

}  // namespace hnet
