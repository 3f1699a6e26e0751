// What prunella_few is: a buffer of few.h and how long it is.
#pragma once
#include <cstdint>

struct prunella_few {
  void* data;
  int64_t bytes;
};
