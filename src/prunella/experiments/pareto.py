"""Methods against each other over ratios and seeds, with baselines that are always there; several processes, resumable.

Every cell (method, ratio, seed) is a record of its own in the journal of the folder, written when the cell is done,
under the identity of all that decides it. A killed study goes on from there; a larger one takes over what is known.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella._version import __version__
from prunella.allocation import global_, uniform
from prunella.criteria import magnitude, random
from prunella.errors import BadInput, Interrupted, PruningError, RequestError
from prunella.granularity import Element, Granularity
from prunella.io.files import write_atomic
from prunella.io.identity import Identity, identify
from prunella.io.journal import Journal, open_journal
from prunella.io.load import load_object
from prunella.model.copying import copied
from prunella.model.masks import finalize
from prunella.model.rng import seed_rng_, seeded
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import metric
from prunella.reporting.extra import reason_without
from prunella.reporting.frontier import DENSE_NAME, Cell, Frontier, summarise, write_frontier
from prunella.targets import Params, Sparsity, Target
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink

PAGE, RECORD = "pareto.html", "pareto.json"
CELL = "cell"
"""The key of a cell in the journal, where each has an identity of its own."""
RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
OnCell = Callable[[Cell, int, int], None]
"""Called with each cell that is done, how many are, and how many there are."""


@dataclass(frozen=True)
class Study:
    """What is compared. Functions are given as themselves or as `module:name`.

    make: seed -> trained dense model, the same for the same seed. evaluate: model -> a number, higher is better.
    inputs: an example batch, or a function that returns it. recipes: name -> recipe; the baselines are added.
    data, loss: for criteria that need them: batches, or a function that returns them, and a function of (model, batch).
    recover: (pruned model, plan, seed) -> recovered model, or None when it works in place; masks stay in force.
    skip: patterns of what is never pruned.
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
        """Random, magnitude by layer and magnitude over all, at every granularity of the recipes."""
        grains = list(dict.fromkeys(recipe.granularity for recipe in self.recipes.values())) or [Element()]
        found = {}
        for grain in grains:
            of = f", {_grain(grain)}" if len(grains) > 1 else ""
            found[f"random{of}"] = Recipe(random, grain, uniform)
            found[f"magnitude, by layer{of}"] = Recipe(magnitude, grain, uniform)
            found[f"magnitude, global{of}"] = Recipe(magnitude, grain, global_)
        return found


@dataclass(frozen=True)
class _Task:
    """One cell to be made."""

    study: Study
    method: str
    recipe: Recipe | None
    target: Target | None
    ratio: float
    seed: int

    def identity(self, study: Identity) -> Identity:
        """All that decides the cell; `study` is what all cells share."""
        return study.plus({"recipe": self.recipe, "target": repr(self.target), "seed": self.seed})


@metric(source="Blalock et al. 2020, arXiv:2003.03033 (several ratios, several seeds, strong and random baselines)")
def pareto(
    study: Study,
    folder: str | os.PathLike[str] | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: Sequence[int] = (0, 1, 2),
    unit: type[Target] = Params,
    jobs: int = 1,
    on_cell: OnCell | None = None,
) -> Frontier:
    """Quality against size for several methods, with random and magnitude pruning beside them, over ratios and seeds.

    `mean +- std` and Student's `mean +- t_{.975, n-1} std / sqrt(n)` over seeds; a point is on the front if no other
    that has all its seeds is as small and as good, and better in one. Cells that cannot be made are kept with the
    reason. The same seeds give the same cells whatever `jobs` is: every cell runs on one thread with its own seed.

    Data: as the criteria need, in `study`. folder: of the journal, the page and a record; a killed study goes on. Cells
    whose functions have changed are made again; what these functions call is not looked at: take a new folder then.
    ratios: original / new, above 1. unit: what is divided: `Params` counts weights under masks too; with `Sparsity` it
    is the weights or units that compete. jobs: processes; above 1 the functions must be importable.

    Use: before claiming that one method is better than another. Avoid: with fewer than three seeds, where the interval
    is wide and says so.
    """
    _check(study, ratios, seeds, jobs)
    tasks = _tasks(study, ratios, seeds, unit)
    if folder is None:
        return _frontier(study, _finished(tasks, None, jobs, on_cell), seeds, unit)
    path = Path(folder)
    with open_journal(path) as journal:
        found = _frontier(study, _finished(tasks, journal, jobs, on_cell), seeds, unit)
        write_atomic(path / RECORD, (found.json() + "\n").encode())
        missing = reason_without(functools.partial(write_frontier, found, path / PAGE), PAGE)
        if missing:
            logging.getLogger(__name__).warning(missing)
    return found


def _finished(tasks: Sequence[_Task], journal: Journal | None, jobs: int, on_cell: OnCell | None) -> list[Cell]:
    """The cell of every task, from the journal or made and recorded."""
    shared = _identity(tasks[0].study) if journal else None
    names = [task.identity(shared) for task in tasks] if shared else []
    done = {place: cell for place, name in enumerate(names) if journal and (cell := _known(journal, name))}
    left = [place for place in range(len(tasks)) if place not in done]
    for place, cell in _made(tasks, left, jobs):
        done[place] = cell
        if journal:
            journal.add(names[place], CELL, asdict(cell))
        if on_cell:
            on_cell(cell, len(done), len(tasks))
    _dense.cache_clear()
    return [replace(done[place], method=task.method) for place, task in enumerate(tasks)]


def _frontier(study: Study, cells: Sequence[Cell], seeds: Sequence[int], unit: type[Target]) -> Frontier:
    return summarise(
        cells, unit=unit.__name__.lower(), baselines=tuple(study.baselines), environment=_environment(study, seeds)
    )


def _check(study: Study, ratios: Sequence[float], seeds: Sequence[int], jobs: int) -> None:
    if not ratios or not seeds or min(ratios) <= 1 or len(set(seeds)) < len(seeds) or jobs < 1:
        why = f"got ratios={tuple(ratios)}, seeds={tuple(seeds)}, jobs={jobs}"
        raise RequestError(
            "a study needs ratios above 1, different seeds and a process", why, "ratios=(2, 4), seeds=(0, 1)"
        )
    taken = sorted({*study.baselines, DENSE_NAME} & set(study.recipes))
    if taken:
        raise RequestError(
            f"the name {taken[0]!r} is taken", "it is a baseline, which is always there", "name it otherwise"
        )
    for found in (study.make, study.evaluate, study.recover, study.loss):
        if isinstance(found, str):
            load_object(found, "a function of the study")
    for found in (study.inputs, study.data):
        _named_data(found)
    if jobs > 1:
        try:
            pickle.dumps(study)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            todo = "give functions of a module, or their names as 'module:function'; or jobs=1"
            raise RequestError("the study cannot be sent to other processes", why, todo) from error


def _tasks(study: Study, ratios: Sequence[float], seeds: Sequence[int], unit: type[Target]) -> list[_Task]:
    """Seed by seed, so that a dense model is made once where that can be."""
    found = []
    for seed in seeds:
        found.append(_Task(study, DENSE_NAME, None, None, 1.0, seed))
        for method, recipe in {**study.recipes, **study.baselines}.items():
            for ratio in ratios:
                target = Sparsity(1 - 1 / ratio) if unit is Sparsity else unit(1 / ratio)
                found.append(_Task(study, method, replace(recipe, seed=seed), target, float(ratio), seed))
    return sorted(found, key=lambda t: (t.method != DENSE_NAME, seeds.index(t.seed)))


# -- running ------------------------------------------------------------------------------------------------------


def _made(tasks: Sequence[_Task], places: Sequence[int], jobs: int) -> Iterator[tuple[int, Cell]]:
    """The cells of the tasks at these places, in the order in which they are done."""
    if jobs == 1 or len(places) < 2:
        for place in places:
            yield place, _cell(tasks[place])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(places)), mp_context=context, initializer=_leave_with_parent)
    try:
        waiting = {pool.submit(_cell, tasks[place]): place for place in places}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        why = "it was killed, ran out of memory, or its functions are in a script without `if __name__ == '__main__'`"
        raise Interrupted(
            "a process of the study died", why, "start it again with the same folder: it goes on"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cell(task: _Task) -> Cell:
    """Make, prune, recover, evaluate; an error becomes the reason."""
    empty = Cell(task.method, task.ratio, task.seed)
    try:
        with _alone(task.seed):
            return _run(task, empty)
    except PruningError as error:
        return replace(empty, error=" ".join(f"{type(error).__name__}: {error.what}: {error.why}".split())[:600])
    except Exception as error:
        return replace(empty, error=f"{_USER}{type(error).__name__}: {str(error)[:400]}")


_USER = "a function of the study raised "
"""Begins the reason of a failure that may be mended; such a cell is tried again."""


def _run(task: _Task, empty: Cell) -> Cell:
    study = task.study
    model = copied(_dense(study.make, task.seed))
    params = macs = 1.0
    seed_rng_(task.seed)
    if task.recipe is not None:
        inputs, data = _value(study.inputs), _value(study.data)
        made = plan(
            model, inputs, task.recipe, target=task.target, data=data, loss=_function(study.loss), skip=study.skip
        )
        params, macs = made.after.params / made.before.params, made.after.macs / made.before.macs
        model = shrink(model, made) if made.changes else apply_(model, made)
        recover = _function(study.recover)
        recovered = recover(model, made, task.seed) if recover else None
        model = finalize(model if recovered is None else recovered)
    score = float(_function(study.evaluate)(model))  # type: ignore[misc]
    if not isfinite(score):
        raise ValueError(f"evaluate gave {score}")
    return replace(empty, score=score, params=float(params), macs=float(macs))


@functools.lru_cache(maxsize=4)
def _dense(make: Callable[[int], nn.Module] | str, seed: int) -> nn.Module:
    seed_rng_(seed)
    model = _function(make)(seed)  # type: ignore[misc]
    if not isinstance(model, nn.Module):
        raise RequestError(f"make gave {type(model).__name__}", "a model is needed", "return the trained nn.Module")
    return model.eval()


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread and seeded generators, as before afterwards: results do not depend on who runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with seeded(seed):
            yield
    finally:
        torch.set_num_threads(threads)


# -- names and files ----------------------------------------------------------------------------------------------


def _identity(study: Study) -> Identity:
    """What all cells share: functions by their code and arguments, data by its contents."""
    functions = {name: _function(getattr(study, name)) for name in ("make", "evaluate", "loss", "recover")}
    data = {name: _named_data(getattr(study, name)) for name in ("inputs", "data")}
    return identify({**functions, **data, "skip": study.skip})


def _known(journal: Journal, identity: Identity) -> Cell | None:
    """A cell that is done. One that failed in the user's code is made again."""
    found = journal.known(identity, CELL)
    if found is None:
        return None
    try:
        cell = Cell(**found)
    except TypeError as error:
        why = f"a record is no cell: {error}"
        raise BadInput(f"{journal.path} is damaged", why, "choose another folder") from error
    return None if cell.error.startswith(_USER) else cell


def _function(found: Any) -> Callable[..., Any] | None:
    return load_object(found, "a function of the study") if isinstance(found, str) else found  # type: ignore[no-any-return]


def _value(found: Any) -> Any:
    """What is given, or what the function gives."""
    found = load_object(found, "data of the study") if isinstance(found, str) else found
    return found() if callable(found) else found


def _named_data(found: Any) -> Any:
    """What stands for data in an identity: its contents, or the function that gives it."""
    found = load_object(found, "data of the study") if isinstance(found, str) else found
    if found is None or callable(found) or isinstance(found, Tensor | Mapping | tuple | list):
        return found
    raise RequestError(
        f"data of type {type(found).__name__} has no name", "a study is resumed by the names of its parts",
        "give a function that returns it, or a list of batches",
    )  # fmt: skip


def _named(found: Any) -> str:
    """A function in the record of the study."""
    if isinstance(found, str) or found is None:
        return str(found)
    if isinstance(found, functools.partial):
        return f"{_named(found.func)} {found.args!r} {sorted(found.keywords.items())!r}"
    return f"{found.__module__}:{getattr(found, '__qualname__', type(found).__qualname__)}"


def _grain(grain: Granularity | tuple[Granularity, ...]) -> str:
    return ", ".join(repr(one) for one in (grain if isinstance(grain, tuple) else (grain,)))


def _environment(study: Study, seeds: Sequence[int]) -> dict[str, str]:
    return {
        "prunella": __version__,
        "torch": str(torch.__version__),
        "seeds": ", ".join(map(str, seeds)),
        "threads": "1 a model",
        "make": _named(study.make),
        "evaluate": _named(study.evaluate),
        "recover": _named(study.recover) if study.recover else "nothing: one shot",
    }
