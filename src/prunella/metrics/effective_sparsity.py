"""Effective sparsity: weights on a path from an input to an output, and dead units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported
from prunella.measure.count import compression
from prunella.measure.text import exact_count, percent, table
from prunella.metrics.paths import Paths
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.state import untouched
from prunella.model.trees import each
from prunella.registry.method import metric
from prunella.types import Inputs, Mask


@dataclass(frozen=True)
class Reached:
    """One weight. total, kept, effective: elements, non-zeros, non-zeros on a path; dead: output units on no path."""

    name: str
    total: int
    kept: int
    effective: int
    units: int
    dead: int


@dataclass(frozen=True)
class EffectiveSparsity:
    """Direct and effective sparsity of all weights that multiply an activation.

    masks: parameter name -> True at weights on a path. unfollowed: calls (or weights) without a rule; they count as
    connected, so that the true effective sparsity may be higher.
    """

    rows: tuple[Reached, ...]
    masks: Mapping[str, Mask]
    unfollowed: tuple[str, ...] = ()

    @property
    def direct(self) -> float:
        """Fraction of the weights that are zero."""
        return 1 - sum(row.kept for row in self.rows) / sum(row.total for row in self.rows)

    @property
    def effective(self) -> float:
        """Fraction of the weights that are zero or on no path."""
        return 1 - sum(row.effective for row in self.rows) / sum(row.total for row in self.rows)

    @property
    def compression(self) -> float:
        """All weights over those on a path. Errors: RequestError where there are none."""
        return compression(sum(row.total for row in self.rows), sum(row.effective for row in self.rows))

    @property
    def dead(self) -> int:
        """Output units, over all layers, that are on no path."""
        return sum(row.dead for row in self.rows)

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                exact_count(row.total),
                exact_count(row.kept),
                exact_count(row.effective),
                f"{row.dead} of {row.units}",
            )
            for row in self.rows
        ]
        lines = [table(("layer", "weights", "non-zero", "on a path", "dead units"), rows, right=range(1, 5))]
        direct, effective = percent(self.direct, 2), percent(self.effective, 2)
        lines.append(f"sparsity {direct} direct, {effective} effective; {self.dead} dead units")
        if self.unfollowed:
            lines.append(f"not followed, taken as connected: {', '.join(self.unfollowed)}")
        return "\n".join(lines)


@metric(source="Vysogorets and Kempe 2023, Connectivity matters: neural network pruning through effective sparsity")
def effective_sparsity(model: nn.Module, inputs: Inputs) -> EffectiveSparsity:
    """Sparsity when a weight that lies on no path from an input to an output counts as removed.

    `w_oi` is effective if it is not zero, unit `i` is reached from an input and unit `o` reaches an output, over
    non-zero weights. The model runs once, forward and backward, on zeros and ones, with all weights positive, so that
    the paths follow branches, residual sums and shared layers. A unit is a channel; a bias carries no input and reaches
    nothing. A normalization over units, a product of activations and attention connect all units that they mix. A call
    without a rule connects all units and is named in `unfollowed`.

    Data: one batch; only its shapes matter (integers are used as indices). The model does not change.
    Errors: NotSupported if no path can be followed, BadInput for a model without weights.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> model[0].weight.data[:4] = 0
        >>> found = pr.metrics.effective_sparsity(model, x)
        >>> round(found.direct, 3), round(found.effective, 3)
        (0.333, 0.5)

    Use: above about 95 % sparsity, where whole units are dead and the direct sparsity is too low. Avoid: structured
    cuts, after which no unit is disconnected.
    """
    replica = _positive(model)
    paths = Paths(dict(replica.named_parameters()))
    try:
        with untouched(replica), torch.enable_grad():
            with paths:
                outputs = outputs_of(replica, each(inputs, _ones))
            ends = [out.sum() for out in outputs if out.requires_grad]
            if ends:
                torch.stack(ends).sum().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise NotSupported("no path can be followed in this model", why, "measure the part that can be run") from error
    return _summary(replica, paths)


def _summary(replica: nn.Module, paths: Paths) -> EffectiveSparsity:
    rows, masks, unseen = [], {}, []
    for name, parameter in replica.named_parameters():
        if parameter.dim() < 2:
            continue
        kept = parameter.detach() != 0
        reached = paths.met.get(name)
        if reached is None:
            unseen.append(f"weight {name}")
            rows.append(Reached(name, kept.numel(), int(kept.sum()), int(kept.sum()), 0, 0))
            masks[name] = kept.cpu()
            continue
        mask = kept & reached.pairs
        row = (int(kept.sum()), int(mask.sum()), len(reached.live), int((~reached.live).sum()))
        rows.append(Reached(name, kept.numel(), *row))
        masks[name] = mask.cpu()
    if not rows:
        raise BadInput("the model has no weights", "no parameter has two axes or more", "pass another model")
    return EffectiveSparsity(tuple(rows), masks, (*sorted(paths.unfollowed), *unseen))


def _positive(model: nn.Module) -> nn.Module:
    """A copy whose parameters are 1 where they are not zero, in float64."""
    replica = copied(model).double()
    for parameter in replica.parameters():
        parameter.data = (parameter.data != 0).double()
        parameter.grad = None
        parameter.requires_grad_(False)
    return replica


def _ones(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.ones_like(tensor, dtype=torch.float64).requires_grad_()
