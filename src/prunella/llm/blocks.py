"""The blocks of a model, and the inputs of each block.

A block is a residual block, found from the data flow (`block_paths`) or, for a model without weights, as an entry of
its largest module list (`listed_block_paths`). A model without blocks is treated as a single block.

A block is *sequential* if its first argument is the tensor that the previous block returned and no other argument was
computed by a block: its inputs are then the outputs of that one block. Otherwise (another order, a block that runs
twice, a position bias that the first block passes to all others) the model itself runs up to the block, which is slower
and gives the same inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.graph.data import Graph
from prunella.model.hooks import removed_after
from prunella.model.trees import tensors
from prunella.model.watch import Stop

Runner = Callable[[nn.Module, Any], Any]
"""Runs the model on one batch."""
StoreActivations = Callable[[Iterable[Tensor]], Sequence[Tensor]]
"""Stores hidden states, one tensor per batch, in memory (`list`) or on disk."""


@dataclass
class BlockCall:
    """The arguments of one call of a block. The first one, in `args` or else in `kwargs`, is the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        """The output of the block."""
        return block(*self.args, **self.kwargs)

    @property
    def hidden_states(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def with_hidden_states(self, hidden_states: Tensor) -> BlockCall:
        """The same call with another first argument."""
        if self.args:
            return BlockCall((hidden_states, *self.args[1:]), self.kwargs)
        first = next(iter(self.kwargs))
        return BlockCall((), {**self.kwargs, first: hidden_states})

    def without_hidden_states(self) -> BlockCall:
        """The same call with an empty first argument, which takes no memory."""
        return self.with_hidden_states(self.hidden_states.new_empty(0))


class StoredTensors(Sequence[Tensor]):
    """Tensors that are elsewhere, and come back one by one when they are indexed."""

    def __init__(self, count: int) -> None:
        self._count = count

    @abstractmethod
    def read(self, k: int) -> Tensor:
        """The tensor of this number."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, k: int) -> Tensor: ...
    @overload
    def __getitem__(self, k: slice) -> list[Tensor]: ...
    def __getitem__(self, k: int | slice) -> Tensor | list[Tensor]:
        numbers = range(self._count)[k]  # IndexError beyond the last, and negative numbers from the end
        return self.read(numbers) if isinstance(numbers, int) else [self.read(n) for n in numbers]


class OnHost(StoredTensors):
    """Hidden states in the memory of the CPU; each is back on its own device while it is used."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._kept = list(map(_on_host, tensors))  # one by one: no name holds the last while the next is computed
        super().__init__(len(self._kept))

    def read(self, k: int) -> Tensor:
        tensor, device = self._kept[k]
        return tensor.to(device)


def _on_host(tensor: Tensor) -> tuple[Tensor, torch.device]:
    return tensor.detach().cpu(), tensor.device


class BlockCalls(Sequence[BlockCall]):
    """One call per batch; its hidden states are read from `hidden_states` when the call is indexed."""

    def __init__(self, calls: Sequence[BlockCall], hidden_states: Sequence[Tensor]) -> None:
        self.calls: Sequence[BlockCall] = calls.calls if isinstance(calls, BlockCalls) else calls
        self.hidden_states = hidden_states

    def __len__(self) -> int:
        return len(self.hidden_states)

    @overload
    def __getitem__(self, k: int) -> BlockCall: ...
    @overload
    def __getitem__(self, k: slice) -> BlockCalls: ...
    def __getitem__(self, k: int | slice) -> BlockCall | BlockCalls:
        if isinstance(k, slice):
            return BlockCalls(self.calls[k], self.hidden_states[k])
        return self.calls[k].with_hidden_states(self.hidden_states[k])


@dataclass(frozen=True)
class ModelBlock:
    """A module that is pruned at once. path: of the module, "" for the model itself.

    sequential: its inputs are the outputs of the previous block. runs_once: it runs once per forward pass.
    """

    path: str
    sequential: bool
    runs_once: bool = True

    def contains(self, names: Iterable[str]) -> bool:
        """Whether a parameter with these names lies in the block; one shared with modules outside does not."""
        return all(name.startswith(f"{self.path}.") or not self.path for name in names)


@dataclass
class BlockInputs:
    """Inputs of each block, computed by the already pruned blocks before it.

    The blocks are visited in order: `calls(block)`, then `next_block(block)` once its weights are final.
    host: whether the hidden states of the first of several blocks wait in the memory of the CPU, as `OnHost` has them.
    """

    model: nn.Module
    batches: Sequence[Any]
    run: Runner
    blocks: tuple[ModelBlock, ...]
    store: StoreActivations = list
    host: bool = False
    _recorded: dict[str, list[BlockCall]] = field(default_factory=dict)  # of the sequential blocks that follow
    _calls: Sequence[BlockCall] = ()

    def calls(self, block: ModelBlock) -> Sequence[BlockCall]:
        """The calls of the block, one or more per batch, with the current weights of the blocks before it."""
        if not block.path:
            return [BlockCall((batch,), {}) for batch in self.batches]
        if not block.sequential:
            chain = [block, *self._followers(block)]
            self._recorded = {later.path: [] for later in chain}
            stop = chain[-1].path if all(later.runs_once for later in chain) else ""  # no head
            self._calls = self._first_calls(block.path, stop)
        return self._calls

    def _first_calls(self, path: str, stop: str) -> Sequence[BlockCall]:
        """The calls of a block in passes of the model, which end at the block `stop`."""
        if not self.host:
            for _ in self._passes(stop):
                pass
            return self._recorded.pop(path)
        bare: list[BlockCall] = []

        def hidden_states() -> Iterator[Tensor]:
            for _ in self._passes(stop):
                calls = self._recorded[path]
                for call in calls:
                    bare.append(call.without_hidden_states())
                    yield call.hidden_states
                calls.clear()

        waiting = OnHost(hidden_states())
        self._recorded.pop(path)
        return BlockCalls(bare, waiting)

    def _passes(self, stop: str) -> Iterator[None]:
        """One pass of the model for each batch, with the calls of its blocks recorded."""
        for batch in self.batches:
            with _recording(self.model, self._recorded, stop), suppress(Stop):
                self.run(self.model, batch)
            yield

    def forward(self, block: ModelBlock, call: BlockCall) -> Any:
        """The output of the block, or of the model, for one of its calls."""
        if not block.path:
            return self.run(self.model, call.args[0])
        return call.run(self.model.get_submodule(block.path))

    def next_block(self, block: ModelBlock, outputs: Sequence[Tensor] | None = None) -> None:
        """Compute the inputs of the block after `block`, if it is sequential; `outputs` of `block`, if known."""
        place = self.blocks.index(block)
        if place + 1 < len(self.blocks) and self.blocks[place + 1].sequential:
            recorded = self._recorded.pop(self.blocks[place + 1].path)
            hidden_states = outputs or (tensors(self.forward(block, call))[0] for call in self._calls)
            self._calls = BlockCalls(recorded, self.store(hidden_states))

    def _followers(self, block: ModelBlock) -> list[ModelBlock]:
        """The sequential blocks directly after this one."""
        after = self.blocks[self.blocks.index(block) + 1 :]
        end = next((k for k, other in enumerate(after) if not other.sequential), len(after))
        return list(after[:end])


def blocks_of(model: nn.Module, graph: Graph, batch: Any, run: Runner) -> tuple[ModelBlock, ...]:
    """The outermost residual blocks in their order of execution on `batch`; the model itself if it has none."""
    return blocks_at(model, block_paths(model, graph), batch, run)


def block_paths(model: nn.Module, graph: Graph) -> list[str]:
    """The paths of the outermost residual blocks, also of those that cannot be dropped."""
    paths = [path for stack in graph.stacks for path in stack.paths]
    paths += [frozen.entity for frozen in graph.rooted if isinstance(_module(model, frozen.entity), nn.Module)]
    return [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths)]


def listed_block_paths(model: nn.Module) -> list[str]:
    """The paths of the blocks of a model that cannot run for lack of weights: the entries of its largest module list.

    For the language models of transformers these are the paths of `block_paths`. Errors: NotSupported without a list.
    """
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    if not lists:
        todo = "load the full model, and use solve_"
        raise NotSupported("the model has no list of blocks", "blocks are the entries of a module list", todo)
    path, largest = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return [f"{path}.{name}" for name, _ in largest.named_children()]


def blocks_at(model: nn.Module, paths: Sequence[str], batch: Any, run: Runner) -> tuple[ModelBlock, ...]:
    """The blocks at these paths in their order of execution on `batch`; the model itself if none of them runs."""
    observed = _Execution()
    with _hooked(model, {path: observed.before(path) for path in paths}, observed.after):
        run(model, batch)
    return observed.blocks() or (ModelBlock("", False, False),)


@dataclass
class _Execution:
    """The order in which blocks run in one pass, and which of them take the output of the previous one."""

    order: list[str] = field(default_factory=list)
    sequential: dict[str, bool] = field(default_factory=dict)
    _outputs: dict[int, Tensor] = field(default_factory=dict)  # kept alive, so that no id is used twice
    _previous: list[Tensor] = field(default_factory=list)

    def before(self, path: str) -> Callable[..., None]:
        """The hook that runs before the block at `path`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = BlockCall(args, kwargs).hidden_states
            others = [t for t in tensors([list(args), kwargs]) if t is not hidden_states]
            follows = bool(self._previous) and hidden_states is self._previous[0]
            depends = any(id(t) in self._outputs for t in others)
            self.sequential[path] = follows and not depends and path not in self.sequential
            self.order.append(path)

        return hook

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The hook that runs after each block."""
        self._previous[:] = tensors(output)[:1]
        self._outputs.update({id(t): t for t in tensors(output)})

    def blocks(self) -> tuple[ModelBlock, ...]:
        """The blocks that ran, in order of their first run."""
        repeated = {path for path in self.order if self.order.count(path) > 1}
        paths = list(dict.fromkeys(self.order))
        blocks = []
        for place, path in enumerate(paths):
            # The block after one that runs twice has another predecessor each time.
            neighbors = {path, *paths[max(0, place - 1) : place]}
            blocks.append(ModelBlock(path, self.sequential[path] and not neighbors & repeated, path not in repeated))
        return tuple(blocks)


@contextmanager
def _hooked(
    model: nn.Module, before: Mapping[str, Callable[..., None]], after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Inside, hooks run before the modules at these paths, and `after` behind each of them."""
    handles = []
    for path, hook in before.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    with removed_after(handles):
        yield


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, the model does not use a key-value cache unless a batch asks for one.

    A block that runs again on its own would attend to the keys and values that earlier runs left in the cache.
    """
    candidates: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in candidates if getattr(config, "use_cache", False)}
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
def _recording(model: nn.Module, calls: dict[str, list[BlockCall]], stop: str) -> Iterator[None]:
    """Record the calls of the blocks in `calls`; end the pass at the block `stop`, if it is not empty."""
    first = next(iter(calls))

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = BlockCall(args, dict(kwargs))
            if not isinstance(call.hidden_states, Tensor):
                raise NotSupported(f"{path} is called without a tensor", "its first argument is not one", "")
            # Later blocks get their hidden states from the block before; recording them all would fill the memory.
            calls[path].append(call if path == first else call.without_hidden_states())
            if path == stop:
                raise Stop

        return hook

    with _hooked(model, {path: record(path) for path in calls}):
        yield
