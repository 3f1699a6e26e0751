#define LANES 16
#include <immintrin.h>
#include "dot_body.inc"

namespace prunella {
const DotTier dot_avx512bf16 = {"avx512bf16", LANES, run_dot};
}
