// Rotary embedding and causal attention over kept keys; see rotary.py and attention.py.
//
// A position's key and value are kept first and then read back like all others, so that a query sees the same
// numbers whether its keys came in the same span or long before. Keys are taken in order of stage position.
#pragma once
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

  int64_t operator()(int64_t row, int64_t position) const {
    if (capacity) return row * capacity + position % capacity;
    return table[row * row_pages + position / PAGE] * PAGE + position % PAGE;
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

// B registers of channels of Σ scores · values, keys in order.
template <class Keep, int B>
inline void mix(const typename Keep::Stored* values, const int64_t* places, const float* scores, int64_t seen,
                float total, float* out) {
  Vec sum[B] = {};
  for (int64_t i = 0; i < seen; i++)
#pragma GCC unroll 4
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
  for (int64_t i = 0; i < kept; i++) scratch.places[i] = slots(span.row, first + i) * width;
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
    float largest = -INFINITY;
    for (int64_t i = 0; i < seen; i++) {
      const typename Keep::Stored* key = keys + places[i];
      Vec sum{};
      int64_t p = 0;
      for (; p + LANES <= head_dim; p += LANES) sum = fma(load(q + p), Keep::get(key + p), sum);
      if (p < head_dim) sum = fma(load_some(q + p, head_dim - p), Keep::get_some(key + p, head_dim - p), sum);
      scores[i] = sum_lanes(sum) * scale;
      largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
    }
    float total = 0;
    for (int64_t i = 0; i < seen; i += LANES) {
      store(scores + i, exp(load(scores + i) - largest));
      for (int64_t j = i; j < i + LANES && j < seen; j++) total += scores[j];
    }
    float* mixed = out + t * ldo;
    int64_t p = 0;
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
