// One linear layer on a few tokens: convert x once, share the rows out by their work, then bias and activation.
#include <cstring>

#include "few.h"
#include "few_weight.h"
#include "prunella_few.h"
#include "threads.h"
#include "tiers.h"

namespace prunella {
namespace {

struct Call {
  FewTask task;
  const FewTier* tier;
  const float* x;          // of this pass, as the caller gave it
  const float* bias;
  const float* residual;   // of this pass
  int32_t activation;
  bool odd[kFewTokens];    // tokens with a number that bf16 cannot hold: infinity, NaN or nearly
  int parts;
};

bool ordinary(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t k = 0; k < n; k++) {
    uint32_t bits;
    std::memcpy(&bits, x + k, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most < 0x7f7f8000u;
}

float number(const FewView& w, int64_t row, int64_t p) {
  if (w.h.value == kFp32) return static_cast<const float*>(w.values)[p];
  if (w.h.value == kInt8) return static_cast<const int8_t*>(w.values)[p] * w.scales[row];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(w.values)[p]) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Weights that are stored, one by one: no lane without a weight can turn infinity into NaN.
float exact(const FewView& w, int64_t row, const float* x) {
  const int64_t words = few_words(w.h.columns);
  int64_t p = w.starts[row];
  float sum = 0.0f;
  for (int64_t word = 0; word < words; word++)
    for (uint64_t bits = w.mask[row * words + word]; bits; bits &= bits - 1)
      sum += number(w, row, p++) * x[word * 64 + __builtin_ctzll(bits)];
  return sum;
}

// Rows before part i of n: a nonzero costs about as much as a word of the mask, a row as four.
int64_t border(const FewView& w, int64_t part, int64_t parts) {
  const int64_t row_cost = 4 + (w.h.kind == kBitmap ? few_words(w.h.columns) : 0);
  const double goal = double(w.h.nonzeros + row_cost * w.h.rows) * double(part) / double(parts);
  int64_t low = 0, high = w.h.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (double(w.starts[middle] + row_cost * middle) < goal)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

void finish(const Call& call, int64_t first, int64_t last) {
  const int64_t rows = call.task.weight.h.rows;
  for (int t = 0; t < call.task.tokens; t++) {
    float* y = call.task.y + t * rows;
    const float* residual = call.residual ? call.residual + t * rows : nullptr;
    for (int64_t row = first; row < last && call.bias; row++) y[row] += call.bias[row];
    for (int64_t row = first; row < last && residual; row++) y[row] += residual[row];
    for (int64_t row = first; row < last && call.activation; row++) y[row] = y[row] < 0.0f ? 0.0f : y[row];
  }
}

void run_part(void* given, int64_t part) {
  const Call& call = *static_cast<const Call*>(given);
  const FewView& w = call.task.weight;
  const int64_t first = border(w, part, call.parts), last = border(w, part + 1, call.parts);
  call.tier->run(call.task, first, last);
  for (int t = 0; t < call.task.tokens; t++)
    for (int64_t row = first; row < last && call.odd[t]; row++)
      call.task.y[t * w.h.rows + row] = exact(w, row, call.x + t * w.h.columns);
  finish(call, first, last);
}

// x with the odd tokens as zeros, so that the vector kernels may fill in zeros for weights.
const float* ordinary_tokens(Call& call) {
  const int64_t columns = call.task.weight.h.columns;
  int odd = 0;
  for (int t = 0; t < call.task.tokens; t++)
    odd += call.odd[t] = call.task.weight.h.kind == kBitmap && !ordinary(call.x + t * columns, columns);
  if (!odd) return call.x;
  float* copy = scratch(1, columns * call.task.tokens);
  if (!copy) return nullptr;
  for (int t = 0; t < call.task.tokens; t++) {
    const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
    if (call.odd[t])
      std::memset(copy + t * columns, 0, bytes);
    else
      std::memcpy(copy + t * columns, call.x + t * columns, bytes);
  }
  return copy;
}

int run_pass(Call& call, int threads) {
  const int64_t columns = call.task.weight.h.columns;
  float* converted = scratch(0, few_words(columns) * 64 * kFewTokens + kFewTokens);
  const float* x = converted ? ordinary_tokens(call) : nullptr;
  if (!x) return PRUNELLA_NO_MEMORY;
  call.task.x_scale = converted + few_words(columns) * 64 * kFewTokens;
  call.tier->prepare(x, &call.task, converted);
  for_each(call.parts, threads, run_part, &call);
  return PRUNELLA_OK;
}

}  // namespace
}  // namespace prunella

using namespace prunella;

extern "C" int prunella_few_linear(const prunella_few* weight, const float* x, int64_t tokens, const float* bias,
                                   const float* residual, int32_t activation, int32_t strict, int32_t threads,
                                   float* y) {
  if (!weight || tokens < 0 || activation < 0 || activation > 1 || strict < 0 || strict > 1) return PRUNELLA_BAD_ARGUMENT;
  Call call = {};
  call.task.weight = few_view(weight->data);
  const FewHeader& h = call.task.weight.h;
  if (tokens == 0 || h.rows == 0) return PRUNELLA_OK;
  if (!y || (h.columns && !x)) return PRUNELLA_BAD_ARGUMENT;
  if (strict && !ordinary(x, tokens * h.columns)) return PRUNELLA_ODD_INPUT;
  static const float none = 0.0f;
  call.tier = tier().few;
  call.bias = bias;
  call.activation = activation;
  call.parts = threads > 1 ? 4 * threads : 1;
  for (int64_t first = 0; first < tokens; first += kFewTokens) {
    call.task.tokens = static_cast<int>(tokens - first < kFewTokens ? tokens - first : kFewTokens);
    call.x = h.columns ? x + first * h.columns : &none;
    call.residual = residual ? residual + first * h.rows : nullptr;
    call.task.y = y + first * h.rows;
    if (int bad = run_pass(call, threads)) return bad;
  }
  return PRUNELLA_OK;
}
