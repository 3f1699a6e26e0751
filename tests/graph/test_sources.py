"""Which tensors are computed from parameters alone."""

from __future__ import annotations

import torch

from prunella.graph.sources import Sources


def test_memory_made_from_nothing_and_filled_with_an_activation_is_one() -> None:
    weight, activation = torch.ones(3), torch.rand(3)
    sources = Sources({"weight": weight}, ["weight"])
    filled = torch.zeros(3)
    assert sources.note([], [filled]) == frozenset()
    assert sources.note([filled, weight], [filled]) == {"weight"} == sources.of(filled)
    assert sources.note([filled, activation], [filled]) is None
    assert sources.of(filled) is None and sources.of(filled.view(1, 3)) is None
    assert sources.note([], [filled]) == frozenset() == sources.of(filled)  # zeros once more
