"""Zero biases for the layers of a language model, by switches of its configuration, so that means can be folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from prunella.errors import NotSupported, PruningError, RequestError
from prunella.io.huggingface import built_shapes
from prunella.io.origin import describe, is_hugging_face
from prunella.model.copying import copied
from prunella.planning.config_search import shapes_of
from prunella.registry.method import recovery

M = TypeVar("M", bound=nn.Module)
_INSTEAD = "compensate by least squares: match_stream_"


@recovery(source="An et al. 2024, arXiv:2312.11983 (FLAP keeps the mean of what it removes in new biases)")
def with_biases(model: M, only: Sequence[str] = ("*down_proj", "*o_proj")) -> M:
    """A copy of a transformers model with biases of zero, which computes the same and loads with `from_pretrained`.

    The switches of the configuration (`mlp_bias`, `attention_bias` or others) are not known by name. Each switch that
    is off is tried; it is used if it adds a bias to a layer of `only`, and only biases. Other layers of the same switch
    get a bias too. Plan and shrink the copy, then `fold_means(small, copy, data, plan)` fills the biases.

    only: patterns of names of modules; each has to match a layer, all of which must have a bias in the end.
    Errors: NotSupported where the configuration has no such switch: use `match_stream_`, which needs no bias.

    Data: none.

    Use: before a cut by `fluctuation`, so that means can be folded. Avoid: when layers are refitted anyway.
    """
    biased: Any = copied(model)
    wanted = {f"{name}.bias" for name in _layers(biased, only)}
    for switch in list(_switches(biased)):
        added = _added(biased, switch)
        if added and wanted & added:
            setattr(biased.config, switch, True)
            for name in sorted(added):
                _give(biased, name)
    bare = sorted(wanted - shapes_of(biased).keys())
    if bare:
        raise NotSupported(
            f"{bare[0].removesuffix('.bias')} cannot have a bias",
            f"no entry of {type(biased.config).__name__} adds one, so that the model would not load again",
            _INSTEAD,
        )
    return biased  # type: ignore[no-any-return]


def _layers(model: nn.Module, only: Sequence[str]) -> list[str]:
    if not is_hugging_face(model):
        raise NotSupported(
            f"{type(model).__name__} is not a model of transformers", "it would not load again", _INSTEAD
        )
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise RequestError(f"{pattern!r} matches no linear layer", f"there are {', '.join(named[:4])} ...", "")
    return [name for name in named if any(fnmatchcase(name, pattern) for pattern in only)]


def _switches(model: Any) -> Iterator[str]:
    """Entries of the configuration that are off."""
    return (name for name, value in model.config.to_dict().items() if value is False and "bias" in name)


def _added(model: nn.Module, switch: str) -> set[str]:
    """Biases that the model has with this entry on; empty where it then differs in anything else."""
    origin = describe(model, None, {}, model)
    before = shapes_of(model)
    try:
        after = built_shapes(origin, {**origin["config"], switch: True})
    except PruningError:
        return set()
    added = after.keys() - before.keys()
    same = before.keys() <= after.keys() and all(after[name] == shape for name, shape in before.items())
    return added if same and all(name.endswith(".bias") for name in added) else set()


def _give(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name.removesuffix(".bias"))
    weight = layer.get_parameter("weight")
    size = weight.new_zeros(getattr(layer, "out_features", weight.shape[0]))
    layer.register_parameter("bias", nn.Parameter(size, requires_grad=weight.requires_grad))
