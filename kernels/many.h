// Packed weights for many tokens at a time, and what one tier's kernels are given.
//
// Rows: the columns are cut into blocks of `depth`. Inside a block the rows of a band are sorted by how many nonzeros
// they have there and run side by side in groups of `rows`; the shorter ones of a group are padded. A padded place
// points at a row of zeros of the panel (one behind every block of columns), so that no value of x is ever multiplied
// by a padding zero. A 16-bit index counts from the first column of its block.
// Groups: `rows` neighboring rows; their columns are sorted by which of them have a nonzero there (2^rows - 1 patterns),
// so that x is loaded once for all. The index of a group begins with how many columns each pattern has.
// Pairs: as Rows, but two nonzeros of a row go together: two indices, and the two values as bf16 in one word, the first
// below. x is bf16 in the panel.
// Blocks: `rows` neighboring rows share their columns; each column has `rows` values, and four rows run at a time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace prunella {

enum ManyKind : int32_t { kRows = 0, kGroups = 1, kBlock16 = 2, kBlock8 = 3, kBlock4 = 4, kPairs = 5 };
enum ManyPrecision : int32_t { kFloat = 0, kHalf = 1 };  // of x in the panel: fp32, or bf16
enum ManyActivation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kRelu6 = 4, kHardswish = 5 };

constexpr int kAlign = 64;

// A group of rows in one block of columns.
struct ManyGroup {
  int64_t at;      // first of its entries in index
  int64_t value;   // first of its entries in value
  int32_t count;   // steps
  int32_t row[4];  // rows of the band, -1: none
};

// One packed weight; every array is owned by the packing code and checked when it was made.
struct ManyWeight {
  int32_t kind, rows, depth, precision;
  int64_t m, k, nnz, bytes;
  int32_t bands, blocks;         // bands of rows, blocks of columns
  const int32_t* band_start;     // bands + 1 rows
  const int64_t* group_start;    // bands * blocks + 1
  const ManyGroup* group;
  const uint16_t* index;
  const float* value;
  const int64_t* band_nnz;       // bands + 1: nonzeros before each band, for an even split
};

// Where x comes from: tokens in rows, or the patches of an image.
struct ManyImage {
  int64_t channels, height, width, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t last;  // channels are the last axis
};

// What comes after the sum.
struct ManyEnd {
  const float* bias;      // m, or null
  const float* residual;  // the shape of y, or null
  int32_t activation;
};

constexpr int kUnit = 4;  // floats that an index of a window counts
constexpr int kMostPhases = 8;
constexpr int kMostLines = 1024;  // of a row of a window

// A panel for convolutions whose patches are not written out. A patch is one column of the kernel wider than its
// neighbor's and one line further down: the panel holds each channel once for every column of the kernel, shifted by that
// column, and the lines of the kernel are the same memory read a line of the output later (direct sparse convolution: Park
// et al. 2017). So x is copied kernel_w times, not kernel_h * kernel_w times.
//
// Of a strip of output lines the panel has, for a channel and a column of the kernel, one row of lines: those of the image
// that are stride_h apart follow each other, those of another remainder come behind. Line y of the output begins y * width
// floats into all of them. Behind the last channel of each block of columns stands a row of zeros.
struct ManyWindow {
  int64_t width;                // floats of a line: the outputs of one, rounded up
  int64_t lines;                // output lines of a strip
  int64_t phases, each;         // remainders that the kernel reads; lines of each
  int64_t row, floats;          // floats of a row, of the panel
  int64_t buffer;               // floats of a line of the image with what is beside it
  int32_t phase[kMostPhases];   // where the lines of a remainder stand in a row, -1: nowhere
  int64_t ends;
  const int64_t* channel;       // first float of each channel
  const int64_t* block;         // first float of each block of columns
  const int64_t* zeros;         // first floats of the rows of zeros
  const uint16_t* index;        // that of the weight, in units from the beginning of a block
};

// One task: some tokens of one image or matrix, and some bands.
struct ManyTask {
  const ManyWeight* weight;
  const ManyImage* image;  // null: rows of tokens
  const ManyWindow* window;  // null: whole patches; else first and count are lines of the output
  const float* x;          // of this image or matrix
  float* y;
  ManyEnd end;             // residual of this image or matrix
  int64_t tokens;          // of this image or matrix
  int64_t first, count;    // tokens of this task
  int32_t band_first, band_last;
  int32_t tile;            // vectors of tokens side by side; 0: 16 rows are the lanes (many_direct.inc)
  int32_t strict;          // look for numbers of x that bf16 cannot hold
  float* panel;            // scratch
  float* sums;
  const float* zeros;      // as many as an image has channels
  float* line;             // scratch of a window
};

struct ManyTier {
  const char* name;
  int lanes;
  bool (*run)(const ManyTask& task);  // false: strict, and x has such a number
};

extern const ManyTier many_portable;
extern const ManyTier many_avx2;
extern const ManyTier many_avx512;
extern const ManyTier many_avx512bf16;

// Floats of scratch that a task needs.
static inline int64_t many_panel(const ManyWeight& w, int64_t width) { return (w.k + w.blocks) * width; }

}  // namespace prunella
