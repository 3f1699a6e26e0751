// Packs rows of float32 into blocks of int8.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "dot_weight.h"

namespace {

using prunella::DotWeight;

struct Rows {
  int64_t m, k;
  const int64_t *starts, *columns;
  const float* values;
};

// Scales, so that the largest number of a row becomes 127. False: one is not finite.
bool set_scales(prunella_dot& made, const Rows& rows) {
  made.scale.assign(size_t(rows.m + 16), 0.0f);
  made.sum.assign(size_t(rows.m + 16), 0);
  for (int64_t row = 0; row < rows.m; row++) {
    float most = 0.0f;
    for (int64_t p = rows.starts[row]; p < rows.starts[row + 1]; p++) {
      if (!std::isfinite(rows.values[p])) return false;
      most = std::max(most, std::fabs(rows.values[p]));
    }
    made.scale[size_t(row)] = most / 127.0f;
  }
  return true;
}

int32_t code_of(float value, float scale) {
  const float code = scale > 0.0f ? std::nearbyint(value / scale) : 0.0f;
  return int32_t(std::max(-127.0f, std::min(127.0f, code)));
}

// The codes of a group of rows in one pass, as blocks.
class Group {
 public:
  Group(prunella_dot& made, const Rows& rows, int64_t first) : made_(made), rows_(rows), first_(first) {
    for (int64_t r = first; r < std::min(rows.m, first + made.weight.side); r++) at_.push_back(rows.starts[r]);
  }

  // `quads` is scratch: a flag and `side` words for each quad of a pass.
  void pack(int64_t from, int64_t to, std::vector<int32_t>& words, std::vector<char>& used) {
    const int64_t side = made_.weight.side, quads = (to - from + 3) / 4;
    std::fill_n(words.begin(), quads * side, 0);
    std::fill_n(used.begin(), quads, char(0));
    for (size_t r = 0; r < at_.size(); r++) {
      const int64_t row = first_ + int64_t(r);
      for (; at_[r] < rows_.starts[row + 1] && rows_.columns[at_[r]] < to; at_[r]++) {
        const int64_t column = rows_.columns[at_[r]] - from;
        const int32_t code = code_of(rows_.values[at_[r]], made_.scale[size_t(row)]);
        used[size_t(column / 4)] = 1;
        int32_t& word = words[size_t(column / 4 * side + int64_t(r))];
        word = int32_t(uint32_t(word) | (uint32_t(code) & 0xffu) << (column % 4 * 8));
        made_.sum[size_t(row)] += code;
      }
    }
    for (int64_t q = 0; q < quads; q++)
      if (used[size_t(q)]) {
        made_.quad.push_back(uint16_t(q));
        for (int64_t r = 0; r < side; r++) made_.code.push_back(words[size_t(q * side + r)]);
      }
    made_.start.push_back(int64_t(made_.quad.size()));
  }

 private:
  prunella_dot& made_;
  const Rows& rows_;
  int64_t first_;
  std::vector<int64_t> at_;
};

void pack_band(prunella_dot& made, const Rows& rows, int64_t first, int64_t last, std::vector<int32_t>& words,
               std::vector<char>& used) {
  const DotWeight& w = made.weight;
  std::vector<Group> groups;
  for (int64_t row = first; row < last; row += w.side) groups.emplace_back(made, rows, row);
  for (int32_t pass = 0; pass < w.passes; pass++) {
    const int64_t from = int64_t(pass) * w.depth;
    made.slot.push_back(int64_t(made.start.size()));
    made.start.push_back(int64_t(made.quad.size()));
    for (Group& group : groups) group.pack(from, std::min(rows.k, from + w.depth), words, used);
  }
}

}  // namespace

void prunella_dot::seal() {
  DotWeight& w = weight;
  w.start = start.data();
  w.slot = slot.data();
  w.quad = quad.data();
  w.code = code.data();
  w.scale = scale.data();
  w.sum = sum.data();
  w.before = before.data();
  w.bytes = int64_t((start.size() + slot.size() + before.size()) * 8 + quad.size() * 2 + code.size() * 4 + scale.size() * 8);
}

extern "C" int prunella_dot_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                                 const float* values, int32_t side, int32_t depth, prunella_dot** out) {
  if (!out) return PRUNELLA_BAD_ARGUMENT;
  if (int bad = prunella_check(m, k, nnz, starts, columns)) return bad;
  if ((nnz && !values) || (side != 1 && side != 2 && side != 4)) return PRUNELLA_BAD_ARGUMENT;
  if (k > prunella::kDotColumns || depth < 4 || depth % 4 || depth > prunella::kDotColumns) return PRUNELLA_BAD_ARGUMENT;
  try {
    auto made = std::make_unique<prunella_dot>();
    DotWeight& w = made->weight;
    const Rows rows{m, k, starts, columns, values};
    w.side = side, w.depth = depth, w.m = m, w.k = k;
    w.passes = int32_t(std::max<int64_t>(1, (k + depth - 1) / depth));
    w.band = w.passes == 1 ? prunella::kDotBand : prunella::kDotBandPasses;
    w.bands = int32_t((m + w.band - 1) / w.band);
    if (!set_scales(*made, rows)) return PRUNELLA_NOT_FINITE;
    const int64_t quads = prunella::dot_quads(std::min<int64_t>(k, depth)) + 1;
    std::vector<int32_t> words(size_t(quads * side));
    std::vector<char> used(static_cast<size_t>(quads));
    made->before.push_back(0);
    for (int32_t band = 0; band < w.bands; band++) {
      const int64_t first = int64_t(band) * w.band;
      pack_band(*made, rows, first, std::min<int64_t>(m, first + w.band), words, used);
      made->before.push_back(int64_t(made->quad.size()));
    }
    made->slot.push_back(int64_t(made->start.size()));
    made->seal();
    *out = made.release();
  } catch (const std::bad_alloc&) {
    return PRUNELLA_NO_MEMORY;
  }
  return PRUNELLA_OK;
}

extern "C" void prunella_dot_free(prunella_dot* weight) { delete weight; }

extern "C" int64_t prunella_dot_bytes(const prunella_dot* weight) { return weight ? weight->weight.bytes : 0; }
