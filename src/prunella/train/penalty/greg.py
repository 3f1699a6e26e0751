"""Growing regularization: a rising penalty on the weights that a plan removes, so that the network can adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import training
from prunella.train.penalty.units import parameters
from prunella.transform.apply import plan_masks
from prunella.types import Mask


@training(source="Wang et al. 2021, arXiv:2012.09243 (GReg-1, GReg-2)")
class GReg:
    """A penalty on the weights that a plan removes; it grows by `delta` every `every` steps, up to `ceiling`.

    `lambda_t / 2 * sum of w^2` over the pruned weights, `lambda_t = min(delta * (1 + t // every), ceiling)`. The object
    is a function of the model, a term for the loss; call `step()` after each optimizer step. When `done`, apply the
    plan or shrink by it.

        greg = GReg(model, plan, delta=1e-4, every=10)
        finetune(model, data, penalized(loss, greg), steps=..., lr=..., on_step=lambda *_: greg.step())

    plan: any, of masks or of structure; a plan by magnitude gives GReg-1. With None the penalty is on every weight with
    at least two axes: weights shrink most where the loss is flat, and a plan by magnitude afterwards gives GReg-2.
    delta, ceiling: above 0; usual 1e-4 and 1. every: steps, at least 1.

    Data: none of its own. Plain gradient steps need `lr * ceiling < 2`.

    Use: high ratios, where one-shot pruning loses too much. Avoid: short training: it takes `every * ceiling / delta`
    steps.
    """

    def __init__(
        self, model: nn.Module, plan: Plan | None, *, delta: float = 1e-4, every: int = 10, ceiling: float = 1.0
    ) -> None:
        if not (0 < delta <= ceiling and every >= 1):
            why = f"found delta={delta:g}, ceiling={ceiling:g}, every={every}"
            raise RequestError("GReg needs 0 < delta <= ceiling and every >= 1", why, "for example delta=1e-4")
        self.delta, self.every, self.ceiling, self.taken = delta, every, ceiling, 0
        self._pruned = _pruned_weights(unwrap(model), plan)

    @property
    def strength(self) -> float:
        """The present lambda."""
        return min(self.delta * (1 + self.taken // self.every), self.ceiling)

    @property
    def done(self) -> bool:
        """Whether the strength has reached the ceiling."""
        return self.strength >= self.ceiling

    def step(self) -> None:
        """Count one training step."""
        self.taken += 1

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of `model`, or of a copy of it."""
        named = parameters(model, self._pruned)
        sums = [(named[name] * pruned.to(named[name])).square().sum() for name, pruned in self._pruned.items()]
        return torch.stack(sums).sum() * (self.strength / 2)


def _pruned_weights(model: nn.Module, plan: Plan | None) -> dict[str, Mask]:
    """Parameter -> True at the weights under the penalty."""
    if plan is None:
        return {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}
    masks = plan_masks(model, plan)
    pruned = {name: ~masks[p] for name, p in model.named_parameters() if p in masks and not bool(masks[p].all())}
    if not pruned:
        raise RequestError("the plan removes nothing", "GReg has no weights to penalize", "ask for a smaller model")
    return pruned
