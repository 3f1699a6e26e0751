#define LANES 4
#include "many_body.inc"

namespace prunella {
const ManyTier many_portable = {"portable", LANES, run_many};
}
