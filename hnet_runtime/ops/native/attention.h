// Rotary embedding and causal attention over kept keys; see rotary.py and attention.py.
//
// A position's key and value are kept first and then read back like all others, so that a query sees the same
// numbers whether its keys came in the same span or long before. Keys are taken in order of stage position.
#pragma once
#include <algorithm>
#include <vector>

#include "norm.h"
#include "spans.h"
#include "vec.h"

namespace hnet {

constexpr int64_t PAGE = 64;

// Where a stage keeps keys: a ring of `capacity` positions a row, or pages by the rows' table where capacity is 0.
struct Slots {
  int64_t capacity;
  const int64_t* table;
  int64_t row_pages;

  // Places in the stores of a row's positions first … first + count, at `width` numbers each.
  void places(int64_t row, int64_t first, int64_t count, int64_t width, int64_t* out) const {
    const int64_t run = capacity ? capacity : PAGE;  // positions that lie in a row
    for (int64_t i = 0, part = 0; i < count; i += part) {
      const int64_t at = (first + i) % run;
      const int64_t begin = capacity ? row * capacity : table[row * row_pages + (first + i) / PAGE] * PAGE;
      part = std::min(run - at, count - i);
      for (int64_t j = 0; j < part; j++) out[i + j] = (begin + at + j) * width;
    }
  }
};

// Turns channel i of one head together with channel i + half by the angle of a position: cos, sin [half].
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {  // rounded product by product, like the twin
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = first * sin[i] + second * cos[i];
  }
}

struct KeepFloat {
  typedef float Stored;
  static float put(float x) { return x; }
  static Vec get(const float* p) { return load(p); }
  static Vec get_some(const float* p, int64_t n) { return load_some(p, n); }
};

struct KeepBfloat16 {
  typedef uint16_t Stored;
  static uint16_t put(float x) { return to_bf16(x); }
  static Vec get(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
    Vec v;
    std::memcpy(&v, &words, sizeof v);
    return v;
  }
  static Vec get_some(const uint16_t* p, int64_t n) {
    uint16_t lanes[LANES] = {};
    std::memcpy(lanes, p, n * sizeof(uint16_t));
    return get(lanes);
  }
};

struct AttentionScratch {
  std::vector<float> scores;
  std::vector<int64_t> places;  // of a span's keys in the stores
};

// Scores of B keys abreast, each one's sum in an order of its own: one key alone would wait for its chain of products.
template <class Keep, int B>
inline void score(const float* q, const typename Keep::Stored* keys, const int64_t* places, int64_t head_dim,
                  float scale, float* scores) {
  Vec sum[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) sum[b] = Vec{};  // "= {}" would write through memory
  int64_t p = 0;
  for (; p + LANES <= head_dim; p += LANES) {
    const Vec x = load(q + p);
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[b] = fma(x, Keep::get(keys + places[b] + p), sum[b]);
  }
  if (p < head_dim) {
    const Vec x = load_some(q + p, head_dim - p);
    for (int b = 0; b < B; b++) sum[b] = fma(x, Keep::get_some(keys + places[b] + p, head_dim - p), sum[b]);
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) scores[b] = sum_lanes(sum[b]) * scale;
}

// B registers of channels of Σ scores · values, keys in order.
template <class Keep, int B>
inline void mix(const typename Keep::Stored* values, const int64_t* places, const float* scores, int64_t seen,
                float total, float* out) {
  Vec sum[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) sum[b] = Vec{};
  for (int64_t i = 0; i < seen; i++)
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[b] = fma(Keep::get(values + places[i] + b * LANES), scores[i], sum[b]);
  for (int b = 0; b < B; b++) store(out + b * LANES, sum[b] / total);
}

// One head of one span. qkv [length, ldq] at this head's q; k and v lie `width` and 2 · `width` behind it.
// keys, values: the stores at this head, [slots, width]; out [length, ldo] at this head.
template <class Keep>
inline void attend(const float* qkv, int64_t ldq, int64_t width, int64_t head_dim, const Span& span, int64_t window,
                   const Slots& slots, typename Keep::Stored* keys, typename Keep::Stored* values, float* out,
                   int64_t ldo, AttentionScratch& scratch) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int64_t first = window >= 0 && span.start > window ? span.start - window : 0;
  const int64_t kept = span.start + span.length - first;
  scratch.places.resize(kept);
  scratch.scores.resize(round_up(kept, LANES));
  slots.places(span.row, first, kept, width, scratch.places.data());
  float* scores = scratch.scores.data();
  for (int64_t t = 0; t < span.length; t++) {
    const float* q = qkv + t * ldq;
    const int64_t now = span.start + t, here = scratch.places[now - first];
    for (int64_t p = 0; p < head_dim; p++) {
      keys[here + p] = Keep::put(q[width + p]);
      values[here + p] = Keep::put(q[2 * width + p]);
    }
    const int64_t oldest = window >= 0 && now > window ? now - window : 0, seen = now - oldest + 1;
    const int64_t* places = scratch.places.data() + (oldest - first);
    int64_t scored = 0;
    for (; scored + 8 <= seen; scored += 8)
      score<Keep, 8>(q, keys, places + scored, head_dim, scale, scores + scored);
    for (; scored < seen; scored++) score<Keep, 1>(q, keys, places + scored, head_dim, scale, scores + scored);
    float largest = -INFINITY;
    for (int64_t i = 0; i < seen; i++) largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
    float total = 0;
    for (int64_t i = 0; i < seen; i += LANES) {
      store(scores + i, exp(load(scores + i) - largest));
      for (int64_t j = i; j < i + LANES && j < seen; j++) total += scores[j];
    }
    float* mixed = out + t * ldo;
    int64_t p = 0;
    for (; p + 8 * LANES <= head_dim; p += 8 * LANES) mix<Keep, 8>(values + p, places, scores, seen, total, mixed + p);
    for (; p + 4 * LANES <= head_dim; p += 4 * LANES) mix<Keep, 4>(values + p, places, scores, seen, total, mixed + p);
    for (; p + LANES <= head_dim; p += LANES) mix<Keep, 1>(values + p, places, scores, seen, total, mixed + p);
    if (p < head_dim) {
      Vec sum{};
      for (int64_t i = 0; i < seen; i++) sum = fma(Keep::get_some(values + places[i] + p, head_dim - p), scores[i], sum);
      store_some(mixed + p, sum / total, head_dim - p);
    }
  }
}

}  // namespace hnet
