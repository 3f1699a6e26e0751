// Whether a packed buffer is what it says, before a kernel takes addresses from it.
#include <cmath>
#include <cstring>

#include "few.h"
#include "prunella_few.h"

namespace prunella {
namespace {

// Bounds first, products after: nothing in few_layout() can overflow then.
bool sensible(const FewHeader& h) {
  if (h.magic != kFewMagic || h.kind < kBitmap || h.kind > kCsr || h.value < kFp32 || h.value > kInt8) return false;
  if (h.kind == kCsr && (h.value == kInt8 || h.columns > kCsrColumns)) return false;
  if (h.rows < 0 || h.columns < 0 || h.rows >= kFewLimit || h.columns >= kFewLimit) return false;
  return h.nonzeros >= 0 && h.nonzeros <= h.rows * h.columns && h.nonzeros < int64_t(1) << 56;
}

int check_starts(const FewView& w) {
  if (w.starts[0] != 0 || w.starts[w.h.rows] != w.h.nonzeros) return PRUNELLA_BAD_STARTS;
  for (int64_t row = 0; row < w.h.rows; row++)
    if (w.starts[row + 1] < w.starts[row]) return PRUNELLA_BAD_STARTS;
  return PRUNELLA_OK;
}

int check_mask(const FewView& w) {
  const int64_t words = few_words(w.h.columns);
  const uint64_t beyond = w.h.columns % 64 ? ~uint64_t(0) << (w.h.columns % 64) : 0;
  for (int64_t row = 0; row < w.h.rows; row++) {
    const uint64_t* mask = w.mask + row * words;
    int64_t count = 0;
    for (int64_t word = 0; word < words; word++) count += __builtin_popcountll(mask[word]);
    if (count != w.starts[row + 1] - w.starts[row]) return PRUNELLA_BAD_INDEX;
    if (words && (mask[words - 1] & beyond)) return PRUNELLA_BAD_INDEX;
  }
  return PRUNELLA_OK;
}

int check_index(const FewView& w) {
  for (int64_t row = 0; row < w.h.rows; row++) {
    int64_t before = -1;
    for (int64_t p = w.starts[row]; p < w.starts[row + 1]; p++) {
      if (w.index[p] <= before || w.index[p] >= w.h.columns) return PRUNELLA_BAD_INDEX;
      before = w.index[p];
    }
  }
  return PRUNELLA_OK;
}

int check_codes(const FewView& w) {
  const int8_t* codes = static_cast<const int8_t*>(w.values);
  for (int64_t row = 0; row < w.h.rows; row++) {
    int64_t sum = 0;
    for (int64_t p = w.starts[row]; p < w.starts[row + 1]; p++) sum += codes[p];
    if (sum != w.sums[row] || !std::isfinite(w.scales[row])) return PRUNELLA_BAD_ARGUMENT;
  }
  return PRUNELLA_OK;
}

}  // namespace

int few_check(const void* data, int64_t length) {
  if (!data || reinterpret_cast<uintptr_t>(data) % kFewAlign || length < int64_t(sizeof(FewHeader))) return PRUNELLA_BAD_ARGUMENT;
  FewHeader h;
  std::memcpy(&h, data, sizeof h);
  if (!sensible(h) || few_layout(h).total != length) return PRUNELLA_BAD_ARGUMENT;
  const FewView w = few_view(data);
  if (int bad = check_starts(w)) return bad;
  if (int bad = h.kind == kBitmap ? check_mask(w) : check_index(w)) return bad;
  return h.value == kInt8 ? check_codes(w) : PRUNELLA_OK;
}

}  // namespace prunella
