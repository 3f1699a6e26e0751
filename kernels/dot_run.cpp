// Cuts a product in int8 into tasks and runs them.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "dot_weight.h"
#include "threads.h"
#include "tiers.h"

using prunella::DotTask;
using prunella::DotWeight;

namespace {

struct Job {
  DotTask task;
  int64_t each, parts;  // tokens of a task; tasks
  int32_t splits;       // bands are split in so many
  const prunella::DotTier* tier;
  std::atomic<bool> failed{false}, odd{false};
};

// The first band of a split, with the blocks shared evenly.
int32_t band_at(const DotWeight& w, int32_t split, int32_t splits) {
  if (split == splits) return w.bands;
  const int64_t wanted = w.before[w.bands] * split / splits;
  return int32_t(std::lower_bound(w.before, w.before + w.bands, wanted) - w.before);
}

void run_one(void* given, int64_t number) {
  Job& job = *static_cast<Job*>(given);
  DotTask task = job.task;
  const DotWeight& w = *task.weight;
  const int32_t split = int32_t(number % job.splits);
  task.band_first = band_at(w, split, job.splits);
  task.band_last = band_at(w, split + 1, job.splits);
  task.first = number / job.splits * job.each;
  task.count = std::min(job.each, task.tokens - task.first);
  const int64_t width = int64_t(task.tile) * job.tier->lanes;
  task.panel = reinterpret_cast<int32_t*>(prunella::scratch(0, std::max<int64_t>(1, prunella::dot_panel(w, width))));
  task.sums = reinterpret_cast<int32_t*>(prunella::scratch(1, prunella::dot_sums(w, width)));
  task.scales = prunella::scratch(2, 2 * width);
  if (!task.panel || !task.sums || !task.scales) {
    job.failed = true;
    return;
  }
  task.zeros = reinterpret_cast<int32_t*>(task.scales + width);
  if (!job.tier->run(task)) job.odd = true;
}

}  // namespace

extern "C" int prunella_dot_linear(const prunella_dot* weight, const float* x, int64_t tokens, const float* bias,
                                   const float* residual, int32_t activation, float scale, int32_t zero, int32_t tile,
                                   int32_t threads, float* y) {
  if (!weight || tokens < 0 || threads < 1 || tile < 1 || tile > 4) return PRUNELLA_BAD_ARGUMENT;
  if (activation < 0 || activation > prunella::kHardswish) return PRUNELLA_BAD_ARGUMENT;
  if (!(scale >= 0.0f) || !std::isfinite(scale) || (scale > 0.0f && !std::isfinite(1.0f / scale))) return PRUNELLA_BAD_ARGUMENT;
  if (scale > 0.0f && (zero < 0 || zero > 255)) return PRUNELLA_BAD_ARGUMENT;
  const DotWeight& w = weight->weight;
  if (!tokens || !w.m) return PRUNELLA_OK;
  if (!y || (w.k && !x)) return PRUNELLA_BAD_ARGUMENT;
  Job job{};
  job.tier = prunella::tier().dot;
  job.task = {&w, x, y, {bias, residual, activation}, tokens, 0, 0, 0, 0, tile, scale, zero, nullptr, nullptr, nullptr, nullptr};
  const int64_t width = int64_t(tile) * job.tier->lanes, tiles = (tokens + width - 1) / width;
  const int64_t wanted = std::min<int64_t>(tiles, int64_t(threads) * 4);
  job.each = (tiles + wanted - 1) / wanted * width;
  job.parts = (tokens + job.each - 1) / job.each;
  job.splits = job.parts >= threads ? 1 : int32_t(std::min<int64_t>(w.bands, (threads + job.parts - 1) / job.parts));
  prunella::for_each(job.parts * job.splits, threads, run_one, &job);
  return job.failed ? PRUNELLA_NO_MEMORY : job.odd ? PRUNELLA_ODD_INPUT : PRUNELLA_OK;
}
