"""Folders that plain `from_pretrained` reads, if the configuration can describe the cut.

`planning.config_search` finds the configuration; here it is written, and read back by plain `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.graph.verify import relative_error
from prunella.io.origin import build_empty, hugging_face_builder
from prunella.model.forward import outputs_of
from prunella.model.state import mode
from prunella.planning.config_search import ConfigPath, Shapes, Sizes, search, shapes_of

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
WITHOUT_TOKENS = ("preprocessor_config.json", "processor_config.json")
COMPANIONS = (*_TOKENIZER, "chat_template*", "generation_config.json", *WITHOUT_TOKENS)
"""Files next to the weights that remain valid for a pruned model."""


def built_shapes(origin: Mapping[str, Any], config: Mapping[str, Any], part: str = "") -> dict[str, tuple[int, ...]]:
    """Shape of every tensor whose name begins with `part`, of the model of this configuration."""
    shapes = shapes_of(build_empty(hugging_face_builder({**origin, "config": dict(config)})))
    return {name: shape for name, shape in shapes.items() if name.startswith(part)}


def search_part(
    origin: Mapping[str, Any], small: Shapes, sizes: Sizes, kept: frozenset[ConfigPath], part: str
) -> tuple[dict[str, Any], tuple[ConfigPath, ...]] | None:
    """A configuration that builds the tensors whose names begin with `part` as they are in `small`, and its changes."""
    mine = {name: shape for name, shape in small.items() if name.startswith(part)}
    build, dense = partial(built_shapes, origin, part=part), origin["config"]
    return search(build, dense, mine, sizes, kept) or search(build, dense, mine, sizes)


def write_generation(model: Any, folder: Path) -> None:
    """Write generation_config.json as the model has it."""
    model.generation_config.to_json_file(folder / "generation_config.json")


def write_config(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json for the class and the dtype of `model`."""
    kind: Any = type(model.config)
    described = kind.from_dict({**config, "architectures": [type(model).__name__]})
    described.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    (folder / "config.json").write_text(described.to_json_string(), encoding="utf-8")


def reads_back(kind: type, folder: Path, model: nn.Module, inputs: Any) -> bool:
    """Whether plain `from_pretrained` gives the same outputs as `model` on `inputs`."""
    with _quiet(), mode(model, training=False), torch.no_grad():
        try:
            loader: Any = kind
            again = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            device = next(iter(model.parameters())).device
            outputs, expected = (outputs_of(m, inputs) for m in (again.to(device).eval(), model))
        except Exception:  # a probe: on any error plain from_pretrained does not read this folder
            return False
    return relative_error(expected, outputs) <= 1e-5


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice while transformers reads a local folder."""
    import transformers

    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
