"""Plans by hand: everything follows from what is kept, and nothing is said to have been asked."""

from __future__ import annotations

import pytest
import torch

import prunella as pr
from prunella.graph.solve.groups import couple
from tests.graphs import convnet, images

X = images()[0]


def test_a_structure_by_hand_is_the_plan_that_keeps_the_same() -> None:
    model = convnet()
    found = pr.plan(model, X, target=pr.MACs(0.5))
    made = pr.Plan.of_structure(couple(model, X), found.keep, inputs=X)
    assert (made.rows, made.before, made.after) == (found.rows, found.before, found.after)
    assert made.cuts.keys() == found.cuts.keys()
    assert all(made.cuts[name][axis].equal(kept) for name in found.cuts for axis, kept in found.cuts[name].items())
    small, other = pr.shrink(model, made), pr.shrink(model, found)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), other.parameters(), strict=True))


def test_masks_by_hand_are_the_plan_with_the_same_masks() -> None:
    model, recipe = convnet(), pr.Recipe(granularity=pr.Element())
    found = pr.plan(model, X, recipe, target=pr.Sparsity(0.5), skip=["7"])
    made = pr.Plan.of_masks(couple(model, X), found.masks)
    assert (made.rows, made.before, made.after, made.got) == (found.rows, found.before, found.after, found.got)


def test_a_mask_of_a_bias_is_parameters_and_no_multiply_adds() -> None:
    model = convnet()
    bias = next(name for name, p in model.named_parameters() if name.endswith("bias") and name.startswith("7"))
    mask = torch.ones(model.get_parameter(bias).shape, dtype=torch.bool)
    mask[0] = False
    made = pr.Plan.of_masks(couple(model, X), {bias: mask})
    assert made.after.params == made.before.params - 1 and made.after.macs == made.before.macs


def test_without_a_target_the_sparsity_is_told_and_nothing_was_asked() -> None:
    graph = couple(convnet(), X)
    group = graph.groups[0]
    keep = torch.arange(group.size) > 0
    made = pr.Plan.of_structure(graph, {group.name: keep})
    assert made.target is None and made.got == pytest.approx(1 / group.size)
    assert "asked" not in str(made) and f"sparsity={1 / group.size:.4g}, without a target (by hand)" in str(made)
