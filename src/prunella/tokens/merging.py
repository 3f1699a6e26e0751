"""Token merging before every residual block of a model, by removable hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.graph.solve.residual_blocks import inside
from prunella.llm.blocks import BlockCall, ModelBlock, blocks_of
from prunella.model.forward import forward
from prunella.model.hooks import removed_after
from prunella.model.state import untouched
from prunella.model.trees import tensors
from prunella.model.unwrap import unwrap
from prunella.registry.method import compression
from prunella.tokens.matching import bipartite_match, merge, most


class TokenMerging:
    """The hooks of `merge_tokens_`; `remove()`, or the end of a `with` block, removes them.

    sizes: after a pass, the number of original tokens in each token of the last block, `(batch, tokens)`.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...], *, r: int, protected: int) -> None:
        self.r, self.protected, self.paths = r, protected, paths
        self.sizes: Tensor | None = None
        self._handles = [model.register_forward_pre_hook(self._begin)]
        blocks = [model.get_submodule(path) for path in paths]
        self._handles += [block.register_forward_pre_hook(self._before, with_kwargs=True) for block in blocks]

    def remove(self) -> None:
        """Remove the hooks: the model computes as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> TokenMerging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.sizes = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = BlockCall(args, kwargs)
        x = call.hidden_states
        sizes = torch.ones(x.shape[:2], device=x.device) if self.sizes is None else self.sizes
        matching = bipartite_match(x, min(self.r, most(x.shape[1], self.protected)), protected=self.protected)
        merged, self.sizes = merge(x, sizes, matching)
        changed = call.with_hidden_states(merged)
        return changed.args, changed.kwargs


@compression(source="Bolya et al. 2023, arXiv:2210.09461 (ToMe), without its proportional attention")
def merge_tokens_(model: nn.Module, inputs: Any, *, r: int, protected: int = 1) -> TokenMerging:
    """Merge the r most similar pairs of tokens before every residual block: fewer tokens, the same parameters.

    Each block gets `r` tokens fewer than the previous block, by `bipartite_match` and `merge`: a merged token is the
    average of its tokens, weighted by their sizes. The blocks are the residual blocks of the graph. The paper compares
    the keys of the attention, merges between attention and MLP, and adds the log of the sizes to the attention, so that
    a large token counts as many. Here the input of the block is compared and merged, and the attention does not change:
    the method is independent of the model's code, and a large token counts as one. With r = 0 nothing changes, bit for
    bit. A mean over tokens at the end is a mean over merged tokens.
    Data: none; `inputs` is one batch for a trial run. r: tokens merged before each block, at least 0; a block with
    fewer mergeable tokens merges those (at most about half). protected: tokens at the front that are never merged (1: a
    class token, 0: none, 2: class and distillation).
    Errors: NotSupported if there are no residual blocks, a block runs twice, its stream is not `(batch, tokens,
    width)`, it takes other tensors (masks, positions), or the model does not run with fewer tokens.

    Use: classification by vision transformers with hundreds of tokens; throughput without training. Avoid: dense
    outputs, which need every token at the end, windowed attention, and causal models, where merging would mix in later
    tokens.
    """
    model = unwrap(model)
    if r < 0 or protected < 0:
        raise RequestError(f"r={r} and protected={protected} count tokens", "one is negative", "give numbers from 0 on")
    graph = couple(model, inputs)
    with untouched(model), torch.no_grad():
        calls = _calls(model, blocks := blocks_of(model, graph, inputs, forward), inputs)
    samples = next((len(tensor) for tensor in tensors(inputs) if tensor.dim()), 0)
    for block in blocks:
        _check(block, calls.get(block.path), graph, samples)
    merging = TokenMerging(model, tuple(block.path for block in blocks), r=r, protected=protected)
    try:
        with untouched(model), torch.no_grad():
            forward(model, inputs)
    except (RuntimeError, ValueError, AssertionError, LookupError) as error:
        merging.remove()
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        todo = "a part of the model needs all tokens: token merging does not fit this model"
        raise NotSupported("the model does not run with fewer tokens", why, todo) from error
    merging.sizes = None
    return merging


def _calls(model: nn.Module, blocks: tuple[ModelBlock, ...], inputs: Any) -> dict[str, BlockCall]:
    """The arguments of the call of each block."""
    calls: dict[str, BlockCall] = {}

    def record(path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = BlockCall(args, kwargs)

        return before

    handles = [
        model.get_submodule(block.path).register_forward_pre_hook(record(block.path), with_kwargs=True)
        for block in blocks
        if block.path
    ]
    with removed_after(handles):
        forward(model, inputs)
    return calls


def _check(block: ModelBlock, call: BlockCall | None, graph: Graph, samples: int) -> None:
    """NotSupported unless tokens can be merged before this block."""
    if not block.path or call is None:
        todo = "tokens are merged before the blocks of a ModuleList or Sequential that add to their input"
        raise NotSupported("no residual blocks were found", "", todo)
    stream = call.hidden_states
    first = next((layer for layer in graph.layers if inside(layer.entity, block.path)), None)
    if not isinstance(stream, Tensor) or stream.dim() != 3 or (first is not None and first.op != "linear"):
        shape = tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        why = f"it takes {shape}, and (batch, tokens, width) is needed"
        raise NotSupported(f"{block.path} has no stream of tokens", why, "convolutions have no tokens to merge")
    if len(stream) != samples:
        why = f"its input begins with {len(stream)}, and the batch has {samples} samples"
        raise NotSupported(f"{block.path} does not take (batch, tokens, width)", why, "build it with batch_first=True")
    if any(tensor is not stream for tensor in tensors([list(call.args), call.kwargs])):
        why = "masks, positions and biases are made for all tokens, and would not fit fewer"
        raise NotSupported(f"{block.path} takes a further tensor", why, "leave masks out, if you can")
    if not block.runs_once:
        raise NotSupported(f"{block.path} runs several times in a pass", "its tokens would be merged several times", "")
