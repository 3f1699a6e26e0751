"""Checkpoints with zeros as masks, and the recipes and masks that tools write next to them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from prunella.errors import BadInput
from prunella.io.importers.imported import Imported, State, as_mask, tensors_of, zero_masks
from prunella.registry.method import importer

_LONGEST_RECIPE = 50_000
"""Characters. Recipes are written by people, and a reader of YAML in Python takes a second for so many."""
_MOST_LISTS = 1000
_LARGEST_SPARSITY = 1e9
_SPARSITIES = ("final_sparsity", "sparsity", "target_sparsity")


@importer(source="prunella; the form in which most pruned checkpoints are published")
def zeros(state: State, *, min_sparsity: float = 0.0) -> Imported:
    """Every weight of two axes or more that is zero is taken as pruned.

    `mask = W != 0` for tensors with a sparsity above `min_sparsity`, in [0, 1). A weight that is zero by chance counts
    as pruned too.
    Data: none.

    Example:

        >>> import torch, prunella as pr
        >>> imported = pr.importers.zeros({"weight": torch.tensor([[0.0, 1.0], [2.0, 0.0]])})
        >>> imported.masks["weight"].tolist()
        [[False, True], [True, False]]

    Use: any checkpoint without masks, from any tool. Avoid: weights with separate masks, where a kept weight may be
    zero.
    """
    weights = tensors_of(state)
    return Imported("zeros in the weights", zero_masks(weights, min_sparsity), weights, implied=True)


@importer(source="Neural Magic SparseML 1.x, checkpoints and recipes, github.com/neuralmagic/sparseml")
def sparseml(state: State) -> Imported:
    """A checkpoint of SparseML: zeros are the mask, and the recipe next to the weights has the requested sparsity.

    `mask = W != 0`; the recipe is text (YAML), read as data, only for its `final_sparsity`. It becomes a remark of the
    plan, for comparison with the actual sparsity.
    Data: none.

    Use: `checkpoint.pth` and folders of SparseML. Avoid: its quantized and its ONNX checkpoints, which are not weights
    of a module.
    """
    weights = tensors_of(state)
    recipe = state.get("recipe")
    asked = tuple(recipe_sparsities(recipe)) if isinstance(recipe, str) else ()
    return Imported("SparseML", zero_masks(weights), weights, asked, implied=True)


@importer(source="Intel Neural Compressor 2.6, compression.pruner, github.com/intel/neural-compressor")
def neural_compressor(state: State) -> Imported:
    """Masks of Intel Neural Compressor's pruners: a mask for each module, or for each block of its weight.

    `W = W * mask`: `pruner.masks` is a mapping from the name of a module to a mask of its `weight`, 1 is kept. Masks
    of blocks are smaller than the weight and are repeated to its shape. The tool saves neither masks nor a form of its
    own: its checkpoints are plain weights with zeros, for which `zeros` is right.
    Data: none.
    Errors: BadInput without masks.

    Use: `masks=` next to a checkpoint, or masks that you saved. Avoid: masks of its old `experimental` pruners, which
    may mean the opposite: check which weights are zero first.
    """
    masks = {str(name): as_mask(value, str(name)) for name, value in state.items()}
    if not masks:
        raise BadInput("there are no masks", "the mapping is empty", "give pruner.masks")
    return Imported("neural-compressor", {n if n.endswith("weight") else f"{n}.weight": m for n, m in masks.items()})


def repeated(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of blocks repeated to the weight's shape; unchanged if it already fits or cannot fit."""
    fits = mask.dim() == len(shape) and all(n and size % n == 0 for n, size in zip(mask.shape, shape, strict=True))
    if not fits or tuple(mask.shape) == shape:
        return mask
    for axis, size in enumerate(shape):
        mask = mask.repeat_interleave(size // mask.shape[axis], axis)
    return mask


def recipe_sparsities(text: str) -> Iterator[str]:
    """The sparsities requested by the modifiers of a recipe, one line each; the text is never executed.

    Errors: BadInput for text that is too long, or no YAML.
    """
    if len(text) > _LONGEST_RECIPE:
        raise BadInput("the recipe is too long", f"{len(text)} characters, up to {_LONGEST_RECIPE} are read")
    if (lists := text.count("[") + text.count("{")) > _MOST_LISTS:
        raise BadInput("the recipe has too many lists", f"{lists}, up to {_MOST_LISTS} are read")
    if importlib.util.find_spec("yaml") is None:
        yield "its recipe was not read: install PyYAML"
        return
    for kind, modifier in _modifiers(_load(text), set()):
        for key in _SPARSITIES:
            value = modifier.get(key)
            if isinstance(value, int | float) and abs(value) < _LARGEST_SPARSITY:  # not NaN, nor too large to be shown
                yield f"the recipe asks for {key}={value:g} ({kind})"


def _load(text: str) -> Any:
    import yaml

    class Tagged(yaml.SafeLoader):
        """Plain data; `!Name` in front of a mapping is remembered as a key, and names no class."""

        def flatten_mapping(self, node: Any) -> None:
            """Leave a mapping as it is. What merges others, which merge others, can be of any size."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("it merges mappings (<<), which a recipe has no need of")

    def tagged(loader: Any, name: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {"!": name, **loader.construct_mapping(node, deep=True)}
        return None

    Tagged.add_multi_constructor("!", tagged)
    try:
        return yaml.load(text, Tagged)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadInput("the recipe cannot be read", f"no YAML: {str(error).splitlines()[0]}") from error


def _modifiers(value: Any, seen: set[int], name: str = "modifier") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in the recipe, once, with the name of its kind."""
    if not isinstance(value, Mapping | list) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        yield str(value.get("!", name)), value
    for key, part in value.items() if isinstance(value, Mapping) else ((name, part) for part in value):
        yield from _modifiers(part, seen, str(key))
