#define LANES 4
#include "dot_body.inc"

namespace prunella {
const DotTier dot_portable = {"portable", LANES, run_dot};
}
