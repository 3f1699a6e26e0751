"""Dynamic network surgery: connections are pruned and restored while the dense weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.masks import forget_masks_, pack, saved_masks
from prunella.model.unwrap import bare_optimizer, unwrap
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import training
from prunella.targets import Sparsity
from prunella.train.pruner import Planner, planner_of
from prunella.transform.apply import apply_, plan_masks
from prunella.types import Inputs, Mask


@training(source="Guo et al. 2016, arXiv:1608.04493 (dynamic network surgery)")
class NetworkSurgery:
    """Prune connections, and restore them when they have grown: the mask changes while the dense weights are trained.

        recipe = Recipe(granularity=Element())
        surgery = NetworkSurgery(model, optimizer, recipe=recipe, target=Sparsity(0.9), inputs=batch)
        for batch in loader:
            ...; optimizer.step(); surgery.step()
        surgery.finish()

    The model computes with `m * W`; the gradient at these weights updates the dense `W`, whether masked or not. Every
    `every` steps the mask is renewed by two thresholds: `m = 0` where the plan for sparsity `s - band` removes the
    weight, `m = 1` where the plan for `s + band` keeps the weight, unchanged in between. With `magnitude` these are two
    thresholds on `|W|`, per layer or global, by the allocation. Between renewals the parameters hold `m * W`; they hold
    the dense values during `optimizer.step()` only. State-dict keys stay the same.

    target: the sparsity `s`. band: from 0 up, with `s - band` and `s + band` in [0, 1). every: steps.
    `finish` plans for exactly `s` on the dense weights, zeroes the other weights permanently, and removes its hooks.

    Use: masks of single weights in a long training. Avoid: channels: both sides of a masked unit are zero and get no
    gradient; take `SoftFilterPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        recipe: Recipe | Planner,
        target: Sparsity,
        inputs: Inputs | None = None,
        band: float = 0.05,
        every: int = 100,
    ) -> None:
        if not 0 <= band <= target.value or target.value + band >= 1 or every < 1:
            what = f"band={band:g} and every={every} do not fit {target}"
            raise RequestError(what, "0 <= band, s - band >= 0, s + band < 1, every >= 1", "for example band=0.05")
        self.model, self.target, self.band, self.every = model, target, band, every
        self.taken, optimizer = 0, bare_optimizer(optimizer)
        self._planner = planner_of(model, recipe, inputs)
        self._dense: dict[nn.Parameter, Tensor] = {}
        self._masks: dict[nn.Parameter, Mask] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._restore()),
            optimizer.register_step_post_hook(lambda *_: self._hide()),
        ]

    def step(self) -> None:
        """Count one training step; renew the mask when it is due."""
        self.taken += 1
        if self.taken % self.every == 0:
            self._restore()
            self._renew()
            self._hide()

    def finish(self) -> Plan:
        """Prune permanently to exactly the target, by the dense weights; the model carries the masks."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        plan = self._plan_for(self.target.value)
        forget_masks_(self.model)
        apply_(self.model, plan)
        return plan

    def state_dict(self) -> dict[str, Tensor]:
        """Step, masks (`bits.NAME`) and dense weights (`dense.NAME`); the parameters themselves hold only `m * W`."""
        state = {"step": torch.tensor(self.taken, device="cpu")}
        for name, parameter in unwrap(self.model).named_parameters():
            if parameter in self._masks:
                state[f"bits.{name}"] = pack(self._masks[parameter]).bits
                state[f"dense.{name}"] = self._dense[parameter].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state_dict()`: the saved dense weights and masks replace those of the model."""
        masks = saved_masks(self.model, state)
        named = dict(unwrap(self.model).named_parameters())
        dense = {named[key.removeprefix("dense.")]: value for key, value in state.items() if key.startswith("dense.")}
        if dense.keys() != masks.keys() or any(p.shape != value.shape for p, value in dense.items()):
            why = "names or shapes differ"
            raise RequestError("the saved weights do not fit their masks", why, "load the result of state_dict()")
        self.taken, self._masks = int(state["step"]), masks
        self._dense = {p: value.to(p.device, p.dtype).clone() for p, value in dense.items()}
        self._restore()
        self._hide()

    def _renew(self) -> None:
        mild, harsh = self._plan_for(self.target.value - self.band), self._plan_for(self.target.value + self.band)
        root = unwrap(self.model)
        may_keep, must_keep = plan_masks(root, mild), plan_masks(root, harsh)
        self._masks = {p: spliced(self._masks.get(p), may_keep[p], must_keep[p]) for p in must_keep}

    def _plan_for(self, sparsity: float) -> Plan:
        assert self._planner is not None
        plan = self._planner(replace(self.target, value=sparsity))
        if plan.cuts or plan.dropped:
            raise RequestError(
                "NetworkSurgery prunes single weights only",
                "a masked channel gets no gradient, so that it could never be restored",
                "use Element(), Block or Vector, or SoftFilterPruner for channels",
            )
        return plan

    def _restore(self) -> None:
        """Write the dense weights into the parameters."""
        with torch.no_grad():
            for parameter, value in self._dense.items():
                parameter.copy_(value)
        self._dense.clear()

    def _hide(self) -> None:
        """Save the dense weights, and zero the masked weights in the parameters."""
        with torch.no_grad():
            for parameter, mask in self._masks.items():
                self._dense[parameter] = parameter.detach().clone()
                parameter.masked_fill_(~mask, 0)


def spliced(old: Mask | None, may_keep: Mask, must_keep: Mask) -> Mask:
    """The renewed mask: False below the lower threshold, True above the upper one, unchanged in between."""
    return must_keep | (may_keep if old is None else old & may_keep)
