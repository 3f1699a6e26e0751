"""Plan solvers: the plan with new weights for its kept positions, from the curvature of the loss.

The layers that read a removed row compensate for it. The layer of the row does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunella.errors import CheckFailed, RequestError
from prunella.graph.data import Layer
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.graph.solve.groups import couple
from prunella.model.batches import listed
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import solver
from prunella.solvers.line_search import check_strength, line_search, scaled, split_samples
from prunella.solvers.obs import cut, cut_matrix_free, cut_singly, cut_singly_matrix_free, inverse_fisher
from prunella.stats import Source, Statistics, Subject, collect
from prunella.stats.curvature import check_damping, in_blocks
from prunella.stats.subject import first_seen
from prunella.transform.apply import plan_masks
from prunella.types import Loss, Mask

LIMIT = 4096
"""Largest number of weights of a layer for `obs`, which stores the Hessian."""


@dataclass(frozen=True)
class _Task:
    """One layer: the kept rows of its matrix, their weights in float64 and the pruned positions."""

    layer: Layer
    parameter: Tensor
    rows: Tensor
    weight: Tensor
    pruned: Mask
    grads: Tensor | None

    def matrix(self, value: Tensor) -> Tensor:
        """The kept rows of values in the shape of the parameter, in float64."""
        return to_matrix(value, self.layer)[self.rows].double()

    def samples(self) -> Iterator[Tensor]:
        """The gradient of each sample."""
        assert self.grads is not None
        return (self.matrix(grad) for grad in self.grads)


JOINT, SINGLE = "joint", "sum of single updates"
Surgeon = Callable[[_Task], dict[str, Tensor]]
"""Task -> new weights of its rows, by the name of the update."""


@solver(source="Hassibi and Stork 1993, Optimal Brain Surgeon")
def obs(model: nn.Module, plan: Plan, data: Iterable[Any], *, loss: Loss, damping: float = 1e-6) -> Plan:
    """The plan with weights that compensate for its removals, by the exact Hessian of each layer (OBS).

    `d = -H^-1[:, S] ([H^-1]_SS)^-1 w_S` for the set S of all weights that a layer loses, jointly, with `H` the Hessian
    of the mean loss to the weights of that layer plus `damping * I`. Each layer is solved as if the others were
    unchanged.
    Data: batches and a loss that can be differentiated twice; one backward pass for each weight and batch.

    model, plan: the model of the plan, which is not changed; masks and cuts both count. damping: above 0.
    Errors: RequestError for a layer of more than 4096 weights; CheckFailed if the Hessian is not positive definite,
    which is usual away from a minimum: raise damping.

    Use: small networks, and as the oracle of the others. Avoid: layers of thousands of weights: `woodfisher`, `mfac`.
    """
    check_damping(damping)
    batches_ = listed(_iterable(data))

    def surgeon(task: _Task) -> dict[str, Tensor]:
        name, size = task.layer.name, task.parameter.numel()
        if size > LIMIT:
            why = f"its Hessian would have {size}^2 entries, and {LIMIT}^2 are allowed"
            raise RequestError(f"obs cannot take {name}", why, "use woodfisher or mfac, or skip the layer")
        hessian = _hessian(model, task, batches_, loss)
        hessian.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            lowest = float(torch.linalg.eigvalsh(hessian)[0]) - damping
            raise CheckFailed(
                f"the Hessian of {name} is not positive definite",
                f"its lowest eigenvalue is {lowest:.3g}: the loss is not at a minimum there",
                f"train longer, or pass damping above {abs(lowest):.1g}",
            )
        step = cut(task.weight.flatten(), torch.cholesky_inverse(factor), task.pruned.flatten())
        return {JOINT: step.weight.view(task.weight.shape)}

    return _solved(model, plan, surgeon, {"name": "obs", "knobs": {"damping": damping}})


@solver(source="Singh and Alistarh 2020, arXiv:2004.14340")
def woodfisher(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    loss: Loss,
    damping: float = 1e-5,
    block: int = 32,
    strength: float | None = None,
) -> Plan:
    """The plan with weights that compensate for its removals, by the empirical Fisher in blocks (WoodFisher).

    `d = -F^-1[:, S] ([F^-1]_SS)^-1 w_S` in every block of `block` neighbors in a row, jointly for all pruned weights,
    with `F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)` over the gradients of N samples, from `I / damping`.
    Data: batches, split into samples, and a loss; memory is one gradient of a layer for each sample.

    model, plan: the model of the plan, which is not changed; masks and cuts both count. damping: above 0;
    far above the squared gradients no weight changes. block: weights, from 1 up; at 1 no weight changes. `obs_saliency`
    with the same knobs is the matching criterion. strength: factor of the update, as in `mfac`.

    Use: after a mask at high sparsity, instead of or before training. Avoid: fewer samples than about a block.
    """
    check_damping(damping, block)

    def surgeon(task: _Task) -> dict[str, Tensor]:
        grads = torch.stack([in_blocks(grad, block) for grad in task.samples()])
        inverse, weight = inverse_fisher(grads, damping), in_blocks(task.weight, block)
        joint = cut(weight, inverse, in_blocks(task.pruned, block)).weight
        updates = {JOINT: joint, SINGLE: cut_singly(weight, inverse, in_blocks(task.pruned, block))}
        return {name: new.flatten(1)[:, : task.weight.shape[1]] for name, new in updates.items()}

    about = {"name": "woodfisher", "knobs": {"damping": damping, "block": block}}
    return _searched(model, plan, surgeon, about, Source(_iterable(data), loss), strength)


@solver(source="Frantar et al. 2021, arXiv:2107.03356")
def mfac(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    loss: Loss,
    damping: float = 1e-5,
    strength: float | None = None,
) -> Plan:
    """The plan with weights that compensate for its removals, by the empirical Fisher of whole layers (M-FAC).

    The kept weights of a layer change by `G_K^T (N damping I + G_K G_K^T)^-1 G_S w_S`, with the gradients of N samples
    as rows of `G`, K the kept and S the pruned weights. This is the joint OBS step for `F = damping * I + G^T G / N`,
    formed from a matrix of N x N only. The paper computes the same products by a recursion over the samples.
    Data: batches, split into samples, and a loss; memory is a copy of the layers' weights for each sample.

    model, plan: the model of the plan, which is not changed; masks and cuts both count. damping: above 0. strength:
    factor of the joint update, from 0 to 1. None: every fourth sample is held out, and the update whose masked model
    has the smallest loss there is taken: the joint one, or the published sum of the updates for each weight alone, with
    a factor from 1 to 0.05, or none at all. The plan says which (`recipe["solver"]`).

    Use: medium layers with dependent weights across blocks. Avoid: large models or many samples:
    `woodfisher` works in blocks.
    """
    check_damping(damping)

    def surgeon(task: _Task) -> dict[str, Tensor]:
        grads = torch.stack([grad.flatten() for grad in task.samples()])
        weight, pruned = task.weight.flatten(), task.pruned.flatten()
        step = cut_matrix_free(task.weight.flatten(), grads, task.pruned.flatten(), damping)
        updates = {JOINT: step.weight, SINGLE: cut_singly_matrix_free(weight, grads, pruned, damping)}
        return {name: new.view(task.weight.shape) for name, new in updates.items()}

    about = {"name": "mfac", "knobs": {"damping": damping}}
    return _searched(model, plan, surgeon, about, Source(_iterable(data), loss), strength)


def _searched(
    model: nn.Module, plan: Plan, surgeon: Surgeon, about: dict[str, Any], source: Source, strength: float | None
) -> Plan:
    """The plan with the surgeon's weights, by the given strength or the best one on held-out samples."""
    check_strength(strength)
    data = None if strength is not None else split_samples(source.data or ())
    source = source if data is None else replace(source, data=data.fit)
    with untouched(unwrap(model), 0):
        updates = _updates(unwrap(model), plan, surgeon, about["name"], source)
        if data is None:
            chosen, note = (JOINT, strength or 0.0), dict[str, Any](strength=strength)
        else:
            assert source.loss is not None
            searched = line_search(unwrap(model), plan, updates, data.held_out, source.loss)
            chosen = searched.update, searched.factor
            note = {
                "update": searched.update,
                "strength": searched.factor,
                "held out": [searched.before, searched.after],
            }
        solved = scaled(unwrap(model), plan, updates[chosen[0]], chosen[1])
    return replace(solved, recipe={**plan.recipe, "solver": {**about, "knobs": {**about["knobs"], **note}}})


def _solved(model: nn.Module, plan: Plan, surgeon: Surgeon, about: dict[str, Any]) -> Plan:
    """The plan with the surgeon's weights of every layer that loses weights."""
    solved = _updates(unwrap(model), plan, surgeon, about["name"], None)[JOINT]
    return replace(plan, weights={**plan.weights, **solved}, recipe={**plan.recipe, "solver": about})


def _updates(
    model: nn.Module, plan: Plan, surgeon: Surgeon, name: str, source: Source | None
) -> dict[str, dict[str, Tensor]]:
    """Name of the update -> entity -> new weights, for every layer that loses weights."""
    if plan.inputs is None:
        raise RequestError("this plan has no example inputs", "it was read without inputs", "make the plan again")
    with untouched(model, 0):
        graph = couple(model, plan.inputs)
        masks = {parameter: mask.cpu() for parameter, mask in plan_masks(model, plan).items()}
        named = dict(model.named_parameters(remove_duplicate=False))
        layers = [x for x in first_seen(graph.layers) if named[x.entity] in masks]
        if not layers:
            raise RequestError(
                "the plan removes no weights", "no layer loses a weight", "make a plan with a target first"
            )
        subject = Subject(model, graph, layers=tuple(layers))
        statistics = collect(subject, ["sample_grad"], source, name) if source else Statistics()
        solved: dict[str, dict[str, Tensor]] = {}
        for layer in layers:
            parameter = named[layer.entity]
            matrix = to_matrix(plan.weights.get(layer.entity, parameter.detach()), layer).clone()
            pruned = ~to_matrix(masks[parameter], layer).to(parameter.device)
            kept = plan.cuts.get(layer.entity, {}).get(layer.out_axis)
            rows = torch.arange(len(matrix), device="cpu") if kept is None else kept
            grads = statistics.get("sample_grad", layer.entity)
            task = _Task(layer, parameter, rows, matrix[rows].double(), pruned[rows], grads)
            for update, new in surgeon(task).items():
                updated = matrix.clone()
                updated[rows] = new.to(matrix.dtype)
                solved.setdefault(update, {})[layer.entity] = from_matrix(updated, parameter, layer).detach()
    return solved


def _hessian(model: nn.Module, task: _Task, data: Sequence[Any], loss: Loss) -> Tensor:
    """Second derivatives of the mean loss to the kept rows, in float64."""
    size, parameter = task.weight.numel(), task.parameter
    total = torch.zeros(size, size, dtype=torch.float64, device=parameter.device)
    parameter.requires_grad_(True)
    for batch in data:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            (grad,) = torch.autograd.grad(loss(model, batch), parameter, create_graph=True)
        flat = to_matrix(grad, task.layer)[task.rows].flatten()
        for row, entry in enumerate(flat if flat.requires_grad else ()):
            (line,) = torch.autograd.grad(entry, parameter, retain_graph=True, allow_unused=True)
            if line is not None:
                total[row] += task.matrix(line).flatten()
    return (total + total.T) / (2 * len(data))


def _iterable(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, Tensor | dict):
        raise RequestError(f"data is one {type(data).__name__}", "an iterable of batches is needed", "pass [batch]")
    return data
