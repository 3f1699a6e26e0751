"""Pareto experiments: methods and baselines compared over ratios and seeds, in several processes, resumable.

Every cell (method, ratio, seed) is one record in the journal of the folder, under the identity of its settings.
A killed experiment resumes from the journal, and a larger one reuses its cells.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella._version import __version__
from prunella.allocation import global_, uniform
from prunella.criteria import magnitude, random
from prunella.errors import BadInput, Interrupted, PruningError, RequestError, printable
from prunella.granularity import Element, Granularity
from prunella.io.files import write_atomic
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.journal import Journal, open_journal
from prunella.io.load import load_object
from prunella.measure.text import without_folders
from prunella.model.copying import copied
from prunella.model.masks import finalize, masks_of
from prunella.model.rng import seed_rng_, seeded
from prunella.model.user_code import quality_of, user_error
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import metric
from prunella.reporting.extra import reason_without
from prunella.reporting.frontier import DENSE_NAME, Cell, Frontier, summarize, unmeasured, write_frontier
from prunella.targets import Params, Sparsity, Target
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink

log = logging.getLogger(__name__)
PAGE, RECORD = "pareto.html", "pareto.json"
CELL = "cell"
"""The key of a cell in the journal; each cell has its own identity there."""
RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
OnCell = Callable[[Cell, int, int], None]
"""Called after each cell with the cell, the number of finished cells, and the number of all cells."""


@dataclass(frozen=True)
class ParetoExperiment:
    """The model, data, evaluation and methods of an experiment. A function is given as itself or as `module:name`.

    make: seed -> trained dense model, the same for the same seed. evaluate: model -> a number, higher is better.
    inputs: an example batch, or a function that returns it. recipes: name -> recipe; the baselines are added.
    data, loss: for criteria that need them: batches, or a function that returns them, and a function of (model, batch).
    recover: (pruned model, plan, seed) -> recovered model, or None when it works in place; masks stay in force.
    skip: patterns of layers that are never pruned.
    """

    make: Callable[[int], nn.Module] | str
    evaluate: Callable[[nn.Module], float] | str
    inputs: Any
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    data: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | str | None = None
    recover: Callable[[nn.Module, Plan, int], nn.Module | None] | str | None = None
    skip: tuple[str, ...] = ()

    @property
    def baselines(self) -> dict[str, Recipe]:
        """Random, magnitude by layer and global magnitude, at every granularity of the recipes."""
        units = list(dict.fromkeys(recipe.granularity for recipe in self.recipes.values())) or [Element()]
        recipes_by_name = {}
        for unit in units:
            of = f", {_granularity_name(unit)}" if len(units) > 1 else ""
            recipes_by_name[f"random{of}"] = Recipe(random, unit, uniform)
            recipes_by_name[f"magnitude, by layer{of}"] = Recipe(magnitude, unit, uniform)
            recipes_by_name[f"magnitude, global{of}"] = Recipe(magnitude, unit, global_)
        return recipes_by_name


@dataclass(frozen=True)
class _Task:
    """The settings of one cell."""

    experiment: ParetoExperiment
    method: str
    recipe: Recipe | None
    target: Target | None
    ratio: float
    seed: int

    def identity(self, experiment: Identity) -> Identity:
        """Everything that determines the cell; `experiment` is the identity shared by all cells of its seed."""
        return experiment.plus({"recipe": self.recipe, "target": repr(self.target), "seed": self.seed})


@metric(source="Blalock et al. 2020, arXiv:2003.03033 (several ratios, several seeds, strong and random baselines)")
def pareto(
    experiment: ParetoExperiment,
    folder: str | os.PathLike[str] | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: Sequence[int] = (0, 1, 2),
    unit: type[Target] = Params,
    jobs: int = 1,
    on_cell: OnCell | None = None,
) -> Frontier:
    """Quality and size of several methods, with random and magnitude pruning as baselines, over ratios and seeds.

    `mean +- std` and Student's `mean +- t_{.975, n-1} std / sqrt(n)` over seeds; a point is on the front if no other
    point with all its seeds is as small and as good, and better in one. Failed cells are kept with the reason. The same
    seeds give the same cells for any `jobs`: every cell runs on one thread with its own seed.

    Data: as the criteria need, in `experiment`. folder: of the journal, the page and a record; a killed experiment is
    resumed. Cells with changed functions run again. Changes in code that these functions call are not detected: take a
    new folder then. ratios: original / new, above 1. unit: of the ratio: `Params` counts weights under masks too;
    `Sparsity` counts the prunable weights or units. jobs: processes; above 1 the functions must be importable.
    on_cell: called after each cell with the cell, the number of finished cells, and of all cells.

    Use: before claiming that one method is better than another. Avoid: fewer than three seeds: the interval is wide.
    """
    _check(experiment, ratios, seeds, jobs)
    tasks = _tasks(experiment, ratios, seeds, unit)
    if folder is None:
        return _frontier(experiment, _finished(tasks, None, jobs, on_cell), seeds, unit)
    path = Path(folder)
    with open_journal(path) as journal:
        frontier = _frontier(experiment, _finished(tasks, journal, jobs, on_cell), seeds, unit)
        write_atomic(path / RECORD, (frontier.json() + "\n").encode())
        missing = reason_without(functools.partial(write_frontier, frontier, path / PAGE), PAGE)
        if missing:
            logging.getLogger(__name__).warning(missing)
    return frontier


def _finished(tasks: Sequence[_Task], journal: Journal | None, jobs: int, on_cell: OnCell | None) -> list[Cell]:
    """The cell of every task: read from the journal, or run and recorded."""
    seeds = dict.fromkeys(task.seed for task in tasks) if journal else {}
    shared = {seed: _identity(tasks[0].experiment, seed) for seed in seeds}
    names = [task.identity(shared[task.seed]) for task in tasks] if shared else []
    cells = {index: cell for index, name in enumerate(names) if journal and (cell := _known(journal, name))}
    remaining = [index for index in range(len(tasks)) if index not in cells]
    for index, cell in _run_tasks(tasks, remaining, jobs):
        cells[index] = cell
        if cell.error and cell.method == DENSE_NAME and len(cells) == 1:
            raise unmeasured(cell)
        if journal:
            journal.add(names[index], CELL, asdict(cell))
        if on_cell:
            on_cell(cell, len(cells), len(tasks))
    _dense.cache_clear()
    return [replace(cells[index], method=task.method) for index, task in enumerate(tasks)]


def _frontier(
    experiment: ParetoExperiment, cells: Sequence[Cell], seeds: Sequence[int], unit: type[Target]
) -> Frontier:
    return summarize(
        cells,
        unit=unit.__name__.lower(),
        baselines=tuple(experiment.baselines),
        environment=_environment(experiment, seeds),
    )


def _check(experiment: ParetoExperiment, ratios: Sequence[float], seeds: Sequence[int], jobs: int) -> None:
    if not ratios or not seeds or min(ratios) <= 1 or len(set(seeds)) < len(seeds) or jobs < 1:
        why = f"got ratios={tuple(ratios)}, seeds={tuple(seeds)}, jobs={jobs}"
        raise RequestError(
            "an experiment needs ratios above 1, different seeds and a process", why, "ratios=(2, 4), seeds=(0, 1)"
        )
    taken = sorted({*experiment.baselines, DENSE_NAME} & set(experiment.recipes))
    if taken:
        raise RequestError(
            f"the name {taken[0]!r} is taken", "every experiment has a baseline of this name", "take another name"
        )
    for value in (experiment.make, experiment.evaluate, experiment.recover, experiment.loss):
        if isinstance(value, str):
            load_object(value, "a function of the experiment")
    for value in (experiment.inputs, experiment.data):
        _named_data(value)
    if jobs > 1:
        try:
            pickle.dumps(experiment)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            todo = "give functions of a module, or their names as 'module:function'; or jobs=1"
            raise RequestError("the experiment cannot be sent to other processes", why, todo) from error


def _tasks(
    experiment: ParetoExperiment, ratios: Sequence[float], seeds: Sequence[int], unit: type[Target]
) -> list[_Task]:
    """All tasks, seed by seed, so that the dense model of a seed is made once."""
    tasks = []
    for seed in seeds:
        tasks.append(_Task(experiment, DENSE_NAME, None, None, 1.0, seed))
        for method, recipe in {**experiment.recipes, **experiment.baselines}.items():
            for ratio in ratios:
                target = Sparsity(1 - 1 / ratio) if unit is Sparsity else unit(1 / ratio)
                tasks.append(_Task(experiment, method, replace(recipe, seed=seed), target, float(ratio), seed))
    return sorted(tasks, key=lambda t: (t.method != DENSE_NAME, seeds.index(t.seed)))


# -- running ------------------------------------------------------------------------------------------------------


def _run_tasks(tasks: Sequence[_Task], indices: Sequence[int], jobs: int) -> Iterator[tuple[int, Cell]]:
    """The cells of the tasks at these indices, in the order of completion."""
    if jobs == 1 or len(indices) < 2:
        for index in indices:
            yield index, _cell(tasks[index])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(indices)), mp_context=context, initializer=_leave_with_parent)
    try:
        waiting = {pool.submit(_cell, tasks[index]): index for index in indices}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        why = "it was killed, ran out of memory, or its functions are in a script without `if __name__ == '__main__'`"
        raise Interrupted(
            "a process of the experiment died", why, "start it again with the same folder: it resumes"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent() -> None:
    """End this worker with its parent: otherwise it would wait forever after a kill of the parent."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cell(task: _Task) -> Cell:
    """Make, prune, recover and evaluate one model; an error becomes the reason of a failed cell."""
    empty = Cell(task.method, task.ratio, task.seed)
    try:
        with _alone(task.seed):
            return _run(task, empty)
    except PruningError as error:
        told = " ".join(f"{type(error).__name__}: {error.what}: {error.why}".split())[:600]
        return replace(empty, error=without_folders(told))
    except Exception as error:
        log.warning("%s, %gx, seed %d: %s", task.method, task.ratio, task.seed, user_error(error, "").why)
        told = " ".join(f"{type(error).__name__}: {str(error)[:400]}".split())
        return replace(empty, error=_USER + printable(without_folders(told)))


_USER = "a function of the experiment raised "
"""Start of the reason of a failure that the user may fix; such a cell runs again."""
_USER_0_1 = "a function of the experiment raised "
"""The same in a journal of 0.1."""


def _run(task: _Task, empty: Cell) -> Cell:
    experiment = task.experiment
    model = copied(_dense(experiment.make, task.seed))
    params = macs = 1.0
    seed_rng_(task.seed)
    if task.recipe is not None:
        inputs, data = _value(experiment.inputs), _value(experiment.data)
        task_plan = plan(
            model,
            inputs,
            task.recipe,
            target=task.target,
            data=data,
            loss=_function(experiment.loss),
            skip=experiment.skip,
        )
        params, macs = task_plan.after.params / task_plan.before.params, task_plan.after.macs / task_plan.before.macs
        model = shrink(model, task_plan) if task_plan.changes else apply_(model, task_plan)
        recover = _function(experiment.recover)
        recovered = recover(model, task_plan, task.seed) if recover else None
        model = model if recovered is None else recovered
        model = finalize(model) if masks_of(model) else model
    value = _function(experiment.evaluate)(model)  # type: ignore[misc]
    score = quality_of(value, "evaluate=", "the dense model" if task.recipe is None else "this model", dense=True)
    return replace(empty, score=score, params=float(params), macs=float(macs))


@functools.lru_cache(maxsize=4)
def _dense(make: Callable[[int], nn.Module] | str, seed: int) -> nn.Module:
    seed_rng_(seed)
    model = _function(make)(seed)  # type: ignore[misc]
    if not isinstance(model, nn.Module):
        raise RequestError(f"make returned {type(model).__name__}", "a model is needed", "return the trained nn.Module")
    return model.eval()


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread and seeded generators, restored afterwards: results do not depend on other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with seeded(seed):
            yield
    finally:
        torch.set_num_threads(threads)


# -- names and files ----------------------------------------------------------------------------------------------


def _identity(experiment: ParetoExperiment, seed: int) -> Identity:
    """The identity that all cells of a seed share: functions by their code and arguments, data and model by contents.

    A change of a checkpoint that `make` reads is detected by the weights of the model.
    """
    functions = {name: _function(getattr(experiment, name)) for name in ("make", "evaluate", "loss", "recover")}
    data = {name: _named_data(getattr(experiment, name)) for name in ("inputs", "data")}
    dense: Mapping[str, Any] = {}
    with _alone(seed), suppress(Exception):  # a cell says what `make` raises
        dense = model_parts(_dense(experiment.make, seed))
    return identify({**functions, **data, **dense, "skip": experiment.skip})


def _known(journal: Journal, identity: Identity) -> Cell | None:
    """The recorded cell, or None; a cell that failed in the user's code runs again."""
    record = journal.known(identity, CELL)
    if record is None:
        return None
    try:
        cell = Cell(**record)
    except TypeError as error:
        why = f"a record is not a cell: {error}"
        raise BadInput(f"{journal.path} is damaged", why, "choose another folder") from error
    return None if cell.error.startswith((_USER, _USER_0_1)) else cell


def _function(value: Any) -> Callable[..., Any] | None:
    return load_object(value, "a function of the experiment") if isinstance(value, str) else value  # type: ignore[no-any-return]


def _value(value: Any) -> Any:
    """The value itself, or the result of the function."""
    value = load_object(value, "data of the experiment") if isinstance(value, str) else value
    return value() if callable(value) else value


def _named_data(value: Any) -> Any:
    """The data in an identity: its contents, or the function that returns it."""
    value = load_object(value, "data of the experiment") if isinstance(value, str) else value
    if value is None or callable(value) or isinstance(value, Tensor | Mapping | tuple | list):
        return value
    raise RequestError(
        f"data of type {type(value).__name__} has no name", "an experiment is resumed by the names of its parts",
        "give a function that returns it, or a list of batches",
    )  # fmt: skip


def _named(function: Any) -> str:
    """The name of a function, for the record of the experiment."""
    if isinstance(function, str) or function is None:
        return str(function)
    if isinstance(function, functools.partial):
        return f"{_named(function.func)} {function.args!r} {sorted(function.keywords.items())!r}"
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _granularity_name(granularity: Granularity | tuple[Granularity, ...]) -> str:
    return ", ".join(repr(entry) for entry in (granularity if isinstance(granularity, tuple) else (granularity,)))


def _environment(experiment: ParetoExperiment, seeds: Sequence[int]) -> dict[str, str]:
    return {
        "prunella": __version__,
        "torch": str(torch.__version__),
        "seeds": ", ".join(map(str, seeds)),
        "threads": "1 a model",
        "make": _named(experiment.make),
        "evaluate": _named(experiment.evaluate),
        "recover": _named(experiment.recover) if experiment.recover else "nothing: one shot",
    }
