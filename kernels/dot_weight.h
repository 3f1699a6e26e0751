// What prunella_dot is: a weight of dot.h that owns its arrays.
#pragma once
#include <vector>

#include "dot.h"
#include "prunella_dot.h"

struct prunella_dot {
  prunella::DotWeight weight{};
  std::vector<int64_t> start, slot, before;
  std::vector<uint16_t> quad;
  std::vector<int32_t> code, sum;
  std::vector<float> scale;

  void seal();
};
