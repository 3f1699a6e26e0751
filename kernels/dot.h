// Weights in int8 for many tokens, and what one tier's kernels are given.
//
// The panel of a tile has for every four columns (a quad) a word for each token: its four codes, the first below. A block
// of the weight is a quad of `side` rows; a word holds four codes of one row. So one instruction multiplies a word of a
// row with the words of many tokens. Columns are cut into passes of `depth`, whose part of the panel stays in a cache.
#pragma once
#include <cstddef>
#include <cstdint>

#include "many.h"

namespace prunella {

constexpr int64_t kDotColumns = 65536;  // 255 * 127 * 65536 < 2^31
constexpr int kDotBand = 16;            // rows of a band where one pass has all columns: sums of one vector
constexpr int kDotBandPasses = 128;     // rows of a band otherwise

struct DotWeight {
  int32_t side, depth;
  int64_t m, k, bytes;
  int32_t bands, band, passes;  // bands of `band` rows; passes over the columns
  const int64_t* start;         // of each group of rows, band by band, in it pass by pass: first of its blocks
  const int64_t* slot;          // bands * passes + 1: first of start
  const uint16_t* quad;         // of each block, from the first of the pass
  const int32_t* code;          // `side` words a block
  const float* scale;           // of a row, 16 more are readable
  const int32_t* sum;           // of the codes of a row, 16 more are readable
  const int64_t* before;        // bands + 1: blocks before each band
};

struct DotTask {
  const DotWeight* weight;
  const float* x;
  float* y;
  ManyEnd end;
  int64_t tokens, first, count;
  int32_t band_first, band_last, tile;
  float scale;      // 0: dynamic
  int32_t zero;
  int32_t* panel;   // scratch: dot_panel() words
  int32_t* sums;    // scratch: dot_sums() words
  float* scales;    // scratch: of each token of a tile
  int32_t* zeros;
};

struct DotTier {
  const char* name;
  int lanes;
  bool (*run)(const DotTask& task);  // false: x has a number that bf16 cannot hold
};

extern const DotTier dot_portable;
extern const DotTier dot_avx2;
extern const DotTier dot_avx512;
extern const DotTier dot_avx512bf16;

static inline int64_t dot_quads(int64_t columns) { return (columns + 3) / 4; }
static inline int64_t dot_panel(const DotWeight& w, int64_t width) { return dot_quads(w.k) * width; }
static inline int64_t dot_sums(const DotWeight& w, int64_t width) { return (w.band + 16) * width; }

}  // namespace prunella
