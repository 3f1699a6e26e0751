"""Watch a model run: every call that reads one of some parameters, with its inputs and outputs.

A parameter is known by its memory, so that transposed views of it, slices, and single matrices of a stack count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.model.forms import Chunk, Form
from prunella.model.forward import tensors
from prunella.model.reads import NotReadable, Product, operation, products, unreadable


class View(NamedTuple):
    """A view of a parameter: its shape, its strides, and where it begins."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, like: Tensor) -> Tensor:
        """The same view of a tensor that lies in memory as the parameter does."""
        return like.as_strided(self.size, self.stride, self.offset + int(like.storage_offset()))

    def lies_in(self, values: Tensor, weight: Tensor) -> Tensor:
        """The same part of values that have the parameter's shape, whatever their strides."""
        if values.stride() != weight.stride():
            values = torch.empty_strided(weight.shape, weight.stride(), dtype=values.dtype).copy_(values)
        return self.of(values)


class Homes:
    """Parameters by their memory."""

    def __init__(self) -> None:
        self._at: dict[int, list[tuple[str, int, int]]] = {}

    def settle(self, name: str, weight: Tensor) -> None:
        """Know a parameter, or a copy of it, by a name."""
        entry = (name, int(weight.storage_offset()), weight.numel())
        self._at.setdefault(weight.untyped_storage().data_ptr(), []).append(entry)

    def of(self, tensor: Tensor) -> tuple[str, View] | None:
        """The parameter that a tensor is a view of, and which view."""
        if tensor.layout is not torch.strided:
            return None
        for name, start, size in self._at.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.storage_offset() < start + size:
                return name, View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start)
        return None


@dataclass(frozen=True)
class Read:
    """One product with a weight: `y = columns @ matrix^T + bias`, matrix by matrix.

    weight: the parameter. view: the part of it that is read. bias: the parameter that is added, or the part of one, as
    `(groups, out)`; None if there is none, or what is added is no parameter. residual: what the output is added to, in
    the shape of `y`; None if it is not added. part: where a single matrix of a stack is read, its place on the first
    axis.
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
        """The same without the values of the run."""
        return replace(self, x=self.x.new_empty(0), y=self.y.new_empty(0), residual=None)

    @property
    def groups(self) -> int:
        """How many matrices are read."""
        return self.form.sizes(self.view.size)[0]

    @property
    def whole(self) -> bool:
        """Whether all of the weight is read."""
        return torch.Size(self.view.size).numel() == self.weight.numel()

    def matrices(self, values: Tensor | None = None) -> Tensor:
        """`(groups, out, in)`: what is read of the weight, or of other values in its shape."""
        view = self.view.of(self.weight.detach()) if values is None else self.view.lies_in(values, self.weight)
        return self.form.matrices(view)

    def write_(self, matrices: Tensor) -> None:
        """Put other matrices in the place of those that are read."""
        with torch.no_grad():
            self.view.of(self.weight.detach()).copy_(self.form.restored(matrices, self.view.size))

    def columns(self, group: int = 0, keep: Tensor | None = None) -> Iterator[Chunk]:
        """What a matrix multiplies, `(tokens, in)` in chunks, each with the slice of tokens; keep: which columns."""
        keep = None if keep is None else keep.to(self.x.device)
        return self.form.columns(self.x, self.view.size, group, keep)

    def rows(self, group: int = 0, keep: Tensor | None = None, *, residual: bool = False) -> Tensor:
        """The output of a matrix, `(tokens, out)`, or what it is added to; keep: which outputs."""
        y = self.residual if residual and self.residual is not None else self.y
        rows = self.rows_of(y, group)
        return rows if keep is None else rows.index_select(1, keep.to(rows.device))

    def rows_of(self, values: Tensor, group: int = 0) -> Tensor:
        """Values in the shape of the output, in the order of `rows`."""
        return self.form.rows(values, self.view.size, group)


class Unread(NamedTuple):
    """A call that takes a weight and cannot be read: its operation, and why."""

    operation: str
    why: str

    def __str__(self) -> str:
        return f"{self.operation} reads it: {self.why}"

    @property
    def tied(self) -> str:
        """What is said of a weight that other calls read as matrices."""
        return f"{self.operation} reads the same (tied) weight"


class Stop(Exception):
    """Raised to end a forward pass once everything asked for was seen."""


class Watch(TorchFunctionMode):
    """Hand every `Read` of the parameters `wanted` to `report`; pass everything else through.

    `others`: parameter id -> a call that takes it and cannot be read.
    stacks: see parameters of three axes, the experts of a mixture for example, of which single matrices are read.
    """

    def __init__(self, wanted: Iterable[nn.Parameter], report: Callable[[Read], None], *, stacks: bool = False) -> None:
        super().__init__()
        self._wanted, self._report, self._stacks = {str(id(p)): p for p in wanted}, report, stacks
        self._homes = Homes()
        for name, parameter in self._wanted.items():
            self._homes.settle(name, parameter)
        self.others: dict[int, Unread] = {}
        self._held: tuple[Read, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = operation(func)
        handed_on = self._used(name, args)
        result = func(*args, **(kwargs or {}))
        if handed_on and self._held is not None:
            self._hand_on(result)
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
        # copies, since the model may go on in place
        read = Read(weight, view, product.form, product.x.detach().clone(), y.detach().clone(), bias, part=part)
        self.finish()
        self._held = read, y

    def _other(self, name: str, why: str, given: Any) -> None:
        for home in filter(None, map(self._homes.of, tensors(given))):
            self.others[int(home[0])] = Unread(name, why)

    def _used(self, name: str, args: tuple[Any, ...]) -> bool:
        """A call that is about to run: hand the last read over if the call uses its output; True if it hands it on.

        Before the call, since a sum in place would change what it adds.
        """
        if self._held is None or not any(argument is self._held[1] for argument in args):
            return False
        if name in _HANDS_ON:
            return True
        read, output = self._held
        if name in _ADDS and len(args) > 1:
            other = args[1] if args[0] is output else args[0]
            if isinstance(other, Tensor) and other.shape == output.shape and other is not output:
                self._held = replace(read, residual=other.detach().clone().reshape(read.y.shape)), output
        self.finish()
        return False

    def _hand_on(self, result: Any) -> None:
        """The output of the last read goes on as `result`, if that still has its last axis."""
        assert self._held is not None
        read, output = self._held
        if isinstance(result, Tensor) and result.shape[-1] == output.shape[-1]:
            self._held = read, result
        else:
            self.finish()

    def finish(self) -> None:
        """Hand over the last read. To be called when the pass has ended."""
        held, self._held = self._held, None
        if held is not None:
            self._report(held[0])


_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_HANDS_ON = frozenset({"dropout", "view", "reshape", "contiguous"})
"""Calls between a layer and the sum that its output goes into, where the last axis stays."""


def _part(weight: Tensor, view: View) -> int | None:
    """The place of a matrix in a stack of three axes, if the view is one of its matrices."""
    if weight.dim() != 3 or len(view.size) != 2 or weight.stride(0) == 0:
        return None
    mine = sorted(zip(view.size, view.stride, strict=True))
    whole = sorted(zip(weight.shape[1:], weight.stride()[1:], strict=True))
    return view.offset // weight.stride(0) if mine == whole and not view.offset % weight.stride(0) else None


def _bias(product: Product, view: View) -> Tensor | None:
    """The bias as `(groups, out)`, if it is a parameter or a view of one."""
    if product.bias is None or not _parameter(product.bias):
        return None
    return product.bias.detach().reshape(product.form.sizes(view.size)[:2])


def _parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
