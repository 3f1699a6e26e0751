"""Moving averages of the weights are pruned with the model that they average."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prunella as pr
from prunella.errors import RequestError
from tests.graphs import mlp

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
MASKS = pr.Recipe(granularity=pr.Element())


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def train(model: nn.Module, average: AveragedModel, pruner: pr.Pruner, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        pruner.step()


def test_an_average_keeps_the_masks_while_they_grow() -> None:
    model = mlp(8)
    average, optimizer = averaged(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    kept: dict[str, object] = {"recipe": MASKS, "target": pr.Sparsity(0.75), "inputs": X, "steps": 4}
    with pr.Pruner(model, optimizer, averages=[average], **kept) as pruner:  # type: ignore[arg-type]
        train(model, average, pruner, optimizer)
    masks = pr.masks_of(average)
    assert masks.keys() == pr.masks_of(model).keys()
    for name, mask in masks.items():
        assert not bool(average.module.get_parameter(name)[~mask].any())
    assert pr.masks_of(pr.finalize(average)) == {}


def test_masks_are_copied_to_a_replica_and_replace_its_own() -> None:
    model = pr.apply_(mlp(8), pr.plan(mlp(8), X, MASKS, target=pr.Sparsity(0.5)))
    replica = pr.apply_(copy.deepcopy(mlp(8)), pr.plan(mlp(8), X, MASKS, target=pr.Sparsity(0.9)))
    pr.transform.copy_masks_(model, replica)
    masks = pr.masks_of(replica)
    assert all(torch.equal(mask, masks[name]) for name, mask in pr.masks_of(model).items())
    with pytest.raises(RequestError, match="do not fit the other model"):
        pr.transform.copy_masks_(model, mlp(9))


def test_one_plan_cuts_both() -> None:
    model = mlp(8)
    average = averaged(model)
    plan = pr.plan(model, X, target=pr.Sparsity(0.5))
    small, smaller = pr.shrink(model, plan), pr.shrink(average, plan)
    assert torch.equal(small(X), smaller(X)) and type(smaller) is nn.Sequential


def test_a_model_without_masks_is_finalized_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(8)
    assert pr.finalize(model) is model and "has no masks" in caplog.text
    caplog.clear()
    pr.finalize(pr.apply_(model, pr.plan(model, X, MASKS, target=pr.Sparsity(0.5))))
    assert not caplog.text
