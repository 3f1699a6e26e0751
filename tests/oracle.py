"""The main oracle: the model with every member of the removed units at zero equals the model cut to size.

`check_exact` couples a model, removes random units of every group, and compares in float64 and float32. It also checks
what the graph promises of the cut model (parameters, bytes, multiply-adds, shapes of outputs, names of parameters) and
that coupling left the model as it was. Nothing here is clever: the reference is written with plain index assignment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from prunella.graph.cut.changes import attributes, cuts
from prunella.graph.cut.surgery import cut_
from prunella.graph.data import Graph, Group
from prunella.graph.solve.groups import couple
from prunella.measure.count import measured_macs

EXACT64, EXACT32 = 1e-9, 1e-4
Keep = dict[str, Tensor]
Mode = Literal["all", "readers", "makers"]


@dataclass(frozen=True)
class Checked:
    """What `check_exact` found: the graph, what was kept, the cut float64 model and the model in its tested state.

    `moved` is the largest relative change of an output by the cut: 0 means that the removed units did nothing.
    """

    graph: Graph
    keep: Keep
    small: nn.Module
    dense: nn.Module
    moved: float


def settle(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Eval mode, with every constant parameter or running statistic made random: nothing is trivially zero or one."""
    generator = torch.Generator().manual_seed(seed)
    stats = {id(m.running_var) for m in model.modules() if getattr(m, "running_var", None) is not None}
    means = {id(m.running_mean) for m in model.modules() if getattr(m, "running_mean", None) is not None}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if id(tensor) in stats:
                tensor.copy_(0.5 + noise)
            elif id(tensor) in means:
                tensor.copy_(noise - 0.5)
            elif isinstance(tensor, nn.Parameter) and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(noise - 0.4)
    return model.eval()


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors of the model's output, in order."""
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    found = list(tensors(output))
    assert found, "the model returned no tensor"
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def double(value: Any) -> Any:
    """Floating-point tensors of nested inputs in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """max |difference| / max |reference|, the largest over the outputs; infinite when not finite."""
    assert len(found) == len(wanted)
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape, f"output shape {tuple(a.shape)}, was {tuple(b.shape)}"
        if b.numel() == 0:
            continue
        gap = float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-30)
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def exact_groups(graph: Graph) -> list[Group]:
    """Groups for which zeros in the place of a unit are the reference; widths and experts have tests of their own."""
    return [group for group in graph.groups if group.kind in {"channel", "head"}]


def random_keep(graph: Graph, *, fraction: float = 0.4, seed: int = 0) -> Keep:
    """For every group of two units or more: remove `fraction` of the units, at least one; at least one stays."""
    generator = np.random.default_rng(seed)
    keep: Keep = {}
    for group in exact_groups(graph):
        if group.size < 2:
            continue
        pruned = min(max(1, round(fraction * group.size)), group.size - 1)
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[torch.from_numpy(generator.permutation(group.size)[:pruned].copy())] = False
        keep[group.name] = mask
    return keep


def masked(model: nn.Module, graph: Graph, keep: Mapping[str, Tensor], *, mode: Mode = "all") -> nn.Module:
    """A deep copy with members of every removed unit at zero: all its parameters, only its readers, or the rest."""
    replica = copy.deepcopy(model)
    parameters = dict(replica.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group in graph.groups:
            pruned = ~keep[group.name].numpy() if group.name in keep else np.zeros(group.size, bool)
            for member in group.members:
                if member.entity not in parameters or mode == ("makers" if member.role == "in" else "readers"):
                    continue
                positions = torch.from_numpy(member.index[pruned[member.unit]].copy())
                parameters[member.entity].index_fill_(member.axis, positions, 0.0)
    return replica


def cut(model: nn.Module, graph: Graph, keep: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy, cut in place."""
    replica = copy.deepcopy(model)
    cut_(replica, cuts(graph, keep), attributes(graph, keep))
    return replica


def macs(model: nn.Module, inputs: Any) -> float:
    """Multiply-adds of one forward pass by torch's own counter (attention by its matrix products)."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run(model, inputs)
    return counter.get_total_flops() / 2


def distinct(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that coupling could spoil: values and identities of tensors, flags, hooks, and types of attributes."""
    state: dict[str, Any] = {"rng": torch.get_rng_state().tolist(), "type": type(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[f"tensor {name}"] = (id(tensor), tensor.detach().clone(), tensor.requires_grad, tensor.grad is None)
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = sum(len(v) for k, v in vars(module).items() if k.endswith("_hooks") and hasattr(v, "__len__"))
        state[f"module {path}"] = (id(module), module.training, hooks, "forward" in vars(module))
        state[f"values {path}"] = {k: plain(v) for k, v in vars(module).items() if not k.startswith("_")}
    return state


def plain(value: Any, depth: int = 0) -> Any:
    """A comparable picture of a value with the exact type of every part."""
    if isinstance(value, nn.Module | Tensor) or callable(value):
        return id(value)
    if isinstance(value, bool | int | float | str | type(None)):
        return (type(value).__name__, value)
    if isinstance(value, list | tuple):
        return (type(value).__name__, [plain(v, depth + 1) for v in value])
    if isinstance(value, dict):
        return (type(value).__name__, {str(k): plain(v, depth + 1) for k, v in value.items()})
    return (id(value), plain(vars(value), depth + 1) if hasattr(value, "__dict__") and depth < 3 else None)


def assert_untouched(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Two snapshots are the same, bit for bit."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if name.startswith("tensor "):
            assert (old[0], old[2], old[3]) == (new[0], new[2], new[3]), f"{name} was replaced"
            assert torch.equal(old[1], new[1]), f"{name} changed"
        else:
            assert old == new, f"{name} changed"


def check_graph(graph: Graph, model: nn.Module) -> None:
    """Laws of any graph: members are in range, disjoint and alike in every unit; dense sizes are the real ones."""
    state = model.state_dict(keep_vars=True)
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    assert len({g.name for g in graph.groups}) == len(graph.groups), "two groups have one name"
    names = [name for entity in graph.entities.values() for name in entity.names]
    assert len(names) == len(set(names)) and set(state) <= set(names)
    taken: dict[tuple[str, int], Tensor] = {}
    for group in graph.groups:
        check_group(graph, group, taken)
    for name, entity in graph.entities.items():
        shape = tuple(named[name].shape)
        assert entity.shape == shape == tuple(extent.size({}) for extent in graph.extents[name])
        assert all(named[alias] is named[name] for alias in entity.names)
    assert graph.params() == distinct(model)
    for attribute in graph.attributes:
        assert attribute.new({}) == attribute.value, f"{attribute.owner}.{attribute.name} changes when nothing is cut"


def check_group(graph: Graph, group: Group, taken: dict[tuple[str, int], Tensor]) -> None:
    """One group: every unit has as many positions as the next, and no position is also in another unit."""
    producers = {name.rsplit(".", 1)[0] for m in group.members for name in graph.entities[m.entity].names}
    producers |= {name for m in group.members for name in graph.entities[m.entity].names}
    assert group.name.split("#")[0] in producers, f"{group.name} is none of {producers}"
    for member in group.members:
        size = graph.entities[member.entity].shape[member.axis]
        assert member.index.shape == member.unit.shape and member.index.size > 0
        assert member.index.min() >= 0 and member.index.max() < size
        assert member.unit.min() >= 0 and member.unit.max() < group.size
        counts = np.bincount(member.unit, minlength=group.size)
        assert (counts == counts[0]).all(), f"{group.name}: units of {member.entity} differ in size"
        seen = taken.setdefault((member.entity, member.axis), torch.zeros(size, dtype=torch.int64))
        seen.index_add_(0, torch.from_numpy(member.index.copy()), torch.ones(member.index.size, dtype=torch.int64))
        assert int(seen.max()) <= 1, f"{member.entity} axis {member.axis}: a position is in two units"


def check_exact(
    model: nn.Module,
    inputs: Any,
    *,
    fraction: float = 0.4,
    seed: int = 0,
    count: bool = True,
    modes: tuple[Mode, ...] = ("all", "readers"),
) -> Checked:
    """Couple, remove random units of every group, cut, and compare with the masked model; see the module's docstring.

    `count=False` skips the comparison of multiply-adds (a model with operations that torch does not count). `modes`:
    `all` alone where a weight reads what it makes, so that it is no reader; where all zero gives no number (a norm of
    a weight divides by zero) the readers alone are compared, or else what makes the unit.
    """
    settle(model, seed=seed)
    before = snapshot(model)
    graph = couple(model, inputs)
    assert_untouched(before, snapshot(model))
    check_graph(graph, model)
    keep = random_keep(graph, fraction=fraction, seed=seed)
    dense, wide = copy.deepcopy(model).double(), double(inputs)
    small = cut(dense, graph, keep)
    found, usual = run(small, wide), run(dense, wide)
    compared = [mode for mode in modes if defined(masked(dense, graph, keep, mode=mode), wide)]
    compared = compared or ["makers"]
    for mode in compared:
        gap = distance(found, run(masked(dense, graph, keep, mode=mode), wide))
        assert gap <= EXACT64, f"cut differs from masked ({mode}) by {gap:.2e}"
    narrow = cut(model, graph, keep)
    gap = distance(run(narrow, inputs), run(masked(model, graph, keep, mode=compared[0]), inputs))
    assert gap <= EXACT32, f"float32: cut differs from masked by {gap:.2e}"
    assert_untouched(before, snapshot(model))
    check_sizes(model, narrow, graph, keep)
    if count:
        assert macs(model, inputs) == graph.macs() and macs(narrow, inputs) == graph.macs(keep)
        assert measured_macs(model, inputs) == graph.macs() and measured_macs(narrow, inputs) == graph.macs(keep)
    check_reasons(graph)
    return Checked(graph, keep, small, dense, distance(found, usual))


def check_reasons(graph: Graph) -> None:
    """Every parameter is in a group or among what stays, with a reason and a line of source."""
    named = {member.entity for group in graph.groups for member in group.members} | {f.entity for f in graph.frozen}
    parameters = {entity.name for entity in graph.entities.values() if entity.parameter}
    assert parameters <= named, f"in no group and not among what stays: {sorted(parameters - named)}"
    for entry in graph.frozen:
        assert entry.reason, f"{entry.entity} stays without a reason"
        assert entry.where or entry.entity in graph.unused, f"{entry} is nowhere"  # a line, or the node of a program


def defined(model: nn.Module, inputs: Any) -> bool:
    """Whether all outputs are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in run(model, inputs))


def check_sizes(model: nn.Module, small: nn.Module, graph: Graph, keep: Keep) -> None:
    """The cut model has the sizes that the graph promised, and the names, ties, dtypes and flags of the model."""
    old, new = model.state_dict(keep_vars=True), small.state_dict(keep_vars=True)
    assert list(old) == list(new), "state-dict keys changed"
    assert distinct(small) == graph.params(keep), f"{distinct(small)} parameters, promised {graph.params(keep)}"
    for name, entity in graph.entities.items():
        shape = tuple(extent.size(keep) for extent in graph.extents[name])
        if name in new:
            assert tuple(new[name].shape) == shape, f"{name} is {tuple(new[name].shape)}, promised {shape}"
            assert all(new[alias] is new[name] for alias in entity.names if alias in new), f"{name} is no longer tied"
    total = {id(t): t.numel() * t.element_size() for t in [*small.parameters(), *small.buffers()]}
    assert sum(total.values()) == graph.bytes(keep)
    for name in old:
        assert (old[name].dtype, old[name].requires_grad) == (new[name].dtype, new[name].requires_grad)
        assert type(old[name]) is type(new[name])
    for path, module in small.named_modules():
        assert module.training == model.get_submodule(path).training
        for key, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool):
                assert type(value) is int, f"{path}.{key} is a {type(value).__name__}"


def produced_by(graph: Graph, module: str) -> Group:
    """The group whose units are (some of) the outputs of that module or parameter."""
    wanted = {module, f"{module}.weight"}
    found = [
        group
        for group in graph.groups
        for m in group.members
        if m.role == "out" and wanted & set(graph.entities[m.entity].names)
    ]
    names = sorted({g.name for g in found})
    assert found, f"no group is produced by {module}; groups: {[g.name for g in graph.groups]}; {graph.frozen}"
    assert len(names) == 1, f"{module} produces {names}"
    return found[0]


def frozen_because(graph: Graph, entity: str, axis: int, *words: str) -> bool:
    """The axis does not go exactly, for a reason with one of the words (any reason when none is given).

    Either it has frozen positions, or it is a width or expert, where something runs along it.
    """
    reasons = [f.reason.lower() for f in graph.frozen if f.entity == entity and f.axis == axis]
    held = [g for g in graph.groups if g.why and any((m.entity, m.axis) == (entity, axis) for m in g.members)]
    reasons += [group.why.lower() for group in held]
    return any(word.lower() in reason for reason in reasons for word in words) if words else bool(reasons)
