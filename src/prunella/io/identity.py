"""Everything that determines a result, as one digest: a run resumes only with the same model, data, recipe and metric.

An `Identity` stores the parts next to the joint digest, so that a refusal names the changes. The digest of a value:

- tensors and arrays: type, shape and every byte, read in chunks; models: `model_parts`;
- plain data, lists, mappings, sets, dataclasses: their contents; a mapping with text keys in the order of its keys;
- functions: qualified name, compiled code, defaults, closure, the arguments bound to them, and for functions of the
  user's own the globals that they read, so that the functions that they call are parts too. Those of prunella and torch
  are known by their names, since the versions are parts too;
- a `DataLoader`: its dataset, batch size, sampler, `collate_fn` and seed; a `TensorDataset`: its tensors;
- an object of the user's own: its class with the code of all methods, and the attributes that they do not change;
- any other object (a generator): a handle, which is its class and its length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import nn

from prunella._version import __version__
from prunella.io.contents import Contents
from prunella.model.masks import masks_of
from prunella.model.unwrap import unwrap

_SHORT = 80
"""Plain values of at most this many characters are stored as they are, so that a refusal can show them."""


@dataclass(frozen=True)
class Identity:
    """Part of a request -> its digest, or the value itself if it is plain and short."""

    parts: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """The digest of all parts, independent of their order."""
        return sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()

    def plus(self, parts: Mapping[str, object]) -> Identity:
        """With further parts."""
        return Identity({**self.parts, **{name: _written(value) for name, value in parts.items()}})

    def changed(self, other: Identity) -> tuple[str, ...]:
        """The parts that differ, or that one of the two does not have."""
        names = dict.fromkeys([*self.parts, *other.parts])
        return tuple(name for name in names if self.parts.get(name) != other.parts.get(name))

    def difference(self, other: Identity) -> str:
        """The changes from this identity to the other, as a clause: `its weights and seed changed (seed: 0, now 1)`."""
        names = self.changed(other)
        pairs = [(name, self.parts.get(name, "none"), other.parts.get(name, "none")) for name in names]
        shown = [f"{name}: {a}, now {b}" for name, a, b in pairs if not (_hashed(a) or _hashed(b))]
        return f"its {_listed(names)} changed" + (f" ({'; '.join(shown)})" if shown else "")


def identify(parts: Mapping[str, object]) -> Identity:
    """The identity of these parts and of the versions of prunella and torch."""
    versions = {"prunella version": __version__, "torch version": str(torch.__version__)}
    return Identity(versions).plus(parts)


def digest_of(value: object) -> str:
    """`sha256:` and the digest of a value, the same in every process. Errors: NotSupported for a tensor of no bytes."""
    contents = Contents(_write_model)
    contents.write(value)
    return f"sha256:{contents.state.hexdigest()}"


def model_parts(model: nn.Module) -> dict[str, str]:
    """Weights, buffers, structure, masks, mode and device of a model; wrappers do not count. Nothing is copied."""
    bare = unwrap(model, computed=True)
    weights = dict(bare.named_parameters(remove_duplicate=False))
    buffers = dict(bare.named_buffers(remove_duplicate=False))
    devices = sorted({value.device.type for value in (*weights.values(), *buffers.values())})
    return {
        "weights": digest_of(_tied(weights)),
        "buffers": digest_of(buffers),
        "structure": digest_of([(name, _described(module)) for name, module in bare.named_modules()]),
        "masks": digest_of(masks_of(bare)),
        "mode": digest_of([module.training for module in bare.modules()]),
        "device": _written(", ".join(devices)),
    }


def weights_digest(model: nn.Module) -> str:
    """The digest of the names and values of all parameters."""
    weights = unwrap(model).named_parameters(remove_duplicate=False)
    return digest_of({name: value.detach() for name, value in sorted(weights)})


def _write_model(contents: Contents, model: nn.Module) -> None:
    contents.write(model_parts(model))


def _tied(weights: Mapping[str, nn.Parameter]) -> list[tuple[str, object]]:
    """Every name, with the parameter or with the first name of it; and whether it is trained."""
    first: dict[int, str] = {}
    named: list[tuple[str, object]] = []
    for name, weight in weights.items():
        owner = first.setdefault(id(weight), name)
        named.append((name, (weight.requires_grad, weight) if owner == name else owner))
    return named


def _described(module: nn.Module) -> list[object]:
    """Class, `forward`, settings and further state of one module, without its children."""
    kind = type(module)
    settings = {name: value for name, value in vars(module).items() if _is_setting(name, value)}
    extra = module.get_extra_state() if kind.get_extra_state is not nn.Module.get_extra_state else None
    return [kind, kind.forward, settings, extra]


def _is_setting(name: str, value: object) -> bool:
    """Whether a plain attribute may affect the outputs of a module. `training` is a separate part."""
    plain = isinstance(value, bool | int | float | str | torch.dtype)
    sizes = isinstance(value, tuple) and all(isinstance(item, int | float) for item in value)
    return not name.startswith("_") and name != "training" and (plain or sizes)


def _written(value: object) -> str:
    if isinstance(value, bool | int | float | str) and len(text := str(value)) <= _SHORT and not _hashed(text):
        return text
    return value if isinstance(value, str) and _hashed(value) else digest_of(value)


def _hashed(text: str) -> bool:
    return text.startswith("sha256:")


def _listed(names: tuple[str, ...]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
