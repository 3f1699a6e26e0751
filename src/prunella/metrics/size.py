"""Compression ratios in three scopes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunella.errors import RequestError
from prunella.measure.count import compression, count
from prunella.registry.method import metric


@dataclass(frozen=True)
class Compression:
    """`original / new` in three scopes; 4 means that a quarter remains.

    weights: elements of parameters with two axes or more, against the non-zero ones of the pruned model.
    parameters: the same for all parameters, including biases and scales.
    disk: bytes of parameters and buffers in a file, where zeros take as much space as other numbers.
    """

    weights: float
    parameters: float
    disk: float

    def __str__(self) -> str:
        scopes = ((self.weights, "weights"), (self.parameters, "parameters"), (self.disk, "bytes on disk"))
        return "compression " + ", ".join(f"{ratio:.3g}x of the {scope}" for ratio, scope in scopes)


@metric(source="Blalock et al. 2020, arXiv:2003.03033 (definitions of the compression ratio)")
def compression_ratio(dense: nn.Module, pruned: nn.Module) -> Compression:
    """The compression ratio of a pruned model, counted on both models.

    `CR = original / new`, never the fraction saved: 0.75 saved is 4. Original counts every element of the dense model;
    new counts the elements of the pruned one that are not zero, so masks and smaller shapes are on one scale. Tied
    parameters count once; buffers count in bytes only, since nothing prunes them.

    Data: none. Errors: RequestError where nothing remains, or there are no weights.

    Example:

        >>> import torch, prunella as pr
        >>> dense, small = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        >>> pr.metrics.compression_ratio(dense, small).weights
        2.0

    Use: every claim about size, with the name of the scope. Avoid: claims about time: use `speedup`.
    """
    pairs = []
    for scope in ("weights", "parameters"):
        old, new = count(dense, scope=scope), count(pruned, scope=scope)
        if not old.total:
            raise RequestError(f"the dense model has no {scope}", "there is nothing to compress", "pass another model")
        pairs.append(compression(old.total, new.nonzero))
    return Compression(pairs[0], pairs[1], compression(old.bytes, new.bytes))
