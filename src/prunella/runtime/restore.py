"""The dense model of a sparse one: the same tensors under the same names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.model.copying import copied, frozen_copy
from prunella.runtime.kernels.config import Activation
from prunella.runtime.layers import FastLinear, FoldedConv2d, SparseConv2d, SparseLinear

_ACTIVATIONS = {
    Activation.RELU: nn.ReLU, Activation.GELU: nn.GELU, Activation.SILU: nn.SiLU, Activation.RELU6: nn.ReLU6,
    Activation.HARDSWISH: nn.Hardswish,
}  # fmt: skip


def restored(model: nn.Module) -> nn.Module:
    """A copy with dense layers of the same weights under the same names.

    A model that was traced gets its tensors back but not its program: batch norms are in their place, but not called.
    """
    dense = frozen_copy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, SparseLinear):
            _put(dense, name, _linear(module))
            if module.activation_path:
                _put(dense, module.activation_path, _ACTIVATIONS[module.activation]())
        elif isinstance(module, FastLinear):
            _put(dense, name, _fast(module))
        elif isinstance(module, SparseConv2d | FoldedConv2d):
            _put(dense, name, _conv(module))
            if module.norm is not None:
                _put(dense, module.norm_path, module.norm)
    return dense


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear | SparseConv2d]:
    """The layers of a model that skip zeros."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv2d)}


def _linear(module: SparseLinear) -> nn.Module:
    if module.dense:
        return _filled(copied(module.dense[0]), module.weight.detach().contiguous(), module.bias)
    with torch.device("meta"):
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    return _filled(layer, module.matrix().detach(), module.bias)


def _fast(module: FastLinear) -> nn.Module:
    """A linear layer with the same parameter objects, so that tied weights stay tied."""
    with torch.device("meta"):
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    layer.weight = module.weight
    layer.register_parameter("bias", module.bias)
    return layer.eval()


def _conv(module: SparseConv2d | FoldedConv2d) -> nn.Module:
    geometry, groups = (module.geometry, 1) if isinstance(module, SparseConv2d) else (module, module.groups)
    weight = module.weight.detach()
    out, wide, *kernel = weight.shape
    sizes = (geometry.stride, geometry.padding, geometry.dilation, groups, module.bias is not None)
    with torch.device("meta"):
        layer = nn.Conv2d(wide * groups, out, kernel, *sizes)  # type: ignore[arg-type]
    return _filled(layer, weight, module.bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    if isinstance(model, GraphModule):
        model.add_submodule(path, module)
    else:
        setattr(model.get_submodule(parent), leaf, module)
