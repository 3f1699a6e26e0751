"""Remove identities and checks from a traced program, so that steps that can be fused become adjacent."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional

_PARTS = ("running_mean", "running_var", "weight", "bias")
_OF_SHAPES = (getattr, operator.eq, operator.ge, operator.gt)


def simplify_(program: GraphModule, model: nn.Module) -> None:
    """Drop identities and checks of the number of axes; turn calls of `F.batch_norm` into calls of a module.

    program: traced from `model`. All tensors keep their names.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            _drop_check(node)
        elif node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.Identity:
            _drop_identity(node, model.get_submodule(str(node.target)))
        elif node.op == "call_function" and node.target is functional.batch_norm:
            _make_norm(program, model, node)
    for node in reversed(list(program.graph.nodes)):
        if node.target is getattr and not node.users:  # it was read for the message of a check only
            program.graph.erase_node(node)
    program.graph.lint()
    program.recompile()


def _drop_identity(node: Node, module: nn.Module) -> None:
    if len(node.args) == 1 and not node.kwargs and not module._forward_hooks and not module._forward_pre_hooks:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)


def _drop_check(node: Node) -> None:
    """Drop an assertion that asks only for the number of axes: the next operations would refuse the input too."""
    pending, steps = [node.args[0]], list[Node]()
    while pending:
        step = pending.pop()
        if not isinstance(step, Node):
            continue
        if step.op != "call_function" or step.target not in _OF_SHAPES or len(step.users) != 1:
            return
        steps.append(step)
        if step.target is getattr:
            if step.args[1] != "ndim":
                return
        else:
            pending += step.args
    node.graph.erase_node(node)
    for step in steps:
        step.graph.erase_node(step)


def _make_norm(program: GraphModule, model: nn.Module, node: Node) -> None:
    """Replace `F.batch_norm` with the tensors of one nn.BatchNorm2d in eval mode, called only here, by a plain module.

    The class of the original module may do more, for example apply an activation: those are other steps of the trace.
    """
    arguments = dict(zip(("x", *_PARTS, "training", "momentum", "eps"), node.args, strict=False)) | node.kwargs
    tensors = [arguments.get(part) for part in _PARTS]
    if not all(isinstance(t, Node) and t.op == "get_attr" for t in tensors) or arguments.get("training") is not False:
        return
    owners = {str(t.target).removesuffix(f".{part}") for t, part in zip(tensors, _PARTS, strict=True)}  # type: ignore[union-attr]
    owner = next(iter(owners))
    norm = model.get_submodule(owner) if len(owners) == 1 and hasattr(model, owner.split(".")[0]) else None
    shared = any(len(t.users) != 1 for t in tensors)  # type: ignore[union-attr]
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or shared or arguments.get("eps", 1e-5) != norm.eps:
        return
    with torch.device("meta"):
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    for name, child in norm.named_children():
        plain.add_module(name, child)
    parent, _, leaf = owner.rpartition(".")
    setattr(program.get_submodule(parent), leaf, plain.eval())
    with node.graph.inserting_before(node):
        call = node.graph.call_module(owner, (arguments["x"],))
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    for tensor in tensors:
        node.graph.erase_node(tensor)  # type: ignore[arg-type]
