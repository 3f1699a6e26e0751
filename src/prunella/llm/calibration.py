"""Calibration data of a language model: text that it writes itself, text files, or both with shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.io.identity import digest_of
from prunella.llm.own_text import OnWindows, OwnText, argument_of_tokens, own_text
from prunella.llm.text import text_samples
from prunella.measure.text import file_name
from prunella.model.unwrap import unwrap
from prunella.types import Inputs

AUTO: Final = "auto"
"""The source that is the model itself."""
Sources = Literal["auto"] | Mapping[str, float]
"""`"auto"`, or text files and `"auto"` with their shares."""


@dataclass(frozen=True)
class TextSource:
    """One source of the drawn windows: their number, and the digest of their tokens."""

    name: str
    share: float
    windows: int
    digest: str


@dataclass(frozen=True)
class Drawn:
    """Windows as batches of one, and their sources. own: the text that the model wrote, if it did."""

    batches: Sequence[Any]
    sources: tuple[TextSource, ...]
    own: OwnText | None = None


@dataclass(frozen=True)
class Calibration:
    """Calibration data of a language model: windows of text from one source or several, for `data=`.

    sources: `"auto"`, the text that the model writes itself (`own_text`), or a mapping from text files and `"auto"` to
    shares, which are relative: `{"auto": 1, "c4.txt": 1}` is half and half. nsamples, seqlen: windows of all sources
    together, and tokens in each. seed: of the text and of the places of the windows.
    on_windows: called while the model writes.
    """

    sources: Sources = AUTO
    nsamples: int = 128
    seqlen: int = 512
    seed: int = 0
    on_windows: OnWindows | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.nsamples < 1 or self.seqlen < 2:
            what = f"{self.nsamples} samples of {self.seqlen} tokens are not data"
            raise RequestError(what, "at least 1 of 2", "128 of 512")
        windows_of(self.shares, self.nsamples)

    @property
    def shares(self) -> dict[str, float]:
        """Source -> share, as they were given."""
        return {AUTO: 1.0} if self.sources == AUTO else dict(self.sources)

    @property
    def windows(self) -> dict[str, int]:
        """The number of windows of each source."""
        return windows_of(self.shares, self.nsamples)

    @property
    def writes(self) -> int:
        """The number of windows that the model writes itself."""
        return self.windows.get(AUTO, 0)

    def draw(
        self,
        model: nn.Module | None,
        *,
        folder: str | Path | None = None,
        inputs: Inputs | None = None,
        own: OwnText | None = None,
    ) -> Drawn:
        """The windows, shuffled by `seed`; a single file keeps the order of `text_samples`.

        model: writes its own text, unless `own` has it already. folder: of the tokenizer for text files; None is the
        folder that the model was read from. inputs: an example batch, None is `{"input_ids": tokens}`.
        Errors: those of `own_text` and `text_samples`.
        """
        rows: dict[str, list[Tensor]] = {}
        for name, count in self.windows.items():
            if name == AUTO:
                own = own or self._own(model, count, inputs)
                rows[name] = list(own.tokens[:, None])
            else:
                where = _folder(model, folder)
                samples = text_samples(where, name, nsamples=count, seqlen=self.seqlen, seed=self.seed)
                rows[name] = [batch["input_ids"] for batch in samples]
        mixed = [row for some in rows.values() for row in some]
        if len(rows) > 1:
            order = torch.randperm(
                len(mixed), generator=torch.Generator().manual_seed(self.seed), device="cpu"
            ).tolist()
            mixed = [mixed[k] for k in order]
        sources = tuple(
            TextSource(file_name(name), self.shares[name], len(some), digest_of(torch.cat(some)))
            for name, some in rows.items()
        )
        return Drawn([_batch(inputs, row) for row in mixed], sources, own)

    def _own(self, model: nn.Module | None, count: int, inputs: Inputs | None) -> OwnText:
        if model is None:
            raise RequestError("there is no model that could write its own text", "", "give the model, or a text")
        return own_text(
            model, nsamples=count, seqlen=self.seqlen, seed=self.seed, inputs=inputs, on_windows=self.on_windows
        )

    def __str__(self) -> str:
        parts = self.windows.items()
        named = ", ".join(
            f"{count} {'by the model itself' if name == AUTO else f'of {file_name(name)}'}" for name, count in parts
        )
        return f"windows of {self.seqlen} tokens: {named} (seed {self.seed})"


@dataclass(frozen=True)
class Split:
    """Calibration data with held-out batches, for `data=`.

    data: the data for the fit: batches, or any other value of `data=`. held_out: batches of another source; they limit
    the change of each block's weights to the fraction that also reduces their error.
    """

    data: Any = AUTO
    held_out: Iterable[Any] = ()


def split(data: object) -> Split:
    """The batches to fit and those held out; none are held out unless a `Split` names them."""
    return data if isinstance(data, Split) else Split(data)


def windows_of(shares: Mapping[str, float], nsamples: int) -> dict[str, int]:
    """How many of `nsamples` windows each source gives: in proportion to its share, the rest to the largest remainders.

    Errors: RequestError for a share that is not positive, or too small for a single window.
    """
    for name, share in shares.items():
        if not 0 < share < math.inf:
            raise RequestError(f"the share {share:g} of {name} is out of range", "shares are positive", "leave it out")
    if not shares:
        raise RequestError("there is no calibration data", "the mapping of sources is empty", 'give "auto"')
    total = sum(shares.values())
    exact = {name: nsamples * share / total for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    largest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in largest[: nsamples - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if not count]
    if empty:
        why = f"{nsamples} windows in shares of {', '.join(f'{share:g}' for share in shares.values())}"
        raise RequestError(f"{empty[0]} would give no window", why, "pass more windows by nsamples=")
    return counts


def calibrated(model: nn.Module, inputs: Inputs, data: object) -> Sequence[Any] | None:
    """The batches of `data` if it is a calibration, `"auto"` or a mapping of sources; None if it is batches."""
    calibration = as_calibration(data)
    return None if calibration is None else calibration.draw(model, inputs=inputs).batches


def as_calibration(data: object) -> Calibration | None:
    """`"auto"` and a mapping of sources as a calibration, None for batches. Errors: RequestError for another text."""
    if isinstance(data, Calibration):
        return data
    if isinstance(data, str):
        if data != AUTO:
            raise RequestError(f"data={data!r} is not data", 'it is "auto", a mapping or batches', f"{{{data!r}: 1}}")
        return Calibration()
    if isinstance(data, Mapping):
        return Calibration(data)
    return None


def _folder(model: nn.Module | None, folder: str | Path | None) -> Path:
    """The folder of the tokenizer: the one given, or the one that the model was read from."""
    config: Any = None if model is None else getattr(unwrap(model), "config", None)
    named = folder or getattr(config, "_name_or_path", "")
    if not named or not Path(named).is_dir():
        why = "the model does not name the folder of its tokenizer"
        raise RequestError("a text file cannot become tokens", why, 'give batches of tokens, or data="auto"')
    return Path(named)


def _batch(inputs: Inputs | None, row: Tensor) -> Any:
    """One row of tokens as the example batch has them: under its name, or as the only argument."""
    name = argument_of_tokens(inputs)
    return row if name is None else {name: row}
