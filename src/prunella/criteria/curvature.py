"""Criteria from the second derivative of the loss: pass data= and loss=.

The knobs `probes`, `damping` and `block` are also knobs of the statistics.
"""

from __future__ import annotations

import torch

from prunella.errors import RequestError
from prunella.registry.criterion import criterion
from prunella.types import FisherDiag, FisherInverse, FisherInverseDiag, HessianDiag, Saliency, SampleGrad, Weight


@criterion(source="LeCun et al. 1990, Optimal Brain Damage", status="stable")
def obd(weight: Weight, hessian_diag: HessianDiag, *, probes: int = 4) -> Saliency:
    """Change of the loss, to second order, when a single weight is removed and all others are kept (OBD).

    `S_ij = 1/2 h_ij W_ij^2` with `h` the diagonal of the Hessian of the loss, by Hutchinson's estimate `mean v * (H v)`
    with random signs `v`: exact for a diagonal Hessian, noisy otherwise; more batches and probes reduce the noise.
    The gradient is taken to be zero, as at a minimum; a negative curvature counts as a gain.
    Data: batches and a loss that can be differentiated twice. probes: from 1 up, for each batch, two backward passes.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.obd(weight, torch.ones(2, 2)).tolist()
        [[0.5, 4.5], [0.125, 2.0]]

    Use: trained networks with smooth activations. Avoid: networks far from a minimum, or few batches and little time:
    `fisher` needs one backward pass per sample and has no noise.
    """
    return weight.square() * hessian_diag / 2


@criterion(source="Theis et al. 2018, arXiv:1801.05787; Liu et al. 2021, arXiv:2108.00708", status="stable")
def fisher(weight: Weight, fisher_diag: FisherDiag) -> Saliency:
    """Change of the loss by the diagonal of the empirical Fisher matrix.

    `S_ij = 1/2 W_ij^2 * mean_n g_n,ij^2`, `g_n` the gradient of the loss of one *sample*: the square comes before the
    mean over samples. The squared gradient of a batch (`taylor_sq`) is a smaller number, since samples cancel.
    Data: batches, which are split along their first axis, and a loss; labels are those of the data.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.fisher(weight, torch.tensor([[2.0, 2.0], [1.0, 1.0]])).tolist()
        [[1.0, 9.0], [0.125, 2.0]]

    Use: single weights, or channels as sums over weights, with a few hundred samples. Avoid: losses that need a whole
    batch, such as contrastive ones.
    """
    return weight.square() * fisher_diag / 2


@criterion(
    source="Hassibi and Stork 1993, Optimal Brain Surgeon; Singh and Alistarh 2020, arXiv:2004.14340", status="stable"
)
def obs_saliency(
    weight: Weight, fisher_inverse_diag: FisherInverseDiag, *, damping: float = 1e-5, block: int = 32
) -> Saliency:
    """Change of the loss when a weight is removed and the others in its block compensate (OBS, WoodFisher).

    `S_q = w_q^2 / (2 [F^-1]_qq)` with `F = damping * I + mean_n g_n g_n^T` over samples, for every `block` neighbors
    in a row of the matrix `(out, in)`. At block 1 it is half of `w^2 * (mean g^2 + damping)`.
    Data: batches, split into samples, and a loss. damping: above 0; where it is far above the squared gradients the
    order is that of `magnitude`. block: weights, 1 to 128; memory is `8 * block` bytes a weight.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.obs_saliency(weight, torch.full((2, 2), 0.5)).tolist()
        [[1.0, 9.0], [0.25, 4.0]]

    Use: masks at high sparsity, followed by the solver `woodfisher`. Avoid: fewer samples than about a block, or
    channels, since the weights of a removed unit cannot compensate for each other.
    """
    return weight.square() / (2 * fisher_inverse_diag)


@criterion(source="Frantar et al. 2021, arXiv:2107.03356", status="stable")
def mfac_saliency(weight: Weight, sample_grad: SampleGrad, *, damping: float = 1e-5) -> Saliency:
    """The OBS score with the empirical Fisher of a full layer, without forming the matrix (M-FAC).

    `S_q = w_q^2 / (2 [F^-1]_qq)`, and with the gradients `G` of N samples as rows `[F^-1]_qq = (1 - sum_n G_nq (K^-1
    G)_nq) / damping`, `K = N damping I + G G^T`: a matrix of N x N.
    Data: batches, split into samples, and a loss; memory is one copy of the weights for each sample. damping: above 0.

    Use: small and medium layers with dependent weights far apart. Avoid: large models: `obs_saliency` stores no
    gradients.
    """
    if not damping > 0:
        raise RequestError(f"damping={damping:g} gives no inverse", "damping is a number above 0", "use damping=1e-5")
    grads = sample_grad.flatten(1).double()
    kernel = grads @ grads.T + damping * len(grads) * torch.eye(len(grads), dtype=grads.dtype, device=grads.device)
    whitened: torch.Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(kernel), grads, upper=False)
    inverse = (1 - whitened.square().sum(0)) / damping
    return weight.double().square() / (2 * inverse.view(weight.shape))


@criterion(source="Kurtic et al. 2022, arXiv:2203.07259", status="stable")
def obert(
    weight: Weight, fisher_inverse: FisherInverse, *, group: int = 4, damping: float = 1e-5, block: int = 32
) -> Saliency:
    """Change of the loss when `group` neighbors in a row are removed and the rest of their block compensates.

    `s_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`, divided equally among the weights of Q, with the inverse of `obs_saliency`.
    For `Block(1, group)`, which sums these shares again. At group 1 it is `obs_saliency`.
    Data: batches, split into samples, and a loss. group: weights, divides block. damping, block: as `obs_saliency`.

    Use: blocks of weights in transformers at high sparsity. Avoid: single weights: all of a group get the same score.
    """
    if group < 1 or block % group:
        raise RequestError(
            f"group={group} does not divide block={block}",
            "a block holds whole groups",
            "for example group=4, block=32",
        )
    padded = torch.nn.functional.pad(weight.double(), (0, -weight.shape[1] % block))
    w = padded.view(len(weight), -1, block // group, group, 1)
    rows, blocks = fisher_inverse.shape[:2]
    tiles = fisher_inverse.reshape(rows, blocks, block // group, group, block // group, group)
    inverse = tiles.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
    joint: torch.Tensor = (w * torch.linalg.solve(inverse, w)).sum((-2, -1)) / 2
    shares = (joint / group).unsqueeze(-1).expand(*joint.shape, group)
    return shares.reshape(len(weight), -1)[:, : weight.shape[1]]
