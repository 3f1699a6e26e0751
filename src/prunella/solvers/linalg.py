"""Linear algebra of Gram matrices that may be singular."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prunella.types import Gram

log = logging.getLogger(__name__)
Factors = TypeVar("Factors")
SMALLEST = 1e-12
"""First damping tried when the matrix is singular, relative to its mean diagonal."""
SINGULAR = 1e-13
"""Squared ratio of Cholesky's smallest to largest pivot below which a matrix counts as singular."""


def damped_factor(gram: Gram, damping: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor of `G + damping * mean(diag(G)) I`, and the damping used.

    The damping starts at the given value and grows tenfold, from 1e-12, while the matrix is numerically singular. The
    log reports the growth. A matrix without a positive diagonal is replaced by the identity.
    """
    scale = float(gram.diagonal().double().mean())  # the sum may be more than a float32 can hold
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not scale > 0:
        log.warning("a Gram matrix of %d inputs is zero: replaced by the identity", len(gram))
        return eye, damping
    requested = damping
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + damping * scale * eye)
        pivots = factor.diagonal()
        if not int(failed) and float((pivots.min() / pivots.max()) ** 2) > SINGULAR:
            if damping > requested:
                log.warning("a Gram matrix of %d inputs is singular: damping %g, not %g", len(gram), damping, requested)
            return factor, damping
        damping = max(10 * damping, SMALLEST)


def for_each_gram(factors: Callable[[Gram, float], Factors]) -> Callable[[Gram, float], Factors]:
    """The function of a Gram matrix and a damping, computed once for all layers that read one input.

    Its last result is kept while the matrix is alive and unchanged, and must not be written to.
    """
    known: MutableMapping[Gram, tuple[tuple[int, float], Factors]] = WeakTensorKeyDictionary()

    @wraps(factors)
    def shared(gram: Gram, damping: float) -> Factors:
        if gram.is_inference():  # torch does not count the writes to it
            return factors(gram, damping)
        state = gram._version, damping
        kept = known.get(gram)
        if kept is None or kept[0] != state:
            known.pop(gram, None)  # before the next, which would be a second one in memory
            kept = known[gram] = state, factors(gram, damping)
        return kept[1]

    return shared


def or_identity(gram: Gram) -> Gram:
    """The matrix, or the identity for inputs that were all zero: then magnitude decides."""
    if bool((gram.diagonal() > 0).any()):
        return gram
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def damped_solve(gram: Gram, cross: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Solve `(G + damping * mean(diag(G)) I) D = C`; also the damping used, see `damped_factor`.

    A zero matrix gives a zero solution.
    """
    if float(gram.diagonal().double().mean()) <= 0:
        return torch.zeros_like(cross), ridge
    factor, damping = damped_factor(gram, ridge)
    return torch.cholesky_solve(cross, factor), damping
