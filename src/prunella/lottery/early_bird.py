"""Early-bird tickets: the mask settles long before the weights do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from prunella.errors import RequestError
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import metric, training
from prunella.types import Mask


@metric(source="You et al. 2020, arXiv:1909.11957 (the distance); layers weigh the same here")
def mask_distance(first: Mapping[str, Mask], second: Mapping[str, Mask]) -> float:
    """Part of the positions at which two masks differ, averaged over layers.

    `mean_l |{i: a_li != b_li}| / n_l`: 0 for equal masks, 1 for opposite ones. Every layer counts the same, however
    many units it has.

    Use: watching whether a mask still moves. Avoid: masks of different models.
    """
    if first.keys() != second.keys() or not first:
        raise RequestError("the masks are not of the same layers", f"{len(first)} and {len(second)} layers", "")
    parts = [float((mask.cpu() != second[name].cpu()).double().mean()) for name, mask in first.items()]
    return sum(parts) / len(parts)


@training(source="You et al. 2020, arXiv:1909.11957")
class EarlyBird:
    """Say after which epoch the mask has settled, so that the rest of the training is done on the small network.

    Each `step` plans on the present weights and compares with the step before; the ticket is drawn when the last
    `window` distances are all below `eps`, at step `window + 1` at the earliest. Nothing is pruned here.

        bird = EarlyBird(lambda m: plan(m, batch, named("network_slimming"), target=Params(0.5)))
        for epoch in range(epochs):
            train_one_epoch(model)
            if drawn := bird.step(model):
                model = shrink(model, drawn)
                break

    prune: model -> plan; the paper takes channels by `bn_scale`, trained with an L1 penalty; any recipe will do.
    window: distances that must be small, from 1 up. eps: largest distance, in (0, 1).

    Use: saving most of the training of a network that will be pruned anyway. Avoid: criteria that need converged
    weights, or masks drawn at random.
    """

    def __init__(self, prune: Callable[[nn.Module], Plan], *, window: int = 5, eps: float = 0.1) -> None:
        if window < 1 or not 0 < eps < 1:
            raise RequestError(f"window={window}, eps={eps:g} are out of range", "window is from 1 up, eps in (0, 1)")
        self.prune, self.window, self.eps = prune, window, eps
        self.distances: list[float] = []
        self._last: Mapping[str, Mask] | None = None

    def step(self, model: nn.Module) -> Plan | None:
        """Count one epoch; the plan if the ticket is drawn now, else None."""
        made = self.prune(unwrap(model))
        return made if self.observe({**made.keep, **made.masks}) else None

    def observe(self, masks: Mapping[str, Mask]) -> bool:
        """Count one epoch by its masks (name -> kept units or weights); whether the ticket is drawn now."""
        if self._last is not None:
            self.distances.append(mask_distance(self._last, masks))
        self._last = {name: mask.clone() for name, mask in masks.items()}
        recent = self.distances[-self.window :]
        return len(recent) == self.window and max(recent) < self.eps
