"""Masks that persist during training, and gradual pruning.

Weight decay and momentum move masked weights away from zero at every optimizer step; a hook on the optimizer sets these
weights to zero again and clears their optimizer state. The same object prunes gradually along a schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunella.errors import RequestError
from prunella.model.masks import (
    Packed,
    copy_masks_,
    forget_masks_,
    masks_of,
    plain_weights_,
    reapply_,
    record_,
    records,
    saved_masks,
)
from prunella.model.unwrap import bare_optimizer, bare_optimizers, unwrap
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.schedules import Schedule, cubic
from prunella.targets import Target, part_of
from prunella.train.optimizer_state import check_optimizer, clear_state, mask_gradients
from prunella.transform.apply import apply_, plan_masks
from prunella.types import Inputs, Mask

log = logging.getLogger(__name__)
Planner = Callable[[Target], Plan]


class Pruner:
    """Keep masked weights at zero while `optimizer` trains `model`; with a recipe, prune along a schedule as well.

    After every `optimizer.step()` masked weights are exactly 0, and so is their optimizer state: every state tensor of
    the parameter's shape (momentum, first and second moments). For optimizers that are not element-wise (Adafactor,
    Muon) the gradients of masked weights are set to zero before the step; LBFGS is refused. A step that a `GradScaler`
    skips changes nothing. State-dict keys of model and optimizer stay the same. While attached, masks cost one byte per
    weight.

        with Pruner(model, optimizer):                      # the model carries masks from apply_
            train(model, optimizer)

        pruner = Pruner(model, optimizer, recipe=recipe, target=Sparsity(0.9), inputs=batch, steps=1000, every=50)
        for batch in loader:
            ...; optimizer.step(); pruner.step()

    optimizer: one, or several, also inside the wrapper of accelerate or of the Trainer. All must train parameters of
        this model.
    recipe: a `Recipe`, or a function from target to plan where planning needs data:
        `lambda target: plan(model, batch, recipe, target=target, data=loader, loss=loss)`.
    target, schedule: at step t the fraction `schedule(t / steps)` of the target is met, and at t = steps all of it.
    every: steps between two plans; the last plan is always at `steps`.
    nested: pruned weights stay pruned. If a plan revives units, they stay pruned as well, the target is overshot, and a
        warning is logged. With `nested=False` the newest plan alone decides, and weights may come back.
    averages: moving averages of the weights (`AveragedModel`, a deep copy), which get the same masks.

    Example:

        >>> import torch, prunella as pr
        >>> model, batch = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> optimizer, recipe = torch.optim.Adam(model.parameters()), pr.Recipe(granularity=pr.Element())
        >>> with pr.Pruner(model, optimizer, recipe=recipe, target=pr.Sparsity(0.5), inputs=batch, steps=10) as pruner:
        ...     for _ in range(10):
        ...         optimizer.zero_grad(); model(batch).square().mean().backward()
        ...         optimizer.step(); plan = pruner.step()
        >>> int(model.weight.count_nonzero())
        32
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] = (),
        *,
        recipe: Recipe | Planner | None = None,
        target: Target | None = None,
        inputs: Inputs | None = None,
        schedule: Schedule = cubic,
        steps: int = 0,
        every: int = 1,
        nested: bool = True,
        averages: Iterable[nn.Module] = (),
    ) -> None:
        if recipe is not None and (target is None or steps < 1 or every < 1):
            raise RequestError(
                "gradual pruning needs a target, and steps and every from 1 up",
                f"found target={target}, steps={steps}, every={every}",
                "for example target=Sparsity(0.9), steps=1000, every=50",
            )
        self.model, self.target, self.schedule = plain_weights_(model), target, schedule
        self.steps, self.every, self.nested = steps, every, nested
        self.averages = tuple(averages)
        self.taken = 0
        self._planner = planner_of(model, recipe, inputs)
        self._before: float | None = None
        self._fraction = 0.0
        self._cache: dict[nn.Parameter, tuple[Packed, Mask]] = {}
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[Optimizer] = []
        for one in bare_optimizers(optimizer):
            self.attach(one)
        self._mask_state()

    def attach(self, optimizer: Optimizer) -> Self:
        """Also apply the masks after each step of `optimizer`."""
        optimizer = bare_optimizer(optimizer)
        owned = set(unwrap(self.model).parameters())
        if not any(p in owned for group in optimizer.param_groups for p in group["params"]):
            raise RequestError(
                "this optimizer trains no parameter of the model",
                "it was made for another model, or before the model was copied or shrunk",
                "make the optimizer from model.parameters() first",
            )
        check_optimizer(optimizer)
        self._optimizers.append(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def detach(self) -> None:
        """Remove the hooks. The masks stay with the model; `finalize(model)` removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def step(self) -> Plan | None:
        """Count one training step; if an update is due, prune and return the plan.

        If a cyclic schedule has fallen to 0, all masks are removed, and there is no plan.
        """
        if self._planner is None or self.target is None or self.taken >= self.steps:
            return None
        self.taken += 1
        last = self.taken == self.steps
        if not last and self.taken % self.every:
            return None
        fraction = self.schedule(self.taken / self.steps)
        if fraction == self._fraction:
            return None
        if fraction < self._fraction and self.nested:
            raise RequestError(
                f"the schedule falls from {self._fraction:g} to {fraction:g} at step {self.taken}",
                "with nested=True pruned weights are never restored",
                "pass nested=False, so that weights come back",
            )
        if fraction == 0:
            forget_masks_(self.model)
            self._fraction = fraction
            return None
        update = self._planner(self.target if fraction == 1 else part_of(self.target, fraction, self._dense))
        self._update(update)
        self._fraction = fraction
        return update

    def state_dict(self) -> dict[str, Tensor]:
        """Step and masks as tensors (`bits.NAME`: one bit per weight), for safetensors or `torch.save`."""
        state = {
            "step": torch.tensor(self.taken, device="cpu"),
            "fraction": torch.tensor(self._fraction, dtype=torch.float64, device="cpu"),
        }
        seen: set[nn.Parameter] = set()
        for name, parameter, packed in records(self.model):
            if parameter not in seen:
                seen.add(parameter)
                state[f"bits.{name}"] = packed.bits.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state_dict()`: the saved masks replace the masks of the model, and are applied."""
        masks = saved_masks(self.model, state)
        self.taken, self._fraction = int(state["step"]), float(state["fraction"])
        forget_masks_(self.model)
        record_(self.model, masks)
        self._mask_state()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask_gradients(optimizer, self._masks())

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        with torch.no_grad():
            for parameter, mask in self._masks():
                if parameter in trained:
                    parameter.masked_fill_(~mask, 0)
                    clear_state(optimizer, parameter, mask)

    def _masks(self) -> Iterable[tuple[nn.Parameter, Mask]]:
        """Each masked parameter once, with its mask on its device; a mask is unpacked again only if it has changed."""
        fresh: dict[nn.Parameter, tuple[Packed, Mask]] = {}
        for _, parameter, packed in records(self.model):
            old = self._cache.get(parameter)
            if old is None or old[0] is not packed or old[1].device != parameter.device:
                old = (packed, packed.unpack(parameter.device))
            fresh[parameter] = old
        self._cache = fresh
        return [(parameter, mask) for parameter, (_, mask) in fresh.items()]

    def _mask_state(self) -> None:
        reapply_(self.model)
        for average in self.averages:
            copy_masks_(self.model, average)
        for optimizer in self._optimizers:
            for parameter, mask in self._masks():
                clear_state(optimizer, parameter, mask)

    def _update(self, update: Plan) -> None:
        before = masks_of(self.model) if self.nested else {}
        apply_(self.model, update, regrow=not self.nested)
        self._mask_state()
        revived = _revived(self.model, before, update)
        if revived:
            log.warning(
                "step %d: the plan would revive %d pruned weights; they stay pruned and the target is overshot "
                "(nested=False would revive them)",
                self.taken,
                revived,
            )

    def _dense(self) -> float:
        """The size of the dense model in the target's unit, computed once."""
        assert self.target is not None and self._planner is not None
        if self._before is None:
            self._before = float(getattr(self._planner(self.target).before, self.target.name))
        return self._before


def planner_of(model: nn.Module, recipe: Recipe | Planner | None, inputs: Inputs | None) -> Planner | None:
    """A function from target to plan: the given function, or one that plans by the given recipe without data."""
    if not isinstance(recipe, Recipe):
        return recipe
    if inputs is None:
        raise RequestError(
            "planning needs an example batch", "found inputs=None", "pass inputs=, or a function from target to plan"
        )
    return lambda target: plan(unwrap(model), inputs, recipe, target=target)


def _revived(model: nn.Module, before: Mapping[str, Mask], update: Plan) -> int:
    """Number of weights that were pruned before and are kept by the plan."""
    root = unwrap(model)
    named = dict(root.named_parameters(remove_duplicate=False))
    masks = plan_masks(root, update)
    seen: set[nn.Parameter] = set()
    total = 0
    for name, mask in before.items():
        parameter = named[name]
        if parameter not in seen:
            seen.add(parameter)
            total += int((~mask if parameter not in masks else masks[parameter].cpu() & ~mask).sum())
    return total
