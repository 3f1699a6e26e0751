// A packed weight that owns its arrays.
#pragma once
#include <memory>
#include <vector>

#include "many.h"
#include "prunella.h"

struct prunella_many {
  prunella::ManyWeight weight{};
  std::vector<int32_t> band_start;
  std::vector<int64_t> group_start, band_nnz;
  std::vector<prunella::ManyGroup> group;
  std::vector<uint16_t> index;
  std::vector<float> value;

  void seal();
};
