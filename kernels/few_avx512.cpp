// A few tokens on AVX-512 without VBMI2: narrow values are expanded as 32 bits, int8 as on AVX2.
#include <immintrin.h>

#include "few.h"

namespace prunella {
namespace {

#include "few_avx2.inc"
#include "few_avx512.inc"

using Fp32 = Fp32Avx512;
using Bf16 = Bf16Avx512;
using Int8 = Int8Avx2;

#include "few_body.inc"

}  // namespace
const FewTier few_avx512 = {"avx512", prepare, run};
}  // namespace prunella
