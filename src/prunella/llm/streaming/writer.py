"""Complete a folder of shards: the last shard, index, configuration, tokenizer and card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunella._version import __version__
from prunella.io.card import Card, write_card
from prunella.io.files import copy_file
from prunella.io.huggingface import COMPANIONS
from prunella.io.json import plain, read_config, write_json
from prunella.io.manifest import entry_of, listed, write_sealed
from prunella.io.origin import passed_on
from prunella.io.tensor_file import INDEX, open_tensors
from prunella.llm.blockwise import Solving
from prunella.llm.streaming.progress import CONFIG, RECORD, WORK
from prunella.llm.streaming.runner import StreamingRun
from prunella.llm.streaming.shards import shard_name, write_shard
from prunella.registry.serialize import described

FORMAT = 2
"""Format of `run.json`; format 1 had no such number and did not list the files."""


def finish(run: StreamingRun, folder: Path, solving: Solving, seconds: float, calibration: Mapping[str, Any]) -> None:
    """Write the shard of the weights outside the blocks, then all files without weights, config.json last.

    calibration: the sources of the batches, for the record.
    """
    _copy_around(run, folder)
    _write_index(folder, len(run.paths) + 1)
    for pattern in COMPANIONS:
        for file in sorted(run.source.glob(pattern)):
            if file.is_file() and file.suffix != ".safetensors":
                copy_file(file, folder / file.name)
    write_card(folder, card_of(run, solving))
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
    }
    config = passed_on(read_config(run.source / CONFIG).data)  # no code is copied, so none is named
    write_card(folder, card_of(run, solving))
    staged = write_json(folder / WORK / CONFIG, config, allow_nan=True)
    files = {**listed(folder, besides=(RECORD, CONFIG)), CONFIG: entry_of(staged)}
    write_sealed(folder / RECORD, {**plain(record), "files": files})
    copy_file(staged, folder / CONFIG)


def card_of(run: StreamingRun, solving: Solving) -> Card:
    """The model card of the folder."""
    method = described(run.how.method)["name"]
    pattern = described(run.how.pattern)
    kind = {key: value for key, value in pattern.items() if key != "kind"}
    knobs = ", ".join(f"{key}={value}" for key, value in kind.items())
    return Card(
        base=run.source.name,
        kind=type(run.skeleton.model).__name__,
        method=method + (" and gradient steps for each block" if run.how.refine else ""),
        pattern=f"{pattern['kind']}({knobs})",
        sparsity=solving.sparsity,
        calibration=f"{run.batches} batches, {run.tokens} tokens",
    )


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
