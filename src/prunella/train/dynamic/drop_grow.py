"""Dynamic sparse training: weights are dropped and grown during training, and the number of non-zeros stays exact."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunella.criteria import magnitude
from prunella.errors import CheckFailed, RequestError
from prunella.model.masks import forget_masks_, pack, record_, records, saved_masks
from prunella.model.unwrap import bare_optimizers, unwrap
from prunella.planning.scoring import Criterion
from prunella.registry.controlled import name_of
from prunella.registry.method import needs_of
from prunella.train.dynamic.exchange import exchange, fair_shares, thin
from prunella.train.dynamic.rules import Rule
from prunella.train.optimizer_state import ELEMENTWISE, clear_state
from prunella.train.pruner import Pruner
from prunella.types import Mask


@dataclass(frozen=True)
class Update:
    """The result of one update: the numbers of weights dropped, grown and active afterwards."""

    step: int
    dropped: int
    grown: int
    kept: int


class DropGrow:
    """Update the masks of a model by a rule while `optimizer` trains it; the number of non-zeros stays exact.

        apply_(model, plan(model, batch, named("erk_random"), target=Sparsity(0.98)))      # the first masks
        moving = DropGrow(model, optimizer, rule=rigl(), steps=7500, every=100)
        for batch in loader:
            ...; optimizer.step(); moving.step()

    Masked weights and their optimizer state are exactly 0 after every step, as with `Pruner`. Grown weights start at 0
    with empty moments. A step that a `GradScaler` skips changes nothing, and an update that was due at this step is
    made at the next step that is taken.

    optimizer: one, or several; together they train all sparse parameters. steps: T_end; no update comes after it. Three
    quarters of the run is usual. every: steps between updates. layers: name patterns of the sparse parameters, for a
    rule that starts dense; by default the parameters that carry masks. seed: of random growth.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        rule: Rule,
        steps: int,
        every: int = 100,
        layers: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if steps < 1 or every < 1:
            raise RequestError(f"steps={steps}, every={every} are out of range", "both are from 1 up", "every=100")
        self.model, self.rule, self.steps, self.every, self.seed = unwrap(model), rule, steps, every, seed
        self.taken, self._due = 0, False
        optimizers = bare_optimizers(optimizer)
        self._owner = {p: one for one in optimizers for group in one.param_groups for p in group["params"]}
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._take(*_taking_part(self.model, layers))
        self._seen = {parameter: mask.clone() for parameter, mask in self._masks.items()}
        self._start = self.kept
        if rule.final is not None and self.total * (1 - rule.final.value) > self._start:
            why = f"{self._start} of {self.total} weights are active"
            raise RequestError(f"the model is sparser than {rule.final} already", why, "start denser")
        self._handles: list[RemovableHandle] = []
        for one in optimizers if rule.needs_gradient else ():  # Pruner masks gradients before the others step
            register = one.register_step_post_hook if type(one) in ELEMENTWISE else one.register_step_pre_hook
            self._handles.append(register(self._read))
        self._pruner = Pruner(model, optimizers)

    @property
    def total(self) -> int:
        """Number of weights in the sparse parameters."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def kept(self) -> int:
        """Number of active weights."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @property
    def explored(self) -> float:
        """Fraction of the weights that was active at some time (`itop`)."""
        return sum(int(mask.sum()) for mask in self._seen.values()) / self.total

    def masks(self) -> dict[str, Mask]:
        """Name -> mask of every sparse parameter, layers that are still dense included."""
        return {name: self._masks[parameter].clone() for parameter, name in self._names.items()}

    def step(self) -> Update | None:
        """Count one training step, after `optimizer.step()`; if an update is due, make it and return its numbers."""
        if not self._masks:
            raise RequestError(
                "the model carries no masks",
                "DropGrow updates masks of weights",
                'call apply_(model, plan(...)) first, or start dense with layers=["*.weight"]',
            )
        if self.taken >= self.steps and not self._due:
            return None
        self.taken += 1
        last = self.taken == self.steps and self.rule.final is not None
        self._due = self._due or (self.taken <= self.steps and (last or self.taken % self.every == 0))
        ready = not self.rule.needs_gradient or self._grads.keys() >= self._masks.keys()
        if not self._due or not ready:
            return None
        self._due = False
        return self._update(min(1.0, self.taken / self.steps))

    def detach(self) -> None:
        """Remove the hooks. The masks stay with the model; `finalize(model)` removes them."""
        self._pruner.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The state for the next updates, as tensors: step, masks, weights ever active, averaged gradients."""
        state = {
            "step": torch.tensor(self.taken, device="cpu"),
            "due": torch.tensor(self._due, device="cpu"),
            "start": torch.tensor(self._start, device="cpu"),
        }
        for parameter, name in self._names.items():
            state[f"bits.{name}"] = pack(self._masks[parameter]).bits
            state[f"seen.{name}"] = pack(self._seen[parameter]).bits
            if parameter in self._grads:
                state[f"gradient.{name}"] = self._grads[parameter].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state_dict()`: the saved masks replace the masks of the model, and are applied."""
        named = dict(self.model.named_parameters())
        masks, seen = saved_masks(self.model, state), saved_masks(self.model, state, "seen")
        self.taken, self._due, self._start = int(state["step"]), bool(state["due"]), int(state["start"])
        self._take({p: name for name, p in named.items() if p in masks}, masks)
        self._seen = seen
        grads = [(p, state.get(f"gradient.{name}")) for p, name in self._names.items()]
        self._grads = {p: grad.clone().to(p.device) for p, grad in grads if grad is not None}
        self._write(self._masks)

    def _take(self, names: dict[nn.Parameter, str], masks: dict[nn.Parameter, Mask]) -> None:
        """Set the sparse parameters and their masks."""
        idle = [name for parameter, name in names.items() if parameter not in self._owner]
        if idle:
            raise RequestError(f"no optimizer trains {idle[0]}", "it is a sparse parameter", "pass its optimizer too")
        self._names, self._masks = names, {parameter: masks[parameter] for parameter in names}

    def _read(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read dense gradients: at every step if the rule averages them, else only before an update."""
        memory, overflow = self.rule.memory, getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow):  # a scaler lets a fused step run and do nothing
            return
        if not memory and not self._due and (self.taken + 1) % self.every and self.taken + 1 != self.steps:
            return
        for parameter in self._masks:
            if self._owner[parameter] is optimizer:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
                old = self._grads.get(parameter)
                fresh = (1 - memory) * grad
                self._grads[parameter] = fresh if not memory or old is None else old.mul_(memory).add_(fresh)

    def _update(self, progress: float) -> Update:
        before = {parameter: mask.clone() for parameter, mask in self._masks.items()}
        masks = self._thinned(progress)
        exchanged = self.rule.fraction(progress)
        active = {p: int(mask.sum()) for p, mask in masks.items()}
        minimum = int(exchanged > 0)
        drops = {p: max(0, min(max(minimum, round(exchanged * count)), count - 1)) for p, count in active.items()}
        if not self.rule.trade:  # a layer without room would only lose the weights it drops
            drops = {p: min(count, masks[p].numel() - active[p]) for p, count in drops.items()}
        grows = self._shares(masks, active, drops)
        survivors: dict[nn.Parameter, Mask] = {}
        for parameter, mask in masks.items():
            drop, grow = (self._scores(f, parameter) for f in (self.rule.drop, self.rule.grow))
            new, kept = exchange(mask, drops[parameter], grows[parameter], drop, grow)
            self._masks[parameter], survivors[parameter] = new, kept
            self._seen[parameter] |= new
        self._write(survivors)
        if not self.rule.memory:
            self._grads.clear()
        moved = [(before[p], self._masks[p]) for p in before]
        dropped, grown = (sum(int((a & ~b).sum()) for a, b in pairs) for pairs in (moved, [(b, a) for a, b in moved]))
        return Update(self.taken, dropped, grown, self.kept)

    def _thinned(self, progress: float) -> dict[nn.Parameter, Mask]:
        """The masks after the pruning step of an update, which raises the total sparsity."""
        if self.rule.final is None:
            return dict(self._masks)
        first = 1 - self._start / self.total
        sparsity = first + (self.rule.final.value - first) * self.rule.schedule(progress)
        count = min(self.kept, max(len(self._masks), self.total - round(sparsity * self.total)))
        scores = [magnitude(parameter.detach()) for parameter in self._masks]
        return dict(zip(self._masks, thin(list(self._masks.values()), scores, count), strict=True))

    def _shares(
        self,
        masks: Mapping[nn.Parameter, Mask],
        active: Mapping[nn.Parameter, int],
        drops: Mapping[nn.Parameter, int],
    ) -> dict[nn.Parameter, int]:
        """Number of weights that grow in each layer: as many as the layer dropped, or its share of the total."""
        if not self.rule.trade:
            return dict(drops)
        means = [float(self._grads[p].abs()[mask].double().mean()) if active[p] else 0.0 for p, mask in masks.items()]
        rooms = [mask.numel() - active[p] + drops[p] for p, mask in masks.items()]
        return dict(zip(masks, fair_shares(sum(drops.values()), means, rooms), strict=True))

    def _scores(self, function: Criterion, parameter: nn.Parameter) -> Tensor:
        scores: Tensor = function(*[self._statistic(need, parameter) for need in needs_of(function)])
        if scores.numel() != parameter.numel():
            raise RequestError(
                f"{name_of(function)} gives {scores.numel()} scores for {parameter.numel()} weights",
                "drop and grow need one score for each weight",
                "take a criterion that scores weights",
            )
        if not bool(torch.isfinite(scores).all()):
            raise CheckFailed(
                f"{name_of(function)} of {self._names[parameter]} is not finite", "", "check the training"
            )
        return scores

    def _statistic(self, need: str, parameter: nn.Parameter) -> Tensor:
        if need == "grad":
            return self._grads[parameter].flatten(1)
        if need == "weight":
            return parameter.detach().flatten(1)
        name = self._names[parameter]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.taken} {name}".encode()))
        return (
            torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            .to(parameter.device)
            .flatten(1)
        )

    def _write(self, survivors: Mapping[nn.Parameter, Mask]) -> None:
        """Record the masks in the model; weights that did not survive become 0, with empty optimizer state."""
        others = {p: packed.unpack(p.device) for _, p, packed in records(self.model) if p not in self._masks}
        forget_masks_(self.model)
        record_(self.model, {**others, **self._masks})
        with torch.no_grad():
            for parameter, mask in survivors.items():
                parameter.masked_fill_(~mask, 0)
                clear_state(self._owner[parameter], parameter, mask)


def _taking_part(model: nn.Module, layers: Sequence[str]) -> tuple[dict[nn.Parameter, str], dict[nn.Parameter, Mask]]:
    """Names and masks of the sparse parameters."""
    masks = {parameter: packed.unpack(parameter.device) for _, parameter, packed in records(model)}
    names = {
        parameter: name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and (any(fnmatchcase(name, pattern) for pattern in layers) if layers else parameter in masks)
    }
    if layers and not names:
        raise RequestError(f"layers={list(layers)!r} names no weight", "", "the patterns match names of parameters")
    return names, {p: masks.get(p, torch.ones(p.shape, dtype=torch.bool, device=p.device)) for p in names}
