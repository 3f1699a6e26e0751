"""Early-bird tickets: the mask becomes stable long before the weights."""

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
    """Fraction of the positions at which two masks differ, averaged over layers.

    `mean_l |{i: a_li != b_li}| / n_l`: 0 for equal masks, 1 for opposite ones. All layers have the same weight,
    whatever their size.
    Errors: RequestError for masks of different layers.

    Example:

        >>> import torch, prunella as pr
        >>> first, second = {"0": torch.tensor([True, False])}, {"0": torch.tensor([True, True])}
        >>> pr.lottery.mask_distance(first, second)
        0.5

    Use: checking whether a mask still changes. Avoid: masks of different models.
    """
    if first.keys() != second.keys() or not first:
        todo = "pass masks of one model"
        raise RequestError("the masks are not of the same layers", f"{len(first)} and {len(second)} layers", todo)
    parts = [float((mask.cpu() != second[name].cpu()).double().mean()) for name, mask in first.items()]
    return sum(parts) / len(parts)


@training(source="You et al. 2020, arXiv:1909.11957")
class EarlyBird:
    """Detect the epoch after which the mask is stable; train the small network from there.

    Each `step` plans on the present weights and compares the masks with those of the previous step. The ticket is drawn
    when the last `window` distances are all below `eps`, at step `window + 1` at the earliest. The model does not
    change.

        bird = EarlyBird(lambda m: plan(m, batch, named("network_slimming"), target=Params(0.5)))
        for epoch in range(epochs):
            train_one_epoch(model)
            if drawn := bird.step(model):
                model = shrink(model, drawn)
                break

    prune: model -> plan; the paper takes channels by `bn_scale`, trained with an L1 penalty; any recipe is possible.
    window: number of distances that must be small, from 1 up. eps: largest distance, in (0, 1).

    Use: saving most of the dense training of a network that will be pruned anyway. Avoid: criteria that need converged
    weights, or random masks.
    """

    def __init__(self, prune: Callable[[nn.Module], Plan], *, window: int = 5, eps: float = 0.1) -> None:
        if window < 1 or not 0 < eps < 1:
            raise RequestError(f"window={window}, eps={eps:g} are out of range", "window is from 1 up, eps in (0, 1)")
        self.prune, self.window, self.eps = prune, window, eps
        self.distances: list[float] = []
        self._last: Mapping[str, Mask] | None = None

    def step(self, model: nn.Module) -> Plan | None:
        """Count one epoch; returns the plan if the ticket is drawn now, else None."""
        plan = self.prune(unwrap(model))
        return plan if self.observe({**plan.keep, **plan.masks}) else None

    def observe(self, masks: Mapping[str, Mask]) -> bool:
        """Count one epoch by its masks (name -> kept units or weights); returns whether the ticket is drawn now."""
        if self._last is not None:
            self.distances.append(mask_distance(self._last, masks))
        self._last = {name: mask.clone() for name, mask in masks.items()}
        recent = self.distances[-self.window :]
        return len(recent) == self.window and max(recent) < self.eps
