"""Criteria that need activations: forward passes only, no labels."""

from __future__ import annotations

from prunella.method import criterion
from prunella.types import InputNorm, Saliency, Weight


@criterion(source="Sun et al. 2023, arXiv:2306.11695")
def wanda(weight: Weight, input_norm: InputNorm) -> Saliency:
    """Weight magnitude times the norm of the input it multiplies.

    `S_ij = |W_ij| * ||x_j||_2`, norms over all tokens of the calibration data. The paper compares the weights of an
    output row with each other: `Element(per_row=True)` or `NM(2, 4)`.
    Data: forward passes only. Zero where the input is always zero.

    Use: linear layers whose inputs have outliers, as in language models. Avoid: models without calibration data, or
    pruned with retraining: `magnitude` does as well there.
    """
    return weight.abs() * input_norm
