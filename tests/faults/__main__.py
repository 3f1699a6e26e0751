"""Rounds of faults by name, all of them if none is named: `LD_PRELOAD=shim.so python -m tests.faults [ROUND,...]`.

--verbs scan,run    --most 60    --stride 1    --seed 0
"""

from __future__ import annotations

import sys

from tests.faults import damage, exchanged, forged, grid, moments, room, together, traces
from tests.faults.rounds import main

MODULES = (grid, moments, damage, exchanged, forged, together, room, traces)
ROUNDS = {module.ROUND.name: module.ROUND for module in MODULES}

if __name__ == "__main__":
    names = sys.argv[1].split(",") if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else list(ROUNDS)
    words = sys.argv[2:] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else sys.argv[1:]
    sys.exit(main([ROUNDS[name] for name in names], __doc__, words))
