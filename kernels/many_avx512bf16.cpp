#include <immintrin.h>
#define LANES 16
#define DOT_PAIRS
#include "many_body.inc"

namespace prunella {
const ManyTier many_avx512bf16 = {"avx512bf16", LANES, run_many};
}
