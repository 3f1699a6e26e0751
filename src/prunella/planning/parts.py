"""The parts of a model that their class builds from their own configuration, with adapters merged into their layers.

A model of transformers may lie in a module of the user, in a wrapper of sentence-transformers, or under the adapters of
peft. No class is known by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunella.model.copying import copied
from prunella.model.forward import forward
from prunella.model.state import untouched

_MERGE = "merge_and_unload"
"""Method of the wrapper that holds adapters: it puts plain layers in place of those with adapters."""


def reads_itself(model: nn.Module) -> bool:
    """Whether the class of the model builds it from its own configuration.

    A wrapper that shows the configuration of the model inside does not.
    """
    if inspect.getattr_static(model, "config", None) is None:
        return False
    config: Any = getattr(model, "config", None)
    own = callable(getattr(type(model), "from_pretrained", None))
    return own and callable(getattr(config, "to_dict", None)) and callable(getattr(type(config), "from_dict", None))


def readable_parts(model: nn.Module) -> list[str]:
    """The outermost parts that read themselves; the name of the model itself is empty."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if not any(inside(path, outer) for outer in paths) and reads_itself(module):
            paths.append(path)
    return paths


def inside(path: str, outer: str) -> bool:
    """Whether a module lies in another one."""
    return not outer or path.startswith(f"{outer}.")


def merged(model: nn.Module) -> nn.Module:
    """The model, or a copy without adapters if it has any: they are merged into their layers, which are plain again.

    The names of the modules do not change. If the adapters cannot be merged, the model itself.
    """
    if not any(_holds_adapters(module) for module in model.modules()):
        return model
    plain = copied(model)
    for module in [module for module in plain.modules() if _holds_adapters(module)]:
        try:
            getattr(module, _MERGE)()
        except Exception:  # code of another library: some kinds of adapters have no such form
            return model
    return plain


def _holds_adapters(module: nn.Module) -> bool:
    return callable(getattr(type(module), _MERGE, None)) and isinstance(getattr(module, "model", None), nn.Module)


def call_of(model: nn.Module, part: nn.Module, inputs: Any) -> Mapping[str, Any] | None:
    """The arguments of a part by name, in a pass of the model; None if the pass does not call it."""
    calls, own = list[dict[str, Any]](), vars(part).get("forward")
    function, signature = part.forward, inspect.signature(part.forward)

    def noted(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        named = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        calls.append(named)
        return function(*args, **kwargs)

    vars(part)["forward"] = noted  # not a hook: sentence-transformers calls `forward` itself
    try:
        with untouched(model), torch.no_grad():
            forward(model, inputs)
    finally:
        if own is None:
            vars(part).pop("forward")
        else:
            vars(part)["forward"] = own
    return calls[0] if calls else None
