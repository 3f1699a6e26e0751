"""Random networks: a strategy that draws a small program, and the module that interprets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generated import blocks

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]
BATCH = 2
UNKNOWN = ("cumsum", "sort", "fft")


@dataclass(frozen=True)
class Step:
    """Call `block(*args)` on the values `sources`; value 0 is the input, value i + 1 the result of step i."""

    block: str
    sources: tuple[int, ...]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """Input shape without the batch, steps, and the values that are returned."""

    start: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def input(self) -> Tensor:
        """An example, always the same."""
        return torch.randn(BATCH, *self.start, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """Run the steps of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.blocks = nn.ModuleList(getattr(blocks, step.block)(*step.args) for step in program.steps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, block in zip(self.program.steps, self.blocks, strict=True):
            values.append(block(*(values[source] for source in step.sources)))
        return tuple(values[index] for index in self.program.outputs)


def axis_of(shape: Shape) -> int:
    """Where the channels are, batch included."""
    return 2 if len(shape) == 2 else 1


def width_of(shape: Shape) -> int:
    """How many channels."""
    return shape[axis_of(shape) - 1]


def divisors(number: int) -> list[int]:
    """Of that number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


WIDTHS = st.sampled_from([2, 4, 6, 8, 12])
Rule = Callable[[Draw, Shape], tuple[Any, ...] | None]


def conv(draw: Draw, shape: Shape) -> tuple[Any, ...]:
    """Dense, grouped or depthwise."""
    outputs = draw(WIDTHS)
    common = [d for d in divisors(shape[0]) if outputs % d == 0]
    stride = draw(st.sampled_from([1, 1, 2])) if shape[1] > 2 else 1
    groups = draw(st.sampled_from([1, 1, 1, *common]))
    if draw(st.integers(0, 3)) == 0:
        groups = shape[0]
        outputs = shape[0] * draw(st.sampled_from([1, 1, 2]))
    return shape[0], outputs, draw(st.sampled_from([1, 3])), stride, groups, draw(st.booleans())


def up(draw: Draw, shape: Shape) -> tuple[Any, ...]:
    """A transposed convolution, sometimes grouped."""
    outputs = draw(WIDTHS)
    return shape[0], outputs, draw(st.sampled_from([1, 1, *[d for d in divisors(shape[0]) if outputs % d == 0]]))


def norm(draw: Draw, shape: Shape) -> tuple[Any, ...]:
    """A norm that fits the kind of value."""
    names = {1: ["batch", "layer", "rms", "group"], 2: ["layer", "rms"], 3: ["batch", "batch", "instance", "group"]}
    groups = draw(st.sampled_from(divisors(width_of(shape))))
    return draw(st.sampled_from(names[len(shape)])), width_of(shape), len(shape) + 1, groups


def attention(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Heads that divide the width, key-value heads that divide the heads."""
    heads = [d for d in divisors(shape[1]) if 2 <= d <= 4 and shape[1] // d >= 2]
    if not heads:
        return None
    count = draw(st.sampled_from(heads))
    return shape[1], count, draw(st.sampled_from(divisors(count))), draw(st.booleans())


def split(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Two parts of unlike size."""
    width = width_of(shape)
    first = draw(st.integers(1, width - 1)) if width > 1 else 0
    return (width, first, draw(WIDTHS), axis_of(shape), len(shape) + 1) if first else None


def if_even(arguments: Callable[[Shape], tuple[Any, ...]], at_least: int = 4) -> Rule:
    """Only for an even number of channels."""
    return lambda draw, s: arguments(s) if width_of(s) % 2 == 0 and width_of(s) >= at_least else None


def choose(*names: str, extra: Callable[[Shape], tuple[Any, ...]] = lambda s: ()) -> Rule:
    """One of the names, then arguments of the shape."""
    return lambda draw, s: (draw(st.sampled_from(names)), *extra(s))


def pool(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Down only while there is something left."""
    return (draw(st.sampled_from(["max", "avg", "up"] if shape[1] >= 2 else ["up"])),) if shape[1] <= 6 else None


def pixel(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Up when four channels make one, down on even maps."""
    ways = [True] * (shape[0] % 4 == 0 and shape[1] <= 4) + [False] * (shape[1] % 2 == 0 and shape[0] <= 6)
    return (draw(st.sampled_from(ways)),) if ways else None


def shuffle(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Into two groups or more."""
    groups = [d for d in divisors(shape[0]) if 1 < d < shape[0]]
    return (draw(st.sampled_from(groups)),) if groups else None


def to_sequence(draw: Draw, shape: Shape) -> tuple[Any, ...] | None:
    """Maps up to nine tokens; vectors folded or repeated."""
    if len(shape) == 3:
        return ("tokens", 0) if shape[1] * shape[2] <= 9 else None
    parts = [d for d in divisors(shape[0]) if 2 <= d <= 4]
    names = ["repeat", "fold"] if parts else ["repeat"]
    name = draw(st.sampled_from(names))
    return name, draw(st.sampled_from(parts)) if name == "fold" else 3


def hidden(draw: Draw, shape: Shape) -> tuple[Any, ...]:
    """Width and a drawn hidden width, with what `mix` needs."""
    return width_of(shape), draw(WIDTHS), axis_of(shape), len(shape) + 1


FLAT: dict[str, Rule] = {
    "Linear": lambda draw, s: (width_of(s), draw(WIDTHS)),
    "Einsum": lambda draw, s: (width_of(s), draw(WIDTHS)),
    "Tied": lambda draw, s: (width_of(s), draw(WIDTHS)),
}
COMMON: dict[str, Rule] = {
    "Act": choose("relu", "gelu", "silu", "tanh", "sigmoid"),
    "Norm": norm,
    "Residual": hidden,
    "Shared": lambda draw, s: (width_of(s), axis_of(s), len(s) + 1),
    "Halves": if_even(lambda s: (width_of(s), axis_of(s), len(s) + 1)),
    "Split": split,
    "Glu": if_even(lambda s: (axis_of(s),)),
    "PerChannel": lambda draw, s: (width_of(s), len(s) + 1),
    "Reorder": choose("flip", "gather", "interleave", "repeat", "pad", extra=lambda s: (axis_of(s), width_of(s))),
    "Slice": lambda draw, s: (axis_of(s), draw(st.integers(1, width_of(s)))),
    "Across": choose(*UNKNOWN, "softmax", "mean", "max", "normalize", extra=lambda s: (axis_of(s),)),
}
RULES: dict[int, dict[str, Rule]] = {
    1: {**FLAT, **COMMON, "ToSequence": to_sequence},
    2: {**FLAT, **COMMON, "Attention": attention, "ToVector": choose("mean", "flatten", "first")},
    3: {
        **COMMON,
        "Conv": conv,
        "Up": lambda draw, s: up(draw, s) if s[1] <= 3 else None,
        "LastLinear": lambda draw, s: (s[0], draw(WIDTHS)),
        "SqueezeGate": lambda draw, s: (s[0], draw(st.sampled_from([2, 4]))),
        "Shuffle": shuffle,
        "Pixel": pixel,
        "Pool": pool,
        "ToVector": choose("mean", "flatten", "max"),
        "ToSequence": to_sequence,
    },
}
LAYERS = ("Conv", "Linear", "LastLinear", "Einsum", "Residual", "Halves", "Attention", "SqueezeGate")
RARE = ("Across", "Slice", "Reorder")


def result(step: Step, shapes: list[Shape]) -> Shape:
    """The shape that a step makes, by running it."""
    block = getattr(blocks, step.block)(*step.args).eval()
    with torch.no_grad():
        made: Tensor = block(*(torch.zeros(BATCH, *shapes[source]) for source in step.sources))
    return tuple(made.shape[1:])


def joined(draw: Draw, shapes: list[Shape]) -> Step | None:
    """A step of two values: the last one, and an earlier one that fits."""
    last, shape = len(shapes) - 1, shapes[-1]
    axis = axis_of(shape) - 1
    options: list[Step] = []
    for other in range(1, last):
        that = shapes[other]
        if that == shape:
            options += [Step("Join", (last, other), (name, axis + 1)) for name in ("add", "mul", "where", "cat")]
        elif len(that) == len(shape) and that[:axis] + that[axis + 1 :] == shape[:axis] + shape[axis + 1 :]:
            options.append(Step("Join", (last, other), ("cat", axis + 1)))
        if len(that) == 1 and len(shape) > 1 and width_of(shape) == that[0]:
            options.append(Step("Gate", (last, other), ()))
        if len(that) == len(shape) == 1 and that[0] * shape[0] <= 48:
            options.append(Step("Outer", (last, other), ()))
    return draw(st.sampled_from(options)) if options else None


def following(draw: Draw, shapes: list[Shape]) -> Step | None:
    """A step of one value, most often the last."""
    source = draw(st.sampled_from([len(shapes) - 1] * 4 + list(range(1, len(shapes)))))
    shape = shapes[source]
    rules = RULES[len(shape)]
    usual = [name for name in rules if name not in RARE]
    often = [name for name in LAYERS if name in rules] * 2 + ["Norm"] * 3 + ["Attention"] * 8 * (len(shape) == 2)
    names = usual * 2 + often + [name for name in RARE if name in rules]
    name = draw(st.sampled_from(names))
    args = rules[name](draw, shape)
    return None if args is None else Step(name, (source,), args)


def stem(draw: Draw, start: Shape) -> Step:
    """The first step: a layer with a bias, so that no later value is the input itself."""
    outputs = draw(st.sampled_from([4, 6, 8, 12]))
    return (
        Step("Conv", (0,), (3, outputs, 3, 1, 1, True))
        if len(start) == 3
        else Step("Linear", (0,), (start[-1], outputs))
    )


@st.composite
def programs(draw: Draw) -> Program:
    """Three to nine steps after a stem, then a head of four outputs on the last value, sometimes on an earlier one."""
    start: Shape = draw(st.sampled_from([(3, 6, 6), (4, 5), (5,), (3, 4, 4), (3, 6), (3, 6, 6)]))
    steps = [stem(draw, start)]
    shapes = [start, result(steps[0], [start])]
    for _ in range(draw(st.integers(3, 9))):
        step = joined(draw, shapes) if draw(st.integers(0, 3)) == 0 else following(draw, shapes)
        if step is None:
            continue
        shape = result(step, shapes)
        if max(width_of(shape), 1) <= 48 and torch.Size(shape).numel() <= 800:
            steps.append(step)
            shapes.append(shape)
    heads = {len(shapes) - 1}
    if draw(st.integers(0, 3)) == 0:
        heads.add(draw(st.integers(1, len(shapes) - 1)))
    outputs = []
    for value in sorted(heads):
        name, width = ("LastLinear" if len(shapes[value]) == 3 else "Linear"), width_of(shapes[value])
        steps.append(Step(name, (value,), (width, 4)))
        outputs.append(len(steps))
    return Program(start, tuple(steps), tuple(outputs))
