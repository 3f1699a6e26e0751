"""Top-KAST: the forward and backward passes are always sparse, while the stored weights are dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.masks import reapply_, record_
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import training
from prunella.selection import keep_top
from prunella.train.gates.gate import put_on, take_off, weights
from prunella.transform.apply import plan_masks

M = TypeVar("M", bound=nn.Module)


class _TwoMaskProduct(torch.autograd.Function):
    """One mask for the forward pass, a wider one for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return weight * forward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None


class TwoMasks(nn.Module):
    """The parametrization of a weight: `active` masks the forward pass; `reached` contains it and gets gradients."""

    active: Tensor
    reached: Tensor

    def __init__(self, weight: Tensor, active: int, reached: int) -> None:
        super().__init__()
        self.counts = active, reached
        self.register_buffer("active", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.register_buffer("reached", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.choose(weight)

    def choose(self, weight: Tensor) -> None:
        """Renew both masks: the largest magnitudes, in the exact numbers."""
        sizes = weight.detach().abs().flatten()
        self.active.copy_(keep_top(sizes, self.counts[0]).view_as(weight))
        self.reached.copy_(keep_top(sizes, self.counts[1]).view_as(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        masked: Tensor = _TwoMaskProduct.apply(weight, self.active, self.reached)  # type: ignore[no-untyped-call]
        return masked


class TopKast(Generic[M]):
    """The loop of `top_kast_`: call `step()` after each `optimizer.step()`, and `finalize()` at the end."""

    def __init__(self, model: M, names: Mapping[str, tuple[int, int]], every: int) -> None:
        self.model, self.every, self.taken = model, every, 0
        root = unwrap(model)
        self._weights = {name: root.get_parameter(name) for name in names}
        counts = {parameter: names[name] for name, parameter in self._weights.items()}
        self._masks = put_on(root, list(names), lambda parameter: TwoMasks(parameter, *counts[parameter]))

    def step(self) -> bool:
        """Count one training step; returns whether the masks were renewed."""
        self.taken += 1
        if self.taken % self.every:
            return False
        for parameter, masks in zip(self._weights.values(), self._masks, strict=True):
            masks.choose(parameter)
        return True

    def penalty(self) -> Tensor:
        """`sum_A w^2 + sum_{B - A} w^2 / D`, with D the density of A: scale it and add it to the loss.

        Weights with gradients that are not active are penalized more, so that they become active only if the loss
        gradient is strong.
        """
        parts = []
        for parameter, masks in zip(self._weights.values(), self._masks, strict=True):
            density = masks.counts[0] / parameter.numel()
            squares = parameter.square()
            parts.append((squares * masks.active).sum() + (squares * (masks.reached & ~masks.active)).sum() / density)
        return torch.stack(parts).sum()

    def finalize(self) -> M:
        """Return a plain model with its former keys: the largest weights are unchanged, the others zero and masked."""
        masks_by_parameter = dict(take_off(self.model, TwoMasks))
        if not masks_by_parameter:
            raise RequestError("the model is finalized already", "it carries no Top-KAST masks", "call finalize() once")
        for parameter, masks in masks_by_parameter.items():
            masks.choose(parameter)
        record_(self.model, {parameter: masks.active for parameter, masks in masks_by_parameter.items()})
        return reapply_(self.model)


@training(source="Jayakumar et al. 2020, arXiv:2106.03517")
def top_kast_(model: M, plan: Plan, *, extra: float = 0.1, every: int = 1) -> TopKast[M]:
    """Use the largest weights forward, give gradients to a larger set, and leave all other weights alone.

    Forward `w * [|w| in the top D]`, backward `g * [|w| in the top D + M]`: a weight outside both keeps its value, and
    its gradient is exactly 0. The masks follow the magnitudes and change during training. Data: the training data.

        loop = top_kast_(model, plan(model, batch, named("erk_magnitude"), target=Sparsity(0.9)), extra=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...; (loss + 1e-4 * loop.penalty()).backward(); optimizer.step(); loop.step()
        model = loop.finalize()

    plan: of masks; it gives the number of active weights of each layer, `D`. It is not applied. extra: M, in [0, 1),
    the fraction of a layer's weights that gets gradients in addition to the active ones. every: steps between two
    updates of the masks. Momentum and decoupled weight decay act on all weights: take plain SGD, or decay by
    `penalty()`.
    Errors: RequestError for numbers out of range, or a plan without masks.

    Use: gradients as sparse as the weights, where a dense gradient must never be formed. Avoid: tight storage: all
    weights are kept; take `rigl`.
    """
    if not 0 <= extra < 1 or every < 1:
        raise RequestError(f"extra={extra:g}, every={every} are out of range", "extra is in [0, 1), every from 1 up")
    if not plan.masks or plan.cuts:
        raise RequestError("the plan has no masks of weights", "Top-KAST ranks single weights", "take Element()")
    root = unwrap(model)
    masks = plan_masks(root, plan)
    counts = {}
    for name, parameter in weights(root, list(plan.masks)):
        active, size = int(masks[parameter].sum()), parameter.numel()
        counts[name] = active, min(size, active + round(extra * size))
    return TopKast(model, counts, every)
