#define LANES 16
#include "many_body.inc"

namespace prunella {
const ManyTier many_avx512 = {"avx512", LANES, run_many};
}
