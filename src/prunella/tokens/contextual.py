"""Contextual sparsity: a different subset of neurons for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.graph.data import Graph, Group
from prunella.graph.solve.groups import couple
from prunella.model.hooks import removed_after
from prunella.model.unwrap import unwrap
from prunella.registry.method import compression

Predictor = Callable[[Tensor], Tensor]
"""The input of a block of neurons, `(..., width)` -> a score for each neuron, `(..., neurons)`."""


def keep_top(hidden: Tensor, keep: float, scores: Tensor | None = None) -> Tensor:
    """The activations of the `ceil(keep * neurons)` neurons with the largest scores for each token, the others zero.

    hidden, scores: `(..., neurons)`; the default scores are absolute activations. keep: in (0, 1]; 1 gives `hidden`.
    Errors: RequestError for `keep` out of range.

    Example:

        >>> import torch, prunella as pr
        >>> pr.tokens.keep_top(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 0.5)
        tensor([[ 0., -3.,  2.,  0.]])
    """
    if not 0 < keep <= 1:
        raise RequestError(f"keep={keep} is out of range", "it is a fraction of the neurons", "take keep in (0, 1]")
    count = -int(-keep * hidden.shape[-1] // 1)
    if count == hidden.shape[-1]:
        return hidden
    ranks = hidden.abs() if scores is None else scores
    chosen = ranks.topk(count, -1).indices
    return hidden * torch.zeros_like(hidden).scatter(-1, chosen, 1)


def neurons(graph: Graph) -> dict[str, str]:
    """Module that reads a set of neurons -> a module that produces them; both are linear layers."""
    layers = {layer.entity: layer for layer in graph.layers}
    producers: dict[str, str] = {}
    for group in graph.groups:
        makers = [layers[m.entity] for m in group.members if m.role == "out" and m.entity in layers]
        read = [layers[m.entity] for m in group.members if m.role == "in" and m.entity in layers]
        linear = all(layer.op == "linear" for layer in (*makers, *read))
        if linear and group.kind == "channel" and len(read) == 1 and makers and _alone(group, graph):
            producers[read[0].module] = makers[0].module
    return producers


@compression(source="Liu et al. 2023, arXiv:2310.17157 (Deja Vu; here a mask, not a kernel)")
@contextmanager
def contextual_(
    model: nn.Module, inputs: Any, *, keep: float, predictors: Mapping[str, Predictor] | None = None
) -> Iterator[tuple[str, ...]]:
    """Inside, every token uses only the fraction `keep` of the neurons of each MLP, a different subset for each token.

    `y = W_down (a * m(x))`, with `m(x)` the top neurons by `|a|` (an oracle), or by the scores of a predictor from the
    input of the MLP. The neurons are the units between two linear layers in the graph; returns the paths of the layers
    that read the neurons. keep = 1 is the dense model, bit for bit.
    Data: none. keep: in (0, 1]. predictors: by path of the reading layer; other layers use the oracle.
    The context measures contextual sparsity. The model does not become faster: all neurons are computed, and a dense
    kernel does not skip zeros; the paper has its own kernels and an early predictor.
    Errors: NotSupported if there are no such neurons.

    Use: estimating what a sparse kernel could save. Avoid: as a way to a faster model.
    """
    model = unwrap(model)
    producers = {path: producer for path, producer in neurons(couple(model, inputs)).items() if path}
    if not producers:
        raise NotSupported("there are no neurons", "none are between two linear layers that are modules", "")
    unknown = sorted(set(predictors or {}) - set(producers))
    if unknown:
        raise RequestError(f"{unknown[0]} reads no neurons", f"known are {', '.join(producers)}", "")
    keep_top(torch.zeros(1, 1, device="cpu"), keep)  # check keep before any hook is registered
    entered: dict[str, Tensor] = {}
    handles = []
    for path, source in producers.items():
        predictor = (predictors or {}).get(path)

        def enter(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            entered[path] = args[0]

        def mask(
            module: nn.Module, args: tuple[Any, ...], path: str = path, predictor: Predictor | None = predictor
        ) -> tuple[Any, ...]:
            scores = None if predictor is None else predictor(entered[path])
            return (keep_top(args[0], keep, scores), *args[1:])

        if predictor is not None:
            handles.append(model.get_submodule(source).register_forward_pre_hook(enter))
        handles.append(model.get_submodule(path).register_forward_pre_hook(mask))
    with removed_after(handles):
        yield tuple(producers)


def _alone(group: Group, graph: Graph) -> bool:
    """Whether the group is the complete input of the layer that reads it."""
    member = next(m for m in group.members if m.role == "in")
    return len(member.index) == group.size == graph.entities[member.entity].shape[member.axis]
