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

from prunella.runtime.kernels import chain as kernel_chain
from prunella.runtime.kernels import convolution, library
from prunella.runtime.kernels.chain import ChainStep, Ready
from prunella.runtime.kernels.config import Activation, Config, Kind, Precision
from prunella.runtime.packed_cache import ACTIVATE
from prunella.runtime.tuning import configs


@dataclass(frozen=True)
class StandinWeight:
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
        return StandinWeight(weight.detach().clone(), config)

    def linear(packed: StandinWeight, x: Tensor, bias: Any = None, residual: Any = None,
               activation: Activation = Activation.NONE) -> Tensor:  # fmt: skip
        calls.append(f"linear {packed.config.kind.value} {packed.config.precision.value}")
        assert torch.isfinite(x).all()
        y = functional.linear(x, packed.matrix, bias)
        return ACTIVATE[activation](y if residual is None else y + residual)

    def finite_linear(
        packed: StandinWeight, x: Tensor, bias: Any, residual: Any, activation: Activation
    ) -> Tensor | None:
        return linear(packed, x, bias, residual, activation) if torch.isfinite(x).all() else None

    def run_patches(
        packed: StandinWeight, patches: convolution.Patches, x: Tensor, bias: Any, residual: Any, activation: Activation
    ) -> Tensor | None:
        calls.append(f"conv2d {packed.config.kind.value}")
        assert residual is None or residual.shape == patches.out  # a kernel would read beyond its end
        if not torch.isfinite(x).all():
            return None
        g = patches.image.contents
        weight = packed.matrix.reshape(len(packed.matrix), -1, g.kernel_h, g.kernel_w)
        sides = ((g.stride_h, g.stride_w), (g.pad_h, g.pad_w), (g.dilation_h, g.dilation_w))
        y = functional.conv2d(x, weight, bias, *sides)
        assert y.shape == patches.out and y.stride() == patches.strides
        return ACTIVATE[activation](y if residual is None else y + residual)

    def prepare(steps: Sequence[ChainStep], layers: Sequence[Ready], inputs: int, outputs: Sequence[int]) -> Any:
        return tuple(steps), tuple(layers), tuple(outputs)

    def run(prepared: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        steps, layers, outputs = prepared
        values: list[Any] = list(inputs)
        for step, layer in zip(steps, layers, strict=True):
            residual = None if step.residual is None else values[step.residual]
            values.append(
                run_patches(layer.packed, layer.patches, values[step.x], layer.bias, residual, layer.activation)
            )
            if values[-1] is None:
                return None
            for place in step.free:
                values[place] = None
        return tuple(values[place] for place in outputs)

    def kernel_configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
        return (Config(Kind.DECODE),) if tokens <= 8 else (Config(Kind.ROWS), Config(Kind.GROUPS))

    for name, value in {
        "available": lambda: True, "isa": lambda: "standin", "tiers": lambda: ("standin",),
        "pack": pack, "linear": linear, "finite_linear": finite_linear,
    }.items():  # fmt: skip
        monkeypatch.setattr(library, name, value)
    monkeypatch.setattr(convolution, "run_patches", run_patches)
    monkeypatch.setattr(kernel_chain, "prepare", prepare)
    monkeypatch.setattr(kernel_chain, "run", run)
    monkeypatch.setattr(configs, "kernel_configs", kernel_configs)
    return calls


def bf16(config: Config) -> Config:
    """The same kernel in bfloat16."""
    return Config(config.kind, Precision.BF16, config.rows, config.tile, config.depth)
