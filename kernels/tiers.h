// Which tier runs: the best that processor and system support, or the one that was asked for.
#pragma once
#include "dot.h"
#include "few.h"
#include "many.h"

namespace prunella {

struct Tier {
  const char* name;
  const ManyTier* many;
  const FewTier* few;
  const DotTier* dot;
  bool (*supported)();
};

const Tier& tier();  // the one in use

}  // namespace prunella
