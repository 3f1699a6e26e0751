"""The calibration text of a run on a folder: drawn once, stored with the result, and read again after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prunella.errors import BadInput, PruningError, RequestError
from prunella.io.files import write_atomic
from prunella.io.json import Fields, read_config, read_object, write_json
from prunella.io.load import load_model
from prunella.io.tensor_file import read_folder
from prunella.llm.calibration import Calibration, Drawn
from prunella.llm.distributed import ProcessGroup
from prunella.llm.own_text import OwnText
from prunella.llm.streaming.memory import resident
from prunella.llm.streaming.progress import WORK, folder_beside
from prunella.llm.text import tokenizer_of
from prunella.measure.text import byte_size
from prunella.model.device import CPU, placed_if_they_fit

FORMAT = 1
TOKENS, TEXT = "calibration.json", "calibration.txt"
"""Files of the model's own text: tokens, losses and seed of each window, and the same as readable text."""


def drawn_for(
    calibration: Calibration,
    source: Path,
    output: Path,
    *,
    budget: int | None,
    group: ProcessGroup,
    device: torch.device = CPU,
) -> Drawn:
    """The windows of a run, the same in all processes: the first one draws them and sends them to the others.

    The model is read whole to write its own text, unless an unfinished run in `output` has that text already.
    Errors, in all processes: those of `Calibration.draw`; RequestError if the model is larger than the budget.
    """
    if not group.is_main:
        return _received()
    try:
        drawn = _drawn(calibration, source, output, budget, device)
    except PruningError as error:
        _send([error.what, error.why, error.todo], group)
        raise
    _send(drawn, group)
    return drawn


def placeholder(calibration: Calibration, source: Path) -> Drawn:
    """Windows of the same sizes for a forecast, with arbitrary tokens in place of the model's own text."""
    words = max(1, int(read_config(source / "config.json").integer("vocab_size", low=1, default=1)))
    tokens = torch.arange(calibration.writes * calibration.seqlen, device="cpu").remainder(words)
    tokens = tokens.view(calibration.writes, calibration.seqlen)
    own = OwnText(tokens, (0.0,) * len(tokens), calibration.seed, 0)
    return calibration.draw(None, folder=source, own=own)


def write_texts(folder: Path, calibration: Calibration, drawn: Drawn, source: Path) -> None:
    """Store the model's own text with the result: as tokens, and as text if `source` has a tokenizer."""
    if drawn.own is None:
        return
    own = drawn.own
    windows = [
        {"loss": loss, "tokens": " ".join(map(str, row))}
        for loss, row in zip(own.losses, own.tokens.tolist(), strict=True)
    ]
    content = {"seed": own.seed, "discarded": own.discarded, "digest": own.digest, "windows": windows}
    write_json(folder / TOKENS, {"format": FORMAT, "request": _request(calibration), **content})
    try:
        tokenizer = tokenizer_of(source)
    except BadInput:
        return
    texts = [
        f"--- window {k}, {loss:.3f} nats a token\n{tokenizer.decode(row)}\n"
        for k, (loss, row) in enumerate(zip(own.losses, own.tokens.tolist(), strict=True), 1)
    ]
    write_atomic(folder / TEXT, "\n".join(texts).encode("utf-8", "replace"))


def recorded(drawn: Drawn | None) -> dict[str, Any]:
    """The calibration in the record of the run: the sources, and the settings of the model's own text."""
    if drawn is None:
        return {}
    own = drawn.own
    written = {} if own is None else {"own": {"seed": own.seed, "digest": own.digest, "discarded": own.discarded}}
    return {"sources": [asdict(source) for source in drawn.sources], **written}


def _drawn(calibration: Calibration, source: Path, output: Path, budget: int | None, device: torch.device) -> Drawn:
    own = _kept(output, calibration) if calibration.writes else None
    if not calibration.writes or own is not None:
        return calibration.draw(None, folder=source, own=own)
    size = sum(stored.size for stored in read_folder(source).values()) + resident()
    if budget is not None and size > budget:
        what = f"{byte_size(budget)} of memory are not enough for the model to write its own text"
        raise RequestError(
            what, f"it is read whole for that, {byte_size(size)}", "pass a text file by data=, or more memory"
        )
    model = load_model(str(source))
    placed_if_they_fit([model], device)
    return calibration.draw(model, folder=source)


def _kept(output: Path, calibration: Calibration) -> OwnText | None:
    """The model's own text for this request from an unfinished run; the journal of the run identifies the model."""
    for folder in (output, folder_beside(output)):
        if (folder / WORK).is_dir() and (folder / TOKENS).is_file():
            stored = read_object(folder / TOKENS, todo=f"remove {folder} to start again")
            if stored.integer("format") == FORMAT and stored.mapping("request") == _request(calibration):
                return _own(stored, folder / TOKENS)
    return None


def _own(stored: Fields, file: Path) -> OwnText:
    windows = [window.fields() for window in stored.list_of("windows")]
    try:
        rows = [[int(token) for token in window.text("tokens").split()] for window in windows]
        tokens = torch.tensor(rows, device="cpu")
    except ValueError as error:
        raise BadInput(f"{file} is damaged", str(error), stored.todo) from error
    own = OwnText(
        tokens,
        tuple(window.number("loss") for window in windows),
        stored.integer("seed"),
        stored.integer("discarded"),
    )
    if own.digest != stored.text("digest"):
        raise BadInput(f"{file} is damaged", "it does not have the recorded digest", stored.todo)
    return own


def _request(calibration: Calibration) -> Mapping[str, Any]:
    """The settings that determine the model's own text; text files are read again and do not count."""
    return {"windows": calibration.writes, "seqlen": calibration.seqlen, "seed": calibration.seed}


def _send(message: object, group: ProcessGroup) -> None:
    """Send a message to the other processes."""
    if group.world_size > 1:
        dist.broadcast_object_list([message], src=0)


def _received() -> Drawn:
    told: list[Any] = [None]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], Drawn):
        return told[0]
    raise RequestError(*told[0])
