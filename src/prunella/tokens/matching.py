"""Bipartite soft matching of similar tokens, and their merging, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prunella.errors import RequestError


@dataclass(frozen=True, eq=False)
class Matching:
    """Of `tokens` tokens, `source[b, i]` merges into `target[b, i]`; `kept[b]` are the others in their former order.

    source, target: `(batch, r)`. kept: `(batch, tokens - r)`. A target is never a source, and may have several.
    """

    tokens: int
    source: Tensor
    target: Tensor
    kept: Tensor

    @property
    def r(self) -> int:
        """Number of merged tokens."""
        return int(self.source.shape[1])


def most(tokens: int, protected: int) -> int:
    """The largest r: every unprotected even token may merge, if there is an unprotected odd token."""
    first = protected + protected % 2
    takes = protected + 1 - protected % 2 < tokens
    return len(range(first, tokens, 2)) if takes else 0


def bipartite_match(metric: Tensor, r: int, *, protected: int = 0) -> Matching:
    """Match the r even tokens with the most similar odd partners.

    Every even token has one edge to the odd token with the largest cosine similarity, and the `r` edges of largest
    similarity are taken; ties go to the first. metric: `(batch, tokens, width)`. r: from 0 to half of the tokens.
    protected: number of tokens at the front (a class token) that neither merge nor receive others.
    Errors: RequestError if r exceeds the number of tokens that may merge.

    Example:

        >>> import torch, prunella as pr
        >>> matching = pr.tokens.bipartite_match(torch.randn(1, 6, 4), r=2)
        >>> matching.kept.shape
        torch.Size([1, 4])
    """
    tokens = metric.shape[1]
    if not 0 <= r <= most(tokens, protected):
        why = f"of {tokens} tokens with {protected} protected, at most {most(tokens, protected)} may go"
        raise RequestError(f"{r} tokens cannot be merged", why, "give a smaller r, or merge in several rounds")
    unit = normalize(metric.detach().to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    even, odd = torch.arange(0, tokens, 2, device=metric.device), torch.arange(1, tokens, 2, device=metric.device)
    similarity = similarity.masked_fill((even < protected)[:, None] | (odd < protected)[None], -torch.inf)
    if not r:  # there may be no odd token at all
        nothing = even.new_zeros(len(metric), 0)
        return Matching(tokens, nothing, nothing, torch.arange(tokens, device=metric.device).expand(len(metric), -1))
    best, partner = similarity.max(2)
    edges = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    source, target = even[edges], odd[partner.gather(1, edges)]
    kept = torch.ones(metric.shape[:2], dtype=torch.bool, device=metric.device).scatter(1, source, False)
    return Matching(tokens, source, target, kept.nonzero()[:, 1].view(len(metric), tokens - r))


def merge(x: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """The kept tokens, each the average of itself and the tokens merged into it, weighted by size; and their sizes.

    `y_t = sum s_i x_i / sum s_i` over the target and its sources. x: `(batch, tokens, width)`. sizes: `(batch,
    tokens)`, the number of original tokens in each. A token without sources keeps its bits; with r = 0 all tokens do.
    matching: from `bipartite_match`.

    Example:

        >>> import torch, prunella as pr
        >>> x, sizes = torch.randn(1, 6, 4), torch.ones(1, 6)
        >>> merged, sizes = pr.tokens.merge(x, sizes, pr.tokens.bipartite_match(x, r=2))
        >>> merged.shape, float(sizes.sum())
        (torch.Size([1, 4, 4]), 6.0)
    """
    if not matching.r:
        return x, sizes
    weighted = x * sizes[..., None].to(x.dtype)
    wide = matching.source[..., None].expand(-1, -1, x.shape[2])
    targets = matching.target[..., None].expand_as(wide)
    total = weighted.scatter_add(1, targets, weighted.gather(1, wide))
    size = sizes.scatter_add(1, matching.target, sizes.gather(1, matching.source))
    merged = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, matching.target, True)
    mixed = torch.where(merged[..., None], total / size[..., None].to(x.dtype), x)
    return mixed.gather(1, matching.kept[..., None].expand(-1, -1, x.shape[2])), size.gather(1, matching.kept)


def unmerge(x: Tensor, matching: Matching) -> Tensor:
    """All tokens, `(batch, tokens, width)`: a merged token gets the value of its target.

    x: the kept tokens. matching: of the merge.

    Example:

        >>> import torch, prunella as pr
        >>> x, sizes = torch.randn(1, 6, 4), torch.ones(1, 6)
        >>> matching = pr.tokens.bipartite_match(x, r=2)
        >>> pr.tokens.unmerge(pr.tokens.merge(x, sizes, matching)[0], matching).shape
        torch.Size([1, 6, 4])
    """
    if not matching.r:
        return x
    order = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    place = order.new_zeros(len(x), matching.tokens).scatter(1, matching.kept, order)
    place = place.scatter(1, matching.source, place.gather(1, matching.target))
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))
