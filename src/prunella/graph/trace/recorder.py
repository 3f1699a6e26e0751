"""Run a model once and record the relations between its axes.

Two modes observe the run. A `TorchFunctionMode` sees the calls with their raw Python arguments, which show the origin
of a size. A `TorchDispatchMode` sees the ATen operations below them, a small set with rules in `graph/rules`. The model
runs on its own device (real or meta), in eval mode and without gradients, and does not change.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from prunella.graph.data import Ints, ReasonKind, Role
from prunella.graph.solve.labels import WHOLE, Dim, Ledger, Reason, Run, Soft
from prunella.graph.trace.dataflow import Flow, watched
from prunella.graph.trace.source import GENERATED, LIBRARY, called, place
from prunella.graph.trace.tracked_int import (
    Attr,
    Expression,
    Shape,
    SizeComparison,
    Tracked,
    bare,
    leaves,
    plain,
    tracked_attributes,
)
from prunella.model.forward import forward, inputs_of, tensors
from prunella.model.state import untouched
from prunella.model.user_code import short

log = logging.getLogger(__name__)
Axis = tuple[str, int]
"""One axis of one parameter or buffer: its first name and the axis number."""


@dataclass(frozen=True)
class TracedValue:
    """The labels of each dim of a tensor, and the parameter axis of each dim, if there is one."""

    dims: tuple[Dim, ...]
    axes: tuple[Axis | None, ...]
    weight: bool = False

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
    """The size of `dim` must equal `expression` for every cut."""

    expression: Expression
    dim: Dim
    length: int
    where: str


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
    """Multiply-adds of one operation: `constant` times the sizes of `dims`."""

    op: str
    module: str
    use: Use | None
    constant: float
    dims: tuple[tuple[Dim, int], ...]


@dataclass
class Trace:
    """The record of one run."""

    names: dict[str, tuple[str, ...]]
    tensors: dict[str, Tensor]
    parameters: set[str]
    ledger: Ledger = field(default_factory=Ledger)
    values: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    aliases: dict[tuple[Any, ...], str] = field(default_factory=dict)
    axes: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    roles: dict[Axis, Role] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    uncounted: dict[str, int] = field(default_factory=dict)
    fixed: list[tuple[Attr, str]] = field(default_factory=list)
    decisions: list[tuple[SizeComparison, str]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Integer tensors that index the positions of an axis -> labels of this axis."""
    given: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Integer tensors that are an input of the model, or part of one -> number of the input."""
    tables: list[tuple[Ints, int]] = field(default_factory=list)
    """Rows that an input indexes, and the number of the input."""
    outputs: list[tuple[int, int, Ints]] = field(default_factory=list)
    """Number of an output, axis and labels."""
    counts: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors with the number of choices of each position; zero for removed positions."""
    flow: Flow = field(default_factory=Flow)
    example: int = 0
    """The number of the example that runs."""
    sizes: dict[tuple[str, int, tuple[int, ...]], Dim] = field(default_factory=dict)
    """Module, size and identity of the labels -> labels, of all dims of the tensors that a module computes."""

    def value(self, tensor: Tensor) -> TracedValue:
        """The labels of a tensor. Parameters and buffers get labels on first use; unknown tensors are always kept."""
        if tensor not in self.values:
            name = self.aliases.get(_storage_key(tensor))
            self.values[tensor] = self._entity(name) if name else TracedValue.plain([WHOLE] * tensor.dim())
        value: TracedValue = self.values[tensor]
        return value

    def _entity(self, name: str) -> TracedValue:
        shape = self.tensors[name].shape
        if name not in self.axes:
            self.axes[name] = tuple(self.ledger.fresh(size) for size in shape)
        return TracedValue(self.axes[name], tuple((name, k) for k in range(len(shape))), True)

    def computed(self, tensor: Tensor) -> None:
        """Record the sizes of a tensor that the running module computes."""
        for size, dim in zip(tensor.shape, self.value(tensor).dims, strict=True):
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
        """Relate two dims position by position."""
        if first is second:
            return first
        return self.ledger.equal(first, second, Reason(text, self.where() if not (first and second) else ""))

    def along(self, tensor: Tensor, axis: int, soft: Soft, text: str) -> bool:
        """Record a call along one axis of `tensor`: freeze the axis, unless the call may see only its kept positions.

        Returns whether the call can be restricted.
        """
        dim, call = self.value(tensor).dims[axis], self.call()
        first = call.args[0] if call.args else None
        restricted = call.name in RESTRICTED and isinstance(first, Tensor) and first.shape == tensor.shape
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
            self.freeze(dim, f"the size {raw} is typed into the source", ReasonKind.SOURCE)

    def leak(self, expression: Expression | SizeComparison) -> None:
        """A size is used as a number and must not change, or it decides a branch whose outcome must not change."""
        where = self.where()
        if isinstance(expression, SizeComparison):
            if not self._equated(expression, where):
                self.decisions.append((expression, where))
            return
        for leaf in leaves(expression):
            if isinstance(leaf, Attr):
                self.fixed.append((leaf, where))
            elif leaf.dim:
                reason = Reason("the size is used in a calculation", where, kind=ReasonKind.SOURCE)
                self.ledger.freeze(leaf.dim, reason)

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
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(GENERATED):
                return place(frame)
            if not path.startswith(LIBRARY) and not path.startswith("<"):
                return f"{short(path)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for all Python objects of the same memory, such as those of `.data`."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return (id(tensor),)
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


class _Calls(TorchFunctionMode):
    """Records the raw Python arguments, and returns tracked integers for `shape`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = called(func)
        kwargs = kwargs or {}
        if func == Tensor.shape.__get__ or name == "size":  # type: ignore[attr-defined]
            return self._sizes(func(*args, **kwargs), *args, **kwargs)
        if name in {"numel", "nelement"}:
            return math.prod(self._sizes(args[0].shape, args[0]))
        if name == "__len__":
            self.trace.freeze(self.trace.value(args[0]).dims[0], "its length is taken by len()")
        if name in _LEAVES_TORCH and args and isinstance(args[0], Tensor):
            for dim in self.trace.value(args[0]).dims:
                self.trace.freeze(dim, f"{name.strip('_')} takes it out of the tensors")
        self.trace.calls.append(Call(name, args, kwargs, self.count[name]))
        self.count[name] += 1
        try:
            self._leaks(name, args, kwargs)
            result = func(*bare(args), **bare(kwargs))
            if name in _OPAQUE:
                self._freeze_all((args, kwargs, result), f"the sizes inside {name} are not visible")
            elif name in _NEEDS_DATA and args and isinstance(args[0], Tensor) and not args[0].numel():
                self._freeze_all((args, kwargs, result), _UNSEEN)
            return result
        finally:
            self.trace.calls.pop()

    def _freeze_all(self, tree: Any, text: str) -> None:
        if isinstance(tree, Mapping):
            tree = tuple(tree.values())
        if isinstance(tree, Tensor):
            for dim in self.trace.value(tree).dims:
                self.trace.freeze(dim, text)
        elif isinstance(tree, tuple | list):
            for item in tree:
                self._freeze_all(item, text)

    def _sizes(self, answer: Any, tensor: Tensor, dim: int | None = None) -> Any:
        dims = self.trace.value(tensor).dims
        if dim is not None:
            return self._track(answer, dims[dim])
        return torch.Size([self._track(n, dim) for n, dim in zip(answer, dims, strict=True)])

    def _track(self, size: int, dim: Dim) -> int:
        return Tracked(size, Shape(dim, size), self.trace.leak)

    def _leaks(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "full":
            args = args[1:]
        elif name in SIZED:
            return
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tracked):
                self.trace.leak(argument.expression)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules to every ATen operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check against the compiler would import dynamo, which takes seconds

    def __init__(self, trace: Trace, apply_rule: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.apply_rule = trace, apply_rule

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.apply_rule(self.trace, func, args, kwargs, result)
        return result


SIZED = frozenset(
    (
        "view reshape unflatten expand repeat split split_with_sizes chunk tensor_split narrow slice __getitem__ "
        "__setitem__ zeros ones empty new_zeros new_ones new_empty new_full conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d group_norm channel_shuffle view_as expand_as pad broadcast_to histc bincount"
    ).split()
)
"""Calls whose integers are sizes, handled by the rules; in other calls a tracked size is used as a number."""


RESTRICTED = frozenset("mean layer_norm rms_norm softmax topk".split())
"""Calls along an axis that the oracle can restrict to the kept positions."""


_LEAVES_TORCH = frozenset("numpy tolist item __array__ __float__ __int__ __bool__ __index__ __dlpack__ stride".split())
"""Calls that turn values or sizes into plain Python, where no cut can follow."""


_UNSEEN = "nothing passed through it: the example gives it an empty batch"
_NEEDS_DATA = frozenset("conv1d conv2d conv3d batch_norm instance_norm group_norm".split())
"""Calls that torch computes differently for an empty batch, so that the record is not complete."""


_OPAQUE = frozenset(
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell multi_head_attention_forward "
    "_native_multi_head_attention _transformer_encoder_layer_fwd ctc_loss".split()
)
"""Calls that check or compute sizes that neither mode observes."""


def _entities(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, Tensor], set[str]]:
    """Parameters and buffers by identity: first name -> all names, first name -> tensor, and which are parameters."""
    names: dict[int, list[str]] = {}
    by_id: dict[int, Tensor] = {}
    parameters = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
        by_id[id(tensor)] = tensor
    first = {key: aliases[0] for key, aliases in names.items()}
    kinds = {first[id(p)] for _, p in parameters}
    return {first[k]: tuple(v) for k, v in names.items()}, {first[k]: t for k, t in by_id.items()}, kinds


def trace(model: nn.Module, inputs: Any, apply_rule: Callable[..., None], others: Sequence[Any] = ()) -> Trace:
    """Run `model` on `inputs`, and on each of `others`, and record. All positions of inputs and outputs are kept.

    Work, and the flow that shows residual blocks, are those of the first run; relations are those of all runs.
    """
    names, entities, parameters = _entities(model)
    record = Trace(names, entities, parameters)
    with untouched(model), torch.no_grad():
        inputs = inputs_of(model, inputs)
    for name, tensor in entities.items():
        record.aliases[_storage_key(tensor)] = name
    _run(record, model, inputs, apply_rule)
    flow, work, uncounted = record.flow, tuple(record.work), dict(record.uncounted)
    for number, example in enumerate(others, start=1):
        record.example, record.flow, start = number, Flow(), len(record.ledger.frozen)
        _run(record, model, example, apply_rule)
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors(example) if tensor.dim())
        _say_example(record, start, f", on an input of {shapes}")
    seen = {item.use.entity for item in work if item.use}
    unseen = [item for item in record.work[len(work) :] if item.use and item.use.entity not in seen]
    record.flow, record.uncounted = flow, uncounted
    record.work = [*work, *(replace(item, constant=0.0) for item in unseen)]
    return record


def _say_example(record: Trace, start: int, suffix: str) -> None:
    """Say of the reasons from `start` on which run shows them."""
    for k, (atoms, reason) in enumerate(record.ledger.frozen[start:], start=start):
        record.ledger.frozen[k] = atoms, replace(reason, text=reason.text + suffix, example=record.example)


def _run(record: Trace, model: nn.Module, inputs: Any, apply_rule: Callable[..., None]) -> None:
    """Record one run."""
    record.flow.start(inputs)
    for number, tensor in enumerate(tensors(inputs)):
        record.values[tensor] = TracedValue.plain([WHOLE] * tensor.dim())
        record.computed(tensor)
        if not tensor.is_floating_point():
            record.given[tensor] = number
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watched(model, record.modules, record.flow))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(tracked_attributes(model, record.leak))
        stack.enter_context(_Operations(record, apply_rule))
        stack.enter_context(_Calls(record))
        output = forward(model, inputs)
    record.flow.finish(output)
    for number, tensor in enumerate(tensors(output)):
        for axis, dim in enumerate(record.value(tensor).dims):
            record.ledger.freeze(dim, Reason("it is an output of the model", soft="output" if len(dim) == 1 else ""))
            record.outputs += [(number, axis, layer) for layer in dim if len(dim) == 1]
