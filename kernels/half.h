// A float as bfloat16. Built without the flags of any tier.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace prunella {

// Ties to even; what is NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace prunella
