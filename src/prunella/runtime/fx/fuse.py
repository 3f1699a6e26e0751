"""What may be computed in one go with a layer, where a trace of the model proves that nothing else sees the parts.

`torch.fx` follows the whole program: a batch norm, the addition of a residual and an activation join the layer before
them if each is the only reader of what it joins. Models that `torch.fx` cannot follow keep their modules.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.nn import functional

from prunella.model.forward import tensors
from prunella.runtime.fx.simplify import tidy_
from prunella.runtime.kernels.library import Activation
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


@dataclass(frozen=True)
class Fused:
    """What joins a layer: the module path of a batch norm, an activation, whether something is added before it."""

    norm: str | None = None
    activation: Activation = Activation.NONE
    residual: bool = False


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, exactly, or None."""
    kind = type(module)
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    if kind.__module__ == "transformers.activations":
        plain = kind.__name__ != "GELUActivation" or getattr(module, "act", None) is functional.gelu
        return _NAMES.get(kind.__name__) if plain else None
    return _MODULES.get(kind)


def traced(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> GraphModule | None:
    """The program of `model`, with these layers as single steps, or None where it cannot be followed or differs."""
    if isinstance(example, Mapping):
        return None
    inputs = example if isinstance(example, tuple) else (example,)
    leaves = {id(layer) for layer in layers.values()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = GraphModule(model, _tracer(leaves).trace(model))
            tidy_(program, model)
            _Shapes(program).run(*inputs)
            same = _same(program(*inputs), model(*inputs))
    except Exception:  # symbolic tracing fails in as many ways as there are models; then nothing is fused
        return None
    return program if same else None


def _tracer(leaves: set[int]) -> Tracer:
    """Follows everything but these modules, torch's own, and those that cannot be followed: these stay single steps."""

    class Leaves(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return id(m) in leaves or Tracer.is_leaf_module(self, m, module_qualified_name)

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            steps, depth = len(self.graph.nodes), len(self.module_stack)
            try:
                return Tracer.call_module(self, m, forward, args, kwargs)
            except Exception:  # its forward asks for values, or is foreign to tracing in another way
                for step in reversed(list(self.graph.nodes)[steps:]):
                    self.graph.erase_node(step)
                while len(self.module_stack) > depth:
                    self.module_stack.popitem()
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    return Leaves()


class _Shapes(Interpreter):
    """Notes the shape of what each step gives."""

    def run_node(self, n: Node) -> Any:
        made = Interpreter.run_node(self, n)
        n.meta["shape"] = tuple(made.shape) if isinstance(made, Tensor) else None
        return made


def _same(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return bool(pairs) and all(torch.allclose(a, b, equal_nan=True) for a, b in pairs)


def fuse_(program: GraphModule, make: Callable[[str, Fused], nn.Module | None], layers: Mapping[str, Any]) -> None:
    """Replace each layer, and what can join it, by what `make` gives for it; None leaves a layer as it is.

    A layer that is called twice is replaced with nothing joined.
    """
    modules = dict(program.named_modules())
    calls: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        joined, last, other = _join(nodes[0], modules) if len(nodes) == 1 else (Fused(), nodes[0], None)
        made = make(name, joined)
        if made is None:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(program.get_submodule(parent), leaf, made)
        if last is not nodes[0]:
            _rewrite(program, nodes[0], last, other)
    program.delete_all_unused_submodules()
    program.graph.lint()
    program.recompile()


def joins(program: GraphModule, layers: Mapping[str, Any]) -> dict[str, Fused]:
    """What `fuse_` would let join each of these layers if all were replaced. The program is of no use afterwards."""
    found: dict[str, Fused] = {}

    def make(name: str, fused: Fused) -> nn.Module:
        found[name] = fused
        return nn.Identity()

    fuse_(program, make, layers)
    return found


def called(program: GraphModule) -> set[str]:
    """Paths of the modules that the program itself calls."""
    return {str(node.target) for node in program.graph.nodes if node.op == "call_module"}


def fold_(program: GraphModule) -> None:
    """Multiply batch norms into the dense convolutions before them; what follows joins as in `fuse_`."""
    modules = dict(program.named_modules())
    convolutions = {name: m for name, m in modules.items() if type(m) is nn.Conv2d and _foldable(m)}

    def make(name: str, fused: Fused) -> nn.Module | None:
        norm = modules.get(fused.norm or "")
        if fused.norm is None or not isinstance(norm, nn.BatchNorm2d):
            return None
        return FoldedConv2d(convolutions[name], norm, fused.norm, fused.activation).eval()

    fuse_(program, make, convolutions)


def _foldable(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and conv.weight.dtype is torch.float32 and not hooked(conv)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward, or its weight is computed."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "parametrizations" in module._modules


def channels_last_(program: GraphModule) -> bool:
    """Let images run with their channels as the last axis; whether there is one, and the result can be turned back.

    Strides of what comes out stay as they were.
    """
    graph = program.graph
    images = [node for node in graph.nodes if node.op == "placeholder" and len(node.meta.get("shape") or ()) == 4]
    (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
    shape = result.meta.get("shape") if isinstance(result, Node) else None
    if not images or shape is None:
        return False
    for node in images:
        with graph.inserting_after(node):
            turned = graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        node.replace_all_uses_with(turned, delete_user_cb=lambda user, turned=turned: user is not turned)
    if len(shape) == 4:
        with graph.inserting_after(result):
            back = graph.call_method("contiguous", (result,))
        result.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    graph.lint()
    program.recompile()
    return True


def _join(layer: Node, modules: Mapping[str, nn.Module]) -> tuple[Fused, Node, Node | None]:
    """What can join a layer, the last step that is part of it then, and what is added."""
    node, norm, other = layer, None, None
    follower = _only_user(node)
    if follower is not None and _is_norm(follower, modules):
        norm, node = str(follower.target), follower
        follower = _only_user(node)
    addend = _added(follower, node) if follower is not None else None
    if follower is not None and addend is not None and _undisturbed(layer, follower):
        other, node = addend, follower
        follower = _only_user(node)
    activation = _activation(follower, modules) if follower is not None else None
    if follower is not None and activation is not None:
        node = follower
    return Fused(norm, activation or Activation.NONE, other is not None), node, other


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_norm(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    norm, path = modules[str(node.target)], str(node.target)
    alone = sum(n.op == "call_module" and n.target == path for n in node.graph.nodes) == 1
    if type(norm) is not nn.BatchNorm2d or norm.training or not alone:
        return False
    # One without a scale would have to make ones in each call, and the layer would be folded and packed again for them.
    return all(part is not None for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias))


def _added(node: Node, one: Node) -> Node | None:
    """The other term, if this step adds two tensors of one shape."""
    plain = node.op == "call_function" and node.target in _ADDITIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not (plain or method) or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is one else node.args[0]
    if (
        not isinstance(other, Node)
        or other is one
        or (node.args[0] is not one and node.target in ("add_", operator.iadd))
    ):
        return None  # in place, the other term would have to change too
    return other if other.meta.get("shape") is not None and other.meta["shape"] == one.meta.get("shape") else None


def _undisturbed(layer: Node, last: Node) -> bool:
    """Whether the layer may run where `last` is: nothing between the two writes into a tensor."""
    node, chain = layer.next, _chain(layer, last)
    while node is not last:
        writes = node.op == "placeholder" or str(node.target).endswith("_") or node.target in (operator.iadd,)
        if node.op == "call_module":
            module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
            writes = writes or any(getattr(part, "inplace", False) for part in module.modules())
        if (writes or "out" in node.kwargs or node.target is operator.setitem) and node not in chain:
            return False
        node = node.next
    return True


def _chain(layer: Node, last: Node) -> set[Node]:
    found, node = {layer}, layer
    while node is not last:
        node = next(iter(node.users))
        found.add(node)
    return found


def _activation(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        return activation_of(modules[str(node.target)])
    extra = [value for key, value in node.kwargs.items() if key != "inplace"]
    if len(node.args) != 1 or extra:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _rewrite(program: GraphModule, layer: Node, last: Node, other: Node | None) -> None:
    """Run the layer in place of all; where something is added, as late as that is there."""
    with program.graph.inserting_before(last if other is not None else layer):
        args = layer.args if other is None else (*layer.args, other)
        made = program.graph.call_module(str(layer.target), args, layer.kwargs)
    made.meta["shape"] = last.meta.get("shape")
    last.replace_all_uses_with(made)
    for node in reversed(list(_backwards(layer, last))):
        program.graph.erase_node(node)


def _backwards(layer: Node, last: Node) -> Iterator[Node]:
    """The steps from the layer to the last one, in order."""
    node = layer
    yield node
    while node is not last:
        node = next(user for user in node.users if user.op != "output")
        yield node


def copied(model: nn.Module) -> nn.Module:
    """A copy of the model, in eval mode and without gradients."""
    with torch.inference_mode(False):
        made = copy.deepcopy(model)
    return made.eval().requires_grad_(False)
