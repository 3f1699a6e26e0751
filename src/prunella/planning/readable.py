"""The contract of `equal_widths`: a configuration of the model's own class describes the smaller model.

A class with `from_pretrained` and a `config` is built from its configuration alone.
Widths that no configuration describes, or that its class refuses, are found before anything is written: the
configuration is searched for, a model is built from it on the meta device, given the tensors of the smaller one, and
compared. No architecture is known by name.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput
from prunella.graph.cut.changes import Changes, changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Graph
from prunella.graph.solve.tokens import known_only, names_token, renumber
from prunella.graph.trace.tracked_int import holder, size_of
from prunella.graph.verify import SINGLE, relative_error
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.rng import seeded
from prunella.model.state import untouched
from prunella.planning.config_search import (
    Shapes,
    Sizes,
    changed_sizes,
    shallower,
    shapes_of,
    steady,
    uniform_configs,
    with_tokens,
)
from prunella.planning.parts import call_of, merged, readable_parts
from prunella.types import Keep


@dataclass(frozen=True)
class Misfit:
    """Why no configuration describes a model. refused: one of these widths was refused; others may be accepted."""

    why: str
    refused: bool


def readers(model: nn.Module) -> dict[str, Builds]:
    """Path of a part -> models of its class, for every part that `from_pretrained` can read before a cut."""
    plain = merged(model)
    found = {path: Builds(plain.get_submodule(path)) for path in readable_parts(model)}
    return {path: builds for path, builds in found.items() if _is_read(builds)}


def _is_read(builds: Builds) -> bool:
    dense = _shapes(builds, configuration(builds.like))
    return dense is not None and dense.keys() == shapes_of(builds.like).keys()


def undescribed(model: nn.Module, parts: Mapping[str, Builds], graph: Graph, keep: Keep, inputs: Any) -> Misfit | None:
    """Why no configuration describes a part of the model cut to `keep`; None if each is described. parts: `readers`."""
    keep = {name: mask for name, mask in keep.items() if not bool(mask.all())}
    if not keep or not parts:
        return None
    applied, small = changes(graph, keep), copied(model)
    change_(small, applied)
    batch, plain = renumber(known_only(inputs, applied.renumbered), applied.renumbered), merged(small)
    pairs = [*_pairs(model, graph, keep, applied)]
    for path, builds in parts.items():
        part = plain.get_submodule(path)
        if shapes_of(part) == shapes_of(builds.like):
            continue
        call = call_of(small, small.get_submodule(path), batch) if path else batch
        if call is None:
            return Misfit(f"{path} is not called on the example, and its cut cannot be compared", refused=False)
        config = part_configuration(builds.like, part, path, applied)
        misfit = _misfit(
            builds, part, config, changed_sizes(shapes_of(builds.like), shapes_of(part), iter(pairs)), call
        )
        if misfit is not None:
            return misfit
    return None


def part_configuration(dense: Any, small: Any, path: str, applied: Changes) -> dict[str, Any]:
    """The configuration of a part, with the depth and the tokens after the cut. path: of the part in the model."""
    own = f"{path}:config"
    sizes = {(":config", name): value for (owner, name), value in applied.attributes.items() if owner == own}
    lists = {(":config", name): removed for (owner, name), removed in applied.lists.items() if owner == own}
    return with_tokens(shallower(configuration(dense), sizes, lists), small.config)


def _misfit(builds: Builds, small: Any, config: Mapping[str, Any], sizes: Sizes, call: Any) -> Misfit | None:
    kept = steady(small, config, call)
    tried, described = _Tried(builds, shapes_of(small)), False
    for candidate in uniform_configs(tried.shapes, config, tried.wanted, sizes, kept):
        if _same(builds.model(candidate), small, call):
            return None
        described = True
    kind = type(small.config).__name__
    why = "its model has these shapes but computes something else" if described else tried.why(config, sizes)
    return Misfit(f"no {kind} describes it: {why}", bool(tried.refusals))


def groups_at_fault(
    model: nn.Module, parts: Mapping[str, Builds], graph: Graph, keep: Keep, inputs: Any
) -> dict[str, str]:
    """Group name -> why its cut is not described, for groups without which the other cuts are described.

    Groups of all layers that are cut alike are tried together, and without the others. Empty if no cut would be left.
    """
    sets: dict[tuple[object, ...], dict[str, Tensor]] = {}
    for group in (*graph.groups, *graph.stacks):
        mask = keep.get(group.name)
        if mask is not None and not bool(mask.all()):
            roles = sorted(member.role for member in group.members if member.role in ("in", "out"))
            sets.setdefault((group.kind, group.size, int(mask.sum()), *roles), {})[group.name] = mask
    misfits = [(part, undescribed(model, parts, graph, part, inputs)) for part in sets.values()]
    wrong = {name: misfit.why for part, misfit in misfits if misfit for name in part}
    rest = {name: mask for part, misfit in misfits if not misfit for name, mask in part.items()}
    return wrong if wrong and rest and undescribed(model, parts, graph, rest, inputs) is None else {}


def _pairs(model: nn.Module, graph: Graph, keep: Keep, applied: Changes) -> Iterator[tuple[int, int]]:
    """Old and new values of the sizes that follow, and of the numbers of units."""
    for (owner, name), new in applied.attributes.items():
        old = size_of(getattr(holder(model, owner), name, None))
        if old is not None and isinstance(new, int) and not names_token(name):
            yield old, new
    for group in graph.groups:
        if group.name in keep:
            yield group.size, int(keep[group.name].sum())


@dataclass(frozen=True)
class Builds:
    """Models of configurations, of the class of `like`, on the meta device. A plan uses one instance."""

    like: nn.Module
    known: dict[str, Shapes | BadInput] = field(default_factory=dict)

    def model(self, config: Mapping[str, Any]) -> nn.Module:
        """A model without values. Errors: BadInput if the class or its configuration refuses it."""
        kind: Any = type(self.like)
        config_kind: Any = type(self.like.config)
        try:
            with seeded(None), torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = kind(config_kind.from_dict(copy.deepcopy(dict(config))))
        except Exception as error:  # a probe: a configuration may check its values and raise anything
            raise BadInput("no model of this configuration", _line(error)) from error
        assert isinstance(model, nn.Module)
        return model

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """The shapes of the tensors of such a model. Errors: BadInput, as `model`."""
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self.known:
            try:
                self.known[key] = shapes_of(self.model(config))
            except BadInput as error:
                self.known[key] = error
        shapes = self.known[key]
        if isinstance(shapes, BadInput):
            raise BadInput(shapes.what, shapes.why)
        return shapes


@dataclass(frozen=True)
class _Tried:
    """The configurations that were tried for one cut, and what was wrong with them."""

    builds: Builds
    wanted: Shapes
    refusals: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)
    nearest: list[tuple[int, str]] = field(default_factory=list)

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """The shapes of a configuration; mismatches are recorded."""
        try:
            shapes = self.builds.shapes(config)
        except BadInput as error:
            self.refusals.append((config, error.why))
            raise
        wrong = [name for name, shape in self.wanted.items() if shapes.get(name) != shape]
        if wrong:
            text = f"{wrong[0]} is {_by(shapes.get(wrong[0]))} there, and {_by(self.wanted[wrong[0]])} in the plan"
            self.nearest.append((len(wrong), text))
        return shapes

    def why(self, dense: Mapping[str, Any], sizes: Sizes) -> str:
        """The mismatch of the nearest configuration, or the refusals of configurations with a new size."""
        best, nearest = min(self.nearest, default=(0, "its tensors have other names"))
        closer = not self.nearest or best < self.nearest[0][0]
        exact = [why for config, why in self.refusals if any(n in sizes.get(o, ()) for o, n in _ints(dense, config))]
        refused = exact or [why for _, why in self.refusals]
        return nearest if closer or not refused else refused[0]


def _ints(dense: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Old and new values of the integers in which two configurations differ."""
    return ((old, config[key]) for key, old in dense.items() if type(old) is int and config.get(key) not in (old, None))


def _shapes(builds: Builds, config: Mapping[str, Any]) -> Shapes | None:
    try:
        return builds.shapes(config)
    except BadInput:
        return None


def _same(empty: nn.Module, small: nn.Module, batch: Any) -> bool:
    """Whether a model on the meta device, with the tensors of `small`, computes the same."""
    values = {**dict(small.named_buffers(remove_duplicate=False)), **small.state_dict(keep_vars=True)}
    for name, tensor in [*empty.named_parameters(remove_duplicate=False), *empty.named_buffers(remove_duplicate=False)]:
        if name not in values or values[name].shape != tensor.shape:
            return False
        module, _, key = name.rpartition(".")
        owner = empty.get_submodule(module)
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = values[name]
    try:
        with untouched(small), torch.no_grad():
            expected = outputs_of(small, batch)
            return relative_error(expected, outputs_of(empty.eval(), batch)) <= SINGLE
    except Exception:  # a probe: on any error the model is not the same
        return False


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w+Error: ", "", max(lines, key=len, default=type(error).__name__)).rstrip(".")


def _by(shape: Sequence[int] | None) -> str:
    return "x".join(map(str, shape)) if shape is not None else "not"


def configuration_of(
    small: nn.Module, dense: nn.Module, config: Mapping[str, Any], sizes: Sizes, batch: Any
) -> dict[str, Any] | None:
    """The configuration from which the class of `small` builds a model that computes the same; None if there is none.

    dense: the model before the cut. config: its configuration, with the depth and the tokens of the small one.
    """
    builds, wanted = Builds(small), shapes_of(small)
    built = _shapes(Builds(dense), configuration(dense))
    if built is None or built.keys() != shapes_of(dense).keys():
        return None
    candidates = uniform_configs(builds.shapes, config, wanted, sizes, steady(small, config, batch))
    return next((candidate for candidate in candidates if _same(builds.model(candidate), small, batch)), None)


def configuration(model: Any) -> dict[str, Any]:
    """The configuration of a model as plain data."""
    return dict(json.loads(model.config.to_json_string(use_diff=False)))
