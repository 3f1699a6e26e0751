// Few tokens on AVX2 and FMA.
#include <immintrin.h>

#include "few.h"

namespace prunella {
namespace {

#include "few_avx2.inc"

using Fp32 = Fp32Avx2;
using Bf16 = Bf16Avx2;
using Int8 = Int8Avx2;

#include "few_body.inc"

}  // namespace
const FewTier few_avx2 = {"avx2", prepare, run};
}  // namespace prunella
