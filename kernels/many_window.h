// Windows of many.h, made for a weight and an image and kept with the weight.
#pragma once
#include "many_pack.h"

// What a window was made for: the same numbers give the same window.
struct prunella_window_key {
  prunella::ManyImage image;
  int64_t batch;
  int32_t lanes, tile, threads;
};

struct prunella_window {
  prunella::ManyWindow window{};
  prunella_window_key key;
  std::vector<int64_t> channel, block, zeros;
  std::vector<uint16_t> index;
};

namespace prunella {

// The window of a weight for an image. Null where whole patches have to do: bf16, and sizes out of the ordinary. Throws
// std::bad_alloc.
std::shared_ptr<const prunella_window> window_of(const prunella_many& weight, const prunella_window_key& key);

}  // namespace prunella
