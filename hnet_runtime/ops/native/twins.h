// The single ops one call each, so that each can be held against its torch twin in ops/*.py. Serving calls none of
// them: its one call is hnet_forward. Strides are in elements; included by interface.cpp.
#pragma once
#include <algorithm>

#include "attention.h"
#include "conv.h"
#include "linear.h"
#include "model.h"
#include "norm.h"
#include "sampler.h"
#include "ssm.h"
#include "vec.h"

namespace hnet {

// y [n] = op(x [n]), a register at a time, the last one in part.
template <class Op>
inline void each_register(const float* x, int64_t n, float* y, const Op& op) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, op(load(x + i)));
  if (i < n) store_some(y + i, op(load_some(x + i, n - i)), n - i);
}

}  // namespace hnet

extern "C" {

void hnet_exp(const float* x, int64_t n, float* y) {
  hnet::each_register(x, n, y, [](hnet::Vec v) { return hnet::exp(v); });
}

void hnet_silu(const float* x, int64_t n, float* y) {
  hnet::each_register(x, n, y, [](hnet::Vec v) { return hnet::silu(v); });
}

void hnet_softplus(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = hnet::softplus(x[i]);
}

void hnet_to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i++) y[i] = hnet::to_bf16(x[i]);
}

void hnet_from_bf16(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = hnet::from_bf16(x[i]);
}

// x, out [rows, n].
void hnet_rms_norm(const float* x, const float* weight, int64_t rows, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; r++) hnet::rms_norm(x + r * n, weight, n, out + r * n);
}

// y, gate, out [rows, n]; n is a multiple of hnet_lanes().
void hnet_gated_rms_norm(const float* y, const float* gate, const float* weight, int64_t rows, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; r++) hnet::gated_rms_norm(y + r * n, gate + r * n, weight, n, out + r * n);
}

// One span: x [length, channels] in, out the same; state [taps − 1, channels]; weight [taps, channels]. `part` channels
// at a time, a multiple of hnet_lanes().
void hnet_causal_conv(const float* x, int64_t length, float* state, const float* weight, const float* bias, int64_t taps,
                      int64_t channels, int64_t part, float* out) {
  for (int64_t c = 0; c < channels; c += part)
    hnet::causal_conv(x, channels, length, state, weight, bias, taps, channels, c, std::min(c + part, channels), out,
                      channels);
}

// One span: x, y [length, heads, P], dt [length, heads] before bias and softplus, b and c rows of [length, 2 · states],
// a, d, dt_bias [heads], state [heads, P, states].
void hnet_selective_scan(const float* x, const float* dt, const float* bc, const float* a, const float* d,
                         const float* dt_bias, int64_t length, int64_t heads, int64_t states, float* state, float* y) {
  const int64_t inner = heads * hnet::HEAD_DIM, width = inner + 2 * states;
  std::vector<float> row(length * width);  // x, B, C of each position, as the convolution leaves them
  for (int64_t t = 0; t < length; t++) {
    std::copy_n(x + t * inner, inner, &row[t * width]);
    std::copy_n(bc + t * 2 * states, 2 * states, &row[t * width + inner]);
  }
  for (int64_t h = 0; h < heads; h++)
    hnet::selective_scan(&row[h * hnet::HEAD_DIM], &row[inner], &row[inner + states], width, dt + h, heads, a[h], d[h],
                         dt_bias[h], length, states, state + h * hnet::HEAD_DIM * states, y + h * hnet::HEAD_DIM,
                         inner);
}

// One head: x [2 · half] in place; cos, sin [half].
void hnet_rotate(float* x, const float* cos, const float* sin, int64_t half) { hnet::rotate(x, cos, sin, half); }

// One span of `row` from stage position `start` on: qkv [length, 3, heads, P], rotated; keys, values [slots, heads, P]
// in bfloat16 or float32; out [length, heads, P].
void hnet_attend(const float* qkv, int64_t heads, int64_t head_dim, int64_t row, int64_t start, int64_t length,
                 int64_t window, const hnet::Slots* slots, int64_t bf16, void* keys, void* values, float* out) {
  const int64_t width = heads * head_dim;
  hnet::AttentionScratch scratch;
  for (int64_t at = 0; at < width; at += head_dim) {
    const hnet::Span span{row, start, length, 0};
    if (bf16)
      hnet::attend<hnet::KeepBfloat16>(qkv + at, 3 * width, width, head_dim, span, window, *slots,
                                       static_cast<uint16_t*>(keys) + at, static_cast<uint16_t*>(values) + at, out + at,
                                       width, scratch);
    else
      hnet::attend<hnet::KeepFloat>(qkv + at, 3 * width, width, head_dim, span, window, *slots,
                                    static_cast<float*>(keys) + at, static_cast<float*>(values) + at, out + at, width,
                                    scratch);
  }
}

// x [rows, k] → q [rows, k rounded up to 4] and scale [rows]: x ≈ scale · (q − 128).
void hnet_quantize(const float* x, int64_t rows, int64_t k, uint8_t* q, float* scale) {
  hnet::Quantized quantized;
  quantized.take(x, k, rows, k);
  const int64_t padded = (k + 3) / 4 * 4;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < padded; i++) q[r * padded + i] = quantized.q[r * quantized.stride + hnet::place(i)];
  std::copy(quantized.scale.begin(), quantized.scale.end(), scale);
}

// Bytes of each struct, in the order in which binding.py has them.
void hnet_struct_sizes(int64_t* sizes) {
  const int64_t each[] = {sizeof(hnet::Matrix), sizeof(hnet::Layer), sizeof(hnet::Stack), sizeof(hnet::Slots),
                          sizeof(hnet::Stage),  sizeof(hnet::Model), sizeof(hnet::Draw),  sizeof(hnet::StageReport)};
  std::copy(std::begin(each), std::end(each), sizes);
}

}  // extern "C"
