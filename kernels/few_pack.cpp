// From rows of columns and values to the buffer that the kernels for a few tokens read.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "few.h"
#include "few_weight.h"
#include "half.h"
#include "prunella_few.h"

namespace prunella {
namespace {

struct Rows {
  const int64_t* starts;
  const int64_t* columns;
  const float* values;
};

// The buffer while it is written.
struct Writer {
  FewHeader h;
  int64_t* starts;
  uint64_t* mask;
  uint16_t* index;
  void* values;
  float* scales;
  int32_t* sums;
};

Writer writer(void* data) {
  const FewView w = few_view(data);
  return {w.h,
          const_cast<int64_t*>(w.starts),
          const_cast<uint64_t*>(w.mask),
          const_cast<uint16_t*>(w.index),
          const_cast<void*>(w.values),
          const_cast<float*>(w.scales),
          const_cast<int32_t*>(w.sums)};
}

float largest(const float* values, int64_t count) {
  float most = 0.0f;
  for (int64_t i = 0; i < count; i++) most = std::fmax(most, std::fabs(values[i]));
  return most;
}

void write_codes(const Writer& out, int64_t row, const float* values, int64_t first, int64_t last) {
  const float scale = out.scales[row] = largest(values + first, last - first) / 127.0f;
  for (int64_t p = first; p < last; p++) {
    const double code = scale > 0 ? std::nearbyint(double(values[p]) / scale) : 0.0;
    static_cast<int8_t*>(out.values)[p] = static_cast<int8_t>(std::fmin(std::fmax(code, -127.0), 127.0));
    out.sums[row] += static_cast<int8_t*>(out.values)[p];
  }
}

void write_values(const Writer& out, int64_t row, const Rows& rows) {
  const int64_t first = rows.starts[row], last = rows.starts[row + 1];
  if (out.h.value == kInt8) return write_codes(out, row, rows.values, first, last);
  for (int64_t p = first; p < last; p++) {
    if (out.h.value == kFp32)
      static_cast<float*>(out.values)[p] = rows.values[p];
    else
      static_cast<uint16_t*>(out.values)[p] = to_bf16(rows.values[p]);
  }
}

void write_row(const Writer& out, int64_t row, const Rows& rows) {
  uint64_t* mask = out.mask + row * few_words(out.h.columns);
  for (int64_t p = rows.starts[row]; p < rows.starts[row + 1]; p++) {
    const int64_t column = rows.columns[p];
    if (out.h.kind == kBitmap)
      mask[column / 64] |= uint64_t(1) << (column % 64);
    else
      out.index[p] = static_cast<uint16_t>(column);
  }
  out.starts[row + 1] = rows.starts[row + 1];
  write_values(out, row, rows);
}

bool offered(int64_t columns, int32_t kind, int32_t value) {
  if (kind == kBitmap) return value >= kFp32 && value <= kInt8;
  return kind == kCsr && value >= kFp32 && value <= kBf16 && columns <= kCsrColumns;
}

bool finite(const float* values, int64_t count) {
  bool all = true;
  for (int64_t i = 0; i < count; i++) all &= std::isfinite(values[i]);
  return all;
}

}  // namespace
}  // namespace prunella

using namespace prunella;

extern "C" int prunella_few_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                                 const float* values, int32_t kind, int32_t precision, prunella_few** made) {
  if (int bad = prunella_check(m, k, nnz, starts, columns)) return bad;
  if (!made || (nnz && !values) || !offered(k, kind, precision)) return PRUNELLA_BAD_ARGUMENT;
  if (precision == kInt8 && !finite(values, nnz)) return PRUNELLA_NOT_FINITE;
  const FewHeader h = {kFewMagic, kind, precision, m, k, nnz};
  const int64_t bytes = few_layout(h).total;
  void* data = std::aligned_alloc(kFewAlign, static_cast<size_t>(bytes));
  prunella_few* weight = data ? new (std::nothrow) prunella_few{data, bytes} : nullptr;
  if (!weight) {
    std::free(data);
    return PRUNELLA_NO_MEMORY;
  }
  std::memset(data, 0, static_cast<size_t>(bytes));
  std::memcpy(data, &h, sizeof h);
  const Writer out = writer(data);
  for (int64_t row = 0; row < m; row++) write_row(out, row, {starts, columns, values});
  *made = weight;
  return PRUNELLA_OK;
}

extern "C" void prunella_few_free(prunella_few* weight) {
  if (!weight) return;
  std::free(weight->data);
  delete weight;
}

extern "C" int64_t prunella_few_bytes(const prunella_few* weight) { return weight ? weight->bytes : 0; }
