"""AlphaPruning: a sparsity for each block from the tails of the spectra of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.graph.match import check_patterns, chosen, names_of_layer
from prunella.graph.matrix import to_matrix
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import blocks_of
from prunella.model.forward import forward
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.registry.method import search
from prunella.stats.subject import first_seen
from prunella.types import Inputs


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of the exponent of the spectrum of `W W^T`: small if few directions carry the layer.

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
    """The sparsity of every layer in the blocks, lower for heavy-tailed spectra: for `OneShot(sparsity=...)`.

    Each block gets `s_b = c (1 - spread + 2 spread (a_b - a_min) / (a_max - a_min))`, with a_b the mean of
    `tail_exponent` over its layers and c such that the mean over all weights is `sparsity`. All layers of a block have
    the same sparsity. Data: none.

    sparsity: in [0, 1), of the layers in blocks. spread: in [0, 1), how far from the mean; 0 is uniform. skip: patterns
    of layers that are kept dense and not counted. Errors: RequestError if a layer would lose all weights.

    Use: unstructured pruning of language models above 60 %. Avoid: N:M, whose sparsity is fixed; and without a check of
    the model's loss, since spectra do not depend on the data.
    """
    if not 0 <= sparsity < 1 or not 0 <= spread < 1:
        raise RequestError(f"cannot use sparsity={sparsity:g}, spread={spread:g}", "both are in [0, 1)", "0.7 and 0.1")
    block_of, exponents, sizes = {}, dict[str, list[float]](), {}
    for name, block, matrix in _layers_in_blocks(unwrap(model), inputs, skip):
        exponents.setdefault(block, []).append(tail_exponent(matrix))
        block_of[name], sizes[name] = block, matrix.numel()
    if not block_of:
        raise RequestError("there is no layer in a block", "skip= leaves none", "skip less")
    factors = _factors({block: sum(some) / len(some) for block, some in exponents.items()}, spread)
    scale = sparsity * sum(sizes.values()) / sum(factors[block_of[name]] * size for name, size in sizes.items())
    sparsities = {name: scale * factors[block] for name, block in block_of.items()}
    if max(sparsities.values()) >= 1:
        what = f"a layer would have a sparsity of {max(sparsities.values()):.0%}"
        raise RequestError(what, "its block has the largest tail exponent", "ask for a smaller sparsity or spread")
    return sparsities


def _layers_in_blocks(model: nn.Module, inputs: Inputs, skip: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, path of the block, and matrix of each layer in a block."""
    with mode(model, training=False):
        graph = couple(model, inputs)
        check_patterns(graph, skip, ())
        blocks = blocks_of(model, graph, inputs, forward)
    named = dict(model.named_parameters(remove_duplicate=False))
    for layer in first_seen(graph.layers):
        path = next((block.path for block in blocks if block.contains(graph.entities[layer.entity].names)), None)
        if path is not None and not chosen(names_of_layer(graph, layer), skip, ()):
            yield layer.name, path, to_matrix(named[layer.entity].detach(), layer)


def _factors(exponents: dict[str, float], spread: float) -> dict[str, float]:
    """Between 1 - spread and 1 + spread, linear in the exponent; all 1 if the finite exponents are equal."""
    finite = [a for a in exponents.values() if a < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if not high > low:
        return dict.fromkeys(exponents, 1.0)
    return {block: 1 - spread + 2 * spread * (min(a, high) - low) / (high - low) for block, a in exponents.items()}
