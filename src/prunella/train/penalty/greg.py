"""Growing regularisation: what a plan removes is pulled to zero harder and harder, so that the net can adapt."""

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
class Growing:
    """A penalty on the weights that a plan removes; it grows by `delta` every `every` steps, up to `ceiling`.

    `lambda_t / 2 * sum of w^2` over what goes, `lambda_t = min(delta * (1 + t // every), ceiling)`. It is a function of
    the model for the loss; call `step()` after each optimizer step. When `done`, apply the plan or shrink by it.

        growing = Growing(model, plan, delta=1e-4, every=10)
        finetune(model, data, penalized(loss, growing), steps=..., lr=..., on_step=lambda *_: growing.step())

    plan: any, of masks or of structure: GReg-1 with one by magnitude. None pulls at every weight with at least two
    axes: where the loss is flat weights shrink most, and a plan by magnitude after it is GReg-2.
    delta, ceiling: above 0; usual 1e-4 and 1. every: steps, at least 1.

    Data: none of its own. Plain gradient steps need `lr * ceiling < 2`.

    Use: high ratios, where cutting at once hurts. Avoid: short training: `every * ceiling / delta` steps.
    """

    def __init__(
        self, model: nn.Module, plan: Plan | None, *, delta: float = 1e-4, every: int = 10, ceiling: float = 1.0
    ) -> None:
        if not (0 < delta <= ceiling and every >= 1):
            found = f"found delta={delta:g}, ceiling={ceiling:g}, every={every}"
            raise RequestError("Growing needs 0 < delta <= ceiling and every of at least 1", found, "delta=1e-4")
        self.delta, self.every, self.ceiling, self.taken = delta, every, ceiling, 0
        self._gone = _gone(unwrap(model), plan)

    @property
    def strength(self) -> float:
        """The present lambda."""
        return min(self.delta * (1 + self.taken // self.every), self.ceiling)

    @property
    def done(self) -> bool:
        """Whether the ceiling is reached."""
        return self.strength >= self.ceiling

    def step(self) -> None:
        """Count one training step."""
        self.taken += 1

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of `model`, or of a copy of it."""
        named = parameters(model, self._gone)
        sums = [(named[name] * gone.to(named[name])).square().sum() for name, gone in self._gone.items()]
        return torch.stack(sums).sum() * (self.strength / 2)


def _gone(model: nn.Module, plan: Plan | None) -> dict[str, Mask]:
    """Parameter -> True where it is pulled at."""
    if plan is None:
        return {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}
    masks = plan_masks(model, plan)
    gone = {name: ~masks[p] for name, p in model.named_parameters() if p in masks and not bool(masks[p].all())}
    if not gone:
        raise RequestError("the plan removes nothing", "there is nothing to pull at", "ask for a smaller model")
    return gone
