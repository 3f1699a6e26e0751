"""A loss without labels whose gradients say how much each unit matters to the output."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunella.model.trees import tensors

Outputs = Callable[[nn.Module, Any], Tensor]


def output_probe(outputs: Outputs) -> Callable[[nn.Module, Any], Tensor]:
    """The loss `sum_i s_i y_i` with random signs `s_i` of +-1, one for each number of the output.

    Every distillation loss has a zero gradient at the dense model itself, so Taylor scores of it would vanish. The
    squared gradient of this one does not: over the signs its mean is `sum_i (dy_i/dz)^2`, the squared change of the
    output, to first order, when the gate z of a unit closes (Hutchinson 1990 on the Gauss-Newton matrix of the squared
    error). The signs depend on nothing but the batch, so that the same batch gives the same number.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        y = outputs(model, batch)
        generator = torch.Generator().manual_seed(_name(batch))
        signs = torch.randint(0, 2, y.shape, generator=generator, device="cpu").to(y).mul_(2).sub_(1)
        return (y * signs).sum()

    return loss


def _name(batch: Any) -> int:
    """A seed from the contents of a batch; different batches have different seeds."""
    return zlib.crc32(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors(batch)))
