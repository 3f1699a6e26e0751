"""Budgets with units. A fraction states what is KEPT; for `Sparsity` it states what is REMOVED.

`MACs(0.5)` keeps half of the multiply-adds of the full model; `MACs(1.2e9)` asks for an absolute number;
`Sparsity(0.9)` removes 90 % of the prunable weights. A value up to and including 1 is a fraction. A fraction above 1,
such as `MACs(1.5)`, is neither a share nor a number of anything, and is refused; from 1000 on it is a computed number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from prunella.errors import RequestError, near_names

if TYPE_CHECKING:
    from prunella.measure.timing import Timing


_PERCENT = 100
_COMPUTED = 1000
"""Fractional numbers from here on are accepted as computed ones, such as 0.3 times that of another model."""


@dataclass(frozen=True)
class Target:
    """A budget: `value` of `unit`. Use one of its children."""

    value: float

    def __post_init__(self) -> None:
        value: object = self.value
        if not isinstance(value, Real):
            why, todo = "a number is needed", f"for example {type(self).__name__}(0.5)"
            raise RequestError(f"{type(self).__name__}({self.value!r}) is not a budget", why, todo)
        low_ok = self.value >= 0 if isinstance(self, Sparsity | Threshold) else self.value > 0
        high_ok = self.value < 1 if isinstance(self, Sparsity) else True
        if not (low_ok and high_ok):
            limits = "0 <= sparsity < 1" if isinstance(self, Sparsity) else "a positive number"
            limits = "a score of at least 0" if isinstance(self, Threshold) else limits
            raise RequestError(
                f"target {self.name}={self.value:g} is out of range",
                f"{type(self).__name__} takes {limits}",
                self._meant
                or "for example target=Sparsity(0.9) removes 90 % of weights, target=MACs(0.5) keeps half of the work",
            )
        if isinstance(self, Params | MACs | Bytes) and 1 < self.value < _COMPUTED and self.value % 1:
            raise RequestError(
                f"target {self.name}={self.value:g} is neither a share nor a number",
                "it takes the share that is kept, in (0, 1], or an int for an absolute number",
                f"did you mean target={type(self).__name__}({1 / self.value:.2g}), a share of 1/{self.value:g}, or "
                f"target={type(self).__name__}({self.value:g}e6), {self.value:g} million?",
            )

    @property
    def name(self) -> str:
        """`sparsity`, `params`, `macs`, `bytes`, `latency` or `threshold`."""
        return type(self).__name__.lower()

    def absolute(self, dense: float) -> float:
        """The budget in the unit of the target. dense: the amount of the dense model."""
        if isinstance(self, Sparsity):
            return (1 - self.value) * dense
        return self.value * dense if self.value <= 1 else self.value

    @property
    def _meant(self) -> str:
        """A suggestion for a percentage without its sign; empty if the number cannot be one."""
        if not 1 < self.value <= _PERCENT or isinstance(self, Latency):
            return ""
        share = f"{type(self).__name__}({self.value / 100:g})"
        return f"did you mean target={share}, {self.value:g} %?" if self.value < _PERCENT else ""

    @property
    def hint(self) -> str:
        """A suggestion for a number too small to be met, such as `macs=50` for 50 %; empty if there is none."""
        return "" if isinstance(self, Sparsity) else self._meant

    @property
    def exact(self) -> str:
        """The target as `parse_target` reads it, with every digit."""
        return f"{self.name}={self.value!r}{self._scope}"

    @property
    def _scope(self) -> str:
        return ",of=model" if isinstance(self, Sparsity) and self.of == "model" else ""

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}{self._scope}"


@dataclass(frozen=True)
class Sparsity(Target):
    """Fraction removed: of the prunable weights for masks, of the prunable units for structured pruning.

    of: `"model"` counts all weights of the model, those that cannot be pruned too (embeddings, recurrent layers,
        weights that are computed). A plan says first which weights `"prunable"`, the default, leaves out.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(10, 10), pr.Recipe(granularity=pr.Element())
        >>> plan = pr.plan(model, torch.randn(2, 10), recipe, target=pr.Sparsity(0.9))
        >>> int(plan.masks["weight"].sum())
        10
    """

    of: Literal["prunable", "model"] = field(default="prunable", kw_only=True)

    def __post_init__(self) -> None:
        Target.__post_init__(self)
        if self.of not in ("prunable", "model"):
            todo = "for example Sparsity(0.9), or Sparsity(0.5, of='model')"
            raise RequestError(f"of={self.of!r} is unknown", "known are 'prunable' and 'model'", todo)


@dataclass(frozen=True)
class Params(Target):
    """Parameters kept in the full model: a fraction up to 1, or a number. Tied parameters count once.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.Params(0.5))
        >>> plan.before.params, plan.after.params
        (212.0, 95.0)
    """


@dataclass(frozen=True)
class MACs(Target):
    """Multiply-adds kept in one forward pass: a fraction up to 1, or a number.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.5))
        >>> plan.before.macs, plan.after.macs
        (384.0, 192.0)
    """


@dataclass(frozen=True)
class Bytes(Target):
    """Bytes kept of parameters and buffers: a fraction up to 1, or a number.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.Bytes(0.5))
        >>> plan.before.bytes, plan.after.bytes
        (848.0, 380.0)
    """


@dataclass(frozen=True)
class Latency(Target):
    """Time of one forward pass on this machine: a fraction of the dense time up to 1, or milliseconds above 1.

    The search builds the smaller model and times it against the dense one. The plan reports the measured time. The
    search meets the target within `TOLERANCE` if the steps of the machine's speed allow it. Masks do not qualify: dense
    kernels multiply the zeros. The model is not timed again after recovery: the time depends on widths, not on values.

    measure: another way to time, for example on another device: a function of (dense model, small model, inputs,
        inputs of the small model) that returns a `prunella.measure.timing.Timing`.

    Example:

        >>> import torch, prunella as pr
        >>> def clock(dense, small, inputs, small_inputs):  # your own, of another device for example
        ...     ratio = pr.metrics.count(small).params / pr.metrics.count(dense).params
        ...     return pr.metrics.Timing(dense=1.0, small=ratio, low=ratio, high=ratio, how="by parameters")
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.Latency(0.5, measure=clock))
        >>> round(plan.after.params / plan.before.params, 2)
        0.49
    """

    measure: Callable[[Any, Any, Any, Any], Timing] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Threshold(Target):
    """Keep weights or units with a score above this number: weights with `|w| > t` by `magnitude`, units likewise.

    The scores alone determine the sparsity, without an allocation or a budget. A group keeps its minimum of units.
    Scores are those of the recipe's criterion; a threshold below all of them is refused with their range.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(10, 10), pr.Recipe(granularity=pr.Element())
        >>> plan = pr.plan(model, torch.randn(2, 10), recipe, target=pr.Threshold(0.1))
        >>> bool((plan.masks["weight"] == (model.weight.abs() > 0.1)).all())
        True
    """

    def absolute(self, dense: float) -> float:
        """Errors: RequestError, since a threshold does not determine an amount."""
        why, todo = "the scores determine the sparsity", "for example MACs(0.5) or Sparsity(0.9)"
        raise RequestError("a threshold is not a budget", why, todo)


TOLERANCE = 0.05
"""Largest relative distance of a measured latency from its target."""


def part_of(target: Target, fraction: float, dense: Callable[[], float]) -> Target:
    """The target after `fraction` of the way from the dense model. dense: returns the amount of the dense model."""
    if isinstance(target, Sparsity | Threshold):
        return replace(target, value=fraction * target.value)
    remains = target.value if target.value <= 1 else min(1.0, target.value / dense())
    return replace(target, value=1 - fraction * (1 - remains))


_KINDS: dict[str, type[Target]] = {
    "sparsity": Sparsity,
    "params": Params,
    "macs": MACs,
    "bytes": Bytes,
    "latency": Latency,
    "threshold": Threshold,
}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_SUFFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "kb": 1e3, "mb": 1e6, "gb": 1e9, "%": 0.01}


_OTHER_WORDS = {
    "madds": "macs", "gmacs": "macs", "parameters": "params", "weights": "params", "size": "bytes", "memory": "bytes",
    "time": "latency",
}  # fmt: skip


def _meant_by(text: str) -> tuple[str, str] | None:
    """Why a target in the words of other tools is not valid, and what to write; None for unknown words."""
    name, _, amount = (part.strip() for part in text.partition("="))
    name = name.lower()
    if name in ("flop", "flops", "gflops", "mflops"):
        share = re.fullmatch(r"0?\.\d+|1(\.0*)?|\d+(\.\d+)?%", amount)
        why = "FLOPs are 2 * MACs, so the share is the same and a number is half"
        unit = name[0].upper() if name[0] in "gm" and not share else ""
        return why, f"use --target macs={amount if share else _halved(amount) + unit}"
    if (
        name in ("speedup", "speed-up", "speed")
        and re.fullmatch(r"\d+(\.\d+)?x?", amount)
        and float(amount.rstrip("x"))
    ):
        return "a target says what is kept", f"use --target latency={1 / float(amount.rstrip('x')):.3g}"
    if name in _OTHER_WORDS:
        return f"it is called {_OTHER_WORDS[name]} here", f"use --target {_OTHER_WORDS[name]}={amount}"
    if name in _KINDS and re.fullmatch(r"\d+,\d+\s*%?", amount):
        return "a number has a point", f"did you mean --target {name}={amount.replace(',', '.')}?"
    return None


def _halved(amount: str) -> str:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]?)", amount)
    return f"{float(match[1]) / 2:g}{match[2]}" if match else "0.5"


def parse_target(text: str) -> Target:
    """Read `macs=0.5`, `params=2.5M`, `bytes=40MB`, `sparsity=0.5,of=model`, `latency=12ms` or `threshold=0.01`.

    Percentages such as `sparsity=90%` are fractions.
    """
    amount, of_model = re.subn(r"\s*,\s*of\s*=\s*model\s*$", "", text)
    match = re.fullmatch(r"\s*([a-zA-Z]+)\s*=\s*([0-9.eE+-]+)\s*([a-zA-Z%]*)\s*", amount)
    name, suffix = (match[1].lower(), match[3].lower()) if match else ("", "")
    suffixes = {"": 1.0, "%": 0.01, **_TIMES} if name == "latency" else _SUFFIX
    suffixes = {"": 1.0} if name == "threshold" else suffixes
    if not match or name not in _KINDS or suffix not in suffixes or (of_model and name != "sparsity"):
        if meant := _meant_by(text):
            raise RequestError(f"cannot read the target {text!r}", *meant)
        unit = text.partition("=")[0].strip()
        near = "" if unit in _KINDS else near_names(unit, _KINDS)
        raise RequestError(
            f"cannot read the target {text!r}",
            f"a target is NAME=NUMBER with NAME one of {', '.join(_KINDS)}{f'; {near}' if near else ''}",
            "for example --target macs=0.5 or --target params=2.5M",
        )
    try:
        number = float(match[2])
    except ValueError:
        why = f"{match[2]!r} is not a number"
        raise RequestError(f"cannot read the target {text!r}", why, "for example --target macs=0.5") from None
    if suffix in _TIMES and number * _TIMES[suffix] <= 1:
        why = "a latency up to 1 is read as a fraction of the dense one, a latency above 1 as milliseconds"
        raise RequestError(
            f"a latency of {text.partition('=')[2].strip()} is too short", why, "for example latency=0.6"
        )
    if of_model:
        return Sparsity(number * suffixes[suffix], of="model")
    return _KINDS[name](number * suffixes[suffix])
