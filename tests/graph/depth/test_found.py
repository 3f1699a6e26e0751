"""Which modules are residual blocks, and which only look like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.depth.nets import IMAGE, TOKENS, Calls, ConvNext, DenseNet, Layer, Lender, Net, ResNet, Wrap
from tests.oracle import assert_untouched, distinct, snapshot
from torch import Tensor, nn

from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple


def found(graph: Graph) -> dict[str, list[str]]:
    """Container -> names of its blocks."""
    return {stack.name: [path.rpartition(".")[2] for path in stack.paths] for stack in graph.stacks}


@pytest.mark.parametrize("options", [{}, {"post": True}, {"norm": nn.LayerNorm}, {"post": True, "norm": nn.LayerNorm}])
def test_layers_of_a_transformer_are_blocks_whatever_their_names(options: dict[str, Any]) -> None:
    model = Net(**options)
    before = snapshot(model)
    graph = couple(model, TOKENS)
    assert found(graph) == {"xyz": ["0", "1", "2", "3"]}
    assert graph.stacks[0].kind == "block" and not graph.rooted
    assert_untouched(before, snapshot(model))


def test_a_resnet_has_its_identity_blocks_and_not_those_that_change_the_size() -> None:
    assert found(couple(ResNet(), IMAGE)) == {"stage1": ["0", "1", "2"], "stage2": ["1", "2"]}


def test_a_stage_that_is_a_sum_as_a_whole_does_not_hide_its_blocks() -> None:
    assert found(couple(ConvNext(), IMAGE)) == {"stages.0": ["0", "1", "2"], "stages.1.1": ["0", "1"]}


def test_of_nested_blocks_the_outer_ones_count() -> None:
    inner = lambda k: nn.Sequential(Calls(lambda x, f: x + f(x)), Calls(lambda x, f: x + f(x).tanh()))  # noqa: E731
    assert found(couple(Wrap(inner), TOKENS)) == {"parts": ["0", "1", "2"]}


def test_what_joins_or_maps_has_no_blocks() -> None:
    assert not couple(DenseNet(), TOKENS).stacks
    assert not couple(Wrap(lambda k: nn.Sequential(nn.Linear(8, 8), nn.ReLU())), TOKENS).stacks


RULES: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], bool]] = {
    "sum": (lambda x, f: x + f(x), True),
    "sum in place": (lambda x, f: x.add_(f(x)), True),
    "difference": (lambda x, f: x - f(x), True),
    "scaled": (lambda x, f: 0.5 * x + f(x), True),
    "reshaped and back": (lambda x, f: (x.reshape(-1, 8) + f(x).reshape(-1, 8)).view(x.shape), True),
    "normed after": (lambda x, f: F.layer_norm(x + f(x), (8,)), True),
    "norm written out": (lambda x, f: (x + f(x)) / (x + f(x)).pow(2).mean(-1, keepdim=True).sqrt(), True),
    "a gated sum": (lambda x, f: x + f(x).sigmoid() * f(x), True),
    "a gate": (lambda x, f: x * f(x), False),
    "a highway": (lambda x, f: x * f(x).sigmoid() + f(x), False),
    "norm alone": (lambda x, f: F.layer_norm(x, (8,), f.weight[0]), False),
    "centered alone": (lambda x, f: x - x.mean(-1, keepdim=True) * f.weight[0], False),
    "permuted": (lambda x, f: x.flip(-1) + f(x), False),
    "map alone": (lambda x, f: f(x), False),
    "sum of maps": (lambda x, f: f(x) + f(x), False),
}


@pytest.mark.parametrize("name", RULES)
def test_a_block_gives_its_input_back_with_something_added(name: str) -> None:
    rule, block = RULES[name]
    assert bool(couple(Wrap(lambda k: Calls(rule)), TOKENS).stacks) is block


def test_a_block_that_runs_twice_stays_and_says_so() -> None:
    graph = couple(Wrap(lambda k: Layer(8, k), times=2), TOKENS)
    assert not graph.stacks
    assert [f.entity for f in graph.rooted] == ["parts.0", "parts.1", "parts.2"]
    assert all("runs 2 times" in f.reason and f.axis == -1 for f in graph.rooted)


def test_a_block_whose_other_results_are_read_stays() -> None:
    graph = couple(Lender(), TOKENS)
    assert found(graph) == {"parts": ["1", "2", "3"]}
    assert [(f.entity, "read outside the block" in f.reason) for f in graph.rooted] == [("parts.0", True)]


def test_a_block_without_parameters_is_none_of_ours() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.tanh()

    graph = couple(Wrap(lambda k: Plain()), TOKENS)
    assert not graph.stacks and {f.reason for f in graph.rooted} == {"the block has no parameters"}


def test_what_lives_in_a_block_goes_with_it_and_shared_weights_stay() -> None:
    model = Net()
    model.xyz[1].up.weight = model.xyz[0].up.weight
    model.xyz[1].down.bias = model.embed.bias
    graph = couple(model, TOKENS)
    keep = {"xyz": torch.tensor([True, False, True, True])}
    lost = sum(p.numel() for n, p in model.xyz[1].named_parameters() if n not in ("up.weight", "down.bias"))
    assert graph.params() == distinct(model)
    assert graph.params() - graph.params(keep) == lost
    both = {"xyz": torch.tensor([False, False, True, True])}
    assert graph.params(keep) - graph.params(both) == sum(p.numel() for p in model.xyz[0].parameters())
    assert graph.macs() - graph.macs(keep) == _macs_of_a_layer()


def _macs_of_a_layer() -> float:
    """10 tokens: four 8x8 maps, 8x24 and back, and two products of 5x5 for each of 2 sequences of width 8."""
    return 10 * (4 * 64 + 2 * 8 * 24) + 2 * (2 * 5 * 5 * 8)
