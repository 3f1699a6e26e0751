"""What makes a folder of shards a model: index, configuration, tokenizer, card; written when all shards are there."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from prunella._version import __version__
from prunella.io.card import Card, write_card
from prunella.io.files import writing
from prunella.io.huggingface import COMPANIONS
from prunella.io.json import plain, read_config, write_json
from prunella.llm.one_shot import Solving
from prunella.llm.streaming.journal import described
from prunella.llm.streaming.runner import Prepared
from prunella.llm.streaming.shards import INDEX, read_header, shard_name, write_shard

RECORD, CONFIG = "run.json", "config.json"


def finish(job: Prepared, folder: Path, solving: Solving, seconds: float) -> None:
    """Write the shard of what is outside the blocks, then all that is no weight, config.json last."""
    _around(job, folder)
    _index(folder, len(job.paths) + 1)
    for pattern in COMPANIONS:
        for file in sorted(job.source.glob(pattern)):
            if file.is_file() and file.suffix != ".safetensors":
                with writing(folder / file.name):
                    shutil.copyfile(file, folder / file.name)
    record = {
        "prunella": __version__,
        "source": job.source.name,
        "recipe": described(job.how),
        "sparsity": solving.sparsity,
        "layers": [asdict(fit) for fit in solving.fits],
        "refined": {path: list(pair) for path, pair in solving.refined.items()},
        "calibration": {"batches": job.batches, "tokens": job.tokens},
        "predicted_peak": job.peak.bytes,
        "seconds": seconds,
    }
    write_json(folder / RECORD, plain(record))
    config = dict(read_config(job.source / CONFIG).data)
    config.pop("auto_map", None)  # code that a folder brings is not carried on
    write_card(folder, card_of(job, solving))
    write_json(folder / CONFIG, config, allow_nan=True)


def card_of(job: Prepared, solving: Solving) -> Card:
    """What the README of the folder says."""
    method = described(job.how.method)["name"]
    pattern = described(job.how.pattern)
    kind = {key: value for key, value in pattern.items() if key != "kind"}
    knobs = ", ".join(f"{key}={value}" for key, value in kind.items())
    return Card(
        base=job.source.name,
        kind=type(job.skeleton.model).__name__,
        method=method + (" and gradient steps for each block" if job.how.refine else ""),
        pattern=f"{pattern['kind']}({knobs})",
        sparsity=solving.sparsity,
        calibration=f"{job.batches} batches, {job.tokens} tokens",
    )


def _around(job: Prepared, folder: Path) -> None:
    """Copy what is outside the blocks; of tied tensors that the files hold twice, the first."""
    inside = tuple(f"{path}." for path in job.paths)
    stored, aliases, files = job.skeleton.stored, job.skeleton.aliases, job.skeleton.files
    first = {name: next(a for a in aliases.get(name, (name,)) if a in stored) for name in stored}
    rest = {name for name in stored if not name.startswith(inside) and first[name] == name}
    kept = {key: found for key, found in files.raw.items() if rest.issuperset(files.names[key])}
    write_shard(folder / shard_name(len(job.paths) + 1, len(job.paths) + 1), kept)


def _index(folder: Path, count: int) -> None:
    places: dict[str, str] = {}
    total = 0
    for number in range(1, count + 1):
        name = shard_name(number, count)
        for key, found in read_header(folder / name).items():
            places[key], total = name, total + found.size
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, content)
