"""Capture the inputs of the first block of a model, and the other arguments of all blocks, without running a block.

The blocks are replaced by stubs, which return their hidden states unchanged. Each block must run once, in order, on the
output of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunella.errors import BadInput, NotSupported, PruningError
from prunella.graph.cut.block_surgery import swap
from prunella.graph.data import Layer
from prunella.graph.match import chosen, parts
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import BlockCall, BlockCalls, ModelBlock, Runner, StoreActivations, listed_block_paths
from prunella.llm.experts import routers
from prunella.llm.streaming.skeleton import Skeleton
from prunella.model.copying import copied
from prunella.model.trees import tensors
from prunella.model.watch import Stop
from prunella.stats.subject import first_seen

_INSTEAD = "load the full model, and use solve_"
_KNOWN = 16
"""Tensors of earlier calls with which those of a new one are compared."""


@dataclass(frozen=True)
class Captured:
    """The blocks, their calls without hidden states, and the hidden states that enter the first block."""

    blocks: tuple[ModelBlock, ...]
    arguments: dict[str, list[BlockCall]]
    hidden_states: Sequence[Tensor]

    @property
    def constants(self) -> int:
        """Bytes of the arguments that the calls share."""
        distinct = {
            id(t): t for calls in self.arguments.values() for c in calls for t in tensors([list(c.args), c.kwargs])
        }
        return sum(t.numel() * t.element_size() for t in distinct.values())

    def calls(self, path: str, hidden_states: Sequence[Tensor] | None = None) -> BlockCalls:
        """The calls of a block for these hidden states, by default those that enter the first block."""
        return BlockCalls(self.arguments[path], self.hidden_states if hidden_states is None else hidden_states)


def capture(skeleton: Skeleton, batches: Sequence[Any], run: Runner, store: StoreActivations) -> Captured:
    """Run the model once on every batch, with stubs in place of its blocks.

    Only the modules that run before the last block are loaded, and unloaded at the end. Errors: NotSupported if the
    blocks run in another order.
    """
    paths = listed_block_paths(skeleton.model)
    stubs = _Stubs(skeleton.model, paths)
    with skeleton.on_demand(paths), stubs.installed():
        hidden_states = store(stubs.first_inputs(batches, run))
    blocks = tuple(ModelBlock(path, sequential=place > 0) for place, path in enumerate(paths))
    return Captured(blocks, stubs.calls, hidden_states)


@dataclass
class _Stubs:
    """Stubs for the blocks, which return their hidden states and record the other arguments.

    outputs: for each block the structure of its output, computed once on the meta device. known: tensors of earlier
    calls. past: whether the last block has run in this pass.
    """

    model: nn.Module
    paths: list[str]
    calls: dict[str, list[BlockCall]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    known: list[Tensor] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    hidden_states: Tensor | None = None
    first: Tensor | None = None
    past: bool = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the stubs run in place of the blocks."""
        modules = [self.model.get_submodule(path) for path in self.paths]
        self.calls = {path: [] for path in self.paths}
        for path, module in zip(self.paths, modules, strict=True):
            module.forward = self._stub(path, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def first_inputs(self, batches: Sequence[Any], run: Runner) -> Iterator[Tensor]:
        """The hidden states that enter the first block, for each batch."""
        for batch in batches:
            first = self._run(batch, run)
            if self.order != self.paths or first is None:
                why = f"{len(self.order)} calls of its {len(self.paths)} blocks, not each once and in order"
                raise NotSupported("the blocks of the model do not run one after the other", why, _INSTEAD)
            yield first

    def _run(self, batch: Any, run: Runner) -> Tensor | None:
        """Run up to the last block, and return the hidden states that entered the first.

        The first pass runs to the end of the model on the meta device, to see whether a block runs again there.
        """
        self.order, self.hidden_states, self.first, self.past = [], None, None, False
        try:
            run(self.model, batch)
        except Stop:
            pass
        except Exception as raised:
            # Errors of the model on a batch are otherwise reported as errors of the data.
            error = raised.__cause__ if isinstance(raised, BadInput) else raised
            if error is None or isinstance(error, PruningError):
                raise
            if self.past:  # the modules after the blocks have no weights here, and may fail
                return self.first
            if "meta tensor" in str(error):
                what = "the modules around the blocks cannot run without all weights"
                raise NotSupported(what, f"it depends on values: {error}".splitlines()[0], _INSTEAD) from error
            raise
        return self.first

    def _stub(self, path: str, block: Callable[..., Any]) -> Callable[..., Any]:
        """The function that runs in place of `block`."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = BlockCall(args, kwargs)
            self._check(path, call)
            if self.hidden_states is None:
                self.first = call.hidden_states
            self.hidden_states = call.hidden_states
            self.order.append(path)
            bare = call.without_hidden_states()
            self.calls[path].append(BlockCall(self._shared(bare.args), self._shared(bare.kwargs)))
            seen, self.past = path in self.outputs, path == self.paths[-1]
            if self.past and seen:
                raise Stop
            if not seen:
                with constants_on_meta(self.model.get_submodule(path)):
                    self.outputs[path] = _on_meta(path, block, call)
            return swap(self.outputs[path], call.hidden_states.to("meta") if self.past else call.hidden_states)

        return forward

    def _check(self, path: str, call: BlockCall) -> None:
        """Errors: NotSupported unless the block runs in order, on the hidden states of the one before it alone."""
        if self.past:
            why = "it runs again after the last one" if path in self.order else "it runs after the last one"
            raise NotSupported("the blocks of the model do not run one after the other", f"{path}: {why}", _INSTEAD)
        follows = self.hidden_states is None or call.hidden_states is self.hidden_states
        if not isinstance(call.hidden_states, Tensor) or not follows:
            why = "its first argument is not what the block before it returned"
            raise NotSupported(f"{path} is not fed by the block before it", why, _INSTEAD)
        if any(t.device.type == "meta" for t in tensors([list(call.args), call.kwargs])):
            what = f"{path} receives more than the hidden states from another block"
            raise NotSupported(what, "it depends on their values", _INSTEAD)

    def _shared(self, tree: Any) -> Any:
        """The tree with tensors of earlier calls in place of equal ones."""
        return pytree.tree_map_only(Tensor, self._known, tree)

    def _known(self, tensor: Tensor) -> Tensor:
        alike = (t for t in self.known if t is tensor or (t.shape == tensor.shape and t.dtype == tensor.dtype))
        same = next((t for t in alike if t is tensor or t.equal(tensor)), None)
        if same is None:
            self.known = [tensor, *self.known[: _KNOWN - 1]]
        return tensor if same is None else same


@contextmanager
def constants_on_meta(block: nn.Module) -> Iterator[None]:
    """Inside, buffers that the constructor computed, such as a causal mask, are on the meta device as all else is."""
    buffers = [(module._buffers, dict(module._buffers)) for module in block.modules()]
    for current, _ in buffers:
        current.update({name: tensor.to("meta") for name, tensor in current.items() if tensor is not None})
    try:
        yield
    finally:
        for current, before in buffers:
            current.update(before)


def _on_meta(path: str, block: Callable[..., Any], call: BlockCall) -> Any:
    """The output of the block on the meta device: its structure, without values."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (call.args, call.kwargs))
    try:
        return block(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        why = f"what it does depends on values: {error}".splitlines()[0]
        raise NotSupported(f"{path} cannot be run without its weights", why, _INSTEAD) from error


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


class _TwoArguments(nn.Module):
    """A block as a model of two arguments, its positional and its keyword arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def layers_of(model: nn.Module, path: str, call: BlockCall, skip: Sequence[str]) -> dict[Layer, bool]:
    """The layers of a block, traced without data, by their names in the model, and whether each routes to experts."""
    # The dtype does not matter without values, and torch has the grouped product of experts in bfloat16 alone there.
    block = copied(model.get_submodule(path)).to("meta", torch.bfloat16)
    inputs = pytree.tree_map_only(Tensor, _to_meta, (call.args, call.kwargs))
    try:
        graph = couple(_TwoArguments(block), inputs)
    except PruningError as error:
        raise NotSupported(f"{path} cannot be traced without its weights", str(error), _INSTEAD) from error
    layers, routing = dict[Layer, bool](), routers(graph)
    for layer in first_seen(graph.layers):
        name, entity = (f"{path}.{text.removeprefix('block.')}" for text in (layer.name, layer.entity))
        if not chosen(parts(entity), skip, ()):
            layers[replace(layer, name=name, entity=entity)] = layer.entity in routing
    return layers
