"""A physically smaller module, verified before it is returned."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from prunella.errors import NotSupported
from prunella.graph.cut.changes import Changes
from prunella.graph.cut.surgery import change_
from prunella.graph.other_sizes import check_sizes
from prunella.graph.training_pass import training_fault
from prunella.graph.verify import check
from prunella.model.copying import copied
from prunella.model.device import check_float64
from prunella.model.masks import slice_masks_
from prunella.model.state import evaluation_flags, outside_inference
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.plan import Plan
from prunella.transform.apply import apply_
from prunella.transform.configuration import follow_configuration_
from prunella.types import Examples, Inputs


def shrink(model: nn.Module, plan: Plan, *, inputs: Inputs | Examples | None = None) -> nn.Module:
    """A new, smaller module with the outputs of the masked `model`; `model` does not change.

    The new module has the weights and masks of the plan, without the removed positions and blocks. It is compared in
    float64 with the masked model, in which dropped blocks are bypassed, on the example inputs of the plan (or on
    `inputs`), on another batch size and image or sequence length where the model accepts them, and tried once in
    training mode if the dense model runs in this mode on these inputs. Gradients are cut with their parameters;
    `carry_` does the same for the state of an optimizer. The configuration of a transformers model is updated, so that
    `from_pretrained` reads the result of its own `save_pretrained`; if no configuration describes the model,
    `save_pretrained` refuses, and `prunella.save` writes it.

    Errors: RequestError if the plan is not for this model, NotSupported if the smaller module does not run or if no
    output can be compared, CheckFailed if its outputs differ. A module that fails the check is never returned.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.Params(0.5))
        >>> pr.shrink(model, plan)
        Sequential(
          (0): Linear(in_features=8, out_features=7, bias=True)
          (1): ReLU()
          (2): Linear(in_features=7, out_features=4, bias=True)
        )
    """
    with outside_inference():
        return _shrunk(with_plain_weights(model), plan, inputs)


def _shrunk(model: nn.Module, plan: Plan, inputs: Inputs | Examples | None) -> nn.Module:
    check_float64(model)
    dense = copied(model)
    if plan.masks or plan.weights:
        apply_(dense, replace(plan, changes=Changes()))
    small = copied(dense)
    _copy_gradients(model, small)
    slice_masks_(small, plan.cuts)
    with evaluation_flags(small):  # a parametrization may change its buffers when it is read in training mode
        change_(small, plan.changes)
    first, others = (plan.inputs, plan.others) if inputs is None else Examples.split(inputs)
    if plan.changes and first is not None:
        for number, example in enumerate((first, *others)):
            check(dense, small, plan.changes, example, example=number)
        check_sizes(dense, small, plan.changes, first, others)
        _check_training(dense, small, plan.changes, first)
    follow_configuration_(small, dense, plan, first if plan.inputs is None else plan.small_inputs)
    return small


def _check_training(dense: nn.Module, small: nn.Module, applied: Changes, example: Inputs) -> None:
    fault = training_fault(dense, small, applied, example)
    if fault:
        raise NotSupported("the smaller model cannot be trained", fault, "skip= excludes the layers that you name")


def _copy_gradients(model: nn.Module, copied_model: nn.Module) -> None:
    """Copy the gradients, which a deep copy omits."""
    for old, new in zip(model.parameters(), copied_model.parameters(), strict=True):
        if old.grad is not None:
            new.grad = old.grad.clone()
