"""The dense model again: what a model that skips zeros would be without, tensor for tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.io.load import import_module
from prunella.runtime.fx.fuse import copied
from prunella.runtime.kernels.library import Activation
from prunella.runtime.layers import FastLinear, FoldedConv2d, SparseConv2d, SparseLinear

_ACTIVATIONS = {
    Activation.RELU: nn.ReLU, Activation.GELU: nn.GELU, Activation.SILU: nn.SiLU, Activation.RELU6: nn.ReLU6,
    Activation.HARDSWISH: nn.Hardswish,
}  # fmt: skip


def restored(model: nn.Module) -> nn.Module:
    """A copy with dense layers of the same weights under the same names.

    Of a model that was traced it has the tensors but not the program: batch norms are back in their place, unused.
    """
    made = copied(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, SparseLinear):
            _put(made, name, _linear(module))
            if module.activation_path:
                _put(made, module.activation_path, _ACTIVATIONS[module.activation]())
        elif isinstance(module, FastLinear):
            _put(made, name, _whole(module))
        elif isinstance(module, SparseConv2d | FoldedConv2d):
            _put(made, name, _conv(module))
            if module.norm is not None:
                _put(made, module.norm_path, module.norm)
    return made


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear | SparseConv2d]:
    """The layers of a model that skip zeros."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv2d)}


def _linear(module: SparseLinear) -> nn.Module:
    weight, bias = module.matrix().detach(), module.bias
    if module.transposed:
        made: nn.Module = import_module("transformers.pytorch_utils").Conv1D(*weight.shape)
        weight = weight.t().contiguous()
    else:
        with torch.device("meta"):
            made = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    return _filled(made, weight, bias)


def _whole(module: FastLinear) -> nn.Module:
    """The same parameters, so that what is tied stays so."""
    with torch.device("meta"):
        made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    made.weight = module.weight
    made.register_parameter("bias", module.bias)
    return made.eval()


def _conv(module: SparseConv2d | FoldedConv2d) -> nn.Module:
    how, groups = (module.geometry, 1) if isinstance(module, SparseConv2d) else (module, module.groups)
    weight = module.weight.detach()
    out, wide, *kernel = weight.shape
    sizes: Any = (wide * groups, out, kernel, how.stride, how.padding, how.dilation, groups, module.bias is not None)
    with torch.device("meta"):
        made = nn.Conv2d(*sizes)
    return _filled(made, weight, module.bias)


def _filled(made: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made.eval()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    if isinstance(model, GraphModule):
        model.add_submodule(path, module)
    else:
        setattr(model.get_submodule(parent), leaf, module)
