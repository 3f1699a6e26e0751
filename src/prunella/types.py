"""Names of all tensor shapes in the library.

A method sees every weight as a matrix `(out, in)`. `graph/matrix.py` folds convolutions and transposed layers, so that
no method depends on the kind of a layer. `prunella.stats.table` lists the name of each statistic: the positional
parameter `input_norm` of a criterion receives an `InputNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""An example batch: one tensor, positional arguments, or keyword arguments."""


@dataclass(frozen=True, init=False, eq=False)
class Examples:
    """Several example batches of one model, for example images of two sizes, where one batch is usually taken.

    The model is traced on each batch, into one graph: couplings and frozen axes of any batch hold for all. Cuts are
    verified on each batch. Multiply-adds and times are those of the first.

    Example:

        >>> import torch, prunella as pr
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> sizes = pr.Examples(torch.randn(1, 3, 8, 8), torch.randn(2, 3, 9, 12))
        >>> len(pr.plan(net, sizes, target=pr.Sparsity(0.5)).others)
        1
    """

    first: Inputs
    others: tuple[Inputs, ...]

    def __init__(self, first: Inputs, *others: Inputs) -> None:
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "others", others)

    @staticmethod
    def split(inputs: Inputs | Examples) -> tuple[Inputs, tuple[Inputs, ...]]:
        """The first example, and the others if there are any."""
        return (inputs.first, inputs.others) if isinstance(inputs, Examples) else (inputs, ())


Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""
Keep = Mapping[str, Tensor]
"""Group name -> bool tensor over its units; True is kept. An absent group is kept dense."""

Weight = Annotated[Tensor, "(out, in)", "the weight as a matrix"]
Grad = Annotated[Tensor, "(out, in)", "mean gradient of the loss over the batches"]
GradSq = Annotated[Tensor, "(out, in)", "mean over batches of the squared gradient"]
InputNorm = Annotated[
    Tensor, "(in,)", "L2 norm of each column's input over all tokens; (out, in) where rows read different inputs"
]
NormScale = Annotated[Tensor, "(units,)", "mean absolute scale (gamma) of the normalizations on each unit"]
GateGrad = Annotated[Tensor, "(batches, units)", "gradient of the loss to a gate of 1 on each unit (weight), per batch"]
UnitWeight = Annotated[Tensor, "(units, weights)", "all weights of each unit in the criterion's scope, one row a unit"]
Noise = Annotated[Tensor, "any", "uniform numbers in [0, 1), one for each unit (weight), from the recipe's seed"]
FisherDiag = Annotated[Tensor, "(out, in)", "mean over samples of the squared gradient"]
FisherInverse = Annotated[
    Tensor, "(out, blocks, block, block)", "inverse of the damped Fisher of every block of neighbors in a row"
]
FisherInverseDiag = Annotated[Tensor, "(out, in)", "diagonal of FisherInverse"]
HessianDiag = Annotated[Tensor, "(out, in)", "estimate of the second derivative of the loss to each weight"]
SampleGrad = Annotated[Tensor, "(samples, out, in)", "gradient of the loss of each sample"]
InputVar = Annotated[Tensor, "(out, in)", "variance over all tokens of the input that each weight multiplies"]
UnitLoss = Annotated[Tensor, "(units,)", "relative error of its refitted readers without the unit and all before"]
UnitNorm = Annotated[Tensor, "(units,)", "root mean square of each unit's activation where it is read"]
UnitRank = Annotated[Tensor, "(units,)", "mean rank of each unit's feature maps where convolutions read it"]
UnitVar = Annotated[Tensor, "(units,)", "variance of each unit's activation where it is read"]
UnitZeros = Annotated[Tensor, "(units,)", "fraction of each unit's activations that are exactly 0 where it is read"]
Influence = Annotated[Tensor, "(units,)", "one minus the mean cosine of a residual block's input and output"]
HessianGrad = Annotated[Tensor, "(out, in)", "Hessian of the mean loss times its gradient"]
TotalSlope = Annotated[Tensor, "(out, in)", "sum of |grad * weight| over all scored weights, one number in every place"]
Flow = Annotated[Tensor, "(out, in)", "gradient of the sum over all paths of products of absolute weights"]
ExpertShare = Annotated[Tensor, "(units,)", "fraction of the tokens for which the router chooses each expert"]
ExpertGate = Annotated[Tensor, "(units,)", "mean weight of each expert where it is chosen, the weights summing to 1"]
ExpertOutput = Annotated[Tensor, "(units,)", "mean norm of the weighted output of each expert where it is chosen"]
Gram = Annotated[Tensor, "(in, in)", "sum over tokens of x x^T"]
TokenIds = Annotated[Tensor, "(tokens,) or (batch, tokens)", "token ids, int64"]
Saliency = Annotated[Tensor, "(out, in)", "one number per weight; higher is kept"]
Scores = Annotated[Tensor, "(units,)", "one number per unit; higher is kept"]
Mask = Annotated[Tensor, "any", "bool; True is kept"]
