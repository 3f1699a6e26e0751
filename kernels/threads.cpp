#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

namespace prunella {
namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// torch brings GNU's runtime; it is never loaded from here, only found.
Parallel find_parallel() {
  void* runtime = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY);
  void* found = runtime ? dlsym(runtime, "GOMP_parallel") : dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return reinterpret_cast<Parallel>(found);
}

struct Loop {
  std::atomic<int64_t> next;
  int64_t count;
  void (*task)(void*, int64_t);
  void* argument;
};

void work(void* given) {
  Loop& loop = *static_cast<Loop*>(given);
  for (int64_t i = loop.next++; i < loop.count; i = loop.next++) loop.task(loop.argument, i);
}

struct Arena {
  float* memory[4] = {};
  int64_t size[4] = {};
  ~Arena() {
    for (float* part : memory) free(part);
  }
};

}  // namespace

void for_each(int64_t count, int threads, void (*task)(void*, int64_t), void* argument) {
  Loop loop{{0}, count, task, argument};
  int64_t useful = count < threads ? count : threads;
  if (useful <= 1) return work(&loop);
  static const Parallel parallel = find_parallel();
  if (parallel) return parallel(work, &loop, unsigned(useful), 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < useful; i++) others.emplace_back(work, &loop);
  work(&loop);
  for (std::thread& other : others) other.join();
}

float* scratch(int slot, int64_t floats) {
#ifdef __SANITIZE_ADDRESS__  // each time as much as was asked for, so that one vector too many is seen
  constexpr int64_t kGrain = 64, kKept = 0;
#else
  constexpr int64_t kGrain = 4096, kKept = 1;
#endif
  static thread_local Arena arena;
  if (arena.size[slot] * kKept < floats) {
    free(arena.memory[slot]);
    int64_t bytes = (floats * 4 + kGrain - 1) / kGrain * kGrain;
    arena.memory[slot] = static_cast<float*>(aligned_alloc(kGrain, size_t(bytes)));
    arena.size[slot] = arena.memory[slot] ? bytes / 4 : 0;
  }
  return arena.memory[slot];
}

}  // namespace prunella
