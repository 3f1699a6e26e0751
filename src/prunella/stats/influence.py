"""Statistics of the residual stream at residual blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.solve.residual_blocks import inside
from prunella.model.forward import first_tensor
from prunella.model.hooks import removed_after
from prunella.model.trees import tensors
from prunella.stats.subject import Subject


class Influence:
    """`influence`: one minus the mean cosine between the input and the output of each residual block, by stack.

    The mean is over all tokens and samples. The vector of a token is along the last axis, or along the channels (axis
    1) where the first layer of the block is a convolution. A vector that the block does not change has a cosine of 1.
    """

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._stacks = {group.name: group.paths for group in subject.groups if group.paths}
        self._axis = {path: _axis(subject, path) for paths in self._stacks.values() for path in paths}
        self._sums = {path: torch.zeros(2, dtype=torch.float64, device="cpu") for path in self._axis}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return self._hooks()

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By name of the stack, one number a block."""
        sums = {name: torch.stack([self._sums[path] for path in paths]) for name, paths in self._stacks.items()}
        return {name: 1 - total[:, 0] / total[:, 1].clamp_min(1) for name, total in sums.items() if total[:, 1].all()}

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        inputs: dict[str, Tensor] = {}
        handles = []
        for path in self._axis:
            block = self._model.get_submodule(path)

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                # a copy, since the block may add in place
                inputs[path] = tensors([list(args), kwargs])[0].detach().clone()

            def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                self._look(path, inputs.pop(path), first_tensor(output).detach())

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        with removed_after(handles):
            yield

    def _look(self, path: str, block_input: Tensor, block_output: Tensor) -> None:
        before, after = (x.double().movedim(self._axis[path], -1).flatten(0, -2) for x in (block_input, block_output))
        lengths = before.norm(dim=1) * after.norm(dim=1)
        cosine = (before * after).sum(1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
        cosine = torch.where((before == after).all(1), 1.0, cosine)
        self._sums[path] += torch.stack([cosine.sum(), cosine.new_tensor(float(len(cosine)))]).cpu()


def _axis(subject: Subject, path: str) -> int:
    """The axis of the stream that holds the vector of a token."""
    first = next((layer for layer in subject.graph.layers if inside(layer.entity, path)), None)
    return 1 if first is not None and first.op != "linear" else -1
