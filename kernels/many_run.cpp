// Cuts a product into tasks and runs them.
#include <algorithm>
#include <atomic>

#include "many_window.h"
#include "threads.h"
#include "tiers.h"

using prunella::ManyImage;
using prunella::ManyTask;
using prunella::ManyWeight;

namespace {

constexpr int64_t kBandRows = 192 + 16;
constexpr int64_t kDirectTokens = 24;  // tile 0: whole passes of all tiers
constexpr int64_t kSlack = 8 * 16;      // a tile may read so far behind its last position

struct Job {
  ManyTask task;
  int64_t batch, x_stride, y_stride;
  int64_t tokens_each, parts;     // tokens of a task, tasks of one image
  int32_t splits;                 // bands are split in so many
  const prunella::ManyTier* tier;
  std::shared_ptr<const prunella_window> window;
  std::atomic<bool> failed{false}, odd{false};
};

// The first band of a split, with the nonzeros shared evenly.
int32_t band_at(const ManyWeight& w, int32_t split, int32_t splits) {
  if (split == splits) return w.bands;
  int64_t wanted = w.band_nnz[w.bands] * split / splits;
  return int32_t(std::lower_bound(w.band_nnz, w.band_nnz + w.bands, wanted) - w.band_nnz);
}

void run_one(void* given, int64_t number) {
  Job& job = *static_cast<Job*>(given);
  ManyTask task = job.task;
  const ManyWeight& w = *task.weight;
  int32_t split = int32_t(number % job.splits);
  int64_t part = number / job.splits % job.parts, image = number / job.splits / job.parts;
  task.band_first = band_at(w, split, job.splits);
  task.band_last = band_at(w, split + 1, job.splits);
  task.first = part * job.tokens_each;
  task.count = std::min(job.tokens_each, (task.window ? task.image->out_height : task.tokens) - task.first);
  task.x += image * job.x_stride;
  task.y += image * job.y_stride;
  if (task.end.residual) task.end.residual += image * job.y_stride;
  const int64_t width = int64_t(task.tile) * job.tier->lanes;
  const int64_t panel = task.window ? task.window->floats + kSlack : prunella::many_panel(w, width);
  task.panel = prunella::scratch(0, std::max<int64_t>(1, panel));
  task.sums = prunella::scratch(1, std::max<int64_t>(1, kBandRows * width));
  const int64_t channels = std::max<int64_t>(1, task.image ? task.image->channels : 0);
  float* zeros = prunella::scratch(2, channels);
  if (zeros) std::fill_n(zeros, channels, 0.0f);
  task.zeros = zeros;
  if (task.window) {
    const int64_t lines = std::max<int64_t>(task.window->phases * task.window->each, job.tier->lanes);
    task.line = prunella::scratch(3, lines * task.window->buffer);
  }
  if (!task.panel || !task.sums || !zeros || (task.window && !task.line)) {
    job.failed = true;
  } else if (task.band_first < task.band_last) {
    if (!job.tier->run(task)) job.odd = true;
  }
}

// Tasks for all threads; where there are too few, rows are split too.
int share(Job& job, int32_t threads) {
  const ManyWeight& w = *job.task.weight;
  int64_t tasks = job.parts * job.batch;
  job.splits = tasks >= threads ? 1 : int32_t(std::min<int64_t>(w.bands, (threads + tasks - 1) / tasks));
  prunella::for_each(tasks * job.splits, threads, run_one, &job);
  return job.failed ? PRUNELLA_NO_MEMORY : job.odd ? PRUNELLA_ODD_INPUT : PRUNELLA_OK;
}

int run(Job& job, int32_t threads) {
  const ManyWeight& w = *job.task.weight;
  if (!job.task.tile && (job.task.image || w.precision == prunella::kHalf)) job.task.tile = 2;
  if (job.window) {
    job.task.window = &job.window->window;
    job.tokens_each = job.task.window->lines;
    job.parts = (job.task.image->out_height + job.tokens_each - 1) / job.tokens_each;
    return share(job, threads);
  }
  int64_t width = job.task.tile ? int64_t(job.task.tile) * job.tier->lanes : kDirectTokens;
  int64_t tiles = (job.task.tokens + width - 1) / width;
  int64_t wanted = std::max<int64_t>(1, threads) * 4;
  int64_t per_image = std::min(tiles, std::max<int64_t>(1, wanted / std::max<int64_t>(1, job.batch)));
  job.tokens_each = (tiles + per_image - 1) / per_image * width;
  job.parts = (job.task.tokens + job.tokens_each - 1) / job.tokens_each;
  return share(job, threads);
}

bool has_tile(const prunella_many* weight, int32_t tile) {
  if (!weight || (weight->weight.precision == prunella::kHalf && tile % 2)) return false;
  if (tile == 0) return weight->weight.kind == prunella::kBlock16;
  return (tile >= 1 && tile <= 4) || tile == 6 || tile == 8;
}

}  // namespace

extern "C" int prunella_many_linear(const prunella_many* weight, const float* x, int64_t tokens, const float* bias,
                                    const float* residual, int32_t activation, int32_t strict, int32_t tile,
                                    int32_t threads, float* y) {
  if (tokens < 0 || !has_tile(weight, tile) || threads < 1) return PRUNELLA_BAD_ARGUMENT;
  if (activation < 0 || activation > prunella::kHardswish || strict < 0 || strict > 1) return PRUNELLA_BAD_ARGUMENT;
  const ManyWeight& w = weight->weight;
  if (!tokens || !w.m) return PRUNELLA_OK;
  if (!y || (w.k && !x)) return PRUNELLA_BAD_ARGUMENT;
  Job job{};
  job.tier = prunella::tier().many;
  job.task = {&w, nullptr, nullptr, x, y, {bias, residual, activation}, tokens, 0, 0, 0, 0, tile, strict,
              nullptr, nullptr, nullptr, nullptr};
  job.batch = 1;
  return run(job, threads);
}

extern "C" int prunella_many_conv(const prunella_many* weight, const prunella_image* image, const float* x,
                                  const float* bias, const float* residual, int32_t activation, int32_t strict,
                                  int32_t tile, int32_t threads, float* y) {
  if (!image || !has_tile(weight, tile) || threads < 1) return PRUNELLA_BAD_ARGUMENT;
  if (activation < 0 || activation > prunella::kHardswish || strict < 0 || strict > 1) return PRUNELLA_BAD_ARGUMENT;
  const ManyWeight& w = weight->weight;
  const prunella_image& g = *image;
  bool sizes = g.channels >= 0 && g.height >= 0 && g.width >= 0 && g.batch >= 0 && g.kernel_h > 0 && g.kernel_w > 0 &&
               g.stride_h > 0 && g.stride_w > 0 && g.pad_h >= 0 && g.pad_w >= 0 && g.dilation_h > 0 && g.dilation_w > 0;
  if (!sizes || g.channels * g.kernel_h * g.kernel_w != w.k) return PRUNELLA_BAD_ARGUMENT;
  int64_t tall = g.height + 2 * int64_t(g.pad_h) - int64_t(g.dilation_h) * (g.kernel_h - 1) - 1;
  int64_t wide = g.width + 2 * int64_t(g.pad_w) - int64_t(g.dilation_w) * (g.kernel_w - 1) - 1;
  if (tall < 0 || wide < 0) return PRUNELLA_BAD_ARGUMENT;
  ManyImage shape{g.channels, g.height,   g.width,    tall / g.stride_h + 1, wide / g.stride_w + 1,
                  g.kernel_h, g.kernel_w, g.stride_h, g.stride_w,            g.pad_h,
                  g.pad_w,    g.dilation_h, g.dilation_w, g.last};
  int64_t tokens = shape.out_height * shape.out_width;
  if (!g.batch || !tokens || !w.m) return PRUNELLA_OK;
  if (!y || (w.k && g.height && g.width && !x)) return PRUNELLA_BAD_ARGUMENT;
  const bool flat = g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && !g.pad_h && !g.pad_w;
  if (flat) {  // every pixel is a token: one long line
    shape.width = shape.out_width = tokens;
    shape.height = shape.out_height = 1;
  }
  Job job{};
  job.tier = prunella::tier().many;
  job.task = {&w, flat && g.last ? nullptr : &shape, nullptr, x, y, {bias, residual, activation}, tokens, 0, 0, 0, 0,
              tile, strict, nullptr, nullptr, nullptr, nullptr};
  job.batch = g.batch;
  job.x_stride = g.channels * g.height * g.width;
  job.y_stride = tokens * w.m;
  try {
    if (!flat) job.window = prunella::window_of(*weight, {shape, g.batch, job.tier->lanes, std::max(tile, 2), threads});
  } catch (const std::bad_alloc&) {
    return PRUNELLA_NO_MEMORY;
  }
  return run(job, threads);
}

extern "C" int prunella_many_chain(const prunella_step* steps, int32_t count, float* const* places, int32_t threads) {
  if (count < 0 || (count && (!steps || !places))) return PRUNELLA_BAD_ARGUMENT;
  int done = PRUNELLA_OK;
  for (const prunella_step* s = steps; s < steps + count && done == PRUNELLA_OK; s++) {
    if (s->x_place < 0 || s->y_place < 0) return PRUNELLA_BAD_ARGUMENT;
    const float* residual = s->residual_place < 0 ? nullptr : places[s->residual_place] + s->residual;
    done = prunella_many_conv(s->weight, s->image, places[s->x_place] + s->x, s->bias, residual, s->activation, 1, s->tile,
                              threads, places[s->y_place] + s->y);
  }
  return done;
}
