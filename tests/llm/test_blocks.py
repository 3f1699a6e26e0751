"""Blocks and their inputs: two ways to find the blocks, and inputs that follow the weights of the blocks before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunella.graph.solve.groups import couple
from prunella.llm.blocks import BlockInputs, ModelBlock, block_paths, blocks_of, listed_block_paths
from prunella.model.forward import forward
from tests.llm.streaming.models import KINDS, data, write
from tests.llm.test_blockwise import batches, net


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_module_list_holds_the_residual_blocks_of_language_models(tmp_path: Path, kind: str) -> None:
    model = write(tmp_path / "in", kind)
    with torch.no_grad():
        found = block_paths(model, couple(model, data()[0]))
    assert listed_block_paths(model) == found and len(found) == 3


def test_a_block_contains_a_parameter_only_with_all_its_names() -> None:
    block = ModelBlock("blocks.1", sequential=True)
    assert block.contains(["blocks.1.up.weight"])
    assert not block.contains(["blocks.10.up.weight"]) and not block.contains(["blocks.1.up.weight", "head.weight"])
    assert ModelBlock("", sequential=False).contains(["anything"])


@pytest.mark.parametrize("scaled", [False, True], ids=["sequential", "whole passes"])
def test_inputs_of_a_block_are_computed_by_the_changed_blocks_before_it(scaled: bool) -> None:
    model, data = net(scaled=scaled), batches()
    inputs = BlockInputs(model, data, forward, blocks_of(model, couple(model, data[0]), data[0], forward))
    with torch.no_grad():
        for block in inputs.blocks[:2]:
            inputs.calls(block)
            model.get_submodule(block.path).up.weight.mul_(0.5)  # type: ignore[union-attr, operator]
            inputs.next_block(block)
        seen = [call.hidden_states for call in inputs.calls(inputs.blocks[2])]
        assert all(torch.equal(a, b) for a, b in zip(seen, map(_before_the_third(model), data), strict=True))


def test_known_outputs_are_not_computed_again() -> None:
    model, data = net(), batches()
    inputs = BlockInputs(model, data, forward, blocks_of(model, couple(model, data[0]), data[0], forward))
    with torch.no_grad():
        inputs.calls(inputs.blocks[0])
        inputs.next_block(inputs.blocks[0], [torch.full((30, 12), float(k)) for k in range(3)])
        assert [float(call.hidden_states[0, 0]) for call in inputs.calls(inputs.blocks[1])] == [0, 1, 2]


def test_the_pass_that_records_the_calls_ends_at_the_last_block() -> None:
    model, data = net(), batches()
    inputs = BlockInputs(model, data, forward, blocks_of(model, couple(model, data[0]), data[0], forward))
    called: list[str] = []
    for name in ("blocks.1", "blocks.2", "last"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: called.append(name))
    with torch.no_grad():
        inputs.calls(inputs.blocks[0])
    assert called == ["blocks.1"] * len(data)


def _before_the_third(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The inputs of the third block in a pass of the full model."""

    def run(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = model.get_submodule("blocks.2").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(x)
        handle.remove()
        return seen[0]

    return run
