"""Every tensor shape of the library, named once.

A weight is always seen as a matrix `(out, in)`: `graph/view.py` folds convolutions and transposed layers, so that a
method never asks what kind of layer it looks at. The names below are also the names by which a criterion asks for its
statistics: a positional parameter called `input_norm` receives an `InputNorm`.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

type_names = (
    "Weight",
    "Grad",
    "GradSq",
    "InputNorm",
    "NormScale",
    "GateGrad",
    "UnitWeight",
    "Noise",
    "Gram",
    "Saliency",
    "Scores",
    "Mask",
)

Weight = Annotated[Tensor, "(out, in)", "the weight as a matrix"]
Grad = Annotated[Tensor, "(out, in)", "mean gradient of the loss over the batches"]
GradSq = Annotated[Tensor, "(out, in)", "mean over batches of the squared gradient"]
InputNorm = Annotated[
    Tensor, "(in,)", "L2 norm of each column's input over all tokens; (out, in) where rows read apart"
]
NormScale = Annotated[Tensor, "(units,)", "mean absolute scale (gamma) of the normalisations on each unit"]
GateGrad = Annotated[Tensor, "(batches, units)", "gradient of the loss to a gate of 1 on each unit (weight), per batch"]
UnitWeight = Annotated[Tensor, "(units, weights)", "all weights of each unit in the criterion's scope, one row a unit"]
Noise = Annotated[Tensor, "any", "uniform numbers in [0, 1), one for each unit (weight), from the recipe's seed"]
Gram = Annotated[Tensor, "(in, in)", "sum over tokens of x x^T"]
Saliency = Annotated[Tensor, "(out, in)", "one number per weight; higher is kept"]
Scores = Annotated[Tensor, "(units,)", "one number per unit; higher is kept"]
Mask = Annotated[Tensor, "any", "bool; True is kept"]
