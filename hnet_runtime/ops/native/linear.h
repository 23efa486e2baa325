// Matrix products y = x Wᵀ. Outputs are lanes and k is walked in order, so an output is one sum in one order for
// any number of rows, any tile and any thread.
//
// Packed weights, block after block of LANES outputs, in 32-bit words:
//   float32   [block][k]     [LANES]
//   bfloat16  [block][k / 2] [LANES: even k low, odd k high]
//   int8      [block][k / 4] [LANES: four k from the low byte up]
#pragma once
#include <algorithm>
#include <vector>

#include "amx.h"
#include "pool.h"
#include "vec.h"

namespace hnet {

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
constexpr int64_t GROUP = 4;    // blocks of outputs that a thread takes at once
constexpr int64_t ROWS = 256;   // whose activations it keeps in the cache while it passes all of its blocks


struct Matrix {
  int64_t kind, n, k;       // outputs, inputs
  const void* data;         // packed
  const float* bias;        // [n] or null
  const float* scale;       // [n], int8 only
  const int32_t* sum;       // [n] sums of an output's weights, int8 only
};

// Words of an output come in multiples of this: whole tiles where there are tiles.
inline int64_t word_multiple(int64_t kind) {
#if defined(HNET_AMX)
  return kind == FLOAT32 ? 1 : TILE_WORDS;
#else
  (void)kind;
  return 1;
#endif
}

inline int64_t words_of(int64_t kind, int64_t k) {  // 32-bit words an output takes
  return round_up(kind == FLOAT32 ? k : kind == BFLOAT16 ? (k + 1) / 2 : (k + 3) / 4, word_multiple(kind));
}

// Where products of bytes are taken by pairs of 16 bits (AVX2), an activation takes two bytes: of each four, the first
// and the third are one 32-bit pair, the second and the fourth the next.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int64_t QUAD = 8;  // bytes of the four activations that meet a word of weights
inline int64_t place(int64_t i) { return i / 4 * QUAD + i % 2 * 4 + i / 2 % 2 * 2; }
#else
constexpr int64_t QUAD = 4;
inline int64_t place(int64_t i) { return i; }
#endif

// Rows of activations in 8 bits: x ≈ scale · (q − 128).
struct Quantized {
  std::vector<uint8_t> q;     // [rows, stride], by place()
  std::vector<float> scale;   // [rows]
  int64_t stride = 0;
#if defined(HNET_AMX)
  std::vector<Line> tiles;       // activations in A tiles, of either kind
#endif

  void take(const float* x, int64_t ldx, int64_t rows, int64_t k) {
    stride = (k + 3) / 4 * QUAD;
    q.assign(rows * stride, 0);
    scale.resize(rows);
    for (int64_t r = 0; r < rows; r++) {
      const float* row = x + r * ldx;
      uint8_t* out = q.data() + r * stride;
      float largest = 0;
      bool numbers = true;  // max() passes over NaN
      for (int64_t i = 0; i < k; i++) largest = std::max(largest, std::fabs(row[i])), numbers &= row[i] == row[i];
      scale[r] = numbers && std::isfinite(largest) ? largest / 127.0f : NAN;
      const float inverse = 127.0f / largest;
      const bool fits = std::isfinite(scale[r]) && std::isfinite(inverse);  // else zeros: none of it fits an integer
      for (int64_t i = 0; i < k; i++)
        out[place(i)] = fits ? static_cast<uint8_t>(128 + static_cast<int>(std::nearbyint(row[i] * inverse))) : 128;
      for (int64_t i = k; i % 4; i++) out[place(i)] = 128;
    }
  }
};

inline int32_t load_word(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// acc + Σ of four products, unsigned · signed; quad: four activations by place().
inline IntVec dot_bytes(IntVec acc, IntVec weights, const uint8_t* quad) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(load_word(quad)), (__m512i)weights);
#elif defined(__AVX2__)
  const __m256i w = (__m256i)weights;
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
  return acc + (IntVec)_mm256_madd_epi16(even, _mm256_set1_epi32(load_word(quad))) +
         (IntVec)_mm256_madd_epi16(odd, _mm256_set1_epi32(load_word(quad + 4)));
#else
  for (int byte = 0; byte < 4; byte++) acc += ((weights << (24 - 8 * byte)) >> 24) * static_cast<int32_t>(quad[byte]);
  return acc;
#endif
}

// The first pass over a block asks for weights some way ahead; later passes find them in the cache.
constexpr int64_t AHEAD = 4096;  // bytes

// R rows against B blocks whose words lie `apart` from one another.
template <int R, int B>
inline void tile(const float* w, int64_t apart, bool fetch, int64_t k, const float* x, int64_t ldx, Vec (&acc)[R][B]) {
  for (int64_t i = 0; i < k; i++, w += LANES) {
    Vec weights[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
      if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(w + b * apart) + AHEAD);
      weights[b] = load(w + b * apart);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float a = x[r * ldx + i];
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = fma(weights[b], a, acc[r][b]);
    }
  }
}

template <int R, int B>
inline void tile(const uint32_t* w, int64_t apart, bool fetch, int64_t k, const float* x, int64_t ldx,
                 Vec (&acc)[R][B]) {
  int64_t i = 0;
  for (; i + 1 < k; i += 2, w += LANES) {
    Vec even[B], odd[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
      if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(w + b * apart) + AHEAD);
      const IntVec words = load_int(w + b * apart);
      even[b] = low_halves(words);
      odd[b] = high_halves(words);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float a0 = x[r * ldx + i], a1 = x[r * ldx + i + 1];
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = fma(odd[b], a1, fma(even[b], a0, acc[r][b]));
    }
  }
  if (i < k)
    for (int r = 0; r < R; r++)
      for (int b = 0; b < B; b++) acc[r][b] = fma(low_halves(load_int(w + b * apart)), x[r * ldx + i], acc[r][b]);
}

template <int R, int B>
inline void tile(const uint32_t* w, int64_t apart, bool fetch, int64_t words, const uint8_t* q, int64_t ldq,
                 IntVec (&acc)[R][B]) {
  for (int64_t i = 0; i < words; i++, w += LANES) {
    IntVec weights[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
      if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(w + b * apart) + AHEAD);
      weights[b] = load_int(w + b * apart);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = dot_bytes(acc[r][b], weights[b], q + r * ldq + QUAD * i);
    }
  }
}

struct Product {
  const Matrix& m;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;  // a multiple of LANES: whole blocks are written
  bool add;     // y += instead of y =
  const Quantized* quantized;

  template <int R, int B, class Sum>
  static void clear(Sum (&sums)[R][B]) {  // "= {}" would write through memory
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sums[r][b] = Sum{};
  }

  template <int R, int B>
  void block(int64_t first, int64_t row) const {
    const int64_t words = words_of(m.kind, m.k), apart = words * LANES;
    const uint32_t* w = static_cast<const uint32_t*>(m.data) + first * apart;
    const bool fetch = row == 0;
    Vec sums[R][B];
    clear(sums);
    if (m.kind == FLOAT32) {
      tile<R, B>(reinterpret_cast<const float*>(w), apart, fetch, m.k, x + row * ldx, ldx, sums);
    } else if (m.kind == BFLOAT16) {
      tile<R, B>(w, apart, fetch, m.k, x + row * ldx, ldx, sums);
    } else {
      IntVec counts[R][B];
      clear(counts);
      const uint8_t* q = quantized->q.data() + row * quantized->stride;
      tile<R, B>(w, apart, fetch, (m.k + 3) / 4, q, quantized->stride, counts);
      for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = scaled(counts[r][b], first + b, row + r);
    }
    for (int r = 0; r < R; r++)
      for (int b = 0; b < B; b++) put(sums[r][b], first + b, row + r);
  }

  // What a block's sums of 8-bit products are worth in one row.
  Vec scaled(IntVec counts, int64_t block, int64_t row) const {
    const int64_t n = block * LANES, some = std::min(LANES, m.n - n);
    alignas(64) int32_t sum[LANES] = {};
    std::memcpy(sum, m.sum + n, some * sizeof(int32_t));
    const Vec scale = some == LANES ? load(m.scale + n) : load_some(m.scale + n, some);
    return __builtin_convertvector(counts - 128 * load_int(sum), Vec) * (scale * splat(quantized->scale[row]));
  }

  void put(Vec value, int64_t block, int64_t row) const {
    const int64_t n = block * LANES, some = std::min(LANES, m.n - n);
    float* out = y + row * ldy + n;
    if (m.bias) value += some == LANES ? load(m.bias + n) : load_some(m.bias + n, some);
    store(out, add ? load(out) + value : value);
  }

#if defined(HNET_AMX)
  // Up to four blocks from `first` on, rows begin…count; begin is a multiple of a tile's rows.
  template <int B, bool BYTES>
  void tiles(int64_t first, int64_t begin, int64_t count) const {
    const int64_t k_tiles = words_of(m.kind, m.k) / TILE_WORDS, apart = k_tiles * TILE_BYTES;
    const char* w = static_cast<const char*>(m.data) + first * apart;
    alignas(64) int32_t sums[B * 256];
    for (int64_t row = begin; row < count; row += TILE_ROWS) {
      const Line* a = quantized->tiles.data() + row * k_tiles * (BYTES ? 1 : 2);
      tile_sums<B, BYTES>(a, w, apart, k_tiles, row == 0, sums);
      for (int64_t r = 0; r < std::min(TILE_ROWS, count - row); r++)
        for (int b = 0; b < B; b++) {
          const IntVec words = load_int(sums + b * 256 + r * LANES);
          put(BYTES ? scaled(words, first + b, row + r) : as_float(words), first + b, row + r);
        }
    }
  }

  template <bool BYTES>
  void tile_group(int64_t index, int64_t begin, int64_t count) const {
    const int64_t first = index * GROUP;
    switch (std::min(GROUP, (m.n + LANES - 1) / LANES - first)) {
      case 4: return tiles<4, BYTES>(first, begin, count);
      case 3: return tiles<3, BYTES>(first, begin, count);
      case 2: return tiles<2, BYTES>(first, begin, count);
      default: return tiles<1, BYTES>(first, begin, count);
    }
  }
#endif

  // Blocks first…last by rows row…count, in tiles of R rows and B blocks; returns the first row left.
  template <int R, int B>
  int64_t pass(int64_t first, int64_t last, int64_t row, int64_t count) const {
    const int64_t until = row + (count - row) / R * R;
    for (; first + B <= last; first += B)
      for (int64_t r = row; r < until; r += R) block<R, B>(first, r);
    for (; first < last; first++)
      for (int64_t r = row; r < until; r += R) block<R, 1>(first, r);
    return until;
  }

  void group(int64_t index, int64_t row, int64_t count) const {
    const int64_t first = index * GROUP, last = std::min(first + GROUP, (m.n + LANES - 1) / LANES);
    // The more sums a tile keeps in registers, the fewer loads a product takes; a tile's blocks stay in the cache while
    // all rows pass.
#if defined(__AVX512F__)  // 32 registers
    row = pass<16, 1>(first, last, row, count);
    row = pass<8, 2>(first, last, row, count);
    row = pass<4, 4>(first, last, row, count);
    row = pass<3, 4>(first, last, row, count);
#else  // 16, of which bfloat16 and 8 bits take some to unpack weights
    if (m.kind == FLOAT32) row = pass<6, 2>(first, last, row, count);
    row = pass<4, 2>(first, last, row, count);
    row = pass<3, 2>(first, last, row, count);  // rows that are left over unpack weights once, not twice
#endif
    row = pass<2, 4>(first, last, row, count);
    pass<1, 4>(first, last, row, count);
  }
};

// y [rows, n] = (or +=) x [rows, k] Wᵀ + bias; ldx and ldy are row strides, ldy at least n rounded up to LANES.
inline void product(const Matrix& m, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy, bool add,
                    Pool& pool, Quantized& scratch) {
  if (m.kind == INT8) scratch.take(x, ldx, rows, m.k);
  const Product call{m, x, ldx, y, ldy, add, &scratch};
  const int64_t groups = (m.n + GROUP * LANES - 1) / (GROUP * LANES), cost = rows * m.n * m.k;
#if defined(HNET_AMX)
  if (m.kind != FLOAT32) {
    if (m.kind == INT8)
      tile_bytes(scratch.q.data(), scratch.stride, rows, m.k, scratch.tiles);
    else
      split(x, ldx, rows, m.k, scratch.tiles);
    pool.run(groups, cost / 8, [&](int64_t begin, int64_t end) {
      static_assert(ROWS % TILE_ROWS == 0);
      const Tiles configured;
      for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t g = begin; g < end; g++) {
          const int64_t until = std::min(row + ROWS, rows);
          m.kind == INT8 ? call.tile_group<true>(g, row, until) : call.tile_group<false>(g, row, until);
        }
    });
    return;
  }
#endif
  pool.run(groups, cost, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += ROWS)
      for (int64_t g = begin; g < end; g++) call.group(g, row, std::min(row + ROWS, rows));
  });
}

}  // namespace hnet
