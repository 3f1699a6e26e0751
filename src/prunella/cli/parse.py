"""Objects of the library from the text of a command line."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from prunella.cli import options
from prunella.cli.console import note, stage
from prunella.cli.device import moved, moved_batches, placed
from prunella.errors import BadInput, RequestError
from prunella.graph.program.capture import as_program
from prunella.io.artifact import PLAN, load
from prunella.io.examples import check_forward, example_inputs
from prunella.io.files import MARKER, write_atomic
from prunella.io.kind_of_path import described_path, is_plan
from prunella.io.load import load_model, load_object
from prunella.io.manifest import read_manifest
from prunella.io.plan_file import load_plan
from prunella.io.space import check_apart, check_output_file, check_room_for_journal
from prunella.io.temporary import check_name
from prunella.model.user_code import as_user_function, call_user
from prunella.planning.by_hand import ByHand
from prunella.planning.loadable import Loadable
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.registry import catalogue
from prunella.targets import Target, Threshold, parse_target
from prunella.types import Examples, Inputs, Loss

_NO_BUDGET = options.Budget()
LLM_RECIPES = ("one_shot", "admm", "alps", "sparsegpt")
"""Recipes of `prunella llm` that are neither a recipe nor a criterion of the catalogue."""


def open_model(
    spec: str,
    shapes: Sequence[str] | None = None,
    *,
    weights: str | None = None,
    weights_key: str = "",
    allow_pickle: bool = False,
    factory: str | None = None,
    seed: int = 0,
    program: bool = False,
) -> tuple[nn.Module, Inputs]:
    """The model, or the model of a run's folder, and an example that it accepts; as a program if requested."""
    folder = Path(spec)
    if (folder / MARKER).is_file() and weights is None:
        with stage(f"loading {spec}"):
            model, example = _open_artifact(folder, shapes, factory=factory, seed=seed)
    else:
        model, example = open_dense(
            spec, shapes, None, weights=weights, weights_key=weights_key, allow_pickle=allow_pickle, seed=seed
        )
    if program:
        with stage("capturing the program"):
            model = as_program(model, example)
    return model, example


def open_source(
    source: options.SourceOptions, *, factory: str | None = None, seed: int = 0, program: bool = False
) -> tuple[nn.Module, Inputs]:
    """`open_model` with the options of the command line."""
    return open_model(
        source.model, source.inputs, weights=source.weights, weights_key=source.weights_key,
        allow_pickle=source.allow_pickle, factory=factory, seed=seed, program=program,
    )  # fmt: skip


def with_others(
    network: nn.Module, spec: str, example: Inputs, shapes: Sequence[str] | None, *, seed: int = 0
) -> Inputs | Examples:
    """The example, with a further one for each of `shapes`; the model accepts all of them."""
    texts = enumerate(shapes or (), start=1)
    others = [moved(example_inputs(network, spec, [text], seed=seed + k)) for k, text in texts]
    for other in others:
        check_forward(network, other)
    return Examples(example, *others) if others else example


def open_dense(
    spec: str,
    shapes: Sequence[str] | None,
    example: Inputs | None,
    *,
    weights: str | None = None,
    weights_key: str = "",
    allow_pickle: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """The model, and an example: of the given shapes, or `example`, or by the model's own description."""
    with stage(f"loading {spec}"):
        model = placed(load_model(spec, weights=weights, key=weights_key, allow_pickle=allow_pickle, tell=note))
        if shapes or example is None:
            example = example_inputs(model, spec, shapes, seed=seed)
        example = moved(example)
        check_forward(model, example)
    if weights is None and spec.startswith(("timm:", "torchvision:")):
        note(f"the weights of {spec} are random: give --weights FILE, or --weights pretrained to fetch them")
    return model, example


def _open_artifact(
    folder: Path, shapes: Sequence[str] | None, *, factory: str | None, seed: int
) -> tuple[nn.Module, Inputs]:
    origin = read_manifest(folder).mapping("origin")
    if factory is None and origin.get("kind") in ("factory", "unknown"):
        why = f"it was made with {origin.get('name', 'a function')}; code named by a file is never imported"
        raise RequestError(f"{folder} needs what made its dense model", why, "give --factory module:function")
    model = placed(load(folder, factory=factory))
    kept = load_plan(folder / PLAN).inputs if (folder / PLAN).is_file() else None
    example = moved(example_inputs(model, str(folder), shapes, seed=seed) if shapes or kept is None else kept)
    check_forward(model, example)
    return model, example


def factory_of(spec: str) -> str | None:
    """The factory for `save` and `load`: MODEL itself, unless it is a file or a folder."""
    return None if Path(spec).exists() or ":" not in spec else spec


def check_new_file(
    file: Path | None, source: options.SourceOptions, *others: str | None, overwrite: bool = False
) -> None:
    """Check, before any work, that the file is writable, is not an input, and is not overwritten by accident."""
    if file is not None:
        check_name(file)
        _check_unused(file, overwrite=overwrite)
        check_output_file(file, source.model, source.weights, *others)


def check_new_plan(file: Path | None, source: options.SourceOptions, *others: str | None) -> None:
    """`check_new_file` for a plan, which replaces a plan and nothing else."""
    if file is not None:
        check_name(file)
    if file is not None and file.is_file() and not is_plan(file):
        what = f"{file} exists, and is not a plan"
        raise RequestError(what, f"{described_path(file)}, and only a plan is replaced", "choose another name")
    check_new_file(file, source, *others, overwrite=True)


def check_tables(*files: Path | None, sources: Sequence[str | Path | None], overwrite: bool) -> None:
    """Before any work: the files beside a result can be written, each once, and replace nothing unasked.

    sources: what is read, which they never are.
    """
    wanted = [file for file in files if file is not None]
    for number, file in enumerate(wanted):
        check_name(file)
        _check_unused(file, overwrite=overwrite)
        check_output_file(file, *sources)
        if any(os.path.realpath(file) == os.path.realpath(other) for other in wanted[:number]):
            raise RequestError(f"{file} is asked for twice", "one result would replace the other", "name two files")


def _check_unused(file: Path, *, overwrite: bool) -> None:
    if file.exists() and not file.is_dir() and not overwrite:
        raise RequestError(f"{file} exists", "existing files are kept", "choose another name, or give --overwrite")


def write_tables(files: Mapping[Path | None, Callable[[], str | bytes]]) -> None:
    """Write each requested file, and log it."""
    for file, make in files.items():
        if file is not None:
            content = make()
            note(f"wrote {write_atomic(file, content.encode() if isinstance(content, str) else content)}")


def check_journal_folder(folder: Path | None, source: options.SourceOptions) -> None:
    """Check, before any work, that a journal can be written in the folder, and that it is not an input."""
    if folder is not None:
        check_apart(folder, source.model, source.weights)
        check_room_for_journal(folder)


def read_ratios(text: str) -> tuple[float, ...]:
    """`0.25,0.5`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"cannot read the ratios {text!r}", "numbers, comma-separated, are needed", "for example 0.25,0.5"
        ) from None


def read_target(budget: options.Budget) -> Target | None:
    """The target of `--target` or `--threshold`. Without either it is None, which only N:M accepts; `plan` checks that.

    Errors: RequestError if both are given.
    """
    if budget.threshold is None:
        return None if budget.target is None else asked_target(budget.target)
    if budget.target is not None:
        raise RequestError(
            "both --target and --threshold", "a threshold determines the sparsity", "give one of the two"
        )
    return Threshold(budget.threshold)


def asked_target(text: str) -> Target:
    """The target that somebody typed. Errors: those of `parse_target`; RequestError for `macs=50`, which is unclear."""
    name, _, amount = (part.strip() for part in text.partition("="))
    if name.lower() in ("macs", "params", "bytes") and amount.isdigit() and 1 < int(amount) <= 100:
        why = f"{amount} % of the dense model's, or {amount} in all"
        todo = f"use --target {name}={amount}% or --target {name}={int(amount) / 1000:g}k"
        raise RequestError(f"{text} can be read in two ways", why, todo)
    return parse_target(text)


def read_loadable(budget: options.Budget) -> Loadable | None:
    """The reader that `--loadable` names. Errors: RequestError for another."""
    if budget.loadable in (None, "transformers"):
        return "transformers" if budget.loadable else None
    raise RequestError(
        f"--loadable {budget.loadable} names no reader", "known is transformers", "--loadable transformers"
    )


def read_by_hand(budget: options.Budget) -> ByHand:
    """The values of `--remove`, `--keep`, `--ratio` and `--count`."""
    return ByHand(
        remove=_by_layer("--remove", budget.remove, _positions),
        keep=_by_layer("--keep", budget.keep, _positions),
        ratios=_by_layer("--ratio", budget.ratio, _ratio),
        counts=_by_layer("--count", budget.count, int),
    )


def _by_layer(option: str, words: Sequence[str] | None, read: Callable[[str], Any]) -> dict[str, Any]:
    """`layer=value`, each layer once. Errors: RequestError."""
    values: dict[str, Any] = {}
    for word in words or ():
        name, mark, text = word.rpartition("=")
        example = f"for example {option} layer1.0.conv1={_EXAMPLES[option]}"
        if not mark or not name:
            raise RequestError(f"cannot read {option} {word!r}", "the name of a layer and = come first", example)
        if name in values:
            raise RequestError(f"{option} names {name} twice", "one value is needed", "give it once")
        try:
            values[name] = read(text.strip())
        except ValueError:
            raise RequestError(f"cannot read {option} {word!r}", f"{text!r} is not a value for it", example) from None
    return values


_EXAMPLES = {"--remove": "2,5,7", "--keep": "0,1,3", "--ratio": "0.3", "--count": "12"}


def _positions(text: str) -> list[int]:
    """`2,5,7` and `8-15`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, mark, last = part.strip().partition("-")
        numbers += range(int(first), int(last) + 1) if mark else [int(first)]
    return numbers


def _ratio(text: str) -> float:
    """`0.3` or `30%`."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def build_recipe(
    name: str,
    *,
    granularity: str | None = None,
    allocation: str | None = None,
    pattern: str | None = None,
) -> Recipe:
    """A recipe by name, or a criterion by name; the other options replace its parts."""
    if name in LLM_RECIPES:
        todo = f"`prunella llm MODEL --recipe {name}`"
        raise RequestError(f"{name} is not a recipe for a plan", "it prunes language models block by block", todo)
    method = catalogue.lookup(name)
    if method.kind == "recipe":
        recipe = call_user(method.function, f"the recipe {name}")
        assert isinstance(recipe, Recipe)
    elif method.kind == "criterion":
        recipe = Recipe(criterion=method.function)
    else:
        todo = "`prunella methods criterion` and `prunella methods recipe` list what fits"
        raise RequestError(f"{name} is not a recipe", f"it is of the kind {method.kind}", todo)
    if granularity and pattern:
        raise RequestError("both --granularity and --pattern", "a pattern is a granularity", "give one of the two")
    if granularity or pattern:
        recipe = replace(recipe, granularity=read_pattern(pattern) if pattern else _granularity(granularity or ""))
    if allocation:
        recipe = replace(recipe, allocation=catalogue.lookup(allocation, "allocation").function)
    return recipe


def is_auto(method: options.MethodOptions, budget: options.Budget, recover: options.RecoveryOptions) -> bool:
    """Whether `run` chooses the method: with `--recipe auto`, or with data and no other option of the method.

    Errors: RequestError if `--recipe auto` is combined with other options of the method.
    """
    options_given = {
        "--granularity": method.granularity, "--allocation": budget.allocation, "--pattern": budget.pattern,
        "--min-density": method.min_density is not None, "--round-to": method.round_to is not None,
        "--equal-widths": budget.equal_widths, "--loadable": budget.loadable, "--recover": recover.recover,
        "--remove": budget.remove,
        "--keep": budget.keep, "--ratio": budget.ratio, "--count": budget.count,
        "--threshold": budget.threshold is not None,
    }  # fmt: skip
    names = [name for name, value in options_given.items() if value]
    if method.recipe == "auto" and names:
        raise RequestError(
            f"--recipe auto does not go with {names[0]}", "it chooses that itself", "leave one of them out"
        )
    return method.recipe == "auto" or (method.recipe is None and method.data is not None and not names)


def recipe_of(method: options.MethodOptions, budget: options.Budget = _NO_BUDGET) -> Recipe:
    """The named recipe, with parts and numbers replaced by the other options of the command line."""
    recipe = build_recipe(
        method.recipe or "magnitude",
        granularity=method.granularity,
        allocation=budget.allocation,
        pattern=budget.pattern,
    )
    return replace(
        recipe,
        min_density=recipe.min_density if method.min_density is None else method.min_density,
        round_to=recipe.round_to if method.round_to is None else method.round_to,
        equal_widths=recipe.equal_widths if budget.equal_widths is None else budget.equal_widths,
        seed=method.seed,
    )


def _granularity(text: str) -> Any:
    """`channel`, or `channel,head`: names of the catalogue in any case."""
    parts = tuple(units_of(part.strip()) for part in text.split(",") if part.strip())
    return parts[0] if len(parts) == 1 else parts


def units_of(name: str) -> Any:
    """The granularity of that name, in any case. Errors: RequestError for one that needs more than its name."""
    by_case = {m.name.lower(): m.name for m in catalogue.methods() if m.kind == "granularity"}
    method = catalogue.lookup(by_case.get(name.lower(), name), "granularity")
    if any(knob.default is knob.empty for knob in inspect.signature(method.function).parameters.values()):
        todo = "give --pattern 2:4 for NM, --pattern 16x16 for Block; Vocabulary takes its tokens in Python"
        raise RequestError(f"{method.name} needs more than its name", "", todo)
    return method.function()


def read_pattern(text: str) -> Any:
    """`2:4` is N:M, `4x4` is blocks."""
    from prunella.granularity import NM, Block

    match = re.fullmatch(r"(\d+)([:x])(\d+)", text.strip())
    if not match:
        why = "a pattern is N:M (N kept of every M) or ROWSxCOLUMNS (blocks)"
        raise RequestError(f"cannot read the pattern {text!r}", why, "for example --pattern 2:4 or --pattern 16x16")
    first, second = int(match[1]), int(match[3])
    return NM(first, second) if match[2] == ":" else Block(first, second)


def load_data(spec: str | None) -> Iterable[Any] | None:
    """The batches returned by `module:function`, or stored in `module:name`."""
    if spec is None:
        return None
    named = load_object(spec, "data", files=True)
    batches = call_user(named, spec) if callable(named) else named
    if not isinstance(batches, Iterable):
        raise BadInput(f"{spec} gives no batches", f"it gave {type(batches).__name__}", "return a list or a DataLoader")
    # a generator would be empty at the second pass
    return moved_batches(batches if hasattr(batches, "__len__") or hasattr(batches, "dataset") else list(batches))


def load_function(spec: str | None, what: str) -> Callable[..., Any] | None:
    """The function that `module:function` names."""
    if spec is None:
        return None
    function = load_object(spec, what, files=True)
    if not callable(function):
        raise RequestError(
            f"{spec} is not a function", f"it is a {type(function).__name__}", f"give --{what} module:function"
        )
    return as_user_function(function, f"the {what} {spec}")


def load_loss(spec: str | None) -> Loss | None:
    """The loss, a function of (model, batch)."""
    return load_function(spec, "loss")


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    kept: Mapping[str, Any] = {name: mask.nonzero().flatten().tolist() for name, mask in plan.keep.items()}
    return {
        "recipe": dict(plan.recipe),
        "target": str(plan.target) if plan.target else None,
        "before": asdict(plan.before),
        "after": asdict(plan.after),
        "rows": [asdict(row) for row in plan.rows],
        "frozen": [asdict(item) for item in plan.frozen],
        "remarks": list(plan.remarks),
        "caveats": list(plan.caveats),
        "kept": kept,
        "masks": {name: {"kept": int(mask.sum()), "total": mask.numel()} for name, mask in plan.masks.items()},
    }
