// Packed weights for a few tokens: one buffer, a header and the sections behind it.
//
// Bitmap: one bit a weight, rows of whole 64-bit words, then the nonzeros row by row.
// CSR: a 16-bit column for every nonzero, then the nonzeros row by row.
// Every section starts on 64 bytes and ends with slack, since the kernels load whole vectors. Where a section lies is
// never stored: it follows from the header's numbers, and few_check() compares them with the length of the buffer.
#pragma once
#include <cstddef>
#include <cstdint>

namespace prunella {

enum FewKind : int32_t { kBitmap = 0, kCsr = 1 };
enum FewValue : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

constexpr uint64_t kFewMagic = 0x31776566726e7570ull;
constexpr int kFewTokens = 8;                    // tokens that one pass of a kernel serves
constexpr int64_t kFewAlign = 64;                 // where a buffer begins
constexpr int64_t kFewSlack = 128;               // readable bytes behind the last element of a section
constexpr int64_t kFewLimit = int64_t(1) << 31;  // rows and columns stay below, so that products fit in 64 bits
constexpr int64_t kCsrColumns = 65536;           // what a 16-bit column can tell apart

struct FewHeader {
  uint64_t magic;
  int32_t kind, value;
  int64_t rows, columns, nonzeros;
};

struct FewLayout {
  int64_t starts, pattern, values, scales, sums, total;  // bytes from the beginning; there are rows + 1 starts
};

static inline int64_t few_words(int64_t columns) { return (columns + 63) / 64; }
static inline int64_t few_value_bytes(int32_t value) { return value == kFp32 ? 4 : value == kBf16 ? 2 : 1; }
static inline int64_t few_section(int64_t at, int64_t bytes) { return (at + bytes + kFewSlack + 63) / 64 * 64; }

static inline FewLayout few_layout(const FewHeader& h) {
  FewLayout l;
  l.starts = 64;
  l.pattern = few_section(l.starts, (h.rows + 1) * 8);
  l.values = few_section(l.pattern, h.kind == kBitmap ? h.rows * few_words(h.columns) * 8 : h.nonzeros * 2);
  l.scales = few_section(l.values, h.nonzeros * few_value_bytes(h.value));
  l.sums = h.value == kInt8 ? few_section(l.scales, h.rows * 4) : l.scales;
  l.total = h.value == kInt8 ? few_section(l.sums, h.rows * 4) : l.sums;
  return l;
}

// The sections of a checked buffer.
struct FewView {
  FewHeader h;
  const int64_t* starts;
  const uint64_t* mask;    // bitmap
  const uint16_t* index;   // CSR
  const void* values;
  const float* scales;     // int8: one a row
  const int32_t* sums;     // int8: the codes of a row added up, for kernels that shift x to unsigned
};

static inline FewView few_view(const void* data) {
  const char* base = static_cast<const char*>(data);
  const FewHeader& h = *reinterpret_cast<const FewHeader*>(base);
  const FewLayout l = few_layout(h);
  return {h,
          reinterpret_cast<const int64_t*>(base + l.starts),
          reinterpret_cast<const uint64_t*>(base + l.pattern),
          reinterpret_cast<const uint16_t*>(base + l.pattern),
          base + l.values,
          reinterpret_cast<const float*>(base + l.scales),
          reinterpret_cast<const int32_t*>(base + l.sums)};
}

// 0 or a code of prunella.h; reads every byte that a kernel would take an address from. O(nonzeros + mask).
int few_check(const void* data, int64_t length);

// What a tier's kernel reads and writes.
struct FewTask {
  FewView weight;
  int tokens;        // 1 to kFewTokens
  const void* x;     // as prepare() wrote it
  float* x_scale;    // int8: one a token
  float* y;          // sums go here, tokens x rows
};

// One tier: prepare() converts `tokens` rows of x for the kernel, run() does the rows [first, last) of the weight.
struct FewTier {
  const char* name;
  void (*prepare)(const float* x, FewTask* task, void* scratch);
  void (*run)(const FewTask& task, int64_t first, int64_t last);
};

extern const FewTier few_portable;
extern const FewTier few_avx2;
extern const FewTier few_avx512;
extern const FewTier few_avx512bf16;

}  // namespace prunella
