// Few tokens, any processor: the set bits are walked one by one.
#include "few.h"

namespace prunella {
namespace {

template <class V, class S>
struct Walk {
  using Value = V;
  using Bits = uint64_t;
  using Sum = S;
  struct Acc {
    Sum sum;
  };
  struct Wide {
    Bits bits;
    const V* values;
  };
  static constexpr int kStep = 64, kShift = 0;
  static Acc zero() { return {0}; }
  static Acc add(Acc a, Acc b) { return {a.sum + b.sum}; }
  static Sum total(Acc a) { return a.sum; }
  static Bits step(uint64_t bits, int) { return bits; }
  static int count(Bits bits) { return __builtin_popcountll(bits); }
  static Wide expand(Bits bits, const V* values) { return {bits, values}; }
  template <class Item>
  static Acc walk(Acc acc, Wide wide, Item item) {
    for (Bits bits = wide.bits; bits; bits &= bits - 1) acc.sum += item(*wide.values++, __builtin_ctzll(bits));
    return acc;
  }
};

struct Fp32 : Walk<float, float> {
  using X = float;
  static Acc multiply_add(Acc acc, Wide wide, const X* x) {
    return walk(acc, wide, [x](float v, int k) { return v * x[k]; });
  }
};

struct Bf16 : Walk<uint16_t, float> {
  using X = float;
  static float widen_bits(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
  }
  static Acc multiply_add(Acc acc, Wide wide, const X* x) {
    return walk(acc, wide, [x](uint16_t v, int k) { return widen_bits(v) * x[k]; });
  }
};

struct Int8 : Walk<int8_t, int64_t> {
  using X = int16_t;
  static Acc multiply_add(Acc acc, Wide wide, const X* x) {
    return walk(acc, wide, [x](int8_t v, int k) { return static_cast<int64_t>(v) * x[k]; });
  }
};

#include "few_body.inc"

}  // namespace
const FewTier few_portable = {"portable", prepare, run};
}  // namespace prunella
