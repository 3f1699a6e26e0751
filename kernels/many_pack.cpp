// Rows of nonzeros to the private layouts of many.h. Built without the flags of any tier.
#include "many_pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "half.h"

using prunella::ManyGroup;

static_assert(prunella::kRows == int(PRUNELLA_ROWS) && prunella::kGroups == int(PRUNELLA_GROUPS), "as in prunella.h");
static_assert(prunella::kBlock16 == int(PRUNELLA_BLOCK16) && prunella::kBlock8 == int(PRUNELLA_BLOCK8), "as in prunella.h");
static_assert(prunella::kBlock4 == int(PRUNELLA_BLOCK4) && prunella::kPairs == int(PRUNELLA_PAIRS), "as in prunella.h");
static_assert(prunella::kNone == int(PRUNELLA_NONE) && prunella::kRelu == int(PRUNELLA_RELU), "as in prunella.h");
static_assert(prunella::kGelu == int(PRUNELLA_GELU) && prunella::kSilu == int(PRUNELLA_SILU), "as in prunella.h");
static_assert(prunella::kRelu6 == int(PRUNELLA_RELU6) && prunella::kHardswish == int(PRUNELLA_HARDSWISH), "as in prunella.h");

namespace {

// The nonzeros of a row inside [from, to).
struct Piece {
  int64_t first, last;
};

Piece piece(const int64_t* columns, int64_t first, int64_t last, int64_t from, int64_t to) {
  return {std::lower_bound(columns + first, columns + last, from) - columns,
          std::lower_bound(columns + first, columns + last, to) - columns};
}

struct Source {
  int64_t m, k;
  const int64_t* starts;
  const int64_t* columns;
  const float* values;

  Piece row(int64_t i, int64_t from, int64_t to) const { return piece(columns, starts[i], starts[i + 1], from, to); }
};

// Two values as bf16 in the bits of one float, the first below.
float together(float low, float high) {
  const uint32_t word = prunella::to_bf16(low) | uint32_t(prunella::to_bf16(high)) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

// Rows of a band sorted by what they have in this block of columns, `side` of them in a group; two nonzeros of a row
// go together in kPairs.
void pack_rows(prunella_many& made, const Source& source, int64_t row, int64_t rows, int64_t from, int64_t to) {
  const int side = made.weight.rows, step = made.weight.kind == prunella::kPairs ? 2 : 1;
  std::vector<Piece> pieces(rows);
  for (int64_t i = 0; i < rows; i++) pieces[i] = source.row(row + i, from, to);
  std::vector<int32_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return pieces[a].last - pieces[a].first > pieces[b].last - pieces[b].first;
  });
  for (int64_t i = 0; i < rows; i += side) {
    const Piece& longest = pieces[order[i]];
    int32_t count = int32_t((longest.last - longest.first + step - 1) / step);
    if (step == 1) count = (count * side + 3) / 4 * 4 / side;  // the kernels take four entries at a time
    ManyGroup group{int64_t(made.index.size()), int64_t(made.value.size()), count, {-1, -1, -1, -1}};
    for (int q = 0; q < side && i + q < rows; q++) group.row[q] = order[i + q];
    for (int32_t s = 0; s < group.count; s++)
      for (int q = 0; q < side; q++) {
        float here[2] = {0.0f, 0.0f};
        for (int e = 0; e < step; e++) {
          const int64_t at = group.row[q] < 0 ? 0 : pieces[group.row[q]].first + s * step + e;
          const bool some = group.row[q] >= 0 && at < pieces[group.row[q]].last;
          made.index.push_back(uint16_t(some ? source.columns[at] - from : to - from));
          here[e] = some ? source.values[at] : 0.0f;
        }
        made.value.push_back(step == 2 ? together(here[0], here[1]) : here[0]);
      }
    made.group.push_back(group);
  }
}

// Blocks of `side` neighboring rows: the columns that any of them has, and a value for each of them.
void pack_shared(prunella_many& made, const Source& source, int64_t row, int64_t rows, int64_t from, int64_t to) {
  int side = made.weight.rows;
  for (int64_t i = 0; i < rows; i += side) {
    std::vector<int64_t> shared;
    std::vector<Piece> pieces;
    for (int64_t q = i; q < std::min<int64_t>(i + side, rows); q++) {
      pieces.push_back(source.row(row + q, from, to));
      shared.insert(shared.end(), source.columns + pieces.back().first, source.columns + pieces.back().last);
    }
    std::sort(shared.begin(), shared.end());
    shared.erase(std::unique(shared.begin(), shared.end()), shared.end());
    int64_t at = int64_t(made.index.size()), value = int64_t(made.value.size());
    for (int64_t column : shared) {
      made.index.push_back(uint16_t(column - from));
      for (int q = 0; q < side; q++) {
        bool here = q < int(pieces.size()) && pieces[q].first < pieces[q].last && source.columns[pieces[q].first] == column;
        made.value.push_back(here ? source.values[pieces[q].first++] : 0.0f);
      }
    }
    made.group.push_back(ManyGroup{at, value, int32_t(shared.size()), {int32_t(i), 0, 0, 0}});
  }
}

// R rows: for each of their 2^R - 1 patterns of nonzeros the columns that have it, and their values.
void pack_groups(prunella_many& made, const Source& source, int64_t row, int64_t rows, int64_t from, int64_t to) {
  const int patterns = (1 << made.weight.rows) - 1;
  for (int64_t i = 0; i < rows; i += made.weight.rows) {
    std::vector<int64_t> columns[16];
    Piece pieces[4] = {};
    int side = int(std::min<int64_t>(made.weight.rows, rows - i));
    for (int q = 0; q < side; q++) pieces[q] = source.row(row + i + q, from, to);
    std::vector<float> values[16];
    for (;;) {
      int64_t next = to;
      for (int q = 0; q < side; q++)
        if (pieces[q].first < pieces[q].last) next = std::min(next, source.columns[pieces[q].first]);
      if (next == to) break;
      int pattern = 0;
      float here[4];
      int count = 0;
      for (int q = 0; q < side; q++)
        if (pieces[q].first < pieces[q].last && source.columns[pieces[q].first] == next) {
          pattern |= 1 << q;
          here[count++] = source.values[pieces[q].first++];
        }
      columns[pattern].push_back(next);
      values[pattern].insert(values[pattern].end(), here, here + count);
    }
    ManyGroup group{int64_t(made.index.size()), int64_t(made.value.size()), patterns, {-1, -1, -1, -1}};
    for (int q = 0; q < side; q++) group.row[q] = int32_t(i) + q;
    for (int pattern = 1; pattern <= patterns; pattern++) made.index.push_back(uint16_t(columns[pattern].size()));
    for (int pattern = 1; pattern <= patterns; pattern++) {
      for (int64_t column : columns[pattern]) made.index.push_back(uint16_t(column - from));
      made.value.insert(made.value.end(), values[pattern].begin(), values[pattern].end());
    }
    made.group.push_back(group);
  }
}

constexpr int64_t kBandRows = 192;  // a multiple of 16; the sums of a band stay in the second cache

}  // namespace

void prunella_many::seal() {
  weight.band_start = band_start.data();
  weight.group_start = group_start.data();
  weight.group = group.data();
  index.resize(index.size() + 32);
  value.resize(value.size() + 32);
  weight.index = index.data();
  weight.value = value.data();
  weight.band_nnz = band_nnz.data();
  weight.bytes = int64_t(index.size() * 2 + value.size() * 4 + group.size() * sizeof(ManyGroup));
}

extern "C" int prunella_many_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                                  const float* values, int32_t kind, int32_t side, int32_t depth,
                                  int32_t precision, prunella_many** out) {
  if (int wrong = prunella_check(m, k, nnz, starts, columns)) return wrong;
  bool pairs = kind == prunella::kPairs, rows = kind == prunella::kRows || pairs, shared = kind >= prunella::kBlock16 && kind <= prunella::kBlock4;
  bool grouped = kind == prunella::kGroups;
  bool known = ((rows || grouped) && (side == 1 || side == 2 || side == 4)) || shared;
  if (!out || (nnz && !values) || depth < 1 || depth > 65535) return PRUNELLA_BAD_ARGUMENT;
  if (!known || precision < 0 || precision > 1 || (pairs && !precision)) return PRUNELLA_BAD_ARGUMENT;
  try {
    auto made = std::make_unique<prunella_many>();
    auto& w = made->weight;
    if (shared) side = kind == prunella::kBlock16 ? 16 : kind == prunella::kBlock8 ? 8 : 4;
    w.precision = precision;
    w.kind = kind, w.rows = side, w.depth = depth, w.m = m, w.k = k, w.nnz = nnz;
    w.blocks = int32_t(std::max<int64_t>(1, (k + depth - 1) / depth));
    const int64_t tall = kBandRows;
    w.bands = int32_t((m + tall - 1) / tall);
    Source source{m, k, starts, columns, values};
    made->group_start.push_back(0);
    made->band_nnz.push_back(0);
    for (int32_t band = 0; band < w.bands; band++) {
      int64_t row = band * tall, here = std::min(tall, m - row);
      made->band_start.push_back(int32_t(row));
      for (int32_t b = 0; b < w.blocks; b++) {
        int64_t from = int64_t(b) * depth, to = std::min<int64_t>(k, from + depth);
        auto one = rows ? pack_rows : grouped ? pack_groups : pack_shared;
        one(*made, source, row, here, from, to);
        made->group_start.push_back(int64_t(made->group.size()));
      }
      made->band_nnz.push_back(starts[row + here]);
    }
    made->band_start.push_back(int32_t(m));
    made->seal();
    *out = made.release();
  } catch (const std::bad_alloc&) {
    return PRUNELLA_NO_MEMORY;
  }
  return PRUNELLA_OK;
}

extern "C" void prunella_many_free(prunella_many* weight) { delete weight; }

extern "C" int64_t prunella_many_bytes(const prunella_many* weight) { return weight ? weight->weight.bytes : 0; }
