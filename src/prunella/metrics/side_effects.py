"""Side effects of pruning on one labeled data set, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError, near_names
from prunella.io.json import encode, plain
from prunella.measure.text import exact_count, interval, table
from prunella.metrics.corruption import CORRUPTIONS
from prunella.metrics.outputs import ClassDrop, calibration_error, flip_rate, kl_divergence, per_class_drop
from prunella.model.batches import batches
from prunella.model.forward import first_tensor, forward
from prunella.model.state import mode
from prunella.registry.method import metric
from prunella.reporting.section import Section

_SHOWN = 10


@dataclass(frozen=True)
class Robustness:
    """Accuracy of both models on the data under one corruption."""

    name: str
    before: float
    after: float

    @property
    def drop(self) -> float:
        """Accuracy lost."""
        return self.before - self.after


@dataclass(frozen=True)
class SideEffects:
    """Dense against pruned; pairs are (dense, pruned)."""

    examples: int
    accuracy: tuple[float, float]
    flips: float
    kl: float
    calibration: tuple[float, float]
    bins: int
    classes: tuple[ClassDrop, ...]
    robustness: tuple[Robustness, ...]
    severity: int

    @property
    def agreement(self) -> float:
        """Fraction of the examples on which both predict the same class."""
        return 1 - self.flips

    def data(self) -> dict[str, Any]:
        """As plain data."""
        classes = [{**asdict(one), "drop": one.drop} for one in self.classes]
        corrupted = [{**asdict(one), "drop": one.drop} for one in self.robustness]
        return {**asdict(self), "agreement": self.agreement, "classes": classes, "robustness": corrupted}

    def json(self) -> str:
        """As JSON text."""
        return encode(plain(self.data()), indent=2, sort=False)

    def __str__(self) -> str:
        lines = table(("", "dense", "pruned"), self._rows())
        return f"side effects on {exact_count(self.examples)} examples\n{lines}"

    def section(self) -> Section:
        """For a report: `report(...).adding(effects.section())`."""
        lead = f"Dense and pruned on {self.examples:,} examples. Classes: the worst {_SHOWN} with Wilson's 95 % "
        lead += "interval and the exact paired test, without a correction for the number of classes."
        return Section("Side effects", lead, ("", "Dense", "Pruned"), self._rows())

    def _rows(self) -> tuple[tuple[str, str, str], ...]:
        rows = [
            ("accuracy", *_two(self.accuracy)),
            ("predictions that flipped", "", f"{self.flips:.2%}"),
            ("divergence from the dense model", "", f"{self.kl:.3g} nats"),
            (f"calibration error ({self.bins} bins of equal width)", *(f"{x:.4f}" for x in self.calibration)),
        ]
        for one in self.classes[:_SHOWN]:
            before, after = (interval(low, high, ".1%") for low, high in (one.interval_before, one.interval_after))
            name = f"class {one.label} ({one.examples} examples, p={one.p:.2g})"
            rows.append((name, f"{one.before:.1%} {before}", f"{one.after:.1%} {after}"))
        rows += [(f"{one.name}, severity {self.severity}", *_two((one.before, one.after))) for one in self.robustness]
        return tuple((a, b, c) for a, b, c in rows)


@metric(source="Hooker et al. 2020, arXiv:2010.03058; Hendrycks and Dietterich 2019, arXiv:1903.12261 (corruptions)")
def side_effects(
    dense: nn.Module,
    pruned: nn.Module,
    data: Iterable[Any],
    *,
    bins: int = 15,
    severity: int = 3,
    corruptions: Sequence[str] = (),
    seed: int = 0,
) -> SideEffects:
    """Flips, agreement, divergence, calibration, classes and robustness of a pruned classifier against its dense one.

    `accuracy alone = (right to wrong) - (wrong to right)`; the side effects show both parts. Both models see the same
    examples with the same corruptions. Data: batches `(inputs, labels)`, or mappings with `labels`; logits are
    `(batch, classes)`, the first tensor in the model's output. Models run in evaluation mode and do not change.

    bins: of the calibration error. severity: 1 to 5. corruptions: names of `metrics.corruption.CORRUPTIONS`, for
    images `(batch, channels, height, width)` only. seed: of the noise.
    Errors: RequestError for an unknown corruption, or a batch without labels.

    Use: before a pruned model replaces its dense one. Avoid: the data of pruning or recovery.
    """
    unknown = [name for name in corruptions if name not in CORRUPTIONS]
    if unknown:
        raise RequestError(
            f"unknown corruption {unknown[0]!r}",
            near_names(unknown[0], CORRUPTIONS) or f"known are {', '.join(CORRUPTIONS)}",
            f"one of {', '.join(CORRUPTIONS)}",
        )
    pairs = [_split(batch) for batch in batches(data)]
    labels = torch.cat([label for _, label in pairs]).cpu()
    with mode(dense, training=False), mode(pruned, training=False), torch.no_grad():
        before, after = (_logits(model, [x for x, _ in pairs]) for model in (dense, pruned))
        corrupted = []
        for name in corruptions:
            bad = [CORRUPTIONS[name](_image(x), severity, seed + at) for at, (x, _) in enumerate(pairs)]
            first, second = (_accuracy(_logits(model, bad), labels) for model in (dense, pruned))
            corrupted.append(Robustness(name, first, second))
    return SideEffects(
        examples=len(labels),
        accuracy=(_accuracy(before, labels), _accuracy(after, labels)),
        flips=flip_rate(before, after),
        kl=kl_divergence(before, after),
        calibration=(calibration_error(before, labels, bins=bins), calibration_error(after, labels, bins=bins)),
        bins=bins,
        classes=per_class_drop(before, after, labels),
        robustness=tuple(corrupted),
        severity=severity,
    )


def _split(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[-1], Tensor) and batch[-1].dim() == 1:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise RequestError(
        f"a batch of type {type(batch).__name__} has no labels",
        "a batch is (inputs, labels), labels (batch,), or a mapping with `labels`",
        "wrap the loader",
    )


def _image(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point():
        return inputs
    raise RequestError(
        "only images can be corrupted", "the inputs are not (batch, channels, height, width)", "corruptions=()"
    )


def _logits(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
    return torch.cat([first_tensor(forward(model, x)).detach().cpu() for x in inputs])


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _two(pair: tuple[float, float]) -> tuple[str, str]:
    return f"{pair[0]:.2%}", f"{pair[1]:.2%}"
