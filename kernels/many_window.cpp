// Lays out windows. Built without the flags of any tier.
#include "many_window.h"

#include <algorithm>
#include <cstring>

using prunella::ManyGroup;
using prunella::ManyImage;
using prunella::ManyWeight;
using prunella::kUnit;

namespace {

constexpr int64_t kPanel = 48 << 10;      // floats that a panel should not exceed: the second cache
constexpr int64_t kMostPanel = 96 << 10;  // more than these come from too far: whole patches are as quick or quicker
constexpr int64_t kMost = 4096;           // of paddings and the like

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool ordinary(const ManyWeight& w, const ManyImage& g) {
  const int64_t tall = int64_t(g.kernel_h) * g.dilation_h, wide = int64_t(g.kernel_w) * g.dilation_w;
  const int64_t most = std::max<int64_t>({g.pad_h, g.pad_w, tall, wide, g.stride_w});
  const bool worth = g.stride_w == 1 || (!g.last && g.kernel_w > 1);
  const bool small = most <= kMost && g.stride_h <= prunella::kMostPhases && g.out_width <= 1 << 16;
  return worth && small && w.precision == prunella::kFloat && w.k;
}

// A line as long as vectors are, unless that wastes a quarter; then as short as units allow.
int64_t line_of(int64_t outputs, int lanes) {
  const int64_t whole = up(outputs, lanes);
  return 4 * whole <= 5 * outputs ? whole : up(outputs, kUnit);
}

// Rows and channels for strips of so many lines.
void size_rows(prunella_window& owner, const ManyWeight& w, int64_t lines) {
  const ManyImage& g = owner.key.image;
  auto& made = owner.window;
  const int64_t taps = int64_t(g.kernel_h) * g.kernel_w;
  const int64_t beyond = up(made.width, owner.key.lanes) - made.width;  // the last line is filled by whole vectors too
  made.lines = lines;
  made.each = lines + int64_t(g.kernel_h - 1) * g.dilation_h / g.stride_h;
  made.row = up(made.phases * made.each * made.width + beyond, owner.key.lanes);
  if (made.row % 128 == 0) made.row += 16;  // a large power of two apart, they would share places in a cache
  int64_t ends = 0;
  for (int32_t b = 0, before = -1; b < w.blocks; b++) {
    const int32_t last = int32_t((std::min<int64_t>(w.k, int64_t(b + 1) * w.depth) - 1) / taps);
    ends += last != before;
    before = last;
  }
  made.floats = (g.channels * g.kernel_w + ends) * made.row;
}

// As many lines as the second cache holds, at least those of a tile, in strips of about one height for all threads.
int64_t strip(prunella_window& owner, const ManyWeight& w) {
  const prunella_window_key& key = owner.key;
  const int64_t all = key.image.out_height, width = owner.window.width;
  const int64_t least = std::min(all, (int64_t(key.tile) * key.lanes + width - 1) / width);
  const int64_t shares = std::max<int64_t>(1, (key.threads > 1 ? 2 * key.threads : 1) / key.batch);
  int64_t lines = std::max(least, (all + shares - 1) / shares);
  size_rows(owner, w, lines);
  while (lines > least && owner.window.floats > kPanel) {
    lines = std::max(least, lines - std::max<int64_t>(1, lines / 8));
    size_rows(owner, w, lines);
  }
  const int64_t strips = (all + lines - 1) / lines;
  return (all + strips - 1) / strips;
}

// Where channels, blocks and rows of zeros begin.
void place(prunella_window& made, const ManyWeight& w, std::vector<int64_t>& zero_of) {
  const ManyImage& g = made.key.image;
  const int64_t row = made.window.row;
  const int64_t taps = int64_t(g.kernel_h) * g.kernel_w;
  int64_t at = 0, b = 0;
  for (int64_t c = 0; c < g.channels; c++) {
    made.channel.push_back(at);
    at += g.kernel_w * row;
    const auto last = [&](int64_t block) { return (std::min<int64_t>(w.k, (block + 1) * w.depth) - 1) / taps; };
    if (b < w.blocks && last(b) == c) {
      made.zeros.push_back(at);
      for (; b < w.blocks && last(b) == c; b++) zero_of.push_back(at);
      at += row;
    }
  }
  for (int64_t block = 0; block < w.blocks; block++) made.block.push_back(made.channel[block * w.depth / taps]);
}

// The indices of a weight in units; false where one does not fit 16 bits.
bool translate(prunella_window& made, const prunella_many& weight, const std::vector<int64_t>& zero_of) {
  const ManyWeight& w = weight.weight;
  const ManyImage& g = made.key.image;
  const int64_t taps = int64_t(g.kernel_h) * g.kernel_w;
  const prunella::ManyWindow& window = made.window;
  made.index.assign(weight.index.begin(), weight.index.end());
  std::vector<int64_t> unit;
  for (int32_t b = 0; b < w.blocks; b++) {
    const int64_t from = int64_t(b) * w.depth, to = std::min<int64_t>(w.k, from + w.depth), base = made.block[b];
    unit.assign(size_t(to - from + 1), 0);
    for (int64_t k = from; k < to; k++) {
      const int64_t tap = k % taps, down = tap / g.kernel_w * g.dilation_h;
      const int64_t line = window.phase[down % g.stride_h] * window.each + down / g.stride_h;
      unit[k - from] = (made.channel[k / taps] + tap % g.kernel_w * window.row + line * window.width - base) / kUnit;
    }
    unit[to - from] = (zero_of[b] - base) / kUnit;
    if (*std::max_element(unit.begin(), unit.end()) > 65535) return false;
    for (int32_t band = 0; band < w.bands; band++) {
      const int64_t slot = int64_t(band) * w.blocks + b;
      for (int64_t group = w.group_start[slot]; group < w.group_start[slot + 1]; group++) {
        const ManyGroup& one = w.group[group];
        int64_t at = one.at, count = w.kind == prunella::kRows ? int64_t(one.count) * w.rows : one.count;
        if (w.kind == prunella::kGroups) {
          at += one.count, count = 0;
          for (int32_t pattern = 0; pattern < one.count; pattern++) count += w.index[one.at + pattern];
        }
        for (int64_t i = at; i < at + count; i++) made.index[i] = uint16_t(unit[w.index[i]]);
      }
    }
  }
  return true;
}

std::shared_ptr<const prunella_window> make(const prunella_many& weight, const prunella_window_key& key) {
  const ManyWeight& w = weight.weight;
  const ManyImage& g = key.image;
  if (!ordinary(w, g)) return nullptr;
  auto owner = std::make_shared<prunella_window>();
  owner->key = key;
  prunella::ManyWindow& made = owner->window;
  made.width = line_of(g.out_width, key.lanes);
  // Whole patches leave no gaps between lines. With channels last, where they are gathered quickly, that decides.
  const int64_t positions = g.out_height * made.width, dense = up(g.out_height * g.out_width, key.lanes);
  if (g.last && 20 * positions > 21 * dense) return nullptr;
  std::fill_n(made.phase, prunella::kMostPhases, -1);
  for (int32_t v = 0; v < g.kernel_h; v++) {
    int32_t& phase = made.phase[int64_t(v) * g.dilation_h % g.stride_h];
    if (phase < 0) phase = int32_t(made.phases++);
  }
  size_rows(*owner, w, strip(*owner, w));
  made.buffer = up((made.width + key.lanes) * g.stride_w + int64_t(g.kernel_w - 1) * g.dilation_w, key.lanes);
  made.buffer += up(g.pad_w, key.lanes);
  const int64_t rows = std::max<int64_t>(made.phases * made.each, key.lanes);
  if (rows > prunella::kMostLines || made.floats > kMostPanel || made.buffer * rows > kMostPanel) return nullptr;
  std::vector<int64_t> zero_of;
  place(*owner, w, zero_of);
  if (!translate(*owner, weight, zero_of)) return nullptr;
  made.ends = int64_t(owner->zeros.size());
  made.channel = owner->channel.data();
  made.block = owner->block.data();
  made.zeros = owner->zeros.data();
  made.index = owner->index.data();
  return owner;
}

bool same(const prunella_window_key& a, const prunella_window_key& b) {
  const ManyImage &g = a.image, &h = b.image;
  return a.batch == b.batch && a.lanes == b.lanes && a.tile == b.tile && a.threads == b.threads && g.last == h.last &&
         g.channels == h.channels && g.height == h.height && g.width == h.width && g.out_height == h.out_height &&
         g.out_width == h.out_width && g.kernel_h == h.kernel_h && g.kernel_w == h.kernel_w && g.pad_h == h.pad_h &&
         g.pad_w == h.pad_w && g.stride_h == h.stride_h && g.stride_w == h.stride_w && g.dilation_h == h.dilation_h &&
         g.dilation_w == h.dilation_w;
}

}  // namespace

std::shared_ptr<const prunella_window> prunella::window_of(const prunella_many& weight,
                                                           const prunella_window_key& key) {
  auto kept = std::atomic_load(&weight.window);
  if (!kept || !same(kept->key, key)) {
    kept = make(weight, key);
    if (!kept) {  // kept too, so that the next call does not look again
      auto none = std::make_shared<prunella_window>();
      none->key = key;
      kept = none;
    }
    std::atomic_store(&weight.window, kept);
  }
  return kept->window.floats ? kept : nullptr;
}
