// A few tokens on AVX-512 with VBMI2, VNNI and BF16: bf16 multiplies x rounded to bf16, int8 takes 64 weights a step.
#include <immintrin.h>

#include "few.h"

namespace prunella {
namespace {

#include "few_avx2.inc"
#include "few_avx512.inc"

FEW_EXPAND(expand_halves, __mmask32, "vpexpandw")
FEW_EXPAND(expand_bytes, __mmask64, "vpexpandb")

struct Bf16Pairs {
  using Value = uint16_t;
  using X = uint16_t;
  using Acc = __m512;
  using Sum = float;
  static constexpr int kStep = 32, kShift = 0;
  FEW_INLINE uint32_t step(uint64_t bits, int s) { return static_cast<uint32_t>(bits >> (32 * s)); }
  FEW_INLINE int64_t count(uint32_t bits) { return __builtin_popcount(bits); }
  FEW_INLINE __m512i expand(uint32_t bits, const Value* v) { return expand_halves(bits, v); }
  FEW_INLINE Acc zero() { return _mm512_setzero_ps(); }
  FEW_INLINE Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  FEW_INLINE Acc multiply_add(Acc acc, __m512i wide, const X* x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(wide), reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
  }
  FEW_INLINE Sum total(Acc a) { return _mm512_reduce_add_ps(a); }
};

// x is unsigned here: 128 too large, which the sum of the row's codes takes back.
struct Int8Quads {
  using Value = int8_t;
  using X = uint8_t;
  using Acc = __m512i;
  using Sum = int64_t;
  static constexpr int kStep = 64, kShift = 128;
  FEW_INLINE uint64_t step(uint64_t bits, int) { return bits; }
  FEW_INLINE int64_t count(uint64_t bits) { return __builtin_popcountll(bits); }
  FEW_INLINE __m512i expand(uint64_t bits, const Value* v) { return expand_bytes(bits, v); }
  FEW_INLINE Acc zero() { return _mm512_setzero_si512(); }
  FEW_INLINE Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  FEW_INLINE Acc multiply_add(Acc acc, __m512i wide, const X* x) {
    return _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(x), wide);
  }
  FEW_INLINE Sum total(Acc a) { return _mm512_reduce_add_epi32(a); }
};

using Fp32 = Fp32Avx512;
using Bf16 = Bf16Pairs;
using Int8 = Int8Quads;

#include "few_body.inc"

}  // namespace
const FewTier few_avx512bf16 = {"avx512bf16", prepare, run};
}  // namespace prunella
