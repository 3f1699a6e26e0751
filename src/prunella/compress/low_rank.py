"""Low-rank factorization: truncated singular value decomposition of linear layers and convolutions into two layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, RequestError
from prunella.model.copying import copied
from prunella.model.masks import records
from prunella.model.torch_masks import with_plain_weights
from prunella.registry.method import compression


@final
class LowRank(nn.Module):
    """A factored layer, `second(first(x))`: the first has `rank` outputs, the second has the bias."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """The first layer, then the second."""
        out: Tensor = self.second(self.first(x))
        return out


@dataclass(frozen=True)
class Factors:
    """`weight ~ second @ first` as matrices `(out, rank)`, `(rank, in)`. error: `|W - BA|^2 / |W|^2`."""

    first: Tensor
    second: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Columns of the second factor."""
        return self.second.shape[1]


@compression(source="Denton et al. 2014, arXiv:1404.0736; Eckart and Young 1936, doi:10.1007/BF02288367")
def svd_factors(weight: Tensor, *, rank: int = 0, energy: float = 0.9) -> Factors:
    """The best approximation of a matrix by a product of two thin matrices, from its largest singular values.

    `W = U S V^T`, `B = U_r sqrt(S_r)`, `A = sqrt(S_r) V_r^T`: `|W - B A|^2 = sum_{i > r} s_i^2`, the smallest error
    that any matrix of rank r has. Computed in float64; both factors have the same norm.

    weight: `(out, in)`. rank: from 1; 0 takes the smallest rank with `sum_{i <= r} s_i^2 >= energy * sum_i s_i^2`.
    energy: in (0, 1].

    Data: none.
    Errors: RequestError for a rank or an energy out of range.

    Example:

        >>> import torch, prunella as pr
        >>> factors = pr.compress.svd_factors(torch.ones(4, 3), rank=1)
        >>> factors.rank
        1

    Use: layers whose singular values fall fast. Avoid: sparse weights: the factors are dense.
    """
    if weight.dim() != 2 or not 0 <= rank <= min(weight.shape) or not 0 < energy <= 1:
        raise RequestError(
            f"rank={rank}, energy={energy:g} is out of range for a weight of shape {tuple(weight.shape)}",
            "the rank of a matrix is from 1 to its smaller side; energy is a fraction",
            "pass rank=, or energy= in (0, 1]",
        )
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    squares = s.square()
    total = float(squares.sum())
    if not rank:
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1
    root = s[:rank].sqrt()
    first, second = root[:, None] * v[:rank], u[:, :rank] * root
    error = float(squares[rank:].sum()) / total if total else 0.0
    return Factors(first.to(weight.dtype), second.to(weight.dtype), error)


@dataclass(frozen=True)
class Factored:
    """One factored layer. error: `|W - BA|^2 / |W|^2`, the energy lost. before, after: numbers of weights."""

    name: str
    rank: int
    full: int
    error: float
    before: int
    after: int

    def __str__(self) -> str:
        size = f"{self.before} -> {self.after} weights"
        return f"{self.name}: rank {self.rank} of {self.full}, {size}, {self.error:.2%} lost"


@compression(source="Denton et al. 2014, arXiv:1404.0736; Zhang et al. 2015, arXiv:1411.4229 (convolutions)")
def low_rank(
    model: nn.Module, *, rank: int = 0, energy: float = 0.9, only: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> tuple[nn.Module, tuple[Factored, ...]]:
    """A new model with linear layers and convolutions factored into two thinner layers, where this is smaller.

    A linear layer `(out, in)` becomes `(rank, in)` and `(out, rank)`; a convolution the same kernel with `rank`
    outputs, with its stride, padding and dilation, and a 1x1 convolution to `out`. The energy lost is `sum_{i > r}
    s_i^2 / sum_i s_i^2` of the weight as a matrix `(out, in * kernel)`. A layer does not change if `rank (in * kernel
    + out) >= in * kernel * out`; neither do grouped convolutions and shared weights. `model` does not change.

    rank: of every layer, 0 for the smallest rank with the energy. energy: kept fraction of the squared weights, (0, 1].
    only, skip: patterns of module names. Data: none.

    `RequestError` if no layer gets smaller, or if a chosen layer carries masks, which the factors would fill.

    Example:

        >>> import torch, prunella as pr
        >>> model, layers = pr.compress.low_rank(torch.nn.Sequential(torch.nn.Linear(32, 32)), rank=2)
        >>> layers[0].rank
        2

    Use: after `shrink`, for large linear layers; `finetune` afterwards. Avoid: networks with masks of single weights.
    """
    small = copied(with_plain_weights(model))
    masked = {name.rpartition(".")[0] for name, _, _ in records(small)}
    rows = []
    for name, layer in _layers(small, only, skip):
        if name in masked:
            raise RequestError(
                f"{name} carries masks, and the product of two factors has no zeros",
                "low rank and single pruned weights do not go together",
                f"leave it out: skip=[{name!r}], or call finalize(model) first if the zeros may go",
            )
        matrix = layer.weight.detach().flatten(1)
        factors = svd_factors(matrix, rank=min(rank, *matrix.shape) if rank else 0, energy=energy)
        after = factors.first.numel() + factors.second.numel()
        if after >= matrix.numel():
            continue
        replace_(small, name, factors.rank)
        with torch.no_grad():
            _fill(small.get_submodule(name), factors, layer)
        rows.append(Factored(name, factors.rank, min(matrix.shape), factors.error, matrix.numel(), after))
    if not rows:
        raise RequestError(
            "no layer gets smaller at this rank",
            f"rank={rank}, energy={energy:g}: two factors would have as many weights as the layer, or none was chosen",
            "ask for a smaller rank or energy",
        )
    return small, tuple(rows)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Module name -> rank, for every factored layer: the entry in a manifest."""
    factored = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    return {name: int(module.first.get_parameter("weight").shape[0]) for name, module in factored.items()}


def replace_(model: nn.Module, name: str, rank: int) -> None:
    """Replace a layer by two layers of this rank, without values. `BadInput` if there is no such layer."""
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        raise BadInput(f"{name!r} cannot be made of low rank", "the model has no such module") from None
    kind = type(layer)
    if kind not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or not 1 <= rank <= min(layer.weight.flatten(1).shape):
        raise BadInput(
            f"{name!r} cannot have rank {rank}", f"it is a {kind.__name__}", "give the factory it was made with"
        )
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if kind is nn.Linear:
        pair = nn.Linear(layer.in_features, rank, bias=False, **like), nn.Linear(rank, layer.out_features, bias, **like)
    else:
        how = {n: getattr(layer, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        pair = (
            kind(layer.in_channels, rank, bias=False, **how, **like),
            kind(rank, layer.out_channels, 1, bias=bias, **like),
        )
    factored = LowRank(*pair).train(layer.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, factored)


def rebuild_(model: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Factor the layers that a manifest names, without values. `BadInput` if they do not fit."""
    for name, rank in ranks.items():
        if not isinstance(rank, int):
            raise BadInput("the manifest is broken", f"the rank of {name!r} is not a whole number")
        replace_(model, name, rank)


def _layers(model: nn.Module, only: Sequence[str], skip: Sequence[str]) -> list[tuple[str, Any]]:
    """The layers that can be factored, by name; only their own module reads their weight."""
    for option, patterns in (("only", only), ("skip", skip)):
        if isinstance(patterns, str):
            raise RequestError(f"{option}= is one text", "a list of patterns is needed", f"{option}=[{patterns!r}]")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    paths = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    layers = []
    for name, layer in model.named_modules():
        kind: Any = type(layer)
        fits = kind is nn.Linear or (kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and layer.groups == 1)
        if not fits or not name or owners[id(layer.weight)] > 1 or paths.count(id(layer)) > 1:
            continue
        if any(fnmatchcase(name, p) for p in only) and not any(fnmatchcase(name, p) for p in skip):
            layers.append((name, layer))
    return layers


def _fill(pair: nn.Module, factors: Factors, layer: Any) -> None:
    assert isinstance(pair, LowRank)
    first, second = pair.first.get_parameter("weight"), pair.second.get_parameter("weight")
    first.copy_(factors.first.reshape(first.shape))
    second.copy_(factors.second.reshape(second.shape))
    if layer.bias is not None:
        pair.second.get_parameter("bias").copy_(layer.bias)
    for parameter in pair.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
