"""Run a model once and record the relations between its axes.

Two modes observe the run. A `TorchFunctionMode` sees the calls with their raw Python arguments, which show the origin
of a size. A `TorchDispatchMode` sees the ATen operations below them, a small set with rules in `graph/rules`. The model
runs on its own device (real or meta), on a copy of its inputs and without gradients, and does not change.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prunella.graph.data import Branch, Ints, ReasonKind, Role
from prunella.graph.solve.labels import WHOLE, Dim, Ledger, Reason, Run, Soft
from prunella.graph.sources import FORMS, Sources, memory
from prunella.graph.trace.call_names import RESTRICTED, SIZE
from prunella.graph.trace.dataflow import Flow
from prunella.graph.trace.known_sizes import KnownSizes, origin
from prunella.graph.trace.source import where
from prunella.graph.trace.tracked_int import (
    Attr,
    Calculation,
    Expression,
    Shape,
    SizeComparison,
    Tracked,
    leaves,
    plain,
)
from prunella.graph.work import Term

log = logging.getLogger(__name__)
Axis = tuple[str, int]
"""One axis of one parameter or buffer: its first name and the axis number."""


@dataclass(frozen=True)
class TracedValue:
    """The labels of each dim of a tensor, and the parameter axis of each dim, if there is one.

    weight: computed from parameters and buffers alone. zeroed: removed positions hold zeros where the parameters do.
    """

    dims: tuple[Dim, ...]
    axes: tuple[Axis | None, ...]
    weight: bool = False
    zeroed: bool = False

    @staticmethod
    def plain(dims: tuple[Dim, ...] | list[Dim]) -> TracedValue:
        """A computed tensor."""
        return TracedValue(tuple(dims), (None,) * len(dims))


@dataclass(frozen=True)
class Call:
    """The running Python call: function and raw arguments; `number` counts the calls of this name."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    number: int = 0


@dataclass(frozen=True, eq=False)
class Link:
    """The size of `dim` must equal `expression` for every cut. text: the reason to freeze `dim` if it does not."""

    expression: Expression
    dim: Dim
    length: int
    where: str
    text: str = ""


@dataclass(frozen=True)
class Use:
    """A parameter multiplied with an activation."""

    entity: str
    out_axis: int
    in_axis: int
    groups: int
    op: str
    bias: str | None
    module: str


@dataclass(frozen=True, eq=False)
class Work:
    """Multiply-adds of one operation: `constant` times the sizes of `dims`. reads: parameters behind its tensors."""

    op: str
    module: str
    use: Use | None
    constant: float
    dims: tuple[tuple[Dim, int], ...]
    reads: tuple[str, ...] = ()


@dataclass
class Unknown:
    """The calls of an operation of unknown cost, and the parameters that they read."""

    calls: int = 0
    reads: set[str] = field(default_factory=set)


@dataclass
class Trace:
    """The record of one run."""

    names: dict[str, tuple[str, ...]]
    tensors: dict[str, Tensor]
    parameters: set[str]
    ledger: Ledger = field(default_factory=Ledger)
    constants: set[str] = field(default_factory=set)
    """The tensors that are neither parameters nor buffers."""
    values: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    aliases: dict[tuple[Any, ...], str] = field(default_factory=dict)
    axes: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    roles: dict[Axis, Role] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    uncounted: dict[str, Unknown] = field(default_factory=dict)
    unregistered: Mapping[int, str] = field(default_factory=dict)
    """Memory -> name of a weight that is no parameter of the model, see `prunella.model.unregistered`."""
    unregistered_work: Counter[str] = field(default_factory=Counter)
    """Name of such a weight -> multiply-adds."""
    operation: str = ""
    """The name of the operation that is running."""
    use: Use | None = None
    """The layer of the running product, set by its rule."""
    readers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Parameter -> the first operation that computes with it, and its source location."""
    fixed: list[tuple[Attr, str]] = field(default_factory=list)
    decisions: list[tuple[SizeComparison, str]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    call_counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Number of an example and name -> how many calls of this name the run on the example has."""
    numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Integer tensors that index the positions of an axis -> labels of this axis."""
    given: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Integer tensors that are an input of the model, or part of one -> number of the input."""
    tables: list[tuple[Ints, int]] = field(default_factory=list)
    """Rows that an input indexes, and the number of the input."""
    outputs: list[tuple[int, int, Ints]] = field(default_factory=list)
    """Number of an output, axis and labels."""
    of_tokens: list[Ints] = field(default_factory=list)
    """Axes of outputs that follow the axes of a table's index: they may be scores of the next token."""
    counts: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors with the number of choices of each position; zero for removed positions."""
    squares: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors that are squares of others."""
    averages: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors that are means over an axis -> labels of this axis; a read of the mean freezes them."""
    flow: Flow = field(default_factory=Flow)
    entries: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors that are an input of the model, or part of one."""
    known_sizes: KnownSizes = field(default_factory=KnownSizes)
    shared: dict[str, str] = field(default_factory=dict)
    """Parameter -> another one in the same memory."""
    branches: list[Branch] = field(default_factory=list)
    values_read: bool = False
    """Python read a tensor value, or a tensor's size depends on values."""
    untried: str = ""
    """Why the model did not run in training mode, where its source has branches for this mode."""

    def __post_init__(self) -> None:
        self.sources = Sources(self.tensors, self.parameters)

    def reads(self, name: str, arguments: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Record which parameters an operation reads, itself or in a form that is computed from them alone."""
        self.operation = name
        for tensor in arguments if self.averages else ():
            self.read(tensor)
        if self.sources.note(arguments, outputs) is None or name not in FORMS:
            for parameter in self.sources.read(arguments) - self.readers.keys():
                self.readers[parameter] = name, self.where()

    def read(self, tensor: Tensor) -> None:
        """Freeze the axis over which this tensor is a mean, because an operation reads the tensor."""
        if tensor in self.averages:
            self.freeze(self.averages[tensor], "a mean is taken over it")

    def reader(self, parameter: str) -> tuple[str, str]:
        """The first operation that computes with a parameter, and its source location; empty if there is none."""
        return self.readers.get(parameter, ("", ""))

    def count(self, name: str, terms: Sequence[Term] | None, arguments: Sequence[Tensor]) -> None:
        """Record the multiply-adds of the operation that just ran; None if they are unknown."""
        use, self.use = self.use, None
        if terms is None:
            entry = self.uncounted.setdefault(name, Unknown())
            entry.calls += 1
            entry.reads |= self.sources.read(arguments)
        for term in terms or ():
            dims = tuple((self.value(tensor).dims[axis], int(tensor.shape[axis])) for tensor, axis in term.sizes)
            reads = tuple(sorted(self.sources.read(term.tensors)))
            self.work.append(Work(name, self.module(), use, float(term.constant), dims, reads))
            for weight in self.unregistered.keys() & {memory(tensor) for tensor in term.tensors}:
                self.unregistered_work[self.unregistered[weight]] += term.macs

    example: int = 0
    """The number of the example that runs."""
    sizes: dict[tuple[str, int, tuple[int, ...]], Dim] = field(default_factory=dict)
    """Module, size and identity of the labels -> labels, of all dims of the tensors that a module computes."""

    def value(self, tensor: Tensor) -> TracedValue:
        """The labels of a tensor. Parameters and buffers get labels on first use; unknown tensors are always kept."""
        if tensor not in self.values:
            name = self.aliases.get(storage_key(tensor))
            self.values[tensor] = self._entity(name) if name else TracedValue.plain([WHOLE] * tensor.dim())
        value: TracedValue = self.values[tensor]
        return value

    def _entity(self, name: str) -> TracedValue:
        shape = self.tensors[name].shape
        if name not in self.axes:
            self.axes[name] = tuple(self.ledger.fresh(size) for size in shape)
        return TracedValue(self.axes[name], tuple((name, k) for k in range(len(shape))), True, name in self.parameters)

    def computed(self, tensor: Tensor) -> None:
        """Record the sizes of a tensor that the running module computes."""
        dims = self.value(tensor).dims
        if len(dims) != tensor.dim():  # the shape changed in place, as in the source of `quantile`
            return
        for size, dim in zip(tensor.shape, dims, strict=True):
            self.sizes.setdefault((self.module(), int(size), tuple(map(id, dim))), dim)

    def role(self, axis: Axis | None, role: Role) -> None:
        """Record the role of an axis of a parameter. The first role counts, but `in` and `out` override others."""
        if axis and (role in {"in", "out"} or axis not in self.roles):
            self.roles[axis] = role

    def freeze(self, dim: Dim, text: str, kind: ReasonKind = ReasonKind.OPERATION) -> None:
        """Freeze all positions of `dim`, with the running source line as location."""
        if dim:
            self.ledger.freeze(dim, Reason(text, self.where(), kind=kind))

    def equal(self, first: Dim, second: Dim, text: str) -> Dim:
        """Relate two dims position by position. text: why the first is frozen if the second is not cut."""
        if first is second:
            return first
        if second and not first:  # the text is about the first
            text = f"it meets a tensor that is not cut in {self.operation}"
        return self.ledger.equal(first, second, Reason(text, self.where() if not (first and second) else ""))

    def along(self, tensor: Tensor, axis: int, soft: Soft, text: str) -> bool:
        """Record a call along one axis of `tensor`: freeze the axis, unless the call may see only its kept positions.

        Returns whether the call can be restricted.
        """
        dim, call = self.value(tensor).dims[axis], self.call()
        first = call.args[0] if call.args else None
        restricted = call.name in RESTRICTED and isinstance(first, Tensor) and first.shape == tensor.shape
        restricted = restricted and call.number >= 0
        if not restricted or len(dim) > 1:
            self.freeze(dim, text)
            return False
        if dim:
            self.ledger.freeze(dim, Reason(text, self.where(), soft))
            self.ledger.runs.append(Run(call.name, call.number, axis, dim[0], self.example))
        return True

    def numbered(self, tensor: Tensor) -> Dim:
        """The labels of the axis that this integer tensor indexes, if there is one."""
        labels: Dim = self.numbers.get(tensor, WHOLE)  # type: ignore[no-untyped-call]
        return labels

    def multiple(self, dim: Dim, count: int) -> None:
        """The size of `dim` must be a multiple of `count`: the operation requires it."""
        if count > 1:
            self.ledger.multiples += [(layer, count) for layer in dim]

    def link(self, raw: object, dim: Dim, length: int) -> None:
        """The size argument `raw` must follow `dim`: a literal freezes it, a tracked size is checked for every cut."""
        if raw is None or (isinstance(raw, int) and plain(raw) == -1):
            return
        if not dim:
            if isinstance(raw, Tracked) and isinstance(raw.expression, Attr):
                self.fixed.append((raw.expression, self.where()))
        elif isinstance(raw, Tracked):
            self.links.append(Link(raw.expression, self.ledger.single(dim), length, self.where()))
        else:
            self.freeze(dim, f"the size {raw} is {origin(raw, sys._getframe(1))}", ReasonKind.SOURCE)

    def leak(self, expression: Expression | SizeComparison | Calculation) -> None:
        """A size is used as a number and must not change, or it decides a branch whose outcome must not change."""
        where = self.where()
        if isinstance(expression, Calculation):
            if self._calculated(expression.size, where):
                return
            expression = expression.size
        if isinstance(expression, SizeComparison):
            if not self._equated(expression, where):
                self.decisions.append((expression, where))
            return
        for leaf in leaves(expression):
            if isinstance(leaf, Attr):
                self.fixed.append((leaf, where))
            elif not leaf.dim:
                self.known_sizes.note(sys._getframe(1), escaped=True)
            elif leaf.dim:
                reason = Reason("the size is used in a calculation", where, kind=ReasonKind.SOURCE)
                self.ledger.freeze(leaf.dim, reason)

    def _calculated(self, size: Expression, where: str) -> bool:
        """Record a number such as `x.shape[1] ** 0.5` as a call on the kept positions alone."""
        if not isinstance(size, Shape) or len(size.dim) != 1 or size.read[0] < 0:
            return False
        number, axis = size.read
        self.ledger.freeze(size.dim, Reason("its size is a number in a calculation", where, "norm"))
        self.ledger.runs.append(Run(SIZE, number, axis, size.dim[0], self.example))
        return True

    def _equated(self, comparison: SizeComparison, where: str) -> bool:
        """Record a check such as `x.shape[1] == self.size` as a link between both sizes."""
        if comparison.operation not in {int.__eq__, int.__ne__}:
            return False
        for shape, attr in ((comparison.left, comparison.right), (comparison.right, comparison.left)):
            if isinstance(shape, Shape) and shape.dim and isinstance(attr, Attr) and shape.value == attr.value:
                self.links.append(Link(attr, self.ledger.single(shape.dim), shape.value, where))
                return True
        return False

    def module(self) -> str:
        """Path of the module that is running."""
        return self.modules[-1] if self.modules else ""

    def call(self) -> Call:
        """The Python call that is running."""
        return self.calls[-1] if self.calls else Call("", (), {})

    def where(self) -> str:
        """`file:line` of the model's source that is running."""
        return where(sys._getframe(1))


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for all Python objects of the same memory, such as those of `.data`."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return (id(tensor),)
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


CallRule = Callable[[Trace, str, Sequence[Any], Any], None]
CALL_RULES: dict[str, CallRule] = {}
"""Rules for whole calls, `rule(trace, name, args, result)`; the operations inside have no labels."""
