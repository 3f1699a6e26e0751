#include <immintrin.h>
#define LANES 8
#include "many_body.inc"

namespace prunella {
const ManyTier many_avx2 = {"avx2", LANES, run_many};
}
