"""One read of a weight in a run: the parameter, the view of it, the inputs and outputs, and what follows.

`model/watch.py` reports them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunella.model.forms import Chunk, Form


class View(NamedTuple):
    """A view of a parameter: shape, strides and offset."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, like: Tensor) -> Tensor:
        """The same view of a tensor with the memory layout of the parameter."""
        return like.as_strided(self.size, self.stride, self.offset + int(like.storage_offset()))

    def lies_in(self, values: Tensor, weight: Tensor) -> Tensor:
        """The same part of values in the shape of the parameter, for any strides of the values."""
        if values.stride() != weight.stride():
            values = torch.empty_strided(weight.shape, weight.stride(), dtype=values.dtype, device=values.device).copy_(
                values
            )
        return self.of(values)


class Homes:
    """Parameters by their memory."""

    def __init__(self) -> None:
        self._at: dict[int, list[tuple[str, int, int]]] = {}

    def settle(self, name: str, weight: Tensor) -> None:
        """Register a parameter, or a copy of it, under a name."""
        entry = (name, int(weight.storage_offset()), weight.numel())
        self._at.setdefault(weight.untyped_storage().data_ptr(), []).append(entry)

    def of(self, tensor: Tensor) -> tuple[str, View] | None:
        """The name and the view of the parameter behind a tensor; None if there is none."""
        if tensor.layout is not torch.strided:
            return None
        for name, start, size in self._at.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.storage_offset() < start + size:
                return name, View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start)
        return None


@dataclass(frozen=True)
class Norm:
    """A batch normalization with fixed statistics: `z = (y - mean) / sqrt(var + eps) * weight + bias` by channel."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def scale(self) -> Tensor:
        """`z = scale * y + shift`: the scales, in float64."""
        inverse = (self.var.detach().double() + self.eps).rsqrt()
        return inverse if self.weight is None else inverse * self.weight.detach().double()

    @property
    def shift(self) -> Tensor:
        """`z = scale * y + shift`: the shifts, in float64."""
        shift = -self.mean.detach().double() * self.scale
        return shift if self.bias is None else shift + self.bias.detach().double()


@dataclass(frozen=True)
class Read:
    """One product with a weight: `y = columns @ matrix^T + bias`, matrix by matrix.

    weight: the parameter. view: the part that is read. bias: the added parameter, or part of one, as `(groups, out)`;
    None without a bias parameter. norm: the batch normalization that reads the output, with fixed
    statistics; None without one. residual: the other term of a sum with the output (of the norm, if there is one), in
    the shape of `y`; None without a sum. part: position on the first axis of a stack, if a single matrix of the stack
    is read. refresh: compute the output again with the present weights, in place, before the pass uses it; False if
    the pass cannot go on with a new output.
    """

    weight: nn.Parameter
    view: View
    form: Form
    x: Tensor
    y: Tensor
    bias: Tensor | None
    norm: Norm | None = None
    residual: Tensor | None = None
    part: int | None = None
    refresh: Callable[[], bool] | None = None

    @property
    def bare(self) -> Read:
        """This read without the values of the run."""
        return replace(self, x=self.x.new_empty(0), y=self.y.new_empty(0), residual=None, refresh=None)

    @property
    def groups(self) -> int:
        """Number of matrices."""
        return self.form.sizes(self.view.size)[0]

    @property
    def full(self) -> bool:
        """Whether the full weight is read."""
        return torch.Size(self.view.size).numel() == self.weight.numel()

    def matrices(self, values: Tensor | None = None) -> Tensor:
        """`(groups, out, in)`: the matrices of the weight, or of other values in its shape."""
        view = self.view.of(self.weight.detach()) if values is None else self.view.lies_in(values, self.weight)
        return self.form.matrices(view)

    def write_(self, matrices: Tensor) -> None:
        """Overwrite the matrices of the weight."""
        with torch.no_grad():
            self.view.of(self.weight.detach()).copy_(self.form.restored(matrices, self.view.size))

    def columns(self, group: int = 0, keep: Tensor | None = None) -> Iterator[Chunk]:
        """The inputs of a matrix, `(tokens, in)` in chunks, each with its slice of tokens; keep: indices of columns."""
        keep = None if keep is None else keep.to(self.x.device)
        return self.form.columns(self.x, self.view.size, group, keep)

    def columns_at(self, tokens: Tensor, group: int = 0, keep: Tensor | None = None) -> Tensor:
        """The inputs of a matrix for these tokens alone."""
        keep = None if keep is None else keep.to(self.x.device)
        return self.form.columns_at(self.x, self.view.size, group, tokens.to(self.x.device), keep)

    @property
    def tokens(self) -> int:
        """The number of tokens of each matrix."""
        groups, out, _ = self.form.sizes(self.view.size)
        return self.y.numel() // max(1, groups * out)

    def rows(
        self, group: int = 0, keep: Tensor | None = None, *, tokens: Tensor | None = None, residual: bool = False
    ) -> Tensor:
        """The output of a matrix, `(tokens, out)`, or its residual; keep: indices of outputs; tokens: which."""
        y = self.residual if residual and self.residual is not None else self.y
        rows = self.form.rows(y, self.view.size, group, None if tokens is None else tokens.to(y.device))
        return rows if keep is None else rows.index_select(1, keep.to(rows.device))

    def affine(self, group: int = 0, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and shift of the norm for the outputs of a matrix, in float64; keep: indices of outputs."""
        assert self.norm is not None
        both = [values.view(self.groups, -1)[group] for values in (self.norm.scale, self.norm.shift)]
        scale, shift = both if keep is None else [values[keep.to(values.device)] for values in both]
        return scale, shift

    def rows_of(self, values: Tensor, group: int = 0) -> Tensor:
        """Values in the shape of the output, in the order of `rows`."""
        return self.form.rows(values, self.view.size, group)


class Unread(NamedTuple):
    """A call that takes a weight and cannot be read: operation and reason."""

    operation: str
    why: str

    def __str__(self) -> str:
        return f"{self.operation} reads it: {self.why}"

    @property
    def tied(self) -> str:
        """The reason for a weight that other calls read as matrices."""
        return f"{self.operation} reads the same (tied) weight"
