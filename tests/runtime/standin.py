"""The kernels' interface in a few lines of torch, so that the layers above it are tested without the library.

A packed weight here is the dense one, and zeros are multiplied; only infinities show it, which is what a test wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunella.runtime.kernels import chain as steps
from prunella.runtime.kernels import convolution
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import Activation, Config, Kind, Precision
from prunella.runtime.packed_cache import ACTIVATE
from prunella.runtime.tuning import configs as tiles


@dataclass(frozen=True)
class Held:
    """A packed weight."""

    matrix: Tensor
    config: Config
    nbytes: int = 0


class Calls(list[str]):
    """Names of what was called, in order."""


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the stand-in in place of the library, and list the calls."""
    calls = Calls()

    def pack(weight: Tensor, config: Config) -> Any:
        calls.append(f"pack {config.kind.value}")
        return Held(weight.detach().clone(), config)

    def linear(packed: Held, x: Tensor, bias: Any = None, residual: Any = None,
               activation: Activation = Activation.NONE) -> Tensor:  # fmt: skip
        calls.append(f"linear {packed.config.kind.value} {packed.config.precision.value}")
        assert torch.isfinite(x).all()
        y = functional.linear(x, packed.matrix, bias)
        return ACTIVATE[activation](y if residual is None else y + residual)

    def finite_linear(packed: Held, x: Tensor, bias: Any, residual: Any, activation: Activation) -> Tensor | None:
        return linear(packed, x, bias, residual, activation) if torch.isfinite(x).all() else None

    def run_patches(
        packed: Held, made: convolution.Patches, x: Tensor, bias: Any, residual: Any, activation: Activation
    ) -> Tensor | None:
        calls.append(f"conv2d {packed.config.kind.value}")
        assert residual is None or residual.shape == made.out  # a kernel would read what lies behind it
        if not torch.isfinite(x).all():
            return None
        g = made.image.contents
        weight = packed.matrix.reshape(len(packed.matrix), -1, g.kernel_h, g.kernel_w)
        sides = ((g.stride_h, g.stride_w), (g.pad_h, g.pad_w), (g.dilation_h, g.dilation_w))
        y = functional.conv2d(x, weight, bias, *sides)
        assert y.shape == made.out and y.stride() == made.strides
        return ACTIVATE[activation](y if residual is None else y + residual)

    def prepared(todo: Sequence[steps.Step], ready: Sequence[steps.Ready], inputs: int, outputs: Sequence[int]) -> Any:
        return tuple(todo), tuple(ready), tuple(outputs)

    def run(held: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        todo, ready, outputs = held
        values: list[Any] = list(inputs)
        for step, one in zip(todo, ready, strict=True):
            residual = None if step.residual is None else values[step.residual]
            values.append(run_patches(one.packed, one.patches, values[step.x], one.bias, residual, one.activation))
            if values[-1] is None:
                return None
            for place in step.free:
                values[place] = None
        return tuple(values[place] for place in outputs)

    def configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
        return (Config(Kind.DECODE),) if tokens <= 8 else (Config(Kind.ROWS), Config(Kind.GROUPS))

    for name, value in {
        "available": lambda: True, "isa": lambda: "standin", "tiers": lambda: ("standin",),
        "pack": pack, "linear": linear, "finite_linear": finite_linear,
    }.items():  # fmt: skip
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(convolution, "run_patches", run_patches)
    monkeypatch.setattr(steps, "prepared", prepared)
    monkeypatch.setattr(steps, "run", run)
    monkeypatch.setattr(tiles, "configs", configs)
    return calls


def bf16(config: Config) -> Config:
    """The same kernel in bfloat16."""
    return Config(config.kind, Precision.BF16, config.rows, config.tile, config.depth)
