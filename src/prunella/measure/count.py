"""Parameters, bytes, zeros and multiply-adds, counted on the model itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.errors import RequestError
from prunella.graph.rules import RULES as RULES  # the rules register the operations without work
from prunella.graph.sources import Sources, by_memory, memory
from prunella.graph.work import Term, counting, known, name_of, tensors_in, terms
from prunella.measure.text import byte_size, exact_count, percent
from prunella.model.forward import forward
from prunella.model.hooks import removed_after
from prunella.model.memory import inner_tensors
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.model.unregistered import unregistered
from prunella.types import Inputs

Scope = Literal["weights", "parameters"]


@dataclass(frozen=True)
class Count:
    """Tied parameters count once. bytes: of parameters and buffers of the state dict, as a file stores them.

    nonzero, total: elements that are not zero, and all elements, of the `scope`: `weights` are the parameters with at
    least two axes (what pruning means by sparsity), `parameters` are all of them.
    """

    params: int
    bytes: int
    nonzero: int
    total: int
    scope: Scope

    @property
    def sparsity(self) -> float:
        """Fraction of the scope that is zero."""
        return 1 - self.nonzero / self.total if self.total else 0.0

    def __str__(self) -> str:
        zero = f"{percent(self.sparsity)} of the {self.scope} are zero"
        return f"{exact_count(self.params)} parameters, {byte_size(self.bytes)}, {zero}"


def count(model: nn.Module, *, scope: Scope = "weights") -> Count:
    """Parameters, bytes and zeros of a model, from its tensors alone.

    scope: `weights` or `parameters`. Errors: RequestError for another scope.

    Example:

        >>> import torch, prunella as pr
        >>> pr.metrics.count(torch.nn.Linear(4, 2)).params
        10
    """
    model = with_plain_weights(model)
    if scope not in ("weights", "parameters"):
        raise RequestError(f"unknown scope {scope!r}", "known are weights, parameters", "weights have two axes or more")
    parameters = list(model.parameters())  # torch gives tied ones once
    looked_at = [p for p in parameters if scope == "parameters" or p.dim() >= 2]
    return Count(
        params=sum(p.numel() for p in parameters),
        bytes=sum(part.nbytes for t in _once(model.state_dict(keep_vars=True).values()) for part in inner_tensors(t)),
        nonzero=sum(map(_nonzero, looked_at)),
        total=sum(p.numel() for p in looked_at),
        scope=scope,
    )


def _values(parameter: Tensor) -> Tensor:
    """The dequantized values of a weight."""
    return parameter if type(parameter.data) is Tensor else parameter.detach().dequantize()


def compression(before: float, after: float) -> float:
    """`before / after`: 4 means a quarter remains."""
    if after <= 0:
        raise RequestError("nothing remains", f"{after:g} after, {before:g} before", "a ratio needs a remaining part")
    return before / after


@dataclass(frozen=True)
class WorkCount:
    """The multiply-adds of one forward pass: by module, by parameter, and operations of unknown work.

    by_module: "" is the model itself; work with a parameter belongs to its module. by_weight: work of products with a
    single parameter. uncounted: operations of unknown work -> number of calls; hidden: the parameters that they read.
    unregistered: work of weights that are no parameters of the model.
    """

    by_module: Mapping[str, int]
    by_weight: Mapping[str, int]
    uncounted: Mapping[str, int] = field(default_factory=dict)
    hidden: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unregistered: Mapping[str, int] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """All counted multiply-adds."""
        return sum(self.by_module.values())


def count_work(model: nn.Module, inputs: Inputs) -> WorkCount:
    """Run `model` once, in eval mode and unchanged, and count its multiply-adds below autograd.

    The formulas are those of `Graph.macs` (`prunella.graph.work`), for any model that runs: pruned, masked, imported.
    Elementwise work is free. The same number as torch's own counter with fused attention off, which also misses
    recurrent kernels and products with vectors.
    """
    model = with_plain_weights(model)
    counter = _Counter(model)
    with untouched(model), torch.no_grad(), counter.modules(), counting(), counter:
        forward(model, inputs)
    return counter.result()


def effective(model: nn.Module, work: WorkCount) -> float:
    """Multiply-adds of the model's work that do not multiply by a zero of a weight."""
    named = dict(with_plain_weights(model).named_parameters())
    weights = ((named[name], macs) for name, macs in work.by_weight.items() if named[name].dim() > 1)
    return float(work.macs) - math.fsum(macs - macs * _nonzero(weight) / weight.numel() for weight, macs in weights)


def _nonzero(parameter: Tensor) -> int:
    return int(torch.count_nonzero(_values(parameter)))


def measured_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of one forward pass: `count_work(model, inputs).macs`."""
    return count_work(model, inputs).macs


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observes the operations of one run below autograd; operations that take functions count as one call."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check against the compiler would import dynamo, which takes seconds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        named = [*model.named_parameters(remove_duplicate=False)]
        first = {id(tensor): name for name, tensor in reversed(named)}
        buffers = dict(model.named_buffers())
        entities = {first[id(tensor)]: tensor for _, tensor in named}
        self.sources = Sources({**entities, **buffers}, entities)
        self.owners: dict[str, set[str]] = {}
        for name, tensor in named:
            self.owners.setdefault(first[id(tensor)], set()).add(name.rpartition(".")[0])
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.running: list[str] = []
        self.by_module, self.by_weight, self.calls = Counter[str](), Counter[str](), Counter[str]()
        self.hidden: dict[str, set[str]] = {}
        self.names = by_memory(unregistered(model))
        self.unregistered = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # under inference_mode composite operations arrive as one
        if isinstance(func, OpOverload) and not known(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        arguments, outputs = tensors_in([args, list(kwargs.values())]), tuple(tensors_in(result))
        self.sources.note(arguments, outputs)
        self._add(func, terms(func, args, kwargs, outputs), arguments)
        return result

    def _add(self, func: Any, done: Sequence[Term] | None, arguments: Sequence[Tensor]) -> None:
        if done is None:
            name = name_of(func)
            self.calls[name] += 1
            self.hidden.setdefault(name, set()).update(self.sources.read(arguments))
        for term in done or ():
            macs = term.macs
            self.by_module[self._module(term)] += macs
            for weight in self.names.keys() & {memory(tensor) for tensor in term.tensors}:
                self.unregistered[self.names[weight]] += macs
            if len(read := self.sources.read(term.tensors)) == 1:
                self.by_weight[next(iter(read))] += macs

    def _module(self, term: Term) -> str:
        """The module of the multiplied parameter; if there is not exactly one parameter, the running module."""
        running = self.running[-1] if self.running else ""
        names = {name for tensor in term.tensors for name in self.sources.held(tensor)}
        if len(names) != 1:
            return running
        owners = self.owners[names.pop()]
        return running if running in owners else min(owners)

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Track the path of the running module; a module outside the model counts as its caller."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(self.paths.get(id(module), self.running[-1] if self.running else ""))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.running:
                self.running.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        with removed_after(handles):
            yield

    def result(self) -> WorkCount:
        """The counts."""
        hidden = {name: tuple(sorted(read)) for name, read in sorted(self.hidden.items())}
        done = {name: macs for name, macs in self.by_module.items() if macs}
        return WorkCount(done, dict(self.by_weight), dict(sorted(self.calls.items())), hidden, dict(self.unregistered))


def _once(values: Iterable[object]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for value in values:
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value
