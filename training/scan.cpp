// Mamba-2's recurrence over whole windows, and its gradient: sequential in time, a head of a window at once, so that its
// state stays in the nearest cache. Knows arrays; nothing of models. The signatures are mirrored in scan.py.
//
// Arrays are time-major and contiguous: x, y [T, R, H, 64], dt [T, R, H], b, c [T, R, N], a [H]; all fp32.
// S_t = exp(dt_t a) S_{t-1} + dt_t x_t (x) b_t, y_t = S_t c_t. A state is kept as [N, 64]: sums over N run beside each
// other for the 64 channels.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

namespace {

constexpr std::ptrdiff_t P = 64;      // channels of a head
constexpr std::ptrdiff_t BLOCK = 32;  // positions between two states that forward leaves for backward

struct Shape {
    std::ptrdiff_t times, rows, heads, states;

    std::ptrdiff_t size() const { return states * P; }
    std::ptrdiff_t blocks() const { return (times + BLOCK - 1) / BLOCK; }
};

void advance(const Shape& shape, float decay, float dt, const float* x, const float* b, const float* before, float* after) {
    float driven[P];
    for (std::ptrdiff_t p = 0; p < P; ++p) driven[p] = dt * x[p];
    for (std::ptrdiff_t n = 0; n < shape.states; ++n) {
        for (std::ptrdiff_t p = 0; p < P; ++p) after[n * P + p] = before[n * P + p] * decay + driven[p] * b[n];
    }
}

}  // namespace

extern "C" {

// kept: [R, H, blocks, N, 64] the state before each block.
void scan_forward(std::ptrdiff_t times, std::ptrdiff_t rows, std::ptrdiff_t heads, std::ptrdiff_t states, const float* x,
                  const float* dt, const float* a, const float* b, const float* c, float* y, float* kept) {
    const Shape shape{times, rows, heads, states};
    std::vector<float> state(shape.size());
    for (std::ptrdiff_t r = 0; r < rows; ++r) {
        for (std::ptrdiff_t h = 0; h < heads; ++h) {
            std::memset(state.data(), 0, state.size() * sizeof(float));
            for (std::ptrdiff_t t = 0; t < times; ++t) {
                if (t % BLOCK == 0) {
                    std::memcpy(kept + ((r * heads + h) * shape.blocks() + t / BLOCK) * shape.size(), state.data(),
                                state.size() * sizeof(float));
                }
                const std::ptrdiff_t at = t * rows + r;
                const float step = dt[at * heads + h];
                advance(shape, std::exp(step * a[h]), step, x + (at * heads + h) * P, b + at * states, state.data(),
                        state.data());
                float out[P] = {};
                for (std::ptrdiff_t n = 0; n < states; ++n) {
                    const float weight = c[at * states + n];
                    for (std::ptrdiff_t p = 0; p < P; ++p) out[p] += state[n * P + p] * weight;
                }
                std::memcpy(y + (at * heads + h) * P, out, sizeof(out));
            }
        }
    }
}

// Gradients of what scan_forward was given, from that of y. da, db, dc are added to; dx, ddt are written.
void scan_backward(std::ptrdiff_t times, std::ptrdiff_t rows, std::ptrdiff_t heads, std::ptrdiff_t states, const float* x,
                   const float* dt, const float* a, const float* b, const float* c, const float* kept, const float* dy,
                   float* dx, float* ddt, float* da, float* db, float* dc) {
    const Shape shape{times, rows, heads, states};
    const std::ptrdiff_t size = shape.size();
    std::vector<float> block((BLOCK + 1) * size), gradient(size);
    for (std::ptrdiff_t r = 0; r < rows; ++r) {
        for (std::ptrdiff_t h = 0; h < heads; ++h) {
            std::memset(gradient.data(), 0, gradient.size() * sizeof(float));
            for (std::ptrdiff_t part = shape.blocks() - 1; part >= 0; --part) {
                const std::ptrdiff_t begin = part * BLOCK, end = begin + BLOCK < times ? begin + BLOCK : times;
                std::memcpy(block.data(), kept + ((r * heads + h) * shape.blocks() + part) * size, size * sizeof(float));
                for (std::ptrdiff_t t = begin; t < end; ++t) {
                    const std::ptrdiff_t at = t * rows + r;
                    const float step = dt[at * heads + h];
                    const float* before = block.data() + (t - begin) * size;
                    advance(shape, std::exp(step * a[h]), step, x + (at * heads + h) * P, b + at * states, before,
                            block.data() + (t - begin + 1) * size);
                }
                for (std::ptrdiff_t t = end - 1; t >= begin; --t) {
                    const std::ptrdiff_t at = t * rows + r;
                    const float step = dt[at * heads + h], decay = std::exp(step * a[h]);
                    const float *here = x + (at * heads + h) * P, *out = dy + (at * heads + h) * P;
                    const float *before = block.data() + (t - begin) * size, *after = before + size;
                    float driven[P] = {}, decayed[P] = {};
                    for (std::ptrdiff_t n = 0; n < states; ++n) {
                        const float bn = b[at * states + n], cn = c[at * states + n];
                        float of_b = 0, of_c = 0;
                        for (std::ptrdiff_t p = 0; p < P; ++p) {
                            const float g = gradient[n * P + p] + out[p] * cn;
                            of_c += out[p] * after[n * P + p];
                            of_b += g * here[p];
                            driven[p] += g * bn;
                            decayed[p] += g * before[n * P + p];
                            gradient[n * P + p] = g * decay;
                        }
                        db[at * states + n] += of_b * step;
                        dc[at * states + n] += of_c;
                    }
                    float of_step = 0, of_decay = 0;
                    for (std::ptrdiff_t p = 0; p < P; ++p) {
                        dx[(at * heads + h) * P + p] = driven[p] * step;
                        of_step += driven[p] * here[p];
                        of_decay += decayed[p];
                    }
                    ddt[at * heads + h] = of_step + of_decay * decay * a[h];
                    da[h] += of_decay * decay * step;
                }
            }
        }
    }
}

}  // extern "C"
