"""Allocations from given numbers for each group: the result of a search, or of a sensitivity scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation

Shares = Mapping[str, float]
"""Group -> fraction of its units removed."""
Drops = Mapping[str, Sequence[Sequence[float]]]
"""Group -> points (fraction removed, quality lost), of a scan."""
_NO_SHARES: Shares = MappingProxyType({})
_NO_DROPS: Drops = MappingProxyType({})


@allocation(source="Yang et al. 2018, arXiv:1804.03230; Frantar & Alistarh 2022, arXiv:2201.13096")
def fixed(pools: Sequence[Pool], *, shares: Shares = _NO_SHARES) -> list[Tensor]:
    """Sparsities of groups in given proportions, scaled by one factor until the target is met.

    `key_r = (r + 1/2) / (n_l * share_l)`: at key 1 every group has lost `round(n_l * share_l)` of its units. A smaller
    target stops earlier, a larger target continues in the same proportion. Groups without a share, or with share 0,
    lose units only when all others are used up.

    shares: group name -> fraction in [0, 1]; without shares it is `uniform`. An unknown group name is an error.
    Errors: RequestError for a share out of range or an unknown group.

    Use: the result of a search, or shares chosen by hand. Avoid: models without known shares: take `global_`.
    """
    _check_names(shares, pools)
    wrong = next((name for name, share in shares.items() if not 0 <= share <= 1), None)
    if wrong is not None:
        raise RequestError(
            f"the share of {wrong} is {shares[wrong]:g}", "a share is a fraction removed", "0 <= share <= 1"
        )
    middles = [(torch.arange(pool.size, dtype=torch.float64, device="cpu") + 0.5) / max(1, pool.size) for pool in pools]
    fractions = [shares.get(pool.name, 0.0) for pool in pools]
    last = max((1 / share for share in fractions if share), default=0.0)
    return [key / share if share else last + 1 + key for key, share in zip(middles, fractions, strict=True)]


@allocation(source="Li et al. 2017, arXiv:1608.08710 (sensitivity of layers)")
def from_scan(pools: Sequence[Pool], *, drops: Drops = _NO_DROPS) -> list[Tensor]:
    """The same loss of quality for every group on its own, by the curves of a sensitivity scan.

    `key_r = max_{q <= r} drop_l((q + 1/2) / n_l)`, with `drop_l` linear between the measured points and 0 where nothing
    is removed. Beyond the last point `drop_l` has the slope of the last segment. `scan(...).allocation` binds the
    curves.

    drops: group name -> points (fraction removed, quality lost). Groups without a curve lose units only when all others
    are used up; without curves it is `uniform`. An unknown group name is an error.

    Use: when an evaluation and a scan are affordable. Avoid: high sparsity in several groups at once, where losses do
    not add up: search instead.
    """
    _check_names(drops, pools)
    curves = {pool.name: _curve(drops[pool.name], pool.size) for pool in pools if pool.name in drops}
    last = max((float(keys[-1]) for keys in curves.values() if len(keys)), default=0.0)
    keys_without_curve = [
        (torch.arange(pool.size, dtype=torch.float64, device="cpu") + 0.5) / max(1, pool.size) + last for pool in pools
    ]
    return [curves.get(pool.name, other) for pool, other in zip(pools, keys_without_curve, strict=True)]


def _curve(points: Sequence[Sequence[float]], size: int) -> Tensor:
    xs, ys = (np.array(values, dtype=float) for values in zip((0.0, 0.0), *sorted(map(tuple, points)), strict=True))
    fractions = (np.arange(size) + 0.5) / max(1, size)
    losses = np.interp(fractions, xs, ys)
    slope = max(0.0, (ys[-1] - ys[-2]) / max(xs[-1] - xs[-2], 1e-9)) if len(xs) > 1 else 0.0
    losses = np.where(fractions > xs[-1], ys[-1] + slope * (fractions - xs[-1]), losses)
    # A small part of the fraction breaks ties: groups without a loss are removed in equal fractions.
    return torch.from_numpy(np.maximum.accumulate(losses + 1e-9 * fractions))


def _check_names(named: Mapping[str, object], pools: Sequence[Pool]) -> None:
    known = {pool.name for pool in pools}
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        first = ", ".join(sorted(known)[:5])
        raise RequestError(f"there is no group {unknown} to prune", f"the groups are {first}", "name one of these")
