"""Statistics of curvature: the diagonal of the Hessian, and the empirical Fisher matrix as diagonal or in blocks.

The empirical Fisher is the mean over *samples* of the gradient times itself, with the labels of the data. In the
gradient of a batch samples cancel. Batches are therefore split into samples, which run one after the other: one
backward pass per sample, memory of one gradient. A loss that normalizes over the batch sees batches of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.stats.gradient import MeanSquaredGrad
from prunella.stats.subject import Subject

Grads = Mapping[str, Tensor]


class HessianDiag:
    """`hessian_diag`: mean over batches of the diagonal of the Hessian, by Hutchinson's estimate, by entity.

    `mean over probes of v * (H v)` with random signs `v`, two backward passes each. The estimate is exact for a
    diagonal Hessian; otherwise the standard error of an entry is `sqrt(sum_{j != i} H_ij^2 / probes / batches)`.
    """

    twice = True

    def __init__(self, subject: Subject, *, probes: int = 4) -> None:
        if probes < 1:
            raise RequestError(f"probes={probes} is out of range", "probes is a whole number from 1 up", "use probes=4")
        self._sums = {name: torch.zeros_like(_single(subject.parameters[name])) for name in subject.scored}
        self._probes, self._batches = probes, 0
        self._generator = torch.Generator().manual_seed(torch.initial_seed())

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def second(self, weights: Grads, grads: Grads) -> None:
        """Gradients of one batch that can be differentiated again."""
        smooth = [name for name, grad in grads.items() if grad.requires_grad]
        for probe in range(self._probes if smooth else 0):
            signs = [self._signs(weights[name]) for name in smooth]
            parameters = [weights[name] for name in smooth]
            retain = probe + 1 < self._probes
            products = torch.autograd.grad(
                [grads[name] for name in smooth], parameters, signs, retain_graph=retain, allow_unused=True
            )
            for name, sign, product in zip(smooth, signs, products, strict=True):
                if product is not None:
                    self._sums[name] += sign * product.detach() / self._probes

    def add(self, grads: Grads) -> None:
        """One batch."""
        self._batches += 1

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: total / self._batches for name, total in self._sums.items()}

    def _signs(self, weight: Tensor) -> Tensor:
        bits = torch.randint(0, 2, weight.shape, generator=self._generator, device="cpu")
        return (2 * bits - 1).to(weight.device, weight.dtype)


class FisherDiag:
    """`fisher_diag`: mean over samples of the squared gradient, by entity."""

    each = True

    def __init__(self, subject: Subject) -> None:
        self._mean = MeanSquaredGrad(subject)

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One sample."""
        self._mean.add(grads)

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return self._mean.result()


class SampleGrad:
    """`sample_grad`: the gradient of every sample, `(samples, *shape)` by entity: as many copies as samples."""

    each = True

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._rows: dict[str, list[Tensor]] = {name: [] for name in subject.scored}

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One sample."""
        for name, rows in self._rows.items():
            weight = self._subject.parameters[name].detach()
            rows.append(grads.get(name, torch.zeros_like(weight)))

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: torch.stack(rows) for name, rows in self._rows.items()}


class FisherInverse:
    """`fisher_inverse`: inverse of the damped empirical Fisher in blocks along the rows of each weight, by entity.

    `(damping * I + mean over samples of g g^T)^-1` for every `block` neighbors in a row of the matrix `(out, in)`:
    `(out, blocks of a row, block, block)` in float64. A partial last block is padded with weights whose gradient is 0.
    Memory: `8 * block` bytes per weight. The sums of `g g^T` are inverted at the end. The result equals that of the
    rank-one recursion of `prunella.solvers`, without the number of samples in advance.
    """

    each = True

    def __init__(self, subject: Subject, *, damping: float = 1e-5, block: int = 32) -> None:
        check_damping(damping, block)
        self._subject, self._damping, self._block = subject, damping, block
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One sample."""
        self._samples += 1
        for name, grad in grads.items():
            g = in_blocks(as_matrix(self._subject, name, grad), self._block).double()
            square = g.unsqueeze(-1) * g.unsqueeze(-2)
            self._sums[name] = self._sums[name].add_(square) if name in self._sums else square

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        eye = torch.eye(self._block, dtype=torch.float64, device="cpu")
        damped = {n: s / self._samples + self._damping * eye.to(s.device) for n, s in self._sums.items()}
        return {name: torch.cholesky_inverse(torch.linalg.cholesky(matrix)) for name, matrix in damped.items()}


class FisherInverseDiag:
    """`fisher_inverse_diag`: the diagonal of `fisher_inverse`, by entity in the shape of the weight."""

    each = True

    def __init__(self, subject: Subject, inverse: FisherInverse) -> None:
        self._subject, self._inverse = subject, inverse

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One sample."""
        self._inverse.add(grads)

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        inverses = self._inverse.result().items()
        return {name: self._laid_out(name, blocks.diagonal(dim1=-2, dim2=-1).flatten(1)) for name, blocks in inverses}

    def _laid_out(self, name: str, matrix: Tensor) -> Tensor:
        weight, layer = self._subject.parameters[name], self._subject.layer_of.get(name)
        matrix = matrix[:, : as_matrix(self._subject, name, weight).shape[1]]
        return from_matrix(matrix, weight, layer) if layer else matrix.reshape(weight.shape)


def fisher_inverse_diag(subject: Subject, *, damping: float = 1e-5, block: int = 32) -> FisherInverseDiag:
    """The slot of `fisher_inverse_diag`, with the knobs of `FisherInverse`."""
    return FisherInverseDiag(subject, FisherInverse(subject, damping=damping, block=block))


def as_matrix(subject: Subject, name: str, value: Tensor) -> Tensor:
    """Values in the shape of a parameter, as the matrix that criteria see."""
    layer = subject.layer_of.get(name)
    if layer is not None:
        return to_matrix(value, layer)
    return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)


def in_blocks(matrix: Tensor, block: int) -> Tensor:
    """`(out, in)` as `(out, blocks, block)`, rows padded with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % block))
    return padded.reshape(len(matrix), -1, block)


def check_damping(damping: float, block: int = 1) -> None:
    """Check the knobs of an inverse Fisher matrix."""
    if not (damping > 0 and math.isfinite(damping)) or block < 1:
        raise RequestError(
            f"damping={damping:g} and block={block} give no inverse",
            "damping is a number above 0, block a whole number from 1 up",
            "for example damping=1e-5, block=32",
        )


def _single(values: Tensor) -> Tensor:
    """In single precision at least."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
