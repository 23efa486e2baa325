// Pieces of several rows' sequences at one stage, packed one after the other.
#pragma once
#include <cstdint>
#include <vector>

namespace hnet {

struct Span {
  int64_t row;     // place in every arena
  int64_t start;   // stage position of the first one
  int64_t length;
  int64_t begin;   // packed place of the first one
};

struct Spans {
  std::vector<Span> each;
  int64_t total = 0;

  void clear() { each.clear(); total = 0; }
  void add(int64_t row, int64_t start, int64_t length) {
    each.push_back({row, start, length, total});
    total += length;
  }
  int64_t count() const { return static_cast<int64_t>(each.size()); }
};

}  // namespace hnet
