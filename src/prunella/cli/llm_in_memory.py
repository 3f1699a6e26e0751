"""`prunella llm` with the models in memory: units that are cut out, and masks that are recovered."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunella.cli.console import emit, note, stage
from prunella.cli.device import moved, placed
from prunella.cli.llm_request import LLMRequest, folder_of, llm_recipe, source_of, teller
from prunella.cli.texts import calibration_of, named, not_fitted, shared_source

if TYPE_CHECKING:
    from prunella.app.job import Job
    from prunella.app.language_job import LanguageModel
    from prunella.llm.calibration import Split

_TARGET = "params=0.8"
"""Of structure, where `--target` names none."""
_STEPS = 200
"""Of training, where `--recover` names none."""


def in_memory(request: LLMRequest, output: Path, *, dry_run: bool, overwrite: bool, as_json: bool) -> None:
    """Structure, and masks that are recovered."""
    from prunella.app.run import run, summary
    from prunella.app.stages import clean_finished
    from prunella.cli.run import run_text
    from prunella.io.load import load_model
    from prunella.io.space import check_output_folder
    from prunella.llm.calibration import Split

    folder, data = folder_of(request.model), calibration_of(request.text)
    if not dry_run:
        clean_finished(output)
        check_output_folder(output, request.model, overwrite=overwrite)
    _check(request)
    note(named(data, request.text))
    with stage(f"loading {request.model}"):
        model = placed(load_model(str(folder)))
    batches = data if isinstance(data, list) else moved(list(data.draw(model, folder=folder).batches))
    inputs = _example(batches)
    source = source_of(request, folder, data, model)
    split = Split(batches, not_fitted(folder, request.text))
    job = (
        _structured(request, source, model, batches)
        if request.structure.granularity
        else _masked(request, source, split)
    )
    cost = _cost(request, job, model, batches)
    note(f"predicted: {cost}")
    if dry_run:
        emit(asdict(cost), str(cost), as_json=as_json)
        return
    outcome = run(model, inputs, job, output, overwrite=overwrite, stage=stage)
    result = summary(outcome, job)
    emit(result, run_text(result, output), as_json=as_json)


def _check(request: LLMRequest) -> None:
    """Before any work: what the words ask for goes together. Errors: RequestError."""
    from prunella.app.language_job import structural_recipe
    from prunella.cli.parse import asked_target, build_recipe, units_of
    from prunella.errors import RequestError

    structure = request.structure
    names = request.units
    _steps(structure.recover or "")
    if not names:
        return
    if "vocabulary" in names and len(names) > 1:
        raise RequestError("vocabulary goes alone", "a text chooses its tokens", "prune the rest after it")
    if "vocabulary" in names and (structure.target or structure.recover not in (None, "none")):
        why = "the text decides which tokens stay, and for these the model is as it was"
        raise RequestError("vocabulary takes no --target and no --recover", why, "leave them out")
    if "vocabulary" not in names:
        structural_recipe([units_of(name) for name in names])
        asked_target(structure.target or _TARGET)
    if request.zeros.recipe is not None:
        build_recipe(request.zeros.recipe)


def _example(batches: list[Any]) -> dict[str, Any]:
    """The beginning of the first batch. Errors: RequestError unless batches are tokens by name."""
    from collections.abc import Mapping

    from torch import Tensor

    from prunella.errors import RequestError

    first = batches[0] if batches else None
    if (
        not isinstance(first, Mapping)
        or not isinstance(first.get("input_ids"), Tensor)
        or first["input_ids"].dim() != 2
    ):
        why = f"its first batch is a {type(first).__name__}" if batches else "it gave no batches"
        raise RequestError("--data gives no batches of tokens", why, "return mappings such as {'input_ids': tokens}")
    return {name: value[:1, :32] for name, value in first.items() if isinstance(value, Tensor) and value.dim() == 2}


def _cost(request: LLMRequest, job: Job, model: Any, batches: list[Any]) -> Any:
    """What the job will take. Errors: RequestError if that is more than the memory."""
    from prunella.app.language_cost import predicted_cost
    from prunella.errors import RequestError
    from prunella.llm.streaming.memory import parse_bytes
    from prunella.measure.text import byte_size

    with stage("timing one pass"):
        cost = predicted_cost(model, batches, job.recovery.steps, request.judging.eval_samples)
    if request.memory is not None and cost.bytes > parse_bytes(request.memory):
        what = f"{byte_size(parse_bytes(request.memory))} of memory are not enough"
        raise RequestError(what, f"the job takes {cost}", "give more, or prune by --sparsity, one block at a time")
    return cost


def _structured(request: LLMRequest, source: LanguageModel, model: Any, batches: list[Any]) -> Job:
    from prunella.app.job import Recovery, RecoveryStep
    from prunella.app.language_job import structural_recipe, structured_job, usual_recovery
    from prunella.cli.parse import asked_target, build_recipe
    from prunella.granularity import Vocabulary

    structure, zeros = request.structure, request.zeros
    units = _units(request, source, model)
    tokens = any(isinstance(unit, Vocabulary) for unit in units)
    recipe = structural_recipe(units)
    if zeros.recipe is not None:
        recipe = replace(build_recipe(zeros.recipe), granularity=units, equal_widths=recipe.equal_widths)
    target = None if tokens else asked_target(structure.target or _TARGET)
    steps = usual_recovery(units) if structure.recover is None else _steps(structure.recover)
    if zeros.bits is not None:
        steps = (*steps, RecoveryStep("quantize", zeros.bits))
    recovery = Recovery(steps, lr=structure.lr)
    return structured_job(
        source, units, recipe, target, batches, recovery, skip=tuple(zeros.skip or ()), seed=request.text.seed
    )


def _units(request: LLMRequest, source: LanguageModel, model: Any) -> Any:
    from prunella.app.language_job import tokens_in
    from prunella.cli.parse import units_of
    from prunella.llm.calibration import AUTO

    files = [name for name in (shared_source(word)[0] for word in request.text.data or ()) if name != AUTO]
    return tuple(
        tokens_in(source.folder, files, model)
        if name == "vocabulary" else units_of(name) for name in request.units
    )  # fmt: skip


def _masked(request: LLMRequest, source: LanguageModel, split: Split) -> Job:
    from prunella.app.job import Recovery, RecoveryStep
    from prunella.app.language_job import masked_job
    from prunella.errors import RequestError

    zeros, structure = request.zeros, request.structure
    steps = _steps(structure.recover or "")
    if any(step.kind == "match" for step in steps):
        why = "it refits what reads a stream that was cut, and masks cut nothing"
        raise RequestError("--recover match is for --granularity", why, "recover masks by lora or distill")
    recipe = llm_recipe(zeros.recipe, zeros.pattern, zeros.sparsity)
    if zeros.bits is not None:
        steps = (*steps, RecoveryStep("quantize", zeros.bits))
    return masked_job(
        source, recipe, split, Recovery(steps, lr=structure.lr), skip=tuple(zeros.skip or ()),
        seed=request.text.seed, on_block=teller(),
    )  # fmt: skip


def _steps(text: str) -> Any:
    """The steps of recovery; those that train have a number of steps without being asked for one."""
    from prunella.app.job import TRAINED, read_steps

    words = [word.strip() for word in text.split(",") if word.strip() not in ("", "none")]
    return read_steps(",".join(f"{word}:{_STEPS}" if word in TRAINED else word for word in words))
