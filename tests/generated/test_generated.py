"""Random networks are cut exactly, or refused with a reason; and most of them are really cut."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings

from prunella.errors import NotSupported
from tests.generated.programs import UNKNOWN, Network, Program, programs
from tests.oracle import Checked, Mode, check_exact

EXAMPLES = 220


def check(program: Program) -> Checked | None:
    """The network cut exactly, or None when the engine refuses it with a reason."""
    torch.manual_seed(0)
    network = Network(program)
    used = {step.block for step in program.steps}
    modes: tuple[Mode, ...] = ("all",) if "Tied" in used else ("all", "readers")
    try:  # torch turns an einsum over one position into a product that its counter does not see
        return check_exact(network, program.input(), fraction=0.4, modes=modes, count="Einsum" not in used)
    except NotSupported as refusal:
        assert refusal.what and refusal.why
        return None


def test_generated_networks_are_exact_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(programs())
    def one(program: Program) -> None:
        checked = check(program)
        seen["all"] += 1
        if checked is None:
            seen["refused"] += 1
            return
        assert all(entry.reason for entry in checked.graph.frozen)
        seen["cut"] += bool(checked.graph.groups)
        seen["moved"] += checked.moved > 1e-6
        seen["heads"] += any(group.kind == "head" for group in checked.graph.groups)
        seen["units"] += sum(group.size for group in checked.graph.groups)
        unknown = {step.args[0] for step in program.steps if step.block == "Across"} & set(UNKNOWN)
        seen["unknown"] += bool(unknown)
        seen["named"] += bool(unknown) and any(n in e.reason for n in unknown for e in checked.graph.frozen)

    one()
    assert seen["all"] >= 200
    assert seen["refused"] <= 0.05 * seen["all"], seen
    assert seen["cut"] >= 0.75 * seen["all"] and seen["moved"] >= 0.6 * seen["all"], seen
    assert seen["heads"] >= 5 and seen["units"] >= 5 * seen["all"], seen
    assert seen["named"] >= 0.8 * seen["unknown"] > 0, seen
