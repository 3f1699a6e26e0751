// Whether the rows of a sparse matrix are well formed, before anything is packed or read by a kernel.
#include "prunella.h"

extern "C" int prunella_check(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns) {
  constexpr int64_t limit = int64_t(1) << 31;
  if (m < 0 || k < 0 || nnz < 0 || m >= limit || k >= limit || !starts || (nnz && !columns)) return PRUNELLA_BAD_ARGUMENT;
  if (starts[0] != 0 || starts[m] != nnz) return PRUNELLA_BAD_STARTS;
  for (int64_t i = 0; i < m; i++) {
    if (starts[i + 1] < starts[i] || starts[i + 1] > nnz) return PRUNELLA_BAD_STARTS;
    int64_t before = -1;
    for (int64_t p = starts[i]; p < starts[i + 1]; p++) {
      if (columns[p] <= before || columns[p] >= k) return PRUNELLA_BAD_INDEX;
      before = columns[p];
    }
  }
  return PRUNELLA_OK;
}
