// An H-Net as the C interface describes it, and its forward: the loop down, the main network, the loop up.
// What each struct means is said once, in binding.py, which mirrors them field by field.
#pragma once
#include <chrono>
#include <memory>
#include <vector>

#include "attention.h"
#include "conv.h"
#include "linear.h"
#include "norm.h"
#include "pool.h"
#include "spans.h"
#include "ssm.h"

namespace hnet {

struct Layer {
  int64_t is_attention, has_mlp;
  const float *norm1, *norm2;
  Matrix in_proj, out_proj, fc1, fc2;                  // in_proj is Wqkv for attention
  const float *conv_weight, *conv_bias, *dt_bias, *a, *d, *ssm_norm;
  void *first_state, *second_state;                    // conv and SSM, or keys and values
};

struct Stack {
  int64_t num_layers;
  const Layer* layers;
  const float* norm;
};

struct Stage {
  int64_t d_model, d_outer, d_mlp;
  int64_t heads, head_dim, rotary_half, window;        // heads 0: no attention in this stage
  const float *rotary_cos, *rotary_sin;                // [positions, rotary_half]
  Slots slots;
  int64_t ssm_heads, d_state, d_conv;                  // ssm_heads 0: no Mamba-2 in this stage
  const float* pad;                                    // [d_model − d_outer]
  Stack encoder, decoder;                              // the main network is an encoder alone
  Matrix q_proj, k_proj, residual;
  float *router, *ema;                                 // [rows, d_model]
  float *parked, *parked_p;                            // [rows, d_model], [rows]: of rows due at the next stage
  double override_rate;                                // benchmarks: chance of a boundary; 0 asks the router
  uint64_t override_key;
  int64_t* positions;                                  // [rows]
};

struct Model {
  int64_t num_stages;
  const Stage* stages;
  const float* embeddings;                             // [256, d_model]
  Matrix head;
  int64_t bf16;                                        // keys, values and the router's rounding in bfloat16
};

// What one forward says of one stage; the arrays hold as many positions as stage 0 has.
struct StageReport {
  int64_t positions;
  double seconds;
  int64_t *rows, *offsets;                             // [T] row and byte offset of each position
  float* p;                                            // [T]
  uint8_t* boundary;                                   // [T]
};

constexpr float P_MIN = 1e-4f, P_MAX = 1.0f - 1e-4f, NORM_FLOOR = 1e-12f;

// Room for [rows, width] floats whose rows are whole registers; what lies behind `width` is never read as a number
// that counts.
struct Buffer {
  std::unique_ptr<float[]> data;
  int64_t room = 0, stride = 0;

  float* take(int64_t rows, int64_t width) {
    stride = round_up(width, LANES);
    if (rows * stride > room) {
      room = rows * stride;
      data = std::make_unique<float[]>(room);
    }
    return data.get();
  }
  float* row(int64_t i) const { return data.get() + i * stride; }
};

// What one pass of a stack's layers takes: positions of spans, and their vectors, which it changes in place.
struct Part {
  Spans spans;
  float* h;
  int64_t stride;

  float* row(int64_t i) const { return h + i * stride; }
};

class Forward {
 public:
  Forward(const Model& model, int threads) : model_(model), pool_(threads), levels_(model.num_stages) {}

  // The next bytes of each span's row, span after span. logits [n, 256] of the last `num_logits[i]` positions of each.
  void run(int64_t count, const int64_t* rows, const int64_t* lengths, const uint8_t* bytes,
           const int64_t* num_logits, float* logits, StageReport* reports) {
    Spans& outer = levels_[0].spans;
    outer.clear();
    for (int64_t i = 0; i < count; i++) outer.add(rows[i], model_.stages[0].positions[rows[i]], lengths[i]);
    embed(bytes);
    clear(reports);
    place(0, reports[0]);
    ascend_from(descend(0, false, nullptr, reports), reports);
    head(num_logits, logits);
  }

  // One position of each row at stage `first`: its next byte where that is 0, else what it was parked with. Rows whose
  // router there opens a chunk go on where `parks` is false; else they are parked, due at the next stage, and nothing is
  // written of their decoders. finished [count] says which rows came to an end; logits [finished ones, 256].
  void step(int64_t first, int64_t count, const int64_t* rows, const uint8_t* bytes, bool parks, uint8_t* finished,
            float* logits, StageReport* reports) {
    const Stage& stage = model_.stages[first];
    Level& level = levels_[first];
    level.spans.clear();
    for (int64_t i = 0; i < count; i++) level.spans.add(rows[i], stage.positions[rows[i]], 1);
    first ? unpark(first) : embed(bytes);
    clear(reports);
    place(first, reports[first]);
    std::fill(finished, finished + count, 1);
    const int64_t deepest = descend(first, parks, finished, reports);
    if (level.spans.total == 0) return;
    for (int64_t s = 0; s < first; s++) surface(s, level.spans);
    ascend_from(deepest, reports);
    ones_.assign(level.spans.count(), 1);
    head(ones_.data(), logits);
  }

 private:
  struct Level {
    Spans spans;
    Buffer h;                         // [T, D] in and out of stacks
    std::vector<float> p;             // [T]
    std::vector<uint8_t> boundary;    // [T]
  };

  static double since(std::chrono::steady_clock::time_point started) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }

  bool is_main(int64_t index) const { return index + 1 == model_.num_stages; }

  void clear(StageReport* reports) const {
    for (int64_t s = 0; s < model_.num_stages; s++) reports[s].positions = 0, reports[s].seconds = 0;
  }

  // Where in its row's bytes each position of the first stage of a forward stands.
  void place(int64_t first, StageReport& report) const {
    for (const Span& span : levels_[first].spans.each)
      for (int64_t t = 0; t < span.length; t++) {
        report.rows[span.begin + t] = span.row;
        report.offsets[span.begin + t] = first ? model_.stages[0].positions[span.row] - 1 : span.start + t;
      }
  }

  void embed(const uint8_t* bytes) {
    Level& level = levels_[0];
    const int64_t width = model_.stages[0].d_model;
    level.h.take(level.spans.total, width);
    for (int64_t t = 0; t < level.spans.total; t++)
      std::memcpy(level.h.row(t), model_.embeddings + bytes[t] * width, width * sizeof(float));
  }

  // A vector of the stage before, widened.
  void widen(const float* from, int64_t width, const Stage& stage, float* to) const {
    std::memcpy(to, from, width * sizeof(float));
    if (stage.d_model > width) std::memcpy(to + width, stage.pad, (stage.d_model - width) * sizeof(float));
  }

  // Encoders and routers from `first` down, until a stage has no positions, or the rows that go on were parked.
  // Returns the last stage that ran.
  int64_t descend(int64_t first, bool parks, uint8_t* finished, StageReport* reports) {
    for (int64_t s = first;; s++) {
      const auto started = std::chrono::steady_clock::now();
      Level& level = levels_[s];
      const Stage& stage = model_.stages[s];
      reports[s].positions = level.spans.total;
      stack(stage, stage.encoder, level);
      if (!is_main(s)) {
        route(stage, level, reports[s]);
        if (!parks) select(s, reports);
      }
      for (const Span& span : level.spans.each) stage.positions[span.row] += span.length;
      if (parks && !is_main(s)) park(stage, level, finished);
      reports[s].seconds += since(started);
      if (parks || is_main(s) || levels_[s + 1].spans.total == 0) return s;
    }
  }

  // Decoders from the last stage that ran up to the bytes.
  void ascend_from(int64_t deepest, StageReport* reports) {
    for (int64_t s = std::min(deepest, model_.num_stages - 2); s >= 0; s--) {
      const auto started = std::chrono::steady_clock::now();
      ascend(s, s < deepest);
      reports[s].seconds += since(started);
    }
  }

  // Of a step: rows with a boundary leave the level and wait, with all that their byte needs to go on.
  void park(const Stage& stage, Level& level, uint8_t* finished) {
    const int64_t width = stage.d_model, total = level.spans.total;
    Spans kept;
    for (int64_t i = 0; i < total; i++) {
      const Span& span = level.spans.each[i];
      finished[i] = !level.boundary[i];
      if (level.boundary[i]) {
        std::memcpy(stage.parked + span.row * width, level.h.row(i), width * sizeof(float));
        stage.parked_p[span.row] = level.p[i];
        continue;
      }
      if (kept.total != i) std::memcpy(level.h.row(kept.total), level.h.row(i), width * sizeof(float));
      kept.add(span.row, span.start, 1);
    }
    level.spans = std::move(kept);
    level.boundary.assign(level.spans.total, 0);
  }

  void unpark(int64_t index) {
    const Stage &outer = model_.stages[index - 1], &stage = model_.stages[index];
    Level& level = levels_[index];
    level.h.take(level.spans.total, stage.d_model);
    for (const Span& span : level.spans.each)
      widen(outer.parked + span.row * outer.d_model, outer.d_model, stage, level.h.row(span.begin));
  }

  // A stage above the one that a step began at, as its rows left it when they parked.
  void surface(int64_t index, const Spans& rows) {
    const Stage& stage = model_.stages[index];
    Level& level = levels_[index];
    level.spans.clear();
    level.h.take(rows.total, stage.d_model);
    level.p.resize(rows.total);
    level.boundary.assign(rows.total, 1);
    for (const Span& span : rows.each) {
      const int64_t at = level.spans.total;
      std::memcpy(level.h.row(at), stage.parked + span.row * stage.d_model, stage.d_model * sizeof(float));
      level.p[at] = stage.parked_p[span.row];
      level.spans.add(span.row, stage.positions[span.row] - 1, 1);
    }
  }

  void multiply(const Matrix& m, const Buffer& x, int64_t rows, Buffer& y, bool add) {
    product(m, x.data.get(), x.stride, rows, y.data.get(), y.stride, add, pool_, quantized_);
  }
  void multiply(const Matrix& m, const Buffer& x, const Part& sum) {
    product(m, x.data.get(), x.stride, sum.spans.total, sum.h, sum.stride, true, pool_, quantized_);
  }

  // RMSNorm of the part's vectors.
  void normalize(const Part& part, const float* weight, int64_t width, float* out, int64_t stride) {
    const int64_t total = part.spans.total;
    pool_.run(total, total * width * 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) rms_norm(part.row(t), weight, width, out + t * stride);
    });
  }

  // level.h → norm(level.h + the layers' outputs). level.h itself is the residual stream on the way. Long prompts pass
  // all layers in parts, so that what lies between two operations stays in the cache.
  void stack(const Stage& stage, const Stack& layers, Level& level) {
    Part part{{}, level.h.data.get(), level.h.stride};
    for (const Span& span : level.spans.each)
      for (int64_t t = 0; t < span.length;) {
        const int64_t length = std::min(span.length - t, PART - part.spans.total);
        part.spans.add(span.row, span.start + t, length);
        t += length;
        if (part.spans.total < PART) continue;
        pass(stage, layers, part);
        part.h += PART * part.stride;
        part.spans.clear();
      }
    if (part.spans.total) pass(stage, layers, part);
  }

  void pass(const Stage& stage, const Stack& layers, const Part& part) {
    const int64_t width = stage.d_model;
    normed_.take(part.spans.total, width);
    for (int64_t i = 0; i < layers.num_layers; i++) {
      const Layer& layer = layers.layers[i];
      normalize(part, layer.norm1, width, normed_.data.get(), normed_.stride);
      layer.is_attention ? attention(stage, layer, part) : mamba2(stage, layer, part);
      if (!layer.has_mlp) continue;
      normalize(part, layer.norm2, width, normed_.data.get(), normed_.stride);
      mlp(stage, layer, part);
    }
    normalize(part, layers.norm, width, part.h, part.stride);
  }

  void mamba2(const Stage& stage, const Layer& layer, const Part& part) {
    const Spans& spans = part.spans;
    const int64_t heads = stage.ssm_heads, inner = heads * HEAD_DIM, states = stage.d_state;
    const int64_t channels = inner + 2 * states, depth = stage.d_conv - 1;
    wide_.take(spans.total, 2 * inner + 2 * states + heads);  // z, x, B, C, dt
    multiply(layer.in_proj, normed_, spans.total, wide_, false);
    mixed_.take(spans.total, channels);
    float* conv = static_cast<float*>(layer.first_state);
    const int64_t parts = (channels + CHANNELS - 1) / CHANNELS;
    pool_.run(spans.count() * parts, spans.total * channels * 20, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const Span& span = spans.each[task / parts];
        const int64_t first = task % parts * CHANNELS, last = std::min(first + CHANNELS, channels);
        causal_conv(wide_.row(span.begin) + inner, wide_.stride, span.length, conv + span.row * depth * channels,
                    layer.conv_weight, layer.conv_bias, stage.d_conv, channels, first, last, mixed_.row(span.begin),
                    mixed_.stride);
      }
    });
    out_.take(spans.total, inner);
    float* ssm = static_cast<float*>(layer.second_state);
    // A row's states come from memory and go back to it, once for all of its span.
    pool_.run(spans.count() * heads, (spans.total + 3 * spans.count()) * inner * states, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const Span& span = spans.each[task / heads];
        const int64_t h = task % heads;
        const float* row = mixed_.row(span.begin);
        selective_scan(row + h * HEAD_DIM, row + inner, row + inner + states, mixed_.stride,
                       wide_.row(span.begin) + 2 * inner + 2 * states + h, wide_.stride, layer.a[h], layer.d[h],
                       layer.dt_bias[h], span.length, states, ssm + (span.row * heads + h) * HEAD_DIM * states,
                       out_.row(span.begin) + h * HEAD_DIM, out_.stride);
      }
    });
    pool_.run(spans.total, spans.total * inner * 20, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) gated_rms_norm(out_.row(t), wide_.row(t), layer.ssm_norm, inner, out_.row(t));
    });
    multiply(layer.out_proj, out_, part);
  }

  void attention(const Stage& stage, const Layer& layer, const Part& part) {
    const Spans& spans = part.spans;
    const int64_t heads = stage.heads, dim = stage.head_dim, width = stage.d_model, half = stage.rotary_half;
    wide_.take(spans.total, 3 * width);
    multiply(layer.in_proj, normed_, spans.total, wide_, false);
    out_.take(spans.total, width);
    int64_t cost = 0;
    for (const Span& span : spans.each) cost += span.length * (span.start + span.length) * width;
    pool_.run(spans.count() * heads, cost, [&](int64_t begin, int64_t end) {
      AttentionScratch scratch;
      for (int64_t task = begin; task < end; task++) {
        const Span& span = spans.each[task / heads];
        const int64_t at = task % heads * dim;
        for (int64_t t = 0; half && t < span.length; t++) {
          const int64_t angle = (span.start + t) * half;
          float* row = wide_.row(span.begin + t) + at;
          rotate(row, stage.rotary_cos + angle, stage.rotary_sin + angle, half);
          rotate(row + width, stage.rotary_cos + angle, stage.rotary_sin + angle, half);
        }
        float *qkv = wide_.row(span.begin) + at, *out = out_.row(span.begin) + at;
        if (model_.bf16)
          attend<KeepBfloat16>(qkv, wide_.stride, width, dim, span, stage.window, stage.slots,
                               static_cast<uint16_t*>(layer.first_state) + at,
                               static_cast<uint16_t*>(layer.second_state) + at, out, out_.stride, scratch);
        else
          attend<KeepFloat>(qkv, wide_.stride, width, dim, span, stage.window, stage.slots,
                            static_cast<float*>(layer.first_state) + at, static_cast<float*>(layer.second_state) + at,
                            out, out_.stride, scratch);
      }
    });
    multiply(layer.out_proj, out_, part);
  }

  void mlp(const Stage& stage, const Layer& layer, const Part& part) {
    const int64_t total = part.spans.total, width = stage.d_mlp;  // a multiple of LANES
    wide_.take(total, 2 * width);
    multiply(layer.fc1, normed_, total, wide_, false);
    out_.take(total, width);
    pool_.run(total, total * width * 20, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const float* row = wide_.row(t);  // value, then gate
        for (int64_t i = 0; i < width; i += LANES) store(out_.row(t) + i, silu(load(row + width + i)) * load(row + i));
      }
    });
    multiply(layer.fc2, out_, part);
  }

  // A boundary by chance instead of the router's; see override.py.
  static float drawn(const Stage& stage, int64_t row, int64_t position) {
    uint64_t z = stage.override_key + (static_cast<uint64_t>(row) << 32) + static_cast<uint64_t>(position);
    z = z * 0x9E3779B97F4A7C15u + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z = z ^ (z >> 31);
    return position == 0 || static_cast<double>(z >> 11) * 0x1p-53 < stage.override_rate ? 0.75f : 0.25f;
  }

  // The router's p and verdict of each position; see router.py.
  void route(const Stage& stage, Level& level, StageReport& report) {
    const Spans& spans = level.spans;
    const int64_t width = stage.d_model;
    normed_.take(spans.total, width);  // previous vectors
    for (const Span& span : spans.each) {
      float* memory = stage.router + span.row * width;
      for (int64_t t = 0; t < span.length; t++)
        std::memcpy(normed_.row(span.begin + t), t ? level.h.row(span.begin + t - 1) : memory, width * sizeof(float));
      std::memcpy(memory, level.h.row(span.begin + span.length - 1), width * sizeof(float));
    }
    wide_.take(spans.total, width);
    out_.take(spans.total, width);
    multiply(stage.q_proj, normed_, spans.total, wide_, false);
    multiply(stage.k_proj, level.h, spans.total, out_, false);
    level.p.resize(spans.total);
    level.boundary.resize(spans.total);
    for (const Span& span : spans.each)
      for (int64_t t = 0; t < span.length; t++) {
        const int64_t at = span.begin + t;
        const float *q = wide_.row(at), *k = out_.row(at);
        const float norms = std::max(std::sqrt(dot(q, q, width)), NORM_FLOOR) *
                            std::max(std::sqrt(dot(k, k, width)), NORM_FLOOR);
        float unlike = 1.0f - dot(q, k, width) / norms;
        if (model_.bf16) unlike = from_bf16(to_bf16(unlike));
        float p = unlike / 2.0f;
        p = p < 0.0f ? 0.0f : p > 1.0f ? 1.0f : p;  // NaN stays
        if (span.start + t == 0) p = 1.0f;
        if (stage.override_rate > 0) p = drawn(stage, span.row, span.start + t);
        level.p[at] = p;
        level.boundary[at] = p > 0.5f;
      }
    std::memcpy(report.p, level.p.data(), spans.total * sizeof(float));
    std::memcpy(report.boundary, level.boundary.data(), spans.total);
  }

  // The chosen positions, widened, become the next stage's spans.
  void select(int64_t index, StageReport* reports) {
    const Stage& next = model_.stages[index + 1];
    Level &level = levels_[index], &inner = levels_[index + 1];
    const int64_t width = model_.stages[index].d_model;
    inner.spans.clear();
    for (const Span& span : level.spans.each) {
      int64_t chosen = 0;
      for (int64_t t = 0; t < span.length; t++) chosen += level.boundary[span.begin + t];
      if (chosen) inner.spans.add(span.row, next.positions[span.row], chosen);
    }
    inner.h.take(inner.spans.total, next.d_model);
    const bool reported = index + 2 < model_.num_stages;  // the main network has no verdicts
    int64_t to = 0;
    for (int64_t from = 0; from < level.spans.total; from++) {
      if (!level.boundary[from]) continue;
      widen(level.h.row(from), width, next, inner.h.row(to));
      if (reported) {
        reports[index + 1].rows[to] = reports[index].rows[from];
        reports[index + 1].offsets[to] = reports[index].offsets[from];
      }
      to++;
    }
  }

  // level.h: the encoder's output → the decoder's, with what the chunks brought. z̄ ← P ẑ + (1 − P) z̄; see ema.py.
  void ascend(int64_t index, bool has_chunks) {
    const Stage& stage = model_.stages[index];
    Level& level = levels_[index];
    const int64_t width = stage.d_model, total = level.spans.total;
    smooth_.take(total, width);
    int64_t chunk = 0;
    for (const Span& span : level.spans.each) {
      float* memory = stage.ema + span.row * width;
      for (int64_t t = 0; t < span.length; t++) {
        const int64_t at = span.begin + t;
        if (has_chunks && level.boundary[at]) {
          const float p = level.p[at] < P_MIN ? P_MIN : level.p[at] > P_MAX ? P_MAX : level.p[at];
          const float* z = levels_[index + 1].h.row(chunk++);
          for (int64_t i = 0; i < width; i++) memory[i] = p * z[i] + (1.0f - p) * memory[i];
        }
        std::memcpy(smooth_.row(at), memory, width * sizeof(float));
      }
    }
    multiply(stage.residual, level.h, total, smooth_, true);
    std::swap(level.h, smooth_);
    stack(stage, stage.decoder, level);
  }

  void head(const int64_t* num_logits, float* logits) {
    Level& level = levels_[0];
    const int64_t width = model_.stages[0].d_model;
    int64_t wanted = 0;
    for (int64_t i = 0; i < level.spans.count(); i++) wanted += num_logits[i];
    if (!wanted) return;
    normed_.take(wanted, width);
    int64_t to = 0;
    for (int64_t i = 0; i < level.spans.count(); i++) {
      const Span& span = level.spans.each[i];
      for (int64_t t = span.length - num_logits[i]; t < span.length; t++)
        std::memcpy(normed_.row(to++), level.h.row(span.begin + t), width * sizeof(float));
    }
    product(model_.head, normed_.data.get(), normed_.stride, wanted, logits, 256, false, pool_, quantized_);
  }

  static constexpr int64_t PART = 256;      // positions that pass a stack together
  static constexpr int64_t CHANNELS = 256;  // of the convolution that one task takes

  const Model model_;
  Pool pool_;
  std::vector<Level> levels_;
  Buffer normed_, wide_, mixed_, out_, smooth_;
  Quantized quantized_;
  std::vector<int64_t> ones_;
};

}  // namespace hnet
