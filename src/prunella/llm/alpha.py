"""A sparsity for each block from the tails of its spectra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.graph.match import check_patterns, chosen, names_of_layer
from prunella.graph.matrix import to_matrix
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import blocks_of
from prunella.llm.one_shot import _within
from prunella.model.forward import forward, mode
from prunella.model.unwrap import unwrap
from prunella.registry.method import search
from prunella.stats.subject import first_seen
from prunella.types import Inputs


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of how the spectrum of `W W^T` falls off: small where few directions carry a layer.

    `1 + k / sum_{i <= k} ln(e_i / e_{k+1})` over the k = n // 2 largest of n eigenvalues; infinite if they are equal.
    """
    energy = torch.linalg.svdvals(weight.double()).square()
    k = max(1, len(energy) // 2)
    tiny = torch.finfo(torch.float64).tiny
    logs = (energy[:k].clamp_min(tiny) / energy[min(k, len(energy) - 1)].clamp_min(tiny)).log().sum()
    return 1 + k / float(logs) if logs > 0 else float("inf")


@search(source="Lu et al. 2024, arXiv:2410.10912 (AlphaPruning)")
@torch.no_grad()
def alpha_sparsities(
    model: nn.Module, inputs: Inputs, *, sparsity: float = 0.7, spread: float = 0.1, skip: Sequence[str] = ()
) -> dict[str, float]:
    """The sparsity of every layer in the blocks, less where spectra have heavy tails: for `OneShot(sparsity=...)`.

    Each block gets `s_b = c (1 - spread + 2 spread (a_b - a_min) / (a_max - a_min))`, with a_b the mean of
    `tail_exponent` over its layers and c such that the mean over all weights is `sparsity`. Layers of a block share it.
    Data: none.

    sparsity: in [0, 1), of the layers in blocks. spread: in [0, 1), how far from the mean; 0 is uniform. skip: patterns
    of layers that stay whole and do not count. Errors: RequestError if a layer would lose everything.

    Use: single weights of language models above 60 %. Avoid: N:M, whose sparsity is fixed; and without a look at the
    model's loss, since spectra say nothing of the data.
    """
    if not 0 <= sparsity < 1 or not 0 <= spread < 1:
        raise RequestError(f"cannot use sparsity={sparsity:g}, spread={spread:g}", "both are in [0, 1)", "0.7 and 0.1")
    within, alphas, sizes = {}, dict[str, list[float]](), {}
    for name, block, matrix in _in_blocks(unwrap(model), inputs, skip):
        alphas.setdefault(block, []).append(tail_exponent(matrix))
        within[name], sizes[name] = block, matrix.numel()
    if not within:
        raise RequestError("there is no layer in a block", "skip= leaves none", "skip less")
    shares = _shares({block: sum(some) / len(some) for block, some in alphas.items()}, spread)
    scale = sparsity * sum(sizes.values()) / sum(shares[within[name]] * size for name, size in sizes.items())
    found = {name: scale * shares[block] for name, block in within.items()}
    if max(found.values()) >= 1:
        raise RequestError(f"a layer would have to lose {max(found.values()):.0%}", "", "ask for less, or less spread")
    return found


def _in_blocks(model: nn.Module, inputs: Inputs, skip: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, block and matrix of each layer that lives in a block."""
    with mode(model, training=False):
        graph = couple(model, inputs)
        check_patterns(graph, skip, ())
        blocks = blocks_of(model, graph, inputs, forward)
    named = dict(model.named_parameters(remove_duplicate=False))
    for layer in first_seen(graph.layers):
        home = next((b.path for b in blocks if _within(graph.entities[layer.entity].names, b)), None)
        if home is not None and not chosen(names_of_layer(graph, layer), skip, ()):
            yield layer.name, home, to_matrix(named[layer.entity].detach(), layer)


def _shares(alphas: dict[str, float], spread: float) -> dict[str, float]:
    """Between 1 - spread and 1 + spread, linear in alpha; all 1 if there is nothing to tell them apart."""
    known = [a for a in alphas.values() if a < float("inf")]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if not high > low:
        return dict.fromkeys(alphas, 1.0)
    return {block: 1 - spread + 2 * spread * (min(a, high) - low) / (high - low) for block, a in alphas.items()}
