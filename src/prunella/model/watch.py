"""Observe a run of a model: every call that reads a given parameter, with inputs and outputs.

A parameter is identified by its memory, so that transposed views, slices, and single matrices of a stack count too.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.model.autocast import Autocast, autocast_on
from prunella.model.observed_reads import Homes, Norm, Read, Unread, View
from prunella.model.product import NotReadable, Product, operation
from prunella.model.reads import products, unreadable
from prunella.model.trees import tensors


class Stop(Exception):
    """Raised to end a forward pass as soon as it is no longer needed."""


_Home = tuple[nn.Parameter, View]
Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]
"""A call: function, arguments, keyword arguments."""


@dataclass(frozen=True, eq=False)
class _Pending:
    """A read whose output no other call has used yet. output: the tensor with which the pass continues.

    calls: the product, and the calls that passed its output on. version: of the input, when the product read it.
    single: whether the call has one product with a watched weight.
    """

    read: Read
    output: Tensor
    calls: tuple[Call, ...]
    product: Product
    version: int
    single: bool
    autocast: Autocast

    def refresh(self) -> bool:
        """Compute the output again, in place."""
        if not self.single or _version(self.product.x) != self.version:
            return False
        with self.autocast.entered():
            return self._refresh()

    def _refresh(self) -> bool:
        func, args, kwargs = self.calls[0]
        result = func(*args, **kwargs)
        value = result if len(self.calls) > 1 else self.product.output(result)
        for func, args, kwargs in self.calls[1:]:
            value = func(value, *args[1:], **kwargs)
        if not isinstance(value, Tensor) or value.shape != self.output.shape:
            return False
        self.output.copy_(value)
        return True


class Watch(TorchFunctionMode):
    """Report every `Read` of the parameters `wanted`; other calls run unchanged.

    `others`: parameter id -> a call that takes the parameter and cannot be read. `computed`: parameter id -> the first
    call that computes other values from the parameter and is not a product.
    `reused`: parameter ids whose output a batch normalization reads, and another call as well.
    stacks: also report single matrices of parameters with three axes, for example the experts of a mixture.
    """

    def __init__(self, wanted: Iterable[nn.Parameter], report: Callable[[Read], None], *, stacks: bool = False) -> None:
        super().__init__()
        self._wanted, self._report, self._stacks = {str(id(p)): p for p in wanted}, report, stacks
        self._homes = Homes()
        for name, parameter in self._wanted.items():
            self._homes.settle(name, parameter)
        self.others: dict[int, Unread] = {}
        self.computed: dict[int, Unread] = {}
        self.reused: set[int] = set()
        self._normed: list[tuple[weakref.ref[Tensor], int]] = []
        self._pending: list[_Pending] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation(func)
        if _looks(func):
            return func(*args, **kwargs)
        passed_on = self._used(name, args, kwargs)
        result = func(*args, **kwargs)
        if passed_on is not None:
            self._pass_on(passed_on, (func, args, kwargs), result)
        try:
            homes = [(product, home) for product in products(name, args, kwargs) if (home := self._home(product))]
            for number in range(len(homes)):
                self._see((func, args, kwargs), homes, number, result)
        except NotReadable as error:
            self._other(name, str(error), [args, kwargs])
        else:
            if unreadable(name):
                self._other(name, unreadable(name), [args, kwargs])
        self._compute(name, [args, kwargs], result)
        return result

    def why_unread(self, parameter: nn.Parameter) -> str:
        """Why no product with a parameter was reported; empty if no call of the pass took the parameter."""
        unread = self.others.get(id(parameter)) or self.computed.get(id(parameter))
        return "" if unread is None else str(unread)

    def _home(self, product: Product) -> _Home | None:
        home = self._homes.of(product.operand)
        return None if home is None else (self._wanted[home[0]], home[1])

    def _see(self, call: Call, homes: Sequence[tuple[Product, _Home]], number: int, result: Any) -> None:
        product, (weight, view) = homes[number]
        part = _part(weight, view)
        if part is not None and not self._stacks:
            self.others[id(weight)] = Unread(operation(call[0]), "one matrix of a stack at a time")
            return
        if _parameter(product.x):
            self.others[id(weight)] = Unread(operation(call[0]), "it multiplies two weights")
            return
        y = product.output(result)
        bias = _bias(product, view)
        # copies, since later operations may work in place
        read = Read(weight, view, product.form, product.x.detach().clone(), y.detach().clone(), bias, part=part)
        pending = _Pending(read, y, (call,), product, _version(product.x), len(homes) == 1, autocast_on(y.device.type))
        if number == len(homes) - 1:
            self._pending.append(pending)
        else:  # only the last product of a call gives its result
            self._tell(pending)

    def _other(self, name: str, why: str, given: Any) -> None:
        for home in filter(None, map(self._homes.of, tensors(given))):
            self.others[int(home[0])] = Unread(name, why)

    def _compute(self, name: str, given: Any, result: Any) -> None:
        if not isinstance(result, Tensor) or self._homes.of(result) is not None:
            return
        for tensor in tensors(given):
            home = self._homes.of(tensor)
            if home is not None and not (name in _ADDS and result.shape != tensor.shape):  # such a sum adds a bias
                self.computed.setdefault(int(home[0]), Unread(name, "no product takes the parameter itself"))

    def _used(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Pending | None:
        """Before a call: report the pending reads whose outputs the call uses; return one that it passes on.

        This happens before the call, since an in-place sum would overwrite the residual. A sum that scales one of its
        sides by `alpha` has no residual of the output's own size.
        """
        arguments = tensors([args, kwargs]) if self._pending or self._normed else []
        self.reused.update(weight for output, weight in self._normed if any(t is output() for t in arguments))
        for pending in [entry for entry in self._pending if any(tensor is entry.output for tensor in arguments)]:
            self._pending.remove(pending)
            first = bool(args) and args[0] is pending.output
            if name in _PASSES_ON and first:
                return pending
            norm = _norm(args, kwargs) if name == "batch_norm" and first and pending.read.norm is None else None
            if norm is not None:
                self._normed.append((weakref.ref(pending.output), id(pending.read.weight)))
                return replace(pending, read=replace(pending.read, norm=norm))
            self._tell(replace(pending, read=replace(pending.read, residual=_residual(pending, name, args, kwargs))))
        return None

    def _pass_on(self, pending: _Pending, call: Call, result: Any) -> None:
        """Continue the pending read with `result` as its output, if the last axis is unchanged."""
        if isinstance(result, Tensor) and result.shape[-1] == pending.output.shape[-1]:
            self._pending.append(replace(pending, output=result, calls=(*pending.calls, call)))
        else:
            self._tell(replace(pending, single=False))

    def _tell(self, pending: _Pending) -> None:
        self._report(replace(pending.read, refresh=pending.refresh))

    def finish(self) -> None:
        """Report the pending reads. Call it at the end of the pass."""
        while self._pending:
            self._tell(self._pending.pop(0))


_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


def _residual(pending: _Pending, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The other term, if the call adds the output to a tensor of its size."""
    if name not in _ADDS or len(args) < 2 or kwargs.get("alpha", 1) != 1:
        return None
    other = args[1] if args[0] is pending.output else args[0]
    if not isinstance(other, Tensor) or other.shape != pending.output.shape or other is pending.output:
        return None
    return other.detach().clone().reshape(pending.read.y.shape)


_METADATA = frozenset({"dim", "size", "stride", "numel", "is_contiguous", "is_floating_point", "__len__", "shape"})
_METADATA |= {"dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "names", "is_leaf", "is_sparse"}


def _looks(func: Any) -> bool:
    """Whether a call reads only metadata: `x.dim()`, `x.shape`."""
    name = getattr(func, "__name__", "")
    return (getattr(func.__self__, "__name__", "") if name == "__get__" else name) in _METADATA


_PASSES_ON = frozenset({"dropout", "view", "reshape", "contiguous"})
"""Calls between a layer and a residual sum that do not change the last axis."""


_NORM = inspect.signature(F.batch_norm)


def _norm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Norm | None:
    """The normalization of a call of `batch_norm` with fixed statistics, else None."""
    try:
        given = _NORM.bind(*args, **kwargs)
    except TypeError:
        return None
    given.apply_defaults()
    at = given.arguments
    if at["training"] or at["running_mean"] is None or at["running_var"] is None:
        return None
    return Norm(at["running_mean"], at["running_var"], at["weight"], at["bias"], at["eps"])


def _version(tensor: Tensor) -> int:
    """A number that changes with every change in place; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


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
