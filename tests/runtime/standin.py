"""The kernels' interface in a few lines of torch, so that the layers above it are tested without the library.

A packed weight here is the dense one, and zeros are multiplied; only infinities show it, which is what a test wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunella.runtime import native, tiles
from prunella.runtime.native import Activation, Config, Kind, Precision
from prunella.runtime.store import ACTIVATE


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

    def conv2d(packed: Held, x: Tensor, kernel: Any, bias: Any = None, residual: Any = None,
               activation: Activation = Activation.NONE, *, stride: Any, padding: Any,
               dilation: Any) -> Tensor:  # fmt: skip
        calls.append(f"conv2d {packed.config.kind.value}")
        weight = packed.matrix.reshape(len(packed.matrix), -1, *kernel)
        y = functional.conv2d(x, weight, bias, stride, padding, dilation)
        return ACTIVATE[activation](y if residual is None else y + residual)

    def finite_conv2d(packed: Held, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return conv2d(packed, x, *args, **kwargs) if torch.isfinite(x).all() else None

    def configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
        return (Config(Kind.DECODE),) if tokens <= 8 else (Config(Kind.ROWS), Config(Kind.GROUPS))

    for name, value in {
        "available": lambda: True, "isa": lambda: "standin", "tiers": lambda: ("standin",),
        "pack": pack, "linear": linear, "finite_linear": finite_linear, "conv2d": conv2d,
        "finite_conv2d": finite_conv2d,
    }.items():  # fmt: skip
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(tiles, "configs", configs)
    return calls


def bf16(config: Config) -> Config:
    """The same kernel in bfloat16."""
    return Config(config.kind, Precision.BF16, config.rows, config.tile, config.depth)
