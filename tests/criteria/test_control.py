"""Criteria made of other criteria."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import prunella as pr
from prunella.planning.recipe import Recipe
from tests.graphs import convnet, images, mlp, square_loss

X = torch.randn(3, 4)


def masks(criterion: object, seed: int = 0, sparsity: float = 0.5) -> dict[str, torch.Tensor]:
    recipe = Recipe(criterion, pr.Element(), pr.global_, seed=seed)  # type: ignore[arg-type]
    return dict(pr.plan(mlp(), X, recipe, target=pr.Sparsity(sparsity)).masks)


def test_inverted_keeps_what_the_other_would_remove() -> None:
    plain, inverse = masks(pr.magnitude), masks(pr.criteria.inverted(pr.magnitude))
    kept = torch.cat([m.flatten() for m in plain.values()])
    other = torch.cat([inverse[name].flatten() for name in plain])
    assert int((kept == other).sum()) <= 1  # an odd number of weights: the one in the middle
    twice = masks(pr.criteria.inverted(pr.criteria.inverted(pr.magnitude)))
    assert all(twice[name].equal(plain[name]) for name in plain)


def test_inverted_turns_the_scores_of_units_not_of_weights() -> None:
    model, x = convnet().eval(), images()[0]
    for reduce in pr.granularity.Reduce:
        plans = [
            pr.plan(model, x, Recipe(criterion, pr.Channel(reduce)), target=pr.Sparsity(0.5))
            for criterion in (pr.magnitude, pr.criteria.inverted(pr.magnitude))
        ]
        assert plans[0].keep["0"].equal(~plans[1].keep["0"])


def test_shuffled_keeps_the_counts_and_the_scores_of_every_layer_and_changes_the_places() -> None:
    plain, mixed = masks(pr.magnitude), masks(pr.criteria.shuffled(pr.magnitude))
    assert {n: int(m.sum()) for n, m in plain.items()} == {n: int(m.sum()) for n, m in mixed.items()}
    assert any(not plain[name].equal(mixed[name]) for name in plain)
    again, other = masks(pr.criteria.shuffled(pr.magnitude)), masks(pr.criteria.shuffled(pr.magnitude), seed=1)
    assert all(again[name].equal(mixed[name]) for name in plain)
    assert any(not other[name].equal(mixed[name]) for name in plain)


@pytest.mark.parametrize(
    "criterion",
    [
        pr.criteria.inverted(pr.magnitude),
        pr.criteria.shuffled(partial(pr.magnitude, p=2)),
        pr.criteria.inverted(pr.criteria.shuffled(partial(pr.criteria.obs_saliency, block=8))),
    ],
)
def test_a_plan_file_says_what_a_control_is_of(criterion: object, tmp_path: object) -> None:
    from pathlib import Path

    recipe = Recipe(criterion, pr.Element())  # type: ignore[arg-type]
    read = Recipe.read(recipe.describe())
    assert read.describe() == recipe.describe()
    plan = pr.plan(mlp(), X, recipe, target=pr.Sparsity(0.5), data=[X], loss=square_loss)
    path = Path(str(tmp_path)) / "a.plan"
    pr.io.save_plan(plan, path)
    loaded = pr.io.load_plan(path)
    assert Recipe.read(loaded.recipe).describe() == recipe.describe()
    again = pr.plan(mlp(), X, Recipe.read(loaded.recipe), target=pr.Sparsity(0.5), data=[X], loss=square_loss)
    assert all(mask.equal(again.masks[name]) for name, mask in plan.masks.items())


def test_a_plan_names_the_control_and_what_it_is_of() -> None:
    recipe = Recipe(pr.criteria.inverted(pr.magnitude), pr.Element())
    assert "inverted(magnitude)" in str(pr.plan(mlp(), X, recipe, target=pr.Sparsity(0.5)))


def test_a_control_asks_for_what_its_criterion_asks_for() -> None:
    recipe = Recipe(pr.criteria.inverted(pr.taylor), pr.Channel())
    with pytest.raises(pr.PruningError, match=r"inverted\(taylor\) needs `gate_grad`"):
        pr.plan(mlp(), X, recipe, target=pr.Sparsity(0.5))


def test_a_control_called_by_hand_changes_the_scores() -> None:
    w = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert pr.criteria.inverted(pr.magnitude)(w).tolist() == [[-1, -2], [-3, 0]]
    assert sorted(pr.criteria.shuffled(pr.magnitude)(w).flatten().tolist()) == [0, 1, 2, 3]


def test_misuse_is_said() -> None:
    with pytest.raises(pr.PruningError, match=r"inverted takes a criterion"):
        pr.criteria.inverted(3)  # type: ignore[arg-type]
    with pytest.raises(pr.PruningError, match="bind them inside"):
        Recipe(partial(pr.criteria.inverted(pr.magnitude), p=2))
    with pytest.raises(pr.PruningError, match="of kind control"):
        Recipe(pr.criteria.inverted)
    with pytest.raises(pr.PruningError):
        Recipe.read({**Recipe().describe(), "criterion": {"name": "magnitude", "knobs": {}, "of": {}}})
