"""The residual blocks of a model in the order in which they run, and what each is called with.

A block is *linked* to the one before it where its first argument is the very tensor that the other returned, and
nothing else that it is given came out of a block: then its inputs are made by running that one block. Where that is
not so (another order, a shared block, a position bias that the first block hands to all), the model itself is run up
to the block: slower, and the same. A model without blocks is one block, fed by the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.graph.data import Graph
from prunella.model.forward import tensors
from prunella.model.reads import Stop

Runner = Callable[[nn.Module, Any], Any]
"""Runs the model on one batch."""


@dataclass
class Call:
    """One call of a block. `stream` is its first tensor, in `args[0]` or under `key` of `kwargs`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        """What the block returns."""
        return block(*self.args, **self.kwargs)

    @property
    def stream(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def fed(self, stream: Tensor) -> Call:
        """The same call with another first argument."""
        if self.args:
            return Call((stream, *self.args[1:]), self.kwargs)
        first = next(iter(self.kwargs))
        return Call((), {**self.kwargs, first: stream})


class Calls(Sequence[Call]):
    """Calls that differ in their first argument alone; it is looked up in `streams` when one is asked for."""

    def __init__(self, calls: Sequence[Call], streams: Sequence[Tensor]) -> None:
        self.calls: Sequence[Call] = calls.calls if isinstance(calls, Calls) else calls
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams)

    @overload
    def __getitem__(self, k: int) -> Call: ...
    @overload
    def __getitem__(self, k: slice) -> Calls: ...
    def __getitem__(self, k: int | slice) -> Call | Calls:
        if isinstance(k, slice):
            return Calls(self.calls[k], self.streams[k])
        return self.calls[k].fed(self.streams[k])


Keep = Callable[[Iterable[Tensor]], Sequence[Tensor]]
"""Keeps the tensors of a stream, one a batch, in memory or elsewhere."""


@dataclass(frozen=True)
class Block:
    """A module that is pruned at a time; `path` "" is the model itself.

    linked: fed by the block before it. once: it runs once in a pass.
    """

    path: str
    linked: bool
    once: bool = True


@dataclass
class Feed:
    """The inputs of every block in turn, made by the blocks before it as they are by then."""

    model: nn.Module
    batches: Sequence[Any]
    run: Runner
    blocks: tuple[Block, ...]
    keep: Keep = list
    _later: dict[str, list[Call]] = field(default_factory=dict)
    _calls: Sequence[Call] = ()

    def calls(self, block: Block) -> Sequence[Call]:
        """What the block is called with, over all batches, with everything before it as it is now."""
        if not block.path:
            return [Call((batch,), {}) for batch in self.batches]
        if not block.linked:
            linked = [later.path for later in self._followers(block)]
            self._later = {path: [] for path in (block.path, *linked)}
            for batch in self.batches:
                stop = block.path if block.once and not linked else ""
                with _recorded(self.model, self._later, stop), suppress(Stop):
                    self.run(self.model, batch)
            self._calls = self._later.pop(block.path)
        return self._calls

    def call(self, block: Block, call: Call) -> Any:
        """The block, or the model, on one of its calls."""
        if not block.path:
            return self.run(self.model, call.args[0])
        return call.run(self.model.get_submodule(block.path))

    def advance(self, block: Block, outputs: Sequence[Tensor] | None = None) -> None:
        """Run a block that is done, or take its `outputs`, so that the one linked to it has its inputs."""
        place = self.blocks.index(block)
        if place + 1 < len(self.blocks) and self.blocks[place + 1].linked:
            later = self._later.pop(self.blocks[place + 1].path)
            streams = outputs or (tensors(self.call(block, call))[0] for call in self._calls)
            self._calls = Calls(later, self.keep(streams))

    def _followers(self, block: Block) -> list[Block]:
        after = self.blocks[self.blocks.index(block) + 1 :]
        ends = next((k for k, other in enumerate(after) if not other.linked), len(after))
        return list(after[:ends])


def blocks_of(model: nn.Module, graph: Graph, batch: Any, run: Runner) -> tuple[Block, ...]:
    """The blocks in the order in which they run on `batch`, outermost only; the model itself where it has none."""
    return blocks_at(model, block_paths(model, graph), batch, run)


def block_paths(model: nn.Module, graph: Graph) -> list[str]:
    """The paths of all residual blocks, those that must stay too, outermost only."""
    paths = [path for stack in graph.stacks for path in stack.paths]
    paths += [frozen.entity for frozen in graph.rooted if isinstance(_module(model, frozen.entity), nn.Module)]
    return [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths)]


def blocks_at(model: nn.Module, paths: Sequence[str], batch: Any, run: Runner) -> tuple[Block, ...]:
    """The blocks at these paths in the order in which they run on `batch`; the model itself where none does."""
    order: list[str] = []
    made: dict[int, Tensor] = {}  # held, so that no number is used twice
    previous: list[Tensor] = []
    linked: dict[str, bool] = {}

    def before(path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, kwargs)
            others = [t for t in tensors([list(args), kwargs]) if t is not call.stream]
            fed = bool(previous) and call.stream is previous[0] and not any(id(t) in made for t in others)
            linked[path] = fed and path not in linked
            order.append(path)

        return look

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        previous[:] = tensors(output)[:1]
        made.update({id(t): t for t in tensors(output)})

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    twice = {path for path in order if order.count(path) > 1}
    ran = list(dict.fromkeys(order))
    # What follows a block that runs twice has another predecessor each time.
    fed = [linked[path] and not {path, *ran[max(0, place - 1) : place]} & twice for place, path in enumerate(ran)]
    found = [Block(path, link, path not in twice) for path, link in zip(ran, fed, strict=True)]
    return tuple(found) or (Block("", False, False),)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, the model does not fill a cache of keys and values unless a batch asks for one.

    A block that is run again on its own would attend to what the runs before left in the cache.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


@contextmanager
def _recorded(model: nn.Module, calls: dict[str, list[Call]], stop: str) -> Iterator[None]:
    """Write down what the blocks are called with; end the pass at `stop`, if it names one."""
    first = next(iter(calls))

    def keep(path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, dict(kwargs))
            if not isinstance(call.stream, Tensor):
                raise NotSupported(f"{path} is called without a tensor", "its first argument is not one", "")
            # Those further on get their stream from the block before; kept here, all streams would be in memory.
            calls[path].append(call if path == first else call.fed(call.stream.new_empty(0)))
            if path == stop:
                raise Stop

        return look

    handles = [model.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
