"""Statistics of routers: how often a router chooses each expert, with which weight, and the output of the expert.

The choice is observed at the call of `topk` along the experts, identified by its number within a run.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from prunella.graph.data import Group, UnitCall
from prunella.model.calls import called
from prunella.model.hooks import removed_after
from prunella.model.trees import tensors
from prunella.stats.subject import Subject

Chosen = Callable[[str, Tensor, Tensor | None], None]
"""Callback of a choice: name of the group, chosen experts `(tokens, k)`, and their weights with sum 1 per token."""


class _Choices(TorchFunctionMode):
    """Reports every choice of experts in a run."""

    def __init__(self, subject: Subject, report: Chosen) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.paused = False
        self._report = report
        runs = [run for run in subject.graph.runs if run.name == "topk" and _chooses_among_all(subject, run)]
        self._at = {run.number: run for run in runs}
        self._soft = {run.group for run in subject.graph.runs if run.name == "softmax"}
        self._pending: tuple[UnitCall, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = called(func)
        if self.paused or name not in {"topk", "softmax"}:
            return result
        run = self._at.get(self.count[name]) if name == "topk" else None
        self.count[name] += 1
        if run is not None:
            self._settle()
            self._pending = run, result
            if (
                run.group in self._soft
            ):  # softmax over all experts, then the choice: divide by the sum over the chosen experts
                values = result[0].detach()
                self._settle(values / values.sum(run.axis, keepdim=True))
        elif name == "softmax" and self._pending is not None and result.shape == self._pending[1][0].shape:
            self._settle(result.detach())  # the choice, then softmax over the chosen experts
        return result

    def begin(self) -> None:
        """Called when a run of the model begins."""
        self._settle()
        self.count.clear()

    def _settle(self, weights: Tensor | None = None) -> None:
        """Report the pending choice with its weights."""
        if self._pending is not None:
            run, out = self._pending
            unit = torch.from_numpy(run.unit).to(out[1].device)
            rows = [None if t is None else t.movedim(run.axis, -1).flatten(0, -2) for t in (out[1], weights)]
            assert rows[0] is not None
            self._pending = None
            self._report(run.group, unit[rows[0]], rows[1])

    def end(self) -> None:
        """Called when a run of the model ends."""
        self._settle()


class Routed:
    """`expert_share`: fraction of the tokens of each expert; `expert_gate`: mean weight where the expert is chosen."""

    def __init__(self, subject: Subject, *, weighted: bool) -> None:
        self._subject, self._weighted = subject, weighted
        sizes = {group.name: group.size for group in subject.groups if group.kind == "expert"}
        self._sums = {name: torch.zeros(3, size, dtype=torch.float64, device="cpu") for name, size in sizes.items()}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return _watched(self._subject, self._add)

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By name of the group, one number per expert; a group without a `topk` choice is absent."""
        seen = {name: sums for name, sums in self._sums.items() if bool(sums[0].any())}
        if self._weighted:
            return {name: sums[1] / sums[0].clamp_min(1) for name, sums in seen.items() if bool(sums[1].any())}
        return {name: sums[0] / sums[2] for name, sums in seen.items()}

    def _add(self, name: str, chosen: Tensor, weights: Tensor | None) -> None:
        if name in self._sums:
            sums, flat = self._sums[name], chosen.flatten().cpu()
            sums[0].index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64, device="cpu"))
            sums[2] += len(chosen)
            if weights is not None:
                sums[1].index_add_(0, flat, weights.flatten().double().cpu())


def expert_share(subject: Subject) -> Routed:
    """`expert_share`: fraction of the tokens for which the router chooses each expert."""
    return Routed(subject, weighted=False)


def expert_gate(subject: Subject) -> Routed:
    """`expert_gate`: mean weight of each expert over the tokens for which it is chosen, the weights summing to 1."""
    return Routed(subject, weighted=True)


class ExpertOutput:
    """`expert_output`: mean norm of the weighted output of each expert over the tokens sent to the expert.

    The output of expert j is the change of the mixture's output when the parameters of j are zero and those of the
    router are unchanged: `g_j(x) f_j(x)`, one run of the mixture for each expert and batch. The mixture is the smallest
    module that holds the router and the experts; its output must have one row for each token.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._groups = {group.name: group for group in subject.groups if group.kind == "expert"}
        self._sums = {
            name: torch.zeros(2, g.size, dtype=torch.float64, device="cpu") for name, g in self._groups.items()
        }
        self._chosen: dict[str, Tensor] = {}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return self._hooks()

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By name of the group, one number per expert; an expert without tokens has 0."""
        return {name: sums[0] / sums[1].clamp_min(1) for name, sums in self._sums.items() if bool(sums[1].any())}

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        with _watched(self._subject, self._note) as mode:
            for group in self._groups.values():
                path = _home(self._subject, group)
                module = self._subject.model.get_submodule(path)

                def after(
                    module: nn.Module, args: Any, kwargs: Any, out: Any, group: Group = group, path: str = path
                ) -> None:
                    if not mode.paused:
                        mode.end()
                        mode.paused = True
                        with torch.no_grad(), torch._C.DisableTorchFunction():  # other modes count calls too
                            self._look(module, path, group, args, kwargs, out)
                        mode.paused = False

                handles.append(module.register_forward_hook(after, with_kwargs=True))
            with removed_after(handles):
                yield

    def _note(self, name: str, chosen: Tensor, weights: Tensor | None) -> None:
        self._chosen[name] = chosen

    def _look(self, module: nn.Module, path: str, group: Group, args: Any, kwargs: Any, out: Any) -> None:
        chosen, full = self._chosen.pop(group.name, None), _rows(out)
        if chosen is None or len(full) != len(chosen):
            return
        for expert in range(group.size):
            rows = (chosen == expert).any(1)
            if not bool(rows.any()):
                continue
            ablated = _rows(functional_call(module, self._without(group, path, expert), args, kwargs))
            contribution = (full[rows].double() - ablated[rows].double()).norm(dim=1)
            self._sums[group.name][:, expert] += torch.stack([contribution.sum(), rows.sum().double()]).cpu()

    def _without(self, group: Group, path: str, expert: int) -> dict[str, Tensor]:
        """The parameters of the mixture in which this expert is zero, by their names within it."""
        parameters: dict[str, Tensor] = {}
        routers = _routers(self._subject, group)
        for member in group.members:
            if member.entity in self._subject.parameters and (member.entity, member.axis) not in routers:
                index = torch.from_numpy(member.index[member.unit == expert])
                inner = member.entity.removeprefix(f"{path}.") if path else member.entity
                value = parameters.get(inner, self._subject.parameters[member.entity].detach())
                parameters[inner] = value.index_fill(member.axis, index.to(value.device), 0)
        return parameters


@contextmanager
def _watched(subject: Subject, report: Chosen) -> Iterator[_Choices]:
    mode = _Choices(subject, report)
    handle = subject.model.register_forward_pre_hook(lambda *_: None if mode.paused else mode.begin())
    with handle:
        with mode:
            yield mode
        mode.end()


def _chooses_among_all(subject: Subject, run: UnitCall) -> bool:
    """Whether the call chooses among all experts of the group, each at one position."""
    size = subject.graph.group(run.group).size
    return sorted(run.unit.tolist()) == list(range(size)) and subject.graph.group(run.group).kind == "expert"


def _routers(subject: Subject, group: Group) -> set[tuple[str, int]]:
    """The members that score experts: rows of a layer whose outputs are the experts, and the bias of this layer."""
    layers = subject.layer_of
    scoring = {(m.entity, m.axis) for m in group.members if m.entity in layers and layers[m.entity].out_axis == m.axis}
    biases = {layers[entity].bias for entity, _ in scoring}
    return scoring | {(m.entity, m.axis) for m in group.members if m.entity in biases}


def _home(subject: Subject, group: Group) -> str:
    """The smallest module that holds every parameter of the group."""
    parents = [m.entity.split(".")[:-1] for m in group.members if m.entity in subject.parameters]
    steps = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return ".".join(names[0] for names in steps)


def _rows(out: Any) -> Tensor:
    outputs = tensors(out)
    return outputs[0].detach().flatten(0, -2) if outputs and outputs[0].dim() > 1 else torch.empty(0, 1, device="cpu")
