// Loops over tasks in the OpenMP runtime that the process already has, so that torch's threads are not doubled.
#pragma once
#include <cstdint>

namespace prunella {

// Call task(argument, i) for every i in [0, count), each once, on at most `threads` threads.
void for_each(int64_t count, int threads, void (*task)(void*, int64_t), void* argument);

// Memory of this thread, aligned to 64 bytes and kept for the next call. Null when there is none left.
float* scratch(int slot, int64_t floats);

}  // namespace prunella
