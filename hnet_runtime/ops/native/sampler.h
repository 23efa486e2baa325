// The next byte of each row; see engine/sampler.py, whose arithmetic in double this is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace hnet {

constexpr int VOCAB = 256;

struct Draw {
  double temperature, top_p, min_p, uniform;
  int64_t top_k;            // 0 keeps all
  const uint8_t* allowed;   // [VOCAB]
};

// −1 where a logit is not finite.
inline int64_t sample(const float* logits, const Draw& draw) {
  int64_t best = -1;
  for (int i = 0; i < VOCAB; i++) {
    if (!std::isfinite(logits[i])) return -1;
    if (draw.allowed[i] && (best < 0 || logits[i] > logits[best])) best = i;
  }
  if (draw.temperature == 0) return best;

  double weight[VOCAB];
  for (int i = 0; i < VOCAB; i++)
    weight[i] = draw.allowed[i]
                    ? std::exp((static_cast<double>(logits[i]) - static_cast<double>(logits[best])) / draw.temperature)
                    : 0.0;
  if (draw.top_k || draw.top_p < 1 || draw.min_p > 0) {
    int order[VOCAB];
    for (int i = 0; i < VOCAB; i++) order[i] = i;
    std::stable_sort(order, order + VOCAB, [&](int a, int b) { return weight[a] > weight[b]; });
    const int64_t most = draw.top_k ? std::min<int64_t>(draw.top_k, VOCAB) : VOCAB;
    double total = 0;
    for (int64_t r = 0; r < most; r++) total += weight[order[r]];
    const double largest = weight[order[0]];
    double before = 0;
    for (int64_t r = 0; r < VOCAB; r++) {
      double& w = weight[order[r]];
      const double own = w;
      if (r >= most || !(draw.top_p >= 1 || before < draw.top_p * total) || own < draw.min_p * largest) w = 0;
      if (r < most) before += own;
    }
  }
  double total = 0;
  for (int i = 0; i < VOCAB; i++) total += weight[i];
  const double target = total * draw.uniform;
  double sum = 0;
  int64_t last = best;
  for (int i = 0; i < VOCAB; i++) {
    if (weight[i] <= 0) continue;
    sum += weight[i];
    last = i;
    if (sum > target) break;
  }
  return last;
}

}  // namespace hnet
