"""The data flow of a run, which identifies residual blocks; nodes are integers, which keep no tensor alive.

Every result of an operation is a node. An edge leads back to an argument if the operation *passes* it on: a pointwise
function of one activation, a norm, a change of type or of shape that keeps the order, or a sum of activations.
Products of activations, matrix products, convolutions, pooling and all other operations have no edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunella.model.hooks import removed_after
from prunella.model.trees import tensors

_SUMS = frozenset({"add", "sub"})
_STATISTICS = frozenset("mean sum var std var_mean std_mean linalg_vector_norm norm amax amin".split())
_NORMS = frozenset(
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_no_update rms_norm _fused_rms_norm".split()
)
_SAME = frozenset(
    "clone detach alias _to_copy contiguous native_dropout dropout view _unsafe_view _reshape_alias reshape "
    "squeeze unsqueeze flatten lift_fresh".split()
)
"""Identities, and views that keep the order of elements: between equal shapes their composition is the identity."""


@dataclass(frozen=True)
class Node:
    """One tensor. back: nodes passed on to it. sums: it is a sum of activations. live: it depends on the inputs.

    statistic: computed from sums and means of activations alone, such as the divisor of an explicit norm.
    """

    back: tuple[int, ...]
    call: int
    size: int
    sums: bool = False
    live: bool = False
    statistic: bool = False


@dataclass
class ModuleCall:
    """One call of a module: nodes and shapes of its first input and first output.

    escaped: a tensor computed inside, other than the first output, was read outside.
    """

    path: str
    parent: int
    source: int = -1
    source_form: tuple[Any, ...] = ()
    output: int = -1
    output_form: tuple[Any, ...] = ()
    escaped: bool = False


@dataclass
class Flow:
    """The record of one run. It keeps no tensor alive."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def start(self, inputs: Any) -> None:
        """Record the inputs of the model; tensors that depend on them are activations."""
        for tensor in tensors(inputs):
            self._add(tensor, Node((), -1, tensor.numel(), live=True))

    def note(self, name: str, pointwise: bool, arguments: list[Tensor], results: list[Tensor]) -> None:
        """Record one operation: `name` as in ATen, without the underscore of in-place operations."""
        known = [self.numbers[tensor] for tensor in arguments if tensor in self.numbers]
        for number in known:
            self._read(number)
        node = self._node(name, pointwise, [n for n in known if self.nodes[n].live], results)
        # The further outputs of a norm are its mean and its deviation.
        other_node = replace(node, back=(), sums=False, statistic=node.live and name in _NORMS)
        for k, tensor in enumerate(results):
            self._add(tensor, replace(other_node, size=tensor.numel()) if k else node)

    def finish(self, outputs: Any) -> None:
        """The outputs of the model are read by its caller."""
        for tensor in tensors(outputs):
            if tensor in self.numbers:
                self._read(self.numbers[tensor])

    def enter(self, path: str, arguments: Any) -> None:
        """A module starts."""
        call = ModuleCall(path, self.active[-1] if self.active else -1)
        self._source(call, arguments)
        self.active.append(len(self.calls))
        self.calls.append(call)

    def given(self, keywords: Any) -> None:
        """Record the keyword arguments of the running module; they count if there is no positional tensor."""
        if self.active and not self.calls[self.active[-1]].source_form:
            self._source(self.calls[self.active[-1]], keywords)

    def leave(self, output: Any) -> None:
        """The running module ends."""
        if not self.active:
            return
        call = self.calls[self.active.pop()]
        first = next(iter(tensors(output)), None)
        if first is not None and first in self.numbers:
            call.output, call.output_form = self.numbers[first], _form(first)

    def residual(self, call: ModuleCall) -> bool:
        """Whether the output of a call is its input plus other terms, through passing operations only."""
        if call.source < 0 or call.output < 0 or call.source_form != call.output_form:
            return False
        seen, todo = set[tuple[int, bool]](), [(call.output, False)]
        while todo:
            number, added = todo.pop()
            if (number, added) in seen or number < call.source:
                continue
            seen.add((number, added))
            if number == call.source:
                if added:
                    return True
                continue
            node = self.nodes[number]
            todo += [(back, added or self._adds(node, back)) for back in node.back]
        return False

    def _adds(self, node: Node, one: int) -> bool:
        """Whether a term other than a statistic (the mean of a norm) is added to this term."""
        return node.sums and any(not self.nodes[other].statistic for other in node.back if other != one)

    def _source(self, call: ModuleCall, arguments: Any) -> None:
        first = next(iter(tensors(arguments)), None)
        if first is not None:
            call.source_form = _form(first)
            call.source = self.numbers[first] if first in self.numbers else -1  # noqa: SIM401 (its `get` has no types)

    def _add(self, tensor: Tensor, node: Node) -> None:
        self.numbers[tensor] = len(self.nodes)
        self.nodes.append(node)

    def _node(self, name: str, pointwise: bool, live: list[int], results: list[Tensor]) -> Node:
        call = self.active[-1] if self.active else -1
        size = results[0].numel() if results else 0
        plain = [n for n in live if not self.nodes[n].statistic] or live
        if name in _SUMS:
            passed = live
        elif name in _SAME or name in _NORMS:
            passed = live[:1]
        else:
            passed = plain if pointwise and len(plain) == 1 else []
        back = tuple(n for n in passed if self.nodes[n].size == size)
        constant = all(self.nodes[n].statistic for n in live)
        statistic = bool(live) and (name in _STATISTICS or (pointwise and constant))
        return Node(back, call, size, name in _SUMS and len(back) > 1, bool(live), statistic)

    def _read(self, number: int) -> None:
        """Mark the finished calls from which this tensor escapes in addition to their first output."""
        at = self.nodes[number].call
        while at >= 0 and at not in self.active:
            call = self.calls[at]
            call.escaped = call.escaped or call.output != number
            at = call.parent


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(int(n) for n in tensor.size()), tensor.dtype)


@contextmanager
def watched(model: nn.Module, stack: list[str], flow: Flow) -> Iterator[None]:
    """Keep the paths of the running modules on `stack`, and record their calls in `flow`."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(paths.get(id(module), ""))
        with torch._C.DisableTorchFunction():
            flow.enter(stack[-1], args)

    def given(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        with torch._C.DisableTorchFunction():
            flow.given(kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if stack:
            stack.pop()
        with torch._C.DisableTorchFunction():
            flow.leave(output)

    elements = [m for box in model.modules() if isinstance(box, nn.ModuleList | nn.Sequential) for m in box]
    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
        *[m.register_forward_pre_hook(given, with_kwargs=True) for m in elements if m is not None],
    ]
    with removed_after(handles):
        yield
