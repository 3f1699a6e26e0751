#define LANES 16
#include <immintrin.h>
#include "dot_body.inc"

namespace prunella {
const DotTier dot_avx512 = {"avx512", LANES, run_dot};
}
