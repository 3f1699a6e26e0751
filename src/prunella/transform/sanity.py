"""Is a mask worth its name? Which layers it empties, and the controls that a method has to beat."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace

import torch
from torch import nn

from prunella.errors import NotSupported, RequestError
from prunella.model.masks import masks_of, reapply_
from prunella.planning.accounting import empty
from prunella.planning.plan import Plan
from prunella.registry.method import control, metric
from prunella.types import Mask


@metric(source="Tanaka et al. 2020, arXiv:2006.05467 (layer collapse)")
def collapsed(subject: Plan | nn.Module) -> tuple[str, ...]:
    """Names of the layers of which nothing is left, so that their output no longer depends on their input.

    Of a plan: rows that keep 0. Of a model: weights with two axes or more whose values are all zero.

    Use: after every plan beyond 90 %, or with `min_units=0`. Avoid: as the only check: paths can be cut between layers
    that still have weights.
    """
    if isinstance(subject, Plan):
        return tuple(empty(subject.rows))
    weights = ((name, p) for name, p in subject.named_parameters() if p.dim() > 1 and p.numel())
    return tuple(name.removesuffix(".weight") for name, p in weights if not bool(p.detach().any()))


@control(source="Su et al. 2020, arXiv:2009.11094; Frankle et al. 2021, arXiv:2009.08576")
def shuffled_plan(plan: Plan, *, seed: int = 0) -> Plan:
    """The plan with the mask of every layer shuffled: the same number of weights in each, at random places.

    `m'_l = m_l[permutation]`, drawn for each layer from `seed` and its name. What only depends on how many weights each
    layer keeps does not change. Patterns such as N:M or blocks are not kept up. seed: of the permutations.

    Use: as the control of a mask: if training from it is as good, only the layers' densities mattered. Avoid: plans
    that cut structure, which are refused.
    """
    if not plan.masks or plan.cuts:
        raise RequestError("there are no masks to shuffle", "the plan cuts structure, or nothing", "use Element()")
    return replace(plan, masks={name: _shuffled(mask, f"{seed} {name}") for name, mask in plan.masks.items()})


def _shuffled(mask: Mask, key: str) -> Mask:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)


@control(source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2021, arXiv:2009.08576")
def reinitialised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy with weights drawn anew by each module's own `reset_parameters`, under the same masks.

    The caller's random state is left as it was. seed: of the new weights. Errors: NotSupported for parameters of
    modules that cannot draw them.

    Use: as the control of masks found at initialisation or by tickets. Avoid: models whose weights were drawn by code
    of their own: the distribution then is torch's, not theirs.
    """
    twin = copy.deepcopy(model)
    stuck = [name for name, m in twin.named_modules() if m._parameters and not hasattr(m, "reset_parameters")]
    if stuck:
        why = f"{stuck[0] or 'the model itself'} has parameters and no reset_parameters()"
        raise NotSupported("the model cannot draw its weights anew", why, "give that module the method")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in twin.modules():
            if module._parameters:
                module.reset_parameters()  # type: ignore[operator]
    return reapply_(twin) if masks_of(twin) else twin
