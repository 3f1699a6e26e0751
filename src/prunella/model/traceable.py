"""Refuse models that cannot be observed during a run, with the reason, before any work."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prunella.errors import BadInput, NotSupported


def check_traceable(model: nn.Module) -> None:
    """Errors: BadInput for lazy modules without sizes, NotSupported for modules of TorchScript; both name them."""
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise BadInput(
            f"{lazy[0]} has no size yet{_more(lazy)}",
            "the model has lazy modules, and no batch has passed through them",
            "run the model once on a batch, model(batch), and then plan",
        )
    scripted = [name or "the model" for name, module in model.named_modules() if _is_script(module)]
    if scripted:
        raise NotSupported(
            f"{scripted[0]} is a torch.jit.ScriptModule{_more(scripted)}",
            "TorchScript runs its own copy of the source, in which no size can follow a cut",
            "plan with the Python module that was scripted or traced, and script the smaller model",
        )


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
