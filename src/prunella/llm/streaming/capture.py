"""What every block of a model is called with, found without running one: the blocks are stood in for.

The blocks are the module list that holds the most weights. Each must run once, in order, fed by the one before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunella.errors import NotSupported, PruningError
from prunella.graph.cut.block_surgery import swap
from prunella.graph.data import Layer
from prunella.graph.match import chosen, parts
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import Block, Call, Keep, Runner
from prunella.llm.experts import routers
from prunella.llm.streaming.skeleton import Skeleton
from prunella.model.forward import tensors
from prunella.model.reads import Stop
from prunella.stats.subject import first_seen

_INSTEAD = "load it whole, and use solve_"


@dataclass(frozen=True)
class Captured:
    """The blocks, what each is called with beside the stream, and the stream into the first."""

    blocks: tuple[Block, ...]
    calls: dict[str, list[Call]]
    streams: Sequence[Tensor]

    @property
    def constants(self) -> int:
        """Bytes of what the calls share."""
        found = {id(t): t for calls in self.calls.values() for c in calls for t in tensors([list(c.args), c.kwargs])}
        return sum(t.numel() * t.element_size() for t in found.values())


def paths_of(model: nn.Module) -> list[str]:
    """Paths of the blocks. Errors: NotSupported where there is no list of modules."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    if not lists:
        raise NotSupported("the model has no list of blocks", "blocks are the entries of a module list", _INSTEAD)
    path, found = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return [f"{path}.{name}" for name, _ in found.named_children()]


def capture(skeleton: Skeleton, batches: Sequence[Any], run: Runner, keep: Keep) -> Captured:
    """Run the model once on every batch, with nothing in place of its blocks.

    Only what runs before the last block is loaded, and let go at the end. Errors: NotSupported for another order.
    """
    paths = paths_of(skeleton.model)
    stage = _Stage(skeleton.model, paths)
    with skeleton.on_demand(paths), stage.set():
        streams = keep(stage.streams(batches, run))
    blocks = tuple(Block(path, linked=place > 0) for place, path in enumerate(paths))
    return Captured(blocks, stage.calls, streams)


@dataclass
class _Stage:
    """Stand-ins for the blocks, which hand the stream on and write down the rest."""

    model: nn.Module
    paths: list[str]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    trees: dict[str, Any] = field(default_factory=dict)
    known: list[Tensor] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    stream: Tensor | None = None
    first: Tensor | None = None
    past: bool = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """Inside, the stand-ins run."""
        modules = [self.model.get_submodule(path) for path in self.paths]
        self.calls = {path: [] for path in self.paths}
        for path, module in zip(self.paths, modules, strict=True):
            module.forward = self._stand_in(path, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def streams(self, batches: Sequence[Any], run: Runner) -> Iterator[Tensor]:
        """The stream into the first block for each batch."""
        for batch in batches:
            first = self._run(batch, run)
            if self.order != self.paths or first is None:
                why = f"{len(self.order)} calls of its {len(self.paths)} blocks, not each once and in order"
                raise NotSupported("the blocks of the model do not run one after the other", why, _INSTEAD)
            yield first

    def _run(self, batch: Any, run: Runner) -> Tensor | None:
        """Run until the last block, and say what came into the first.

        The first time the model runs to its end without values, to see whether a block runs again there.
        """
        self.order, self.stream, self.first, self.past = [], None, None, False
        try:
            run(self.model, batch)
        except (Stop, PruningError) as ended:
            if not isinstance(ended, Stop):
                raise
        except Exception as error:
            if self.past:  # what comes after the blocks has no weights here, and may well fail
                return self.first
            if "meta tensor" in str(error):
                what = "what surrounds the blocks cannot be run without all weights"
                raise NotSupported(what, f"it depends on values: {error}".splitlines()[0], _INSTEAD) from error
            raise
        return self.first

    def _stand_in(self, path: str, block: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call(args, kwargs)
            if self.past:
                why = "it runs again after the last one" if path in self.order else "it runs after the last one"
                raise NotSupported("the blocks of the model do not run one after the other", f"{path}: {why}", _INSTEAD)
            if not isinstance(call.stream, Tensor) or not (self.stream is None or call.stream is self.stream):
                why = "its first argument is not what the block before it returned"
                raise NotSupported(f"{path} is not fed by the block before it", why, _INSTEAD)
            others = tensors([list(args), kwargs])
            if any(t.device.type == "meta" for t in others):
                raise NotSupported(f"{path} is given more than the stream by a block", "it depends on them", _INSTEAD)
            if self.stream is None:
                self.first = call.stream
            self.stream = call.stream
            self.order.append(path)
            bare = call.fed(call.stream.new_empty(0))
            self.calls[path].append(Call(self._shared(bare.args), self._shared(bare.kwargs)))
            known, self.past = path in self.trees, path == self.paths[-1]
            if self.past and known:
                raise Stop
            if not known:
                self.trees[path] = _on_meta(path, block, call)
            return swap(self.trees[path], call.stream.to("meta") if self.past else call.stream)

        return forward

    def _shared(self, tree: Any) -> Any:
        """The tree with tensors that are known from an earlier call in place of equal ones."""
        return pytree.tree_map_only(Tensor, self._known, tree)

    def _known(self, tensor: Tensor) -> Tensor:
        same = (t for t in self.known if t is tensor or (t.shape == tensor.shape and t.dtype == tensor.dtype))
        found = next((t for t in same if t is tensor or t.equal(tensor)), None)
        if found is None:
            self.known = [tensor, *self.known[:15]]
        return tensor if found is None else found


def _on_meta(path: str, block: Callable[..., Any], call: Call) -> Any:
    """What the block returns, without values."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (call.args, call.kwargs))
    try:
        return block(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        why = f"what it does depends on values: {error}".splitlines()[0]
        raise NotSupported(f"{path} cannot be run without its weights", why, _INSTEAD) from error


def _light(tensor: Tensor) -> Tensor:
    return tensor.to("meta", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


class _Called(nn.Module):
    """A block as a model of one argument for all that it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def layers_of(model: nn.Module, path: str, call: Call, skip: Sequence[str]) -> dict[Layer, bool]:
    """The layers of a block without data, under their names in the model, and whether each routes to experts."""
    # The type does not matter without values, and torch multiplies the experts of a mixture in this one alone then.
    block = copy.deepcopy(model.get_submodule(path)).to(torch.bfloat16)
    inputs = pytree.tree_map_only(Tensor, _light, (call.args, call.kwargs))
    try:
        graph = couple(_Called(block), inputs)
    except PruningError as error:
        raise NotSupported(f"{path} cannot be traced without its weights", str(error), _INSTEAD) from error
    found, routing = dict[Layer, bool](), routers(graph)
    for layer in first_seen(graph.layers):
        name, entity = (f"{path}.{text.removeprefix('block.')}" for text in (layer.name, layer.entity))
        if not chosen(parts(entity), skip, ()):
            found[replace(layer, name=name, entity=entity)] = layer.entity in routing
    return found
