// Matrix products on AMX tiles, for bfloat16 and int8 weights: 16 rows × 16 outputs × one line of k at a time.
//
// An output is summed tile after tile along k, the high and then the low part of the activations in each; a row never
// meets another one, and missing rows of a tile are zeros. So the sum is the same for any number of rows.
// The packed blocks of linear.h are B tiles as they stand: sixteen words of k by sixteen outputs.
#pragma once
#if (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || (defined(__AMXBF16__) && defined(__AMXINT8__))  // clang 14
#define HNET_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "vec.h"

namespace hnet {

constexpr int64_t TILE_ROWS = 16, TILE_WORDS = 16, TILE_BYTES = 1024;

// Linux hands AMX's registers out on request, once a process.
inline bool amx_permitted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// The tile registers configured for this thread, all of them 16 lines of 64 bytes, until the end of the scope.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

struct alignas(64) Line {  // one row of a tile
  unsigned char bytes[64];
};

// bfloat16 to nearest, ties to even, in the low half of each word; NaN stays NaN.
inline IntVec rounded(Vec x) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  Words u;
  std::memcpy(&u, &x, sizeof u);
  const Words nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x == x ? (IntVec)nearest : (IntVec)((u >> 16) | 0x40u);
}

// Activations as A tiles: [row tile][k tile][high, low] of 16 rows by 32 bfloat16, x = high + low to 16 bits.
inline void split(const float* x, int64_t ldx, int64_t rows, int64_t k, std::vector<Line>& out) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const int64_t row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, k_tiles = (k + 31) / 32;
  out.assign(row_tiles * k_tiles * 2 * TILE_ROWS, Line{});
  for (int64_t r = 0; r < rows; r++) {
    const float* row = x + r * ldx;
    Line* tile = out.data() + r / TILE_ROWS * k_tiles * 2 * TILE_ROWS + r % TILE_ROWS;
    for (int64_t i = 0; i < k; i += LANES) {
      const Vec v = k - i >= LANES ? load(row + i) : load_some(row + i, k - i);
      const IntVec high = rounded(v), low = rounded(v - as_float(high << 16));
      const Halves halves[2] = {__builtin_convertvector(high, Halves), __builtin_convertvector(low, Halves)};
      Line* at = tile + i / 32 * 2 * TILE_ROWS;
      for (int part = 0; part < 2; part++) std::memcpy(at[part * TILE_ROWS].bytes + i % 32 * 2, &halves[part], 32);
    }
  }
}

// The same for 8-bit activations: [row tile][k tile] of 16 rows by 64 bytes; what is missing is weighed by zeros.
inline void tile_bytes(const uint8_t* q, int64_t ldq, int64_t rows, int64_t k, std::vector<Line>& out) {
  const int64_t row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, k_tiles = (k + 63) / 64;
  out.assign(row_tiles * k_tiles * TILE_ROWS, Line{});
  for (int64_t r = 0; r < rows; r++) {
    Line* tile = out.data() + r / TILE_ROWS * k_tiles * TILE_ROWS + r % TILE_ROWS;
    for (int64_t i = 0; i < k; i += 64, tile += TILE_ROWS)
      std::memcpy(tile->bytes, q + r * ldq + i, k - i < 64 ? k - i : 64);
  }
}

// Sums of one row tile with B blocks whose tiles lie `apart` bytes from one another → [B][16 rows][16] words.
template <int B, bool BYTES>
inline void tile_sums(const Line* a, const char* w, int64_t apart, int64_t k_tiles, bool fetch, int32_t* out) {
  constexpr int64_t AHEAD_TILES = 4;
  static_assert(B >= 1 && B <= 4);
  _tile_zero(0);
  if constexpr (B > 1) _tile_zero(1);
  if constexpr (B > 2) _tile_zero(2);
  if constexpr (B > 3) _tile_zero(3);
  const char* x = reinterpret_cast<const char*>(a);
  const auto ask = [&](const char* line) {
    if (fetch)
      for (int64_t i = 0; i < TILE_BYTES; i += 64) __builtin_prefetch(line + AHEAD_TILES * TILE_BYTES + i);
  };
  for (int64_t i = 0; i < k_tiles; i++, w += TILE_BYTES, x += (BYTES ? 1 : 2) * TILE_BYTES) {
    _tile_loadd(4, x, 64);
    if constexpr (!BYTES) _tile_loadd(5, x + TILE_BYTES, 64);
#define HNET_TILE(C, T)                     \
  if constexpr (B > C) {                    \
    ask(w + C * apart);                     \
    _tile_loadd(T, w + C * apart, 64);      \
    if constexpr (BYTES) {                  \
      _tile_dpbusd(C, 4, T);                \
    } else {                                \
      _tile_dpbf16ps(C, 4, T);              \
      _tile_dpbf16ps(C, 5, T);              \
    }                                       \
  }
    HNET_TILE(0, 6)
    HNET_TILE(1, 7)
    HNET_TILE(2, 6)
    HNET_TILE(3, 7)
#undef HNET_TILE
  }
  _tile_stored(0, out, 64);
  if constexpr (B > 1) _tile_stored(1, out + 256, 64);
  if constexpr (B > 2) _tile_stored(2, out + 512, 64);
  if constexpr (B > 3) _tile_stored(3, out + 768, 64);
}

}  // namespace hnet
#endif
