#define LANES 8
#include <immintrin.h>
#include "dot_body.inc"

namespace prunella {
const DotTier dot_avx2 = {"avx2", LANES, run_dot};
}
