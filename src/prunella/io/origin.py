"""The origin of a model's architecture, as data in a manifest, from which the model is built without weights.

A manifest may name an architecture class of `transformers` (its own classes, never code from a folder), a name of timm
or torchvision, or `package.module:function`. The last is never imported on behalf of a file: the caller passes it to
`load`, as text or as the function.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.errors import BadInput, MissingExtra, RequestError, out_of_resources
from prunella.io.json import decode, encode
from prunella.io.load import import_module, is_file_spec, load_object
from prunella.model.rng import seeded
from prunella.model.torch_masks import with_plain_weights

Factory = str | Callable[..., nn.Module]
Builder = Callable[[], nn.Module]
LIBRARIES = ("timm", "torchvision")


def describe(model: nn.Module, factory: Factory | None, kwargs: Mapping[str, Any], dense: nn.Module) -> dict[str, Any]:
    """The origin as JSON data: of the factory if there is one, else of the Hugging Face class, else `unknown`."""
    if factory is None:
        return hugging_face(type(model), dense) if is_hugging_face(model) else {"kind": "unknown"}
    name = without_folder(factory) if isinstance(factory, str) else _spelled(factory)
    try:
        data = decode(encode(dict(kwargs), allow_nan=True), allow_nan=True)
    except (TypeError, ValueError) as error:
        raise RequestError("kwargs= cannot be written", str(error), "use numbers, text, lists and mappings") from None
    library, _, model_name = name.partition(":")
    if library in LIBRARIES:
        return {"kind": library, "name": model_name, "kwargs": data}
    return {"kind": "factory", "name": name, "kwargs": data}


def without_folder(spec: str) -> str:
    """`file.py:name` of `path/to/file.py:name`: folders name people."""
    return f"{Path(spec.rpartition(':')[0]).name}:{spec.rpartition(':')[2]}" if is_file_spec(spec) else spec


def builder(origin: Mapping[str, Any], factory: Factory | None, where: str) -> Builder:
    """A function that builds the dense model. Errors: BadInput when the origin cannot or may not be used."""
    kind, kwargs = origin.get("kind"), origin.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        raise BadInput(f"the manifest of {where} is broken", "kwargs is not a mapping")
    if factory is not None:
        text = isinstance(factory, str)
        split = str(factory).partition(":") if text else ("", "", "")
        if split[0] in LIBRARIES:
            return _library(split[0], split[2], kwargs)
        function = _imported(str(factory)) if isinstance(factory, str) else factory
        return lambda: function(**kwargs)
    if kind in LIBRARIES:
        return _library(str(kind), str(origin.get("name")), kwargs)
    if kind == "transformers":
        return hugging_face_builder(origin)
    recorded = f"it was made with {origin['name']!r}" if origin.get("name") else "it does not say how it was made"
    why = f"{recorded}; code that a file names is never imported"
    raise BadInput(f"loading {where} needs the model's factory", why, "pass factory=, a function or 'package.module:f'")


def build_empty(build: Builder) -> nn.Module:
    """The bare model on the meta device, or on the CPU if its constructor needs data."""
    from prunella.io.state import has_stray_meta

    with _in_quiet():
        try:
            with torch.device("meta"):
                model = build()
            if isinstance(model, nn.Module) and not has_stray_meta(model):
                return with_plain_weights(model)
        except Exception:  # a build with data shows whether it is an error of the user
            pass
        model = _call(build)
    if not isinstance(model, nn.Module):
        raise BadInput("the factory gave no model", f"it returned {type(model).__name__}", "return a torch.nn.Module")
    return with_plain_weights(model)


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the class of `model` is one of transformers' own."""
    return type(model).__module__.startswith("transformers.models.") and hasattr(model, "config")


def passed_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without entries that name code of a folder, or the path of a folder on this machine."""
    left: dict[str, Any] = {}
    for key, value in config.items():
        place = key == "_name_or_path" and isinstance(value, str) and Path(value).expanduser().is_absolute()
        if key != "auto_map" and not place:
            left[key] = passed_on(value) if isinstance(value, dict) else value
    return left


def hugging_face(kind: type, dense: nn.Module) -> dict[str, Any]:
    """The origin of a Hugging Face model: class names and the configuration of the dense model."""
    config: Any = dense.config
    data = passed_on(decode(config.to_json_string(use_diff=False), allow_nan=True))
    if (data.get("quantization_config") or {}).get("quant_method") == "gguf":
        del data["quantization_config"]  # the file was quantized; the weights in the model are not
    attention = getattr(config, "_attn_implementation", None)
    names = {"name": kind.__name__, "config_class": type(config).__name__}
    return {"kind": "transformers", **names, "config": data, "attention": attention}


def hugging_face_builder(origin: Mapping[str, Any]) -> Builder:
    """Builds a class of transformers from the configuration in the origin alone."""
    kind, config_kind = _class(origin.get("name"), "PreTrainedModel"), _class(origin.get("config_class"), None)
    data, attention = origin.get("config"), origin.get("attention")
    if not isinstance(data, dict):
        raise BadInput("the manifest is broken", "it has no configuration")
    chosen = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}

    def build() -> nn.Module:
        clean = {key: value for key, value in data.items() if key != "auto_map"}
        model = kind._from_config(config_kind.from_dict(clean), **chosen)
        assert isinstance(model, nn.Module)
        return model

    return build


def _class(name: object, base: str | None) -> Any:
    transformers = _module("transformers")
    base_name = base or ("PreTrainedConfig" if hasattr(transformers, "PreTrainedConfig") else "PretrainedConfig")
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, getattr(transformers, base_name)):
        why = f"transformers {transformers.__version__} has no such {base_name}"
        raise BadInput(
            f"cannot rebuild the class {name!r}", why, "pass factory=, or install the version it was made with"
        )
    return kind


def _library(library: str, name: str, kwargs: Mapping[str, Any]) -> Builder:
    if not name.replace("_", "").replace(".", "").replace("-", "").isalnum():
        raise BadInput(f"the name {library}:{name} is refused", "only names of built-in models are rebuilt")
    options = {key: value for key, value in kwargs.items() if key not in ("pretrained", "weights", "checkpoint_path")}
    if library == "timm":
        create = _module("timm").create_model
        return lambda: create(name, pretrained=False, **options)
    _module("torchvision")
    get_model = import_module("torchvision.models").get_model
    return lambda: get_model(name, weights=None, **options)


def _module(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise MissingExtra(f"this model needs {name}", "it is not installed", f"pip install 'prunella[{name}]'")
    return import_module(name)


def _imported(name: str) -> Callable[..., Any]:
    factory = load_object(name, "factory", files=True)
    if not callable(factory):
        raise RequestError(
            f"{name} is not a factory", f"it is a {type(factory).__name__}", "give a function or a class"
        )
    return factory  # type: ignore[no-any-return]


def _spelled(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"


def _call(build: Builder) -> Any:
    try:
        return build()
    except Exception as error:
        why, todo = f"{type(error).__name__}: {error}", "call its factory to see"
        raise out_of_resources(error) or BadInput("the model cannot be built", why, todo) from error


@contextmanager
def _in_quiet() -> Iterator[None]:
    """Inside, changes of the random state and of warning filters are temporary."""
    with seeded(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
