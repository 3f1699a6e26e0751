"""Observe a run of a model: every call that reads a given parameter, with inputs and outputs.

A parameter is identified by its memory, so that transposed views, slices, and single matrices of a stack count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.model.forms import Chunk, Form
from prunella.model.reads import NotReadable, Product, operation, products, unreadable
from prunella.model.trees import tensors


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
            values = torch.empty_strided(weight.shape, weight.stride(), dtype=values.dtype).copy_(values)
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
class Read:
    """One product with a weight: `y = columns @ matrix^T + bias`, matrix by matrix.

    weight: the parameter. view: the part that is read. bias: the added parameter, or part of one, as `(groups, out)`;
    None without a bias, or if the bias is no parameter. residual: the other term of a sum with the output, in the shape
    of `y`; None without a sum. part: position on the first axis of a stack, if a single matrix of the stack is read.
    """

    weight: nn.Parameter
    view: View
    form: Form
    x: Tensor
    y: Tensor
    bias: Tensor | None
    residual: Tensor | None = None
    part: int | None = None

    @property
    def bare(self) -> Read:
        """This read without the values of the run."""
        return replace(self, x=self.x.new_empty(0), y=self.y.new_empty(0), residual=None)

    @property
    def groups(self) -> int:
        """Number of matrices."""
        return self.form.sizes(self.view.size)[0]

    @property
    def whole(self) -> bool:
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

    def rows(self, group: int = 0, keep: Tensor | None = None, *, residual: bool = False) -> Tensor:
        """The output of a matrix, `(tokens, out)`, or its residual; keep: indices of outputs."""
        y = self.residual if residual and self.residual is not None else self.y
        rows = self.rows_of(y, group)
        return rows if keep is None else rows.index_select(1, keep.to(rows.device))

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


class Stop(Exception):
    """Raised to end a forward pass as soon as it is no longer needed."""


class Watch(TorchFunctionMode):
    """Report every `Read` of the parameters `wanted`; other calls run unchanged.

    `others`: parameter id -> a call that takes the parameter and cannot be read.
    stacks: also report single matrices of parameters with three axes, for example the experts of a mixture.
    """

    def __init__(self, wanted: Iterable[nn.Parameter], report: Callable[[Read], None], *, stacks: bool = False) -> None:
        super().__init__()
        self._wanted, self._report, self._stacks = {str(id(p)): p for p in wanted}, report, stacks
        self._homes = Homes()
        for name, parameter in self._wanted.items():
            self._homes.settle(name, parameter)
        self.others: dict[int, Unread] = {}
        self._pending: tuple[Read, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = operation(func)
        passed_on = self._used(name, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if passed_on and self._pending is not None:
            self._pass_on(result)
        try:
            for product in products(name, args, kwargs):
                self._see(name, product, result)
        except NotReadable as error:
            self._other(name, str(error), [args, kwargs or {}])
        else:
            if unreadable(name):
                self._other(name, unreadable(name), [args, kwargs or {}])
        return result

    def _see(self, name: str, product: Product, result: Any) -> None:
        home = self._homes.of(product.operand)
        if home is None:
            return
        weight, view = self._wanted[home[0]], home[1]
        part = _part(weight, view)
        if part is not None and not self._stacks:
            self.others[id(weight)] = Unread(name, "one matrix of a stack at a time")
            return
        if _parameter(product.x):
            self.others[id(weight)] = Unread(name, "it multiplies two weights")
            return
        y = product.output(result)
        bias = _bias(product, view)
        # copies, since later operations may work in place
        read = Read(weight, view, product.form, product.x.detach().clone(), y.detach().clone(), bias, part=part)
        self.finish()
        self._pending = read, y

    def _other(self, name: str, why: str, given: Any) -> None:
        for home in filter(None, map(self._homes.of, tensors(given))):
            self.others[int(home[0])] = Unread(name, why)

    def _used(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Before a call: report the pending read if the call uses its output. True if the call passes the output on.

        This happens before the call, since an in-place sum would overwrite the residual. A sum that scales one of its
        sides by `alpha` has no residual of the output's own size.
        """
        if self._pending is None or not any(argument is self._pending[1] for argument in args):
            return False
        if name in _PASSES_ON:
            return True
        read, output = self._pending
        if name in _ADDS and len(args) > 1 and kwargs.get("alpha", 1) == 1:
            other = args[1] if args[0] is output else args[0]
            if isinstance(other, Tensor) and other.shape == output.shape and other is not output:
                self._pending = replace(read, residual=other.detach().clone().reshape(read.y.shape)), output
        self.finish()
        return False

    def _pass_on(self, result: Any) -> None:
        """Continue the pending read with `result` as its output, if the last axis is unchanged."""
        assert self._pending is not None
        read, output = self._pending
        if isinstance(result, Tensor) and result.shape[-1] == output.shape[-1]:
            self._pending = read, result
        else:
            self.finish()

    def finish(self) -> None:
        """Report the pending read. Call it at the end of the pass."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(pending[0])


_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_PASSES_ON = frozenset({"dropout", "view", "reshape", "contiguous"})
"""Calls between a layer and a residual sum that do not change the last axis."""


def _part(weight: Tensor, view: View) -> int | None:
    """The position of a matrix in a stack of three axes, if the view is one of the matrices; else None."""
    if weight.dim() != 3 or len(view.size) != 2 or weight.stride(0) == 0:
        return None
    of_view = sorted(zip(view.size, view.stride, strict=True))
    of_matrix = sorted(zip(weight.shape[1:], weight.stride()[1:], strict=True))
    return view.offset // weight.stride(0) if of_view == of_matrix and not view.offset % weight.stride(0) else None


def _bias(product: Product, view: View) -> Tensor | None:
    """The bias as `(groups, out)`, if it is a parameter or a view of one."""
    if product.bias is None or not _parameter(product.bias):
        return None
    return product.bias.detach().reshape(product.form.sizes(view.size)[:2])


def _parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
