"""Criteria that need activations: forward passes only, no labels."""

from __future__ import annotations

import torch

from prunella.errors import RequestError
from prunella.registry.criterion import criterion
from prunella.types import (
    ExpertGate,
    ExpertOutput,
    ExpertShare,
    Influence,
    InputNorm,
    InputVar,
    Saliency,
    Scores,
    UnitLoss,
    UnitNorm,
    UnitRank,
    UnitVar,
    UnitZeros,
    Weight,
)


@criterion(source="Sun et al. 2023, arXiv:2306.11695", status="stable")
def wanda(weight: Weight, input_norm: InputNorm) -> Saliency:
    """Weight magnitude times the norm of the input it multiplies.

    `S_ij = |W_ij| * ||x_j||_2`, norms over all tokens of the calibration data. The paper compares the weights of an
    output row with each other: `Element(per_row=True)` or `NM(2, 4)`.
    Data: forward passes only. Zero where the input is always zero.

    Example:

        >>> import torch, prunella as pr
        >>> weight, input_norm = torch.tensor([[1.0, -3.0], [0.5, 2.0]]), torch.tensor([10.0, 1.0])
        >>> pr.wanda(weight, input_norm)  # the small weights of the large input matter more
        tensor([[10.,  3.],
                [ 5.,  2.]])

    Use: linear layers whose inputs have outliers, as in language models. Avoid: models without calibration data, or
    pruning with retraining, where `magnitude` is as good.
    """
    return weight.abs() * input_norm


@criterion(source="Zhang et al. 2024, Plug-and-Play: an efficient post-training pruning method (ICLR)")
def ria(weight: Weight, input_norm: InputNorm, *, a: float = 0.5) -> Saliency:
    """Each weight as a share of its row and of its column, times a power of the norm of its input (RIA).

    `S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||x_j||_2^a`, norms over all tokens of the calibration
    data. The shares prevent empty rows and columns; rows and columns of zeros score 0.
    Data: forward passes only.

    a: from 0 up; 0 ignores the inputs.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.ria(weight, torch.ones(2)).sum(1)
        tensor([2.2667, 1.7333])

    Use: as `wanda`, at N:M and above 50 %. Avoid: structured pruning, where the shares of units hardly differ.
    """
    magnitudes = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    rows, columns = (magnitudes.sum(axis, keepdim=True).clamp_min(tiny) for axis in (1, 0))
    return (magnitudes / rows + magnitudes / columns) * input_norm.to(weight.dtype) ** a


@criterion(source="An et al. 2024, arXiv:2312.11983", scope="consumer", status="stable")
def fluctuation(weight: Weight, input_var: InputVar) -> Saliency:
    """Variance of an input times the squared weight that reads the input: the part that no bias can replace (FLAP).

    `S_ij = Var(x_j) * W_ij^2`; a unit scores the sum over the weights that read it, `Var(x_j) * ||W_:j||^2`. An input
    that never varies scores 0 at any size, since `fold_means` folds it into the bias without error.
    Data: forward passes only. A convolution takes the variance of a channel over samples and pixels.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.fluctuation(weight, torch.tensor([0.0, 0.5])).tolist()
        [[0.0, 4.5], [0.0, 2.0]]

    Use: units and heads without training, followed by `fold_means`. Avoid: pruning without `fold_means`, which removes
    large constant inputs without compensation.
    """
    return input_var * weight.square()


@criterion(source="Hassibi and Stork 1993, Optimal Brain Surgeon; Kurtic et al. 2023, arXiv:2302.04089 (ZipLM)")
def obs_units(unit_loss: UnitLoss, *, ridge: float = 1e-3) -> Scores:
    """Error of the layers that read a unit after its removal, with an optimal update of their other weights (OBS).

    In each step the unit c with the smallest `tr(W_c ([H^-1]_cc)^-1 W_c^T)` is eliminated, and the other columns of W
    are updated; `H = X^T X + ridge * mean(diag X^T X) I` over all tokens. The score of a unit is the relative squared
    error of the outputs without it and all units before it. Inputs are centered if a bias or a batch normalization
    absorbs the constant. `reconstruct` computes the matching weights after the cut.
    Data: forward passes only, a few times more tokens (pixels) than a layer has inputs. ridge: above 0.
    Errors: RequestError for a ridge that is not positive.

    Use: channels, neurons and heads with `reconstruct`, and `prunella.search.measured` for the number of each group.
    Avoid: without `reconstruct`: the scores assume its weights.
    """
    if not ridge > 0:
        raise RequestError(f"ridge={ridge:g} gives no inverse", "ridge is a number above 0", "use ridge=1e-3")
    return unit_loss


@criterion(source="Hu et al. 2016, arXiv:1607.03250", status="stable")
def apoz(unit_zeros: UnitZeros) -> Scores:
    """Fraction of the activations of a unit that are not zero: one minus the average percentage of zeros (APoZ).

    `s_u = 1 - mean [a_u = 0]`, so that higher is kept: a dead unit, whose APoZ is 1, scores 0. `a_u` is the input of
    the layers that read the unit, after any activation, module or function. Behind an average pooling a value is zero
    only where the full window is zero. Data: forward passes only.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.apoz(torch.tensor([1.0, 0.25])).tolist()
        [0.0, 0.75]

    Use: networks with ReLU, to find dead and nearly dead units. Avoid: GELU, SiLU and other activations that are never
    exactly 0: all units tie.
    """
    return 1 - unit_zeros


@criterion(source="Lin et al. 2020, arXiv:2002.10179", status="stable")
def hrank(unit_rank: UnitRank) -> Scores:
    """Mean rank of the feature maps of a channel.

    `s_u = mean over samples of rank(A_u)`, `A_u` the map `(height, width)` that the convolutions read, after activation
    and pooling. The rank is that of `torch.linalg.matrix_rank` with its default tolerance. Data: forward passes only,
    and one singular value decomposition for each map. Channels that no 2-D convolution reads are not scored.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.hrank(torch.tensor([3.0, 1.0])).tolist()
        [3.0, 1.0]

    Use: convolutions on maps of 8x8 and more; a few batches are enough. Avoid: small maps, where nearly all ranks are
    equal, and linear layers.
    """
    return unit_rank


@criterion(source="Molchanov et al. 2017, arXiv:1611.06440, section 2.2 (activation)", status="stable")
def activation_norm(unit_norm: UnitNorm) -> Scores:
    """Size of the activation of a unit.

    `s_u = sqrt(mean a_u^2)` over samples, pixels and the positions of the unit, at the input of the layers that read
    the unit. Data: forward passes only.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.activation_norm(torch.tensor([2.0, 0.5])).tolist()
        [2.0, 0.5]

    Use: rankings without labels in networks whose readers have weights of similar size. Avoid: units with a large
    constant part, which a bias could replace: see `activation_variance`.
    """
    return unit_norm


@criterion(source="Polyak and Wolf 2015; Molchanov et al. 2017, arXiv:1611.06440", status="stable")
def activation_variance(unit_var: UnitVar) -> Scores:
    """Variance of the activation of a unit: a constant unit carries no information.

    `s_u = mean a_u^2 - (mean a_u)^2` over samples and pixels, the mean over the positions of a unit, at the input of
    the layers that read the unit. Data: forward passes only.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.activation_variance(torch.tensor([0.0, 1.5])).tolist()
        [0.0, 1.5]

    Use: before `fold_means` or `reconstruct`, which restore the constant part. Avoid: readers with weights of different
    size: `fluctuation` includes the weights.
    """
    return unit_var


@criterion(source="Men et al. 2024, arXiv:2403.03853", status="stable")
def block_influence(influence: Influence) -> Scores:
    """Rotation of the residual stream by a residual block (ShortGPT's block influence).

    `s_l = 1 - mean cos(x_l, x_{l+1})` over tokens and samples, between the input and the output of the block. The
    vectors are along the last axis, or along the channels where the block begins with a convolution. An identity block
    scores 0 and is removed first, as is a block that only scales the stream. Data: forward passes only. For `Depth()`.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.block_influence(torch.tensor([0.5, 0.0])).tolist()
        [0.5, 0.0]

    Use: layers of language models without training. Avoid: short stacks, or blocks that change the width.
    """
    return influence


@criterion(source="Chen et al. 2022, arXiv:2206.00277 (experts by their number of tokens)")
def router_frequency(expert_share: ExpertShare) -> Scores:
    """Fraction of the tokens for which the router chooses an expert.

    `s_j = (tokens sent to j) / (all tokens)`, so that the scores of a layer sum to k, the number of experts per token.
    An expert without tokens scores 0: its removal does not change the outputs on this data. Data: forward passes only.
    For `Expert()`; the router is identified by its call of `topk` along the experts.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.router_frequency(torch.tensor([0.75, 0.25])).tolist()
        [0.75, 0.25]

    Use: a first look at the load of the experts, on data of the task. Avoid: as the only criterion, since rare experts
    may matter most for rare tokens: `reap` measures their outputs.
    """
    return expert_share


@criterion(source="Lasby et al. 2025, arXiv:2510.13999 (the router's part of REAP)")
def router_weight(expert_gate: ExpertGate) -> Scores:
    """Mean router weight of an expert over the tokens sent to the expert.

    `s_j = mean of g_j(x) over the tokens sent to j`, `g` the softmax over the experts chosen for a token. The source
    may take the softmax before or after the choice. Data: forward passes only. For `Expert()`. Experts of routers
    without a softmax are not scored.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.router_weight(torch.tensor([0.5, 0.25])).tolist()
        [0.5, 0.25]

    Use: a check on `reap`, at the cost of plain forward passes. Avoid: experts whose outputs differ in size.
    """
    return expert_gate


@criterion(source="Lasby et al. 2025, arXiv:2510.13999")
def reap(expert_output: ExpertOutput) -> Scores:
    """Mean norm of the router-weighted output of an expert over the tokens sent to the expert (REAP).

    `s_j = mean of ||g_j(x) f_j(x)||_2 over the tokens sent to j`. The score is measured without knowledge of the
    architecture: the layer runs once more for each expert with the parameters of the expert at zero, and the difference
    is the output of the expert. The router's weights must not depend on the experts, and a zero expert must give zero.
    The output is that of the smallest module that holds router and experts. Data: forward passes only, one of each
    layer for each of its experts. For `Expert()`.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.reap(torch.tensor([0.5, 2.0])).tolist()
        [0.5, 2.0]

    Use: removal of experts in one shot, without training. Avoid: hundreds of experts on much data: try
    `router_frequency` first.
    """
    return expert_output
