"""Operations of torch that skip zeros on a CUDA device: 2:4 by cuSPARSELt or CUTLASS, blocks by Triton.

They have never run on a GPU yet. Each is a candidate that is measured against dense code, and compared with it, before
it is used: one that fails or differs is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunella.runtime.tuning.choice import Route

HALF = (torch.float16, torch.bfloat16)
MOST_BLOCKS = 0.7
"""A weight with a larger fraction of its blocks in use has no chance against dense code."""
_TOKENS = 16
"""The Triton kernel takes multiples of so many tokens."""


@dataclass(frozen=True)
class AcceleratorKernel:
    """One way to multiply.

    applies: to a matrix `(out, in)`, by its zeros. pack: its operand. linear: of an input, the operand and a bias.
    The operand of a kernel for dense weights is the weight.
    """

    applies: Callable[[Tensor], bool]
    pack: Callable[[Tensor], Any]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor]


def is_two_of_four(matrix: Tensor) -> bool:
    """Whether at most two of every four neighbors in a row are not zero."""
    if matrix.shape[1] % 4:
        return False
    return bool(((matrix != 0).reshape(-1, 4).sum(1) <= 2).all())


def block_density(matrix: Tensor, block: int) -> float:
    """The fraction of square blocks that hold a weight; 1 if the matrix has no whole number of blocks."""
    rows, columns = matrix.shape
    if not matrix.numel() or rows % block or columns % block:
        return 1.0
    used = (matrix != 0).reshape(rows // block, block, columns // block, block).any(3).any(1)
    return float(used.double().mean()) if used.device.type == "cpu" else int(used.sum()) / used.numel()


def _fits_two_of_four(matrix: Tensor) -> bool:
    return matrix.dtype in HALF and is_two_of_four(matrix)


def _fits_blocks(block: int, matrix: Tensor) -> bool:
    return matrix.dtype in (*HALF, torch.float32) and block_density(matrix, block) <= MOST_BLOCKS


def _two_of_four(matrix: Tensor) -> Tensor:
    from torch.sparse import to_sparse_semi_structured

    packed: Tensor = to_sparse_semi_structured(matrix.contiguous())
    return packed


def _in_blocks(block: int, matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this layout is in beta
        return matrix.to_sparse_bsr((block, block))


def _block_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`(W X^T)^T + b`, with zeros as further tokens where the kernel takes multiples."""
    from torch.sparse._triton_ops import bsr_dense_mm

    flat = x.reshape(-1, x.shape[-1])
    padded = functional.pad(flat, (0, 0, 0, -len(flat) % _TOKENS))
    y: Tensor = bsr_dense_mm(packed, padded.t().contiguous())[:, : len(flat)].t()
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y if bias is None else y + bias


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(functional.linear, mode="max-autotune-no-cudagraphs")


def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _compiled()(x, weight, bias)


def _whole(matrix: Tensor) -> Tensor:
    return matrix


BLOCKS = {Route.BSR16: 16, Route.BSR32: 32, Route.BSR64: 64}
_CUDA: Mapping[Route, AcceleratorKernel] = {
    Route.COMPILED: AcceleratorKernel(lambda matrix: True, _whole, _compiled_linear),
    Route.SEMI: AcceleratorKernel(_fits_two_of_four, _two_of_four, functional.linear),
    **{
        route: AcceleratorKernel(partial(_fits_blocks, b), partial(_in_blocks, b), _block_linear)
        for route, b in BLOCKS.items()
    },
}


def kernels_of(device: torch.device) -> Mapping[Route, AcceleratorKernel]:
    """The kernels for a type of device, beside dense code; empty if there are none."""
    return _CUDA if device.type == "cuda" and torch.version.cuda is not None else {}
