"""Methods against each other over ratios and seeds, with baselines that are always there; several processes, resumable.

Every cell (method, ratio, seed) is a file of its own in the run directory, written when the cell is done, under a name
that is a digest of all that decides it. A killed study goes on from there, and a larger one takes over what is known.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from prunella.errors import Interrupted, PruningError, RequestError
from prunella.granularity import Element, Granularity
from prunella.io.files import write_atomic
from prunella.io.load import load_object
from prunella.model.copying import copied
from prunella.model.forward import tensors
from prunella.model.masks import finalize
from prunella.model.rng import seed_rng_, seeded
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import metric
from prunella.reporting.frontier import DENSE_NAME, Cell, Frontier, summarise, write_frontier
from prunella.targets import Params, Sparsity, Target
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink

PAGE, RECORD, CELLS = "pareto.html", "pareto.json", "cells"
RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
OnCell = Callable[[Cell, int, int], None]
"""Called with each cell that is done, how many are, and how many there are."""


@dataclass(frozen=True)
class Study:
    """What is compared. Functions are given as themselves or as `module:name`.

    make: seed -> trained dense model, the same for the same seed. evaluate: model -> a number, higher is better.
    inputs: an example batch, or a function that returns it. recipes: name -> recipe; the baselines are added.
    data, loss: for criteria that need them: batches, or a function that returns them, and a function of (model, batch).
    recover: (pruned model, plan, seed) -> healed model, or None when it heals in place; masks stay in force.
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

    @property
    def key(self) -> str:
        """A digest of all that decides the cell, except the code behind the names of functions."""
        one = self.study
        what = {
            "functions": [_named(f) for f in (one.make, one.evaluate, one.inputs, one.data, one.loss, one.recover)],
            "recipe": self.recipe.describe() if self.recipe else None,
            "target": repr(self.target),
            "seed": self.seed,
            "skip": one.skip,
            "versions": (__version__, str(torch.__version__)),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


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

    Data: as the criteria need, in `study`. folder: of the cells, the page and a record; a killed
    study goes on. Code behind a name is not looked at: take a new folder when you change it.
    ratios: original / new, above 1. unit: what is divided: `Params` counts weights under masks too; with `Sparsity` it
    is the weights or units that compete. jobs: processes; above 1 the functions must be importable.

    Use: before claiming that one method is better than another. Avoid: with fewer than three seeds, where the interval
    is wide and says so.
    """
    _check(study, ratios, seeds, jobs)
    tasks = _tasks(study, ratios, seeds, unit)
    journal = Path(folder) if folder is not None else None
    done = {task.key: cell for task in tasks if (cell := _known(journal, task))}
    left = [task for task in tasks if task.key not in done]
    count = len(tasks) - len(left)
    for task, cell in _made(left, jobs):
        count += 1
        done[task.key] = cell
        if journal:
            write_atomic(_file(journal, task), (json.dumps(asdict(cell), default=str) + "\n").encode())
        if on_cell:
            on_cell(cell, count, len(tasks))
    _dense.cache_clear()
    cells = [replace(done[task.key], method=task.method) for task in tasks]
    found = summarise(
        cells, unit=unit.__name__.lower(), baselines=tuple(study.baselines), environment=_environment(study, seeds)
    )
    if journal:
        write_atomic(journal / RECORD, (found.json() + "\n").encode())
        write_frontier(found, journal / PAGE)
    return found


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


def _made(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[_Task, Cell]]:
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, _cell(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_leave_with_parent)
    try:
        waiting = {pool.submit(_cell, task): task for task in tasks}
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
        healed = recover(model, made, task.seed) if recover else None
        model = finalize(model if healed is None else healed)
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


def _known(journal: Path | None, task: _Task) -> Cell | None:
    """A cell that is done. One that failed in the user's code, or whose file is damaged, is made again."""
    if journal is None:
        return None
    file = _file(journal, task)
    try:
        cell = Cell(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return None if cell.error.startswith(_USER) else cell


def _file(journal: Path, task: _Task) -> Path:
    folder = journal / CELLS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {folder}", str(error), "choose another folder") from error
    return folder / f"{task.key}.json"


def _function(found: Any) -> Callable[..., Any] | None:
    return load_object(found, "a function of the study") if isinstance(found, str) else found  # type: ignore[no-any-return]


def _value(found: Any) -> Any:
    """What is given, or what the function gives."""
    found = load_object(found, "data of the study") if isinstance(found, str) else found
    return found() if callable(found) else found


def _named(found: Any) -> str:
    """What a key knows of a part of the study."""
    if isinstance(found, str) or found is None:
        return str(found)
    if isinstance(found, functools.partial):
        return f"{_named(found.func)} {found.args!r} {sorted(found.keywords.items())!r}"
    if callable(found):
        return f"{found.__module__}:{getattr(found, '__qualname__', type(found).__qualname__)}"
    state = hashlib.sha256()
    for tensor in tensors(found if isinstance(found, Tensor | Mapping) else list(_listed(found))):
        state.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _listed(found: Any) -> Iterable[Any]:
    if isinstance(found, tuple | list):
        return found
    raise RequestError(
        f"data of type {type(found).__name__} has no name", "a study is resumed by the names of its parts",
        "give a function that returns it, or a list of batches",
    )  # fmt: skip


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
