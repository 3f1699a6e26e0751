"""The sizes of a program: integer literals of its graph become attributes of the module, so that they can change.

A graph module of `torch.export` has every size of its source as a literal argument: `view(x, [2, 7, 4, 12])`. Each is
replaced by a read of its own integer attribute, named after the node and the position (`view_3_size_2`), also if two
literals are equal. The outputs of the module do not change. A cut can now set each size separately.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

_SIZES = {
    "view": ("size",),
    "_unsafe_view": ("size",),
    "reshape": ("shape",),
    "expand": ("size",),
    "broadcast_to": ("size",),
    "repeat": ("repeats",),
    "unflatten": ("sizes",),
    "split": ("split_size", "split_sizes", "split_size_or_sections"),
    "split_with_sizes": ("split_sizes",),
    "slice": ("start", "end"),
    "narrow": ("start", "length"),
    "zeros": ("size",),
    "ones": ("size",),
    "empty": ("size",),
    "full": ("size",),
    "new_zeros": ("size",),
    "new_ones": ("size",),
    "new_empty": ("size",),
    "new_full": ("size",),
    "conv1d": ("groups",),
    "conv2d": ("groups",),
    "conv3d": ("groups",),
    "conv_transpose1d": ("groups",),
    "conv_transpose2d": ("groups",),
    "conv_transpose3d": ("groups",),
    "group_norm": ("num_groups",),
    "layer_norm": ("normalized_shape",),
    "rms_norm": ("normalized_shape",),
}
"""Operation -> its size arguments, for operations whose rules follow sizes. All others keep their literals."""

_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod})
_REMEMBERED = ("stack_trace",)
_END = 2**62
"""Bounds from here on mean the end of an axis."""


def module_of(exported: ExportedProgram) -> nn.Module:
    """An exported program as a module with free sizes. Its training flags can be set but have no effect.

    Copies by `copy.deepcopy` have the same state-dict keys, unlike copies of a bare graph module.
    """
    module: Any = exported.module(check_guards=False)
    for name in ("train", "eval"):  # `train` and `eval` of a program raise
        vars(module).pop(name, None)
    module._forward_pre_hooks.clear()  # the hooks compare the inputs with those of the example
    constants = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    for name in constants:
        module.register_buffer(name, vars(module).pop(name), persistent=False)
    transient = frozenset(dict(module.named_buffers(remove_duplicate=False))) - frozenset(module.state_dict())
    module._deepcopy_hooks.append(partial(_as_before, transient=transient))
    free_sizes_(module)
    return module.eval()  # type: ignore[no-any-return]


def _as_before(copied: nn.Module, *, transient: frozenset[str]) -> None:
    """Restore what copying a graph module loses: its flags, and which buffers are not in the state dict."""
    for name in transient:
        path, _, key = name.rpartition(".")
        copied.get_submodule(path)._non_persistent_buffers_set.add(key)
    copied.eval()


def free_sizes_(program: nn.Module) -> None:
    """Turn literal sizes into attributes, in place, and drop type checks, which would forbid another precision."""
    for module in program.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.eliminate_dead_code()  # unread nodes would keep their arguments alive
            for node in list(module.graph.nodes):
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    module.graph.erase_node(node)
                    continue
                if node.op == "call_function":
                    _free(module, node)
                if node.target is torch.ops.aten.repeat_interleave.self_int:
                    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "output_size"}
                node.meta = {key: node.meta[key] for key in _REMEMBERED if node.meta.get(key)}
            module.recompile()


def _free(module: fx.GraphModule, node: fx.Node) -> None:
    """The sizes of one node, numbered in their order."""
    count = 0

    def attribute(value: Any) -> Any:
        nonlocal count
        if type(value) is not int or value in (-1, 0, 1) or value >= _END:
            return value
        count += 1
        return _attribute(module, node, f"{node.name}_size_{count}", value)

    if node.target in _ARITHMETIC:
        node.args = tuple(attribute(value) for value in node.args)
        return
    for place in _places(node):
        argument = node.args[place] if isinstance(place, int) else node.kwargs[place]
        _put(
            node, place, [attribute(v) for v in argument] if isinstance(argument, list | tuple) else attribute(argument)
        )


def _attribute(module: fx.GraphModule, node: fx.Node, name: str, value: int) -> fx.Node:
    while hasattr(module, name):
        name += "_"
    setattr(module, name, value)
    with module.graph.inserting_before(node):
        read = module.graph.create_node(
            "get_attr", name
        )  # `graph.get_attr` warns about attributes that are not tensors
    return read


def _places(node: fx.Node) -> Iterator[int | str]:
    """Positions and keywords of the arguments that are sizes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema
    namespace, _, name = schema.name.partition("::")
    wanted = _SIZES.get(name, ()) if namespace == "aten" else ()
    for position, argument in enumerate(schema.arguments):
        if argument.name in wanted:
            yield from [position] if position < len(node.args) else []
            yield from [argument.name] if argument.name in node.kwargs else []


def _put(node: fx.Node, place: int | str, value: Any) -> None:
    if isinstance(place, int):
        node.update_arg(place, value)
    else:
        node.update_kwarg(place, value)
