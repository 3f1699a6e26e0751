"""The result of the coupling engine: frozen data, in coordinates of named parameters.

A *unit* is the smallest part that can be removed: a channel, a neuron, a head. A *group* is a set of units of one
shape. A *member* maps positions on one axis of one parameter or buffer to units of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from prunella.graph.nested_sizes import changed
from prunella.types import Keep

Role = Literal["out", "in", "bias", "scale", "shift", "stat", "other"]
Kind = Literal["channel", "head", "width", "expert", "vocabulary", "block"]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Place = tuple[str, int]
"""A unit: the name of its group and its number."""


def left(places: tuple[Place, ...], keep: Keep) -> bool:
    """Whether a tensor that only these units contain is kept: at least one unit is kept, or there are none."""
    return not places or any(group not in keep or bool(keep[group][unit]) for group, unit in places)


@dataclass(frozen=True)
class Entity:
    """One parameter, buffer or constant. Tied tensors are one entity with several names. trainable: `requires_grad`.

    itemsize: bytes of a number, 0 for a constant, which no state holds.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    parameter: bool
    used: bool
    trainable: bool = True


@dataclass(frozen=True)
class Member:
    """The positions `index` on `axis` of `entity`; position `index[i]` belongs to unit `unit[i]` of the group.

    `role`: `out` rows of a weight that produce the unit, `in` columns of a weight that read it, `bias` of a producer,
    `scale` and `shift` of a normalization, `stat` its running statistics, `other` anything else that is cut along.
    """

    entity: str
    axis: int
    index: Ints
    unit: Ints
    role: Role


@dataclass(frozen=True)
class Group:
    """`size` units of one shape. `name` is the first parameter that produces them, without `.weight`.

    kind: `channel` and `head` are exact: zeros in their place give the same output. `width` (a residual stream or an
    embedding) and `expert` have calls along their units (`Graph.runs`), restricted to the kept units. `vocabulary` is
    indexed by inputs and outputs (`Graph.numbered`). A `block` is bypassed, and is in `Graph.stacks`.
    multiple: the number of kept units must be a multiple of this number, if an operation requires it.
    min_units: smallest number of kept units; an operation such as `topk(k)` chooses that many.
    why, where: the call along the units of a `width` or an `expert`, or the lookup of tokens, and its source location.
    paths: of residual blocks, the module of each unit. The name of the group is then that of their container. Members
        are all parameters that only one block has, with all rows in the unit of this block.
    """

    name: str
    size: int
    kind: Kind
    members: tuple[Member, ...]
    multiple: int = 1
    min_units: int = 1
    why: str = ""
    where: str = ""
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitCall:
    """A call along an axis of units: the `number`-th call of `name` in a run.

    Position `i` on `axis` of its first tensor belongs to unit `unit[i]` of the group, or to none if `unit[i]` is -1.
    example: the run in which it is counted, by the number of its example. calls: how many calls of `name` this run has.
    """

    name: str
    number: int
    axis: int
    group: str
    unit: Ints
    example: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Numbered:
    """Tensors indexed by the units of a group: inputs of the model, and the (number, axis) of outputs."""

    group: str
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]


class ReasonKind(StrEnum):
    """The kind of a reason, for advice; the text of the reason is for people."""

    OPERATION = "operation"
    """An operation of the model needs every position."""
    RULE = "rule"
    """An operation has no rule; with one, its axes may go."""
    COMPLEX = "complex"
    """The model computes with complex numbers, which torch takes apart into real ones."""
    SOURCE = "source"
    """A size in the model's source does not follow the cut; in a program the size does."""
    DECISION = "decision"
    """The model's source takes another branch for another size."""
    REQUEST = "request"
    """`granularity=`, `skip=` or `only=` excludes it."""
    MINIMUM = "minimum"
    """All units are needed."""
    UNSCORED = "unscored"
    """The criterion gives no score."""
    UNPROVEN = "unproven"
    """The smaller model does not run, or its outputs differ from those of the masked model."""


@dataclass(frozen=True)
class Frozen:
    """Positions that must be kept, and why. `where` is `file:line` of the model's source, or empty.

    With `axis` -1 the entity is a module: `count` residual blocks.
    """

    entity: str
    axis: int
    count: int
    reason: str
    where: str
    kind: ReasonKind = ReasonKind.OPERATION

    @property
    def place(self) -> str:
        """The kept positions, as text."""
        if self.axis < 0:
            return f"{self.entity}, {'a block' if self.count == 1 else f'{self.count} blocks'}"
        return f"{self.entity} axis {self.axis}, {self.count} positions"


@dataclass(frozen=True)
class Layer:
    """A weight that multiplies an activation. `graph.matrix` maps it to a matrix `(out, in)` by these axes.

    `kernel` axes are all others. With `groups` > 1 the matrix is `(out, in / groups * kernel)`.
    """

    name: str
    entity: str
    out_axis: int
    in_axis: int
    groups: int
    op: Literal["linear", "conv", "conv_transpose"]
    bias: str | None = None
    module: str = ""
    macs: float = 0.0


@dataclass(frozen=True)
class Extent:
    """The size of one dimension as a function of the kept units: fixed positions plus positions of units."""

    fixed: int
    units: tuple[tuple[str, Ints], ...] = ()

    def size(self, keep: Keep) -> int:
        """The number of kept positions."""
        total = self.fixed
        for group, count in self.units:
            mask = keep.get(group)
            total += int(count.sum()) if mask is None else int(count[mask.numpy()].sum())
        return total


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one operation: `constant` times the product of the extents. `layer` is "" for attention.

    home: the residual block of the operation, if any; the operation is removed with this block. reads: the parameters
    that it multiplies by, layers or not.
    """

    op: str
    module: str
    layer: str
    constant: float
    extents: tuple[Extent, ...]
    home: tuple[Place, ...] = ()
    reads: tuple[str, ...] = ()

    def macs(self, keep: Keep) -> float:
        """Multiply-adds when only `keep` remains."""
        if not left(self.home, keep):
            return 0.0
        total = self.constant
        for extent in self.extents:
            total *= extent.size(keep)
        return total


@dataclass(frozen=True)
class Attribute:
    """An integer attribute with a size: `owner.name` becomes `extent.size(keep) * factor // divisor`.

    `owner` is a module path ("" is the model itself), or `path:config` for a configuration object of a module.
    index: its position in a list or tuple of sizes, or -1.
    """

    owner: str
    name: str
    value: int
    extent: Extent
    factor: int = 1
    divisor: int = 1
    where: str = ""
    index: int = -1

    def new(self, keep: Keep) -> int:
        """The value when only `keep` remains."""
        return self.extent.size(keep) * self.factor // self.divisor


def placed(old: Any, index: int, value: int) -> Any:
    """An attribute with a new value: an integer (`index` -1), or a container with one other size."""
    return value if index < 0 else changed(old, lambda place, size: value if place == index else size)


@dataclass(frozen=True)
class UnreadSize:
    """An integer attribute that no operation of the run reads, with the sizes of its owner that it equals.

    index: its position in a list or tuple of sizes, or -1. It follows a cut if all these sizes become the same.
    """

    owner: str
    name: str
    value: int
    extents: tuple[Extent, ...]
    index: int = -1

    def new(self, keep: Keep) -> tuple[int, ...]:
        """What these sizes become when only `keep` remains, each once."""
        return tuple(sorted({extent.size(keep) for extent in self.extents}))

    def placed(self, old: Any, value: int) -> Any:
        """The attribute with `value` in its place."""
        return placed(old, self.index, value)


@dataclass(frozen=True)
class Setting:
    """The conditions of a run of the model, in addition to its batch.

    answers: the value that the source reads instead of the computed one, by expression. before: batches on which the
    model runs first, so that its state between calls exists. kept: owner, attribute and value of numbers in this state.
    """

    answers: Mapping[Any, bool | int | float] = field(default_factory=dict)
    before: tuple[Any, ...] = ()
    kept: tuple[tuple[str, str, Any], ...] = ()


PLAIN = Setting()
"""The first run of a model, in which the source reads every value as computed."""


@dataclass(frozen=True)
class Branch:
    """A run in another setting than the first one, where the source may take another branch.

    place: `file:line` of a branch on a value, or a description of the run. batch: None for the example. example: the
    number of the run. fault: why the run failed; empty if it succeeded. other_arguments: the batch has other arguments
    than the example.
    """

    place: str
    setting: Setting
    example: int
    fault: str = ""
    batch: Any = None
    other_arguments: bool = False

    @property
    def text(self) -> str:
        """The run, described in words."""
        return f"on the other side of {self.place}" if self.setting.answers else self.place


@dataclass(frozen=True)
class Hints:
    """Hints of a run that the source may take other branches on other inputs.

    turns: a size of the inputs, and another size at which a comparison has another outcome. alone: the same for a
    single axis of the inputs, if a comparison has several sizes. numbers, keys: sizes in the source, see `KnownSizes`.
    escaped: a size was used where comparisons are not observed. values: tensor values were converted to Python numbers.
    ranks, layouts: the source reads the number of axes of a tensor, or its memory layout. macs: the multiply-adds.
    """

    turns: tuple[tuple[int, int], ...] = ()
    alone: tuple[tuple[int, int, int], ...] = ()
    numbers: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    escaped: bool = False
    values: bool = False
    ranks: bool = False
    layouts: bool = False
    macs: float = 0.0


@dataclass(frozen=True)
class Graph:
    """The coupling graph of a model, from `prunella.graph.solve.groups.couple(model, inputs)`.

    stacks: groups of residual blocks. rooted: blocks that must be kept, and why. homes: entity -> the blocks that
    contain the entity; it is removed with the last of them. orders: stack -> names of all children of the container.
    lists: stack -> (owner, name) of plain lists with one entry per child. `prunella.graph.solve.block_counters` finds
    these lists and the integers that count the children. untried: why the model did not run in training mode, for which
    its source has branches; empty otherwise.
    """

    entities: Mapping[str, Entity]
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[Layer, ...]
    costs: tuple[Cost, ...]
    extents: Mapping[str, tuple[Extent, ...]]
    attributes: tuple[Attribute, ...] = ()
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """Operations with an unknown number of multiply-adds -> number of their calls."""
    hidden: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Operations of `uncounted` -> the parameters that they read."""
    unregistered: Mapping[str, int] = field(default_factory=dict)
    """Weights that are no parameters of the model -> multiply-adds, which `macs` counts."""
    readers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Parameter -> the first operation that computes with it, and the line of the model's source."""
    unused: tuple[str, ...] = ()
    runs: tuple[UnitCall, ...] = ()
    numbered: tuple[Numbered, ...] = ()
    specials: Mapping[tuple[str, str], int | tuple[int, ...]] = field(default_factory=dict)
    """Attributes that name tokens."""
    stacks: tuple[Group, ...] = ()
    rooted: tuple[Frozen, ...] = ()
    homes: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    lists: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    untried: str = ""
    hints: Hints = Hints()
    shared: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> why it is kept: another parameter shares its memory."""
    branches: tuple[Branch, ...] = ()
    """Branches on values."""
    unread: tuple[UnreadSize, ...] = ()
    lists_of_sizes: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    """Attributes that are lists or tuples of sizes, of which some follow a cut."""

    def macs(self, keep: Keep | None = None) -> float:
        """Multiply-adds of one forward pass on the example inputs when only `keep` remains."""
        return sum(cost.macs(keep or {}) for cost in self.costs)

    def numel(self, entity: str, keep: Keep | None = None) -> int:
        """Elements of one parameter or buffer when only `keep` remains."""
        if not left(self.homes.get(entity, ()), keep or {}):
            return 0
        total = 1
        for extent in self.extents[entity]:
            total *= extent.size(keep or {})
        return total

    def params(self, keep: Keep | None = None) -> int:
        """Parameters of the full model, tied ones once, when only `keep` remains."""
        return sum(self.numel(name, keep) for name, e in self.entities.items() if e.parameter)

    def bytes(self, keep: Keep | None = None) -> int:
        """Bytes of parameters and buffers when only `keep` remains."""
        return sum(self.numel(name, keep) * e.itemsize for name, e in self.entities.items())

    @property
    def tokens(self) -> Group | None:
        """The group indexed by tokens: that of the largest embedding that an input indexes."""
        tables = [group for group in self.groups if group.kind == "vocabulary"]
        return max(tables, key=lambda group: group.size, default=None)

    def group(self, name: str) -> Group:
        """The group of that name."""
        return next(g for g in (*self.groups, *self.stacks) if g.name == name)
