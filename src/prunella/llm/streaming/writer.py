"""Complete a folder of shards: the last shard, index, configuration, tokenizer and card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prunella._version import __version__
from prunella.io.card import Card, write_card
from prunella.io.files import copy_file
from prunella.io.huggingface import COMPANIONS
from prunella.io.json import plain, read_config, write_json
from prunella.io.manifest import entry_of, listed, write_sealed
from prunella.io.origin import passed_on
from prunella.io.source_card import licence_files, read_source_card
from prunella.io.tensor_file import INDEX, open_tensors
from prunella.llm.blockwise import Solving
from prunella.llm.recipe import OneShot
from prunella.llm.streaming.progress import CONFIG, RECORD, WORK
from prunella.llm.streaming.runner import StreamingRun
from prunella.llm.streaming.shards import shard_name, write_shard
from prunella.registry.serialize import described

FORMAT = 2
"""Format of `run.json`; format 1 had no such number and did not list the files."""


@dataclass(frozen=True)
class Closed:
    """What is told of a finished folder: its card, and further entries of its record."""

    card: Card
    record: Mapping[str, Any] = field(default_factory=dict)


Close = Callable[[Path, Path, Card], Closed]
"""Judges a folder, given with the file of its configuration, and completes its card. It may write files there."""


def finish(
    run: StreamingRun,
    folder: Path,
    solving: Solving,
    seconds: float,
    calibration: Mapping[str, Any],
    close: Close | None = None,
) -> None:
    """Write the shard of the weights outside the blocks, then all files without weights, config.json last.

    calibration: the sources of the batches, for the record. close: called before the files are listed.
    """
    _copy_around(run, folder)
    _write_index(folder, len(run.paths) + 1)
    for pattern in COMPANIONS:
        for file in sorted(run.source.glob(pattern)):
            if file.is_file() and file.suffix != ".safetensors":
                copy_file(file, folder / file.name)
    for file in licence_files(run.source):
        copy_file(file, folder / file.name)
    config = passed_on(read_config(run.source / CONFIG).data)  # no code is copied, so none is named
    staged = write_json(folder / WORK / CONFIG, config, allow_nan=True)
    card = card_of(run, solving)
    closed = close(folder, staged, card) if close else Closed(card)
    write_card(folder, closed.card)
    record = {
        "format": FORMAT,
        "prunella": __version__,
        "source": run.source.name,
        "recipe": described(run.how),
        "sparsity": solving.sparsity,
        "layers": [asdict(fit) for fit in solving.fits],
        "refined": {path: list(pair) for path, pair in solving.refined.items()},
        **({"strengths": dict(solving.strengths)} if solving.strengths else {}),
        "calibration": {"batches": run.batches, "tokens": run.tokens, **calibration},
        "predicted_peak": run.peak.bytes,
        "seconds": seconds,
        **closed.record,
    }
    files = {**listed(folder, besides=(RECORD, CONFIG)), CONFIG: entry_of(staged)}
    write_sealed(folder / RECORD, {**plain(record), "files": files})
    copy_file(staged, folder / CONFIG)


def card_of(run: StreamingRun, solving: Solving) -> Card:
    """The model card of the folder."""
    method, pattern = in_words(run.how)
    return Card(
        base=run.source.name,
        kind=type(run.skeleton.model).__name__,
        method=method,
        pattern=pattern,
        sparsity=solving.sparsity,
        calibration=f"{run.batches} batches, {run.tokens} tokens",
        source=read_source_card(run.source),
    )


def in_words(how: OneShot) -> tuple[str, str]:
    """The method and the pattern of a recipe, for its card."""
    solver, pattern = described(how.method), described(how.pattern)
    score = solver["knobs"].get("score")
    named = str(score["name"]).rpartition(":")[2].strip("_") if isinstance(score, dict) else ""
    method = str(solver["name"]) + (f" of {named}" if named else "")
    knobs = ", ".join(f"{key}={value}" for key, value in pattern.items() if key != "kind")
    return method + (" and gradient steps for each block" if how.refine else ""), f"{pattern['kind']}({knobs})"


def _copy_around(run: StreamingRun, folder: Path) -> None:
    """Copy the weights outside the blocks; of tied tensors that the files hold twice, the first."""
    inside = tuple(f"{path}." for path in run.paths)
    stored, aliases, files = run.skeleton.stored, run.skeleton.aliases, run.skeleton.files
    first = {name: next(a for a in aliases.get(name, (name,)) if a in stored) for name in stored}
    outside = {name for name in stored if not name.startswith(inside) and first[name] == name}
    kept = {key: raw for key, raw in files.raw.items() if outside.issuperset(files.names[key])}
    write_shard(folder / shard_name(len(run.paths) + 1, len(run.paths) + 1), kept)


def _write_index(folder: Path, count: int) -> None:
    places: dict[str, str] = {}
    total = 0
    for number in range(1, count + 1):
        name = shard_name(number, count)
        for key, stored in open_tensors(folder / name).tensors.items():
            places[key], total = name, total + stored.size
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, content)
