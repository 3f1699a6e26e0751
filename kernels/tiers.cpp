#include "tiers.h"

#include <atomic>
#include <cstring>
#include <string>

#include "prunella.h"

namespace prunella {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}
#endif

// The best last.
const Tier kTiers[] = {
    {"portable", &many_portable, &few_portable, &dot_portable, always},
#if defined(PRUNELLA_HAS_AVX2)
    {"avx2", &many_avx2, &few_avx2, &dot_avx2, has_avx2},
#endif
#if defined(PRUNELLA_HAS_AVX512)
    {"avx512", &many_avx512, &few_avx512, &dot_avx512, has_avx512},
#endif
#if defined(PRUNELLA_HAS_AVX512BF16)
    {"avx512bf16", &many_avx512bf16, &few_avx512bf16, &dot_avx512bf16, has_avx512bf16},
#endif
};

const Tier* best() {
  const Tier* found = &kTiers[0];
  for (const Tier& one : kTiers)
    if (one.supported()) found = &one;
  return found;
}

std::atomic<const Tier*> in_use{nullptr};

}  // namespace

const Tier& tier() {
  const Tier* now = in_use.load();
  if (!now) in_use.store(now = best());
  return *now;
}

}  // namespace prunella

extern "C" int prunella_abi(void) { return PRUNELLA_ABI; }

extern "C" const char* prunella_tiers(void) {
  static const std::string names = [] {
    std::string all;
    for (const auto& one : prunella::kTiers)
      if (one.supported()) all += (all.empty() ? "" : ",") + std::string(one.name);
    return all;
  }();
  return names.c_str();
}

extern "C" const char* prunella_tier(void) { return prunella::tier().name; }

extern "C" int prunella_use(const char* name) {
  if (!name) return PRUNELLA_BAD_ARGUMENT;
  if (!*name) {
    prunella::in_use.store(prunella::best());
    return PRUNELLA_OK;
  }
  for (const auto& one : prunella::kTiers)
    if (!strcmp(one.name, name)) {
      if (!one.supported()) return PRUNELLA_NO_TIER;
      prunella::in_use.store(&one);
      return PRUNELLA_OK;
    }
  return PRUNELLA_BAD_ARGUMENT;
}
