// Reads memory as fast as a core can take it: what a benchmark's roofline is measured with. One plain C function.
#include <cstdint>
#include <thread>
#include <vector>

typedef int64_t Words __attribute__((vector_size(64)));

static int64_t read_part(const char* data, int64_t bytes) {
  Words sums[4] = {};
  for (int64_t at = 0; at + 256 <= bytes; at += 256) {
    __builtin_prefetch(data + at + 4096);
    __builtin_prefetch(data + at + 4096 + 64);
    __builtin_prefetch(data + at + 4096 + 128);
    __builtin_prefetch(data + at + 4096 + 192);
    for (int i = 0; i < 4; i++) sums[i] ^= *reinterpret_cast<const Words*>(data + at + 64 * i);
  }
  const Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  int64_t result = 0;
  for (int i = 0; i < 8; i++) result ^= all[i];
  return result;
}

// data is aligned to 64 bytes; every thread reads one contiguous part.
extern "C" int64_t read_words(const char* data, int64_t bytes, int64_t threads) {
  std::vector<int64_t> results(threads);
  std::vector<std::thread> others;
  const int64_t part = bytes / threads / 256 * 256;
  for (int64_t t = 1; t < threads; t++)
    others.emplace_back([&, t] { results[t] = read_part(data + t * part, part); });
  results[0] = read_part(data, part);
  for (auto& other : others) other.join();
  int64_t result = 0;
  for (int64_t each : results) result ^= each;
  return result;
}
