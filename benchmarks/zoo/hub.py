"""The Hugging Face suite: a small random-weight model of each transformers type, from its own defaults.

`small` walks a default configuration and its parts, and puts a small number where a name of `SIZES` or `LISTS` is;
`CHANGES` holds what that leaves unsaid for one type, `CLASSES` and `INPUTS` what the group's habit gets wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hub_sizes import (
    BATCH,
    CHANGES,
    CLASSES,
    FIRST_WORD,
    GROUPS,
    IMAGE_WORDS,
    INPUTS,
    LISTS,
    SIZES,
    TARGETS,
    TASKS,
    TOKENS,
    VOCABULARY,
    WORDS,
)
from torch import Tensor, nn

from prunella.io.load import import_module


@cache
def _library() -> Any:
    """Transformers, imported so that torchvision's missing operators do no harm."""
    return import_module("transformers")


def names() -> list[str]:
    """The types, group after group."""
    return [name for listed in GROUPS.values() for name in listed.split()]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The small model of a type with random weights, in eval mode, and keyword inputs for one call."""
    group = next(group for group, listed in GROUPS.items() if name in listed.split())
    torch.manual_seed(0)
    config = small(_library().CONFIG_MAPPING[name], CHANGES.get(name, {}))
    model = _model_class(name, group, config)(config).eval()
    return model, _inputs(name, group, model)


def small(kind: Any, changes: dict[str, Any], given: Any = None) -> Any:
    """The configuration of class `kind` with small sizes, parts included, and `changes` on top; a part is `given`."""
    default = given or kind()
    fields = {field: shrunk for field, value in vars(default).items() if (shrunk := _shrunk(field, value)) is not None}
    if getattr(given, "_out_indices", None) and "out_features" not in changes:
        fields["out_indices"] = list(given.out_indices)
    for part in kind.sub_configs:
        inside, inner = getattr(default, part, None), changes.get(part, {})
        if inside is not None or inner:
            fields[part] = _small_part(inside, inner)
    return kind(**fields | {field: value for field, value in changes.items() if field not in kind.sub_configs})


def _small_part(given: Any, changes: dict[str, Any]) -> Any:
    """A part made small: of the default's class, or of the type that `changes` names."""
    if "model_type" not in changes:
        return small(type(given), changes, given)
    inner = {field: value for field, value in changes.items() if field != "model_type"}
    return small(_library().CONFIG_MAPPING[changes["model_type"]], inner)


def _shrunk(field: str, value: Any) -> Any:
    """The small value of a field, None to leave the default."""
    if value is None:
        return None
    if field.endswith(("_token_id", "_token_index")):
        return next((number for start, number in TOKENS.items() if field.startswith(start)), 9)
    if isinstance(value, list | tuple):
        return [LISTS[field][i % len(LISTS[field])] for i in range(len(value))] if field in LISTS else None
    return SIZES.get(field) if isinstance(value, int) else None


def _model_class(name: str, group: str, config: Any) -> Any:
    """The class of the type's own choice, of the group's first task that has it, or the bare model's."""
    if name in CLASSES:
        return getattr(_library(), CLASSES[name])
    tables = [f"MODEL_FOR_{task}_MAPPING" for task in TASKS[group].split()] + ["MODEL_MAPPING"]
    found = next(table[type(config)] for key in tables if type(config) in (table := getattr(_library(), key)))
    return found[0] if isinstance(found, tuple) else found


def _inputs(name: str, group: str, model: Any) -> dict[str, Any]:
    """Keyword inputs: the type's own list, or the main input and what its group adds, of those that forward takes."""
    taken = inspect.signature(model.forward).parameters
    listed = INPUTS.get(name, "").split()
    if not listed:
        more = ["decoder_input_ids"] if model.config.is_encoder_decoder else []
        more += ["attention_mask"] if group in ("encoder", "seq2seq") else []
        more += ["input_ids", "pixel_values"] if group == "multimodal" else []
        listed = [key for key in dict.fromkeys([model.main_input_name, *more]) if key in taken]
    return dict(_example(key, name, model.config) for key in listed)


def _find(config: Any, field: str, fallback: Any) -> Any:
    """A field of the configuration or of the first part that has it."""
    parts = [getattr(config, part, None) for part in config.sub_configs]
    values = [getattr(config, field, None), *(_find(part, field, None) for part in parts if part is not None)]
    return next((value for value in values if value is not None), fallback)


def _example(key: str, name: str, config: Any) -> tuple[str, Tensor | bool]:
    """One input by its name, or noise of the shape that follows it."""
    key, _, shape = key.partition("=")
    if shape:
        return key, torch.randn(*map(int, shape.split("x")))
    image = IMAGE_WORDS.get(name, 0)
    words = WORDS + image
    makers: dict[str, Callable[[], Tensor | bool]] = {
        "input_ids": lambda: _tokens(words, image),
        "inputs": lambda: _tokens(words),
        "decoder_input_ids": lambda: _tokens(TARGETS),
        "qformer_input_ids": lambda: _tokens(TARGETS),
        "attention_mask": lambda: torch.ones(BATCH, words, dtype=torch.long),
        "bbox": lambda: torch.rand(BATCH, words, 4).sort(-1).values,
        "pixel_values": lambda: _pixels(config),
        "pixel_attention_mask": lambda: torch.ones(BATCH, 16, dtype=torch.long),
        "past_observed_mask": lambda: torch.ones(BATCH, 12),
        "spatial_shapes": lambda: torch.full((BATCH, 2), 4),
        "image_sizes": lambda: torch.full((BATCH, 2), 32),
        "image_grid_thw": lambda: torch.tensor([[1, 4, 4]] * BATCH),
        "image_embeds_position_mask": lambda: _image_mask(words, image).bool(),
        "mm_token_type_ids": lambda: _image_mask(words, image),
        "flattened_patches": lambda: torch.cat([torch.randint(3, (BATCH, 9, 2)), torch.randn(BATCH, 9, 40)], -1),
        "use_cache": lambda: False,
        "timesteps": lambda: torch.arange(TARGETS).expand(BATCH, -1),
        "input_values": lambda: torch.randn(BATCH, 4000),
        "input_features": lambda: torch.randn(BATCH, 24, _find(config, "num_mel_bins", 20)),
    }
    return key, makers[key]()


def _image_mask(words: int, image: int) -> Tensor:
    """One where `_tokens` puts the image's words."""
    mask = torch.zeros(BATCH, words, dtype=torch.long)
    mask[:, 1 : 1 + image] = 1
    return mask


def _tokens(words: int, image_words: int = 0) -> Tensor:
    """Random words, none of them special; the second and following ones stand for the image."""
    tokens = torch.randint(FIRST_WORD, VOCABULARY, (BATCH, words))
    tokens[:, 1 : 1 + image_words] = TOKENS["image"]
    return tokens


def _pixels(config: Any) -> Tensor:
    """A batch of images of the size that the configuration names."""
    size = _find(config, "image_size", 64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(BATCH, _find(config, "num_channels", 3), height, width)
