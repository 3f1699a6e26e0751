"""The verb that prunes a language model: a folder of Hugging Face in, a folder out, and both models judged on text.

Masks are solved block by block, with one block in memory. Structure, and masks that are recovered, are jobs for
`app.run`, with the models in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage
from prunella.cli.device import CPU, chosen
from prunella.cli.llm_in_memory import in_memory
from prunella.cli.llm_request import LLMRequest, Structure, Zeros, folder_of, llm_recipe, source_of, teller
from prunella.cli.texts import Judging, Text, calibration_of, named, not_fitted, shared_source

if TYPE_CHECKING:
    from prunella.llm import OneShot
    from prunella.llm.streaming import Forecast, Streamed


def llm(
    model: options.LLMModel,
    zeros: Zeros,
    structure: Structure,
    source: Text,
    judging: Judging,
    memory: Annotated[str | None, typer.Option(metavar="4GB", help="Most memory of the process.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory and time, and write nothing.")] = False,
    output: options.Output = Path("pruned"),
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Prune a language model: masks, 2:4 or blocks in one shot, or depth, heads, neurons, width, experts, tokens.

    Ends with perplexity, agreement, a sample of text and tokens a second of both models, report.html and a model card.
    The same command resumes a killed run.
    """
    from prunella.io.space import check_apart, check_folder_of_weights

    request = LLMRequest(model, zeros, structure, source, judging, memory)
    request.check()
    if not dry_run:
        sources = (shared_source(word)[0] for word in source.data or ())
        check_apart(output, model, source.held_out, judging.text, *sources)
        check_folder_of_weights(output)
    if request.in_memory:
        in_memory(request, output, dry_run=dry_run, overwrite=overwrite, as_json=as_json)
    elif dry_run:
        _forecast(request, as_json=as_json)
    else:
        _by_blocks(request, output, overwrite=overwrite, as_json=as_json)


def _by_blocks(request: LLMRequest, output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Masks, with one block in memory."""
    from prunella.app.language_job import FolderEnd
    from prunella.io.files import clean_up_after_kill
    from prunella.llm.calibration import Split
    from prunella.llm.streaming.folder import solve_and_close
    from prunella.llm.streaming.progress import check_output

    _check_one_process()
    with _joined() as speaks:
        folder, recipe, data = _read(request)
        if speaks:
            note(f"{named(data, request.text)}; the same command resumes a killed run")
            clean_up_after_kill(output)
        check_output(output, overwrite=overwrite)
        end = _end(request, folder, data) if speaks and _alone() else None
        if end is not None:
            _tell_forecast(request, folder, recipe, data)
        streamed = solve_and_close(
            folder, output, recipe, data=Split(data, not_fitted(folder, request.text)), memory=request.memory,
            skip=tuple(request.zeros.skip or ()), overwrite=overwrite,
            on_block=teller() if speaks else None, close=end.close if isinstance(end, FolderEnd) else None,
            device=chosen(),
        )  # fmt: skip
    if speaks:
        _say(streamed, end.judged.record if end and end.judged else {}, as_json=as_json)


def _end(request: LLMRequest, folder: Path, data: Any) -> Any:
    """Both models on text at the end, if they fit into the memory together."""
    from prunella.app.language_job import FolderEnd
    from prunella.io.tensor_file import read_folder
    from prunella.llm.streaming.memory import parse_bytes, resident
    from prunella.measure.text import byte_size

    if request.judging.eval_samples < 1:
        return None
    needed = resident() + 2 * sum(stored.size for stored in read_folder(folder).values())
    if request.memory is not None and needed > parse_bytes(request.memory):
        note(f"both models together take {byte_size(needed)}, so nothing is judged at the end: use `prunella eval`")
        return None
    return FolderEnd(source_of(request, folder, data), chosen())


def _tell_forecast(request: LLMRequest, folder: Path, recipe: OneShot, data: Any) -> None:
    """One line with what the run will take."""
    with stage("trying the first block on two batches"):
        expected = _expected(request, folder, recipe, data)
    note("; ".join(str(expected).splitlines()))


def _expected(request: LLMRequest, folder: Path, recipe: OneShot, data: Any) -> Forecast:
    from prunella.llm.streaming import forecast

    skip = tuple(request.zeros.skip or ())
    return forecast(folder, recipe, data=data, memory=request.memory, skip=skip, device=chosen())


def _forecast(request: LLMRequest, *, as_json: bool) -> None:
    """Print what a run would take."""
    folder, recipe, data = _read(request)
    if not any(folder.glob("*.safetensors")):
        return _forecast_scaling(request, folder, recipe, data, as_json=as_json)
    with stage("trying the first block on two batches"):
        expected = _expected(request, folder, recipe, data)
    peak = {**expected.peak.parts, "together": expected.peak.bytes}
    there = None if expected.there is None else {**expected.there.parts, "together": expected.there.bytes}
    result = {**asdict(expected), "peak": peak, "there": there, "stream_on_disk": expected.peak.on_disk}
    emit(result, str(expected), as_json=as_json)


def _forecast_scaling(request: LLMRequest, folder: Path, recipe: OneShot, data: Any, *, as_json: bool) -> None:
    """Print what runs of 1 to 64 processes would take, from the configuration of a folder without weights."""
    from prunella.llm.streaming import forecast_scaling

    with stage("tracing the blocks without weights"):
        skip = tuple(request.zeros.skip or ())
        expected = forecast_scaling(folder, recipe, data=data, memory=request.memory, skip=skip, device=chosen())
    peaks = [{**row.peak.parts, "together": row.peak.bytes} for row in expected.rows]
    rows = [{**asdict(row), "peak": peak, "moved": row.moved} for row, peak in zip(expected.rows, peaks, strict=True)]
    emit({**asdict(expected), "rows": rows}, str(expected), as_json=as_json)


def _say(done: Streamed, judged: Any, *, as_json: bool) -> None:
    from prunella.app.language_job import JUDGED
    from prunella.llm.streaming.gguf import gguf_obstacle

    obstacle = gguf_obstacle(done.path)
    gguf = f"not for converters to GGUF: {obstacle}" if obstacle else "its shapes and files suit converters to GGUF"
    page = judged.get("missing") or f"look at {done.path / 'report.html'}"
    said = [judged["told"], f"{page}; its model card is README.md"] if judged else []
    text = "\n\n".join([f"{done}\nread it with from_pretrained; {gguf}", *said])
    result = {
        "folder": str(done.path), "sparsity": done.solving.sparsity, "seconds": done.seconds,
        "replayed": done.replayed, "predicted_bytes": done.peak.bytes, "most_bytes": done.most,
        "reader": "from_pretrained", "gguf_obstacle": obstacle, "layers": [asdict(fit) for fit in done.solving.fits],
        JUDGED: judged.get(JUDGED),
    }  # fmt: skip
    emit(result, text, as_json=as_json)


def _alone() -> bool:
    """Whether there is one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def _check_one_process() -> None:
    """Errors: NotSupported for several processes on an accelerator."""
    from prunella.errors import NotSupported

    if chosen() != CPU and not _alone():
        why = "their sums go over the memory of the CPU"
        todo = "leave --device out, or run one process"
        raise NotSupported(f"several processes do not prune block by block on {chosen()}", why, todo)


@contextmanager
def _joined() -> Iterator[bool]:
    """Join the other processes under torchrun; yields whether this process prints."""
    if _alone():
        yield True
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _read(request: LLMRequest) -> tuple[Path, OneShot, Any]:
    """The folder, the recipe, and the batches or the texts from which they are drawn."""
    zeros = request.zeros
    recipe = llm_recipe(zeros.recipe, zeros.pattern, zeros.sparsity, bits=zeros.bits)
    return folder_of(request.model), recipe, calibration_of(request.text)
