"""Fusion of a batch norm, a residual and an activation with the layer before them, in a program that torch.fx traced.

A step can be fused if it is the only reader of the result before it. Models that torch.fx cannot trace are not changed.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional

from prunella.model.trees import tensors
from prunella.runtime.fx.simplify import simplify_
from prunella.runtime.kernels.config import Activation
from prunella.runtime.layers import FoldedConv2d

_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation.RELU, nn.SiLU: Activation.SILU, nn.GELU: Activation.GELU, nn.ReLU6: Activation.RELU6,
    nn.Hardswish: Activation.HARDSWISH,
}  # fmt: skip
_NAMES = {"GELUActivation": Activation.GELU, "SiLUActivation": Activation.SILU}
_FUNCTIONS: dict[object, Activation] = {
    functional.relu: Activation.RELU, torch.relu: Activation.RELU, torch.relu_: Activation.RELU,
    functional.silu: Activation.SILU, functional.gelu: Activation.GELU, functional.relu6: Activation.RELU6,
    functional.hardswish: Activation.HARDSWISH,
}  # fmt: skip
_METHODS = {"relu": Activation.RELU, "relu_": Activation.RELU}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
SHAPE = "tensor_meta"
"""Key of `Node.meta` where torch.fx notes the shape and type of a step's result."""


@dataclass(frozen=True)
class Fused:
    """Steps fused with a layer. norm: path of a batch norm. residual: whether one is added before the activation."""

    norm: str | None = None
    activation: Activation = Activation.NONE
    residual: bool = False


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None."""
    kind = type(module)
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    if kind.__module__ == "transformers.activations":
        plain = kind.__name__ != "GELUActivation" or getattr(module, "act", None) is functional.gelu
        return _NAMES.get(kind.__name__) if plain else None
    return _MODULES.get(kind)


def traced(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> GraphModule | None:
    """The program of `model` with these layers as single steps; None if it cannot be traced or its output differs."""
    if isinstance(example, Mapping):
        return None
    inputs = example if isinstance(example, tuple) else (example,)
    leaves = {id(layer) for layer in layers.values()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = GraphModule(model, _tracer(leaves).trace(model))
            simplify_(program, model)
            if not _same_outputs(program(*inputs), model(*inputs)):
                return None
            ShapeProp(program).propagate(*inputs)  # after a run that succeeded: it prints the errors of one that fails
    except Exception:  # tracing can fail in any way, depending on the code of the model; then nothing is fused
        return None
    return program


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of the tensor that a step computed on the example; None if its result is not a tensor."""
    meta = node.meta.get(SHAPE)
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def _tracer(leaves: set[int]) -> Tracer:
    """A tracer for which these modules, those of torch, and those that cannot be traced are single steps."""

    class Leaves(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return id(m) in leaves or Tracer.is_leaf_module(self, m, module_qualified_name)

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            before, depth = len(self.graph.nodes), len(self.module_stack)
            try:
                return Tracer.call_module(self, m, forward, args, kwargs)
            except Exception:  # its forward needs values, or cannot be traced for another reason
                for node in reversed(list(self.graph.nodes)[before:]):
                    self.graph.erase_node(node)
                while len(self.module_stack) > depth:
                    self.module_stack.popitem()
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    return Leaves()


def _same_outputs(output: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(output), tensors(expected), strict=True))
    return bool(pairs) and all(torch.allclose(a, b, equal_nan=True) for a, b in pairs)


def fuse_(program: GraphModule, make: Callable[[str, Fused], nn.Module | None], layers: Mapping[str, Any]) -> None:
    """Replace each layer, and the steps that can be fused with it, by the module that `make` returns.

    If `make` returns None the layer stays. Nothing is fused with a layer that is called twice.
    """
    modules = dict(program.named_modules())
    calls: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        fused, last, addend = _fusable(nodes[0], modules) if len(nodes) == 1 else (Fused(), nodes[0], None)
        module = make(name, fused)
        if module is None:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(program.get_submodule(parent), leaf, module)
        if last is not nodes[0]:
            _rewrite(program, nodes[0], last, addend)
    program.delete_all_unused_submodules()
    program.graph.lint()
    program.recompile()


def fusions(program: GraphModule, layers: Mapping[str, Any]) -> dict[str, Fused]:
    """The steps that `fuse_` would fuse with each of these layers. The program computes something else afterwards."""
    by_layer: dict[str, Fused] = {}

    def make(name: str, fused: Fused) -> nn.Module:
        by_layer[name] = fused
        return nn.Identity()

    fuse_(program, make, layers)
    return by_layer


def called_modules(program: GraphModule) -> set[str]:
    """Paths of the modules that the program itself calls."""
    return {str(node.target) for node in program.graph.nodes if node.op == "call_module"}


def fold_(program: GraphModule) -> None:
    """Fold batch norms into the dense convolutions before them, and fuse the next steps as `fuse_` does."""
    modules = dict(program.named_modules())
    convolutions = {name: m for name, m in modules.items() if type(m) is nn.Conv2d and _foldable(m)}

    def make(name: str, fused: Fused) -> nn.Module | None:
        norm = modules.get(fused.norm or "")
        if fused.norm is None or not isinstance(norm, nn.BatchNorm2d):
            return None
        return FoldedConv2d(convolutions[name], norm, fused.norm, fused.activation).eval()

    fuse_(program, make, convolutions)


def _foldable(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and conv.weight.dtype is torch.float32 and not has_hooks(conv)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward, or its weight is parametrized."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "parametrizations" in module._modules


def channels_last_(program: GraphModule) -> bool:
    """Run images in the layout channels last; False if the program takes no image or returns more than one tensor.

    The output keeps the layout that it had.
    """
    graph = program.graph
    images = [node for node in graph.nodes if node.op == "placeholder" and len(shape_of(node) or ()) == 4]
    (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
    shape = shape_of(result) if isinstance(result, Node) else None
    if not images or shape is None:
        return False
    for node in images:
        with graph.inserting_after(node):
            image = graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        node.replace_all_uses_with(image, delete_user_cb=lambda user, image=image: user is not image)
    if len(shape) == 4:
        with graph.inserting_after(result):
            restored = graph.call_method("contiguous", (result,))
        result.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    graph.lint()
    program.recompile()
    return True


def _fusable(layer: Node, modules: Mapping[str, nn.Module]) -> tuple[Fused, Node, Node | None]:
    """The operations to fuse with a layer, the last node among them, and the residual that is added."""
    node, norm, residual = layer, None, None
    follower = _only_user(node)
    if follower is not None and _is_norm(follower, modules):
        norm, node = str(follower.target), follower
        follower = _only_user(node)
    addend = _added(follower, node) if follower is not None else None
    if follower is not None and addend is not None and _can_move(layer, follower):
        residual, node = addend, follower
        follower = _only_user(node)
    activation = _activation(follower, modules) if follower is not None else None
    if follower is not None and activation is not None:
        node = follower
    return Fused(norm, activation or Activation.NONE, residual is not None), node, residual


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_norm(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    norm, path = modules[str(node.target)], str(node.target)
    called_once = sum(n.op == "call_module" and n.target == path for n in node.graph.nodes) == 1
    if type(norm) is not nn.BatchNorm2d or norm.training or not called_once:
        return False
    # Without a scale, each call would make a new tensor of ones, and the cache would take it for a changed weight.
    return all(part is not None for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias))


def _added(node: Node, term: Node) -> Node | None:
    """The other term of a sum with `term`, if the step adds two tensors of one shape."""
    plain = node.op == "call_function" and node.target in _ADDITIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not (plain or method) or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is term else node.args[0]
    in_place = node.target in ("add_", operator.iadd)
    if not isinstance(other, Node) or other is term or (in_place and node.args[0] is not term):
        return None  # a sum in the memory of the other term would have to change that term
    return other if shape_of(other) is not None and shape_of(other) == shape_of(term) else None


def _can_move(layer: Node, last: Node) -> bool:
    """Whether the layer can run where `last` is: no step between the two writes into a tensor."""
    node, chain = layer.next, set(_steps(layer, last))
    while node is not last:
        writes = node.op == "placeholder" or str(node.target).endswith("_") or node.target in (operator.iadd,)
        if node.op == "call_module":
            module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
            writes = writes or any(getattr(part, "inplace", False) for part in module.modules())
        if (writes or "out" in node.kwargs or node.target is operator.setitem) and node not in chain:
            return False
        node = node.next
    return True


def _activation(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        return activation_of(modules[str(node.target)])
    options = [value for key, value in node.kwargs.items() if key != "inplace"]
    if len(node.args) != 1 or options:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _rewrite(program: GraphModule, layer: Node, last: Node, residual: Node | None) -> None:
    """Replace the steps from `layer` to `last` by one call; with a residual it stands where the residual is ready."""
    with program.graph.inserting_before(last if residual is not None else layer):
        args = layer.args if residual is None else (*layer.args, residual)
        call = program.graph.call_module(str(layer.target), args, layer.kwargs)
    call.meta[SHAPE] = last.meta.get(SHAPE)
    last.replace_all_uses_with(call)
    for node in reversed(list(_steps(layer, last))):
        program.graph.erase_node(node)


def _steps(layer: Node, last: Node) -> Iterator[Node]:
    """The steps from the layer to the last one, in order; each has one user."""
    node = layer
    yield node
    while node is not last:
        node = next(user for user in node.users if user.op != "output")
        yield node
