"""Evolutionary search by Optuna (extra `search`): under a budget, or for the Pareto front of quality and cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prunella.errors import MissingExtra, RequestError, TargetMissed
from prunella.io.files import make_folder
from prunella.registry.method import search
from prunella.search.space import Evaluate, Predict, SearchResult, Space
from prunella.targets import Target

MAX_REMOVED = 0.95


@search(source="Deb et al. 2002, doi:10.1109/4235.996017; Akiba et al. 2019, arXiv:1907.10902")
def evolve(
    space: Space,
    target: Target,
    evaluate: Evaluate,
    *,
    trials: int = 100,
    storage: str | os.PathLike[str] | None = None,
    predict: Predict | None = None,
    seed: int = 0,
) -> SearchResult:
    """Evolve the sparsity of each group; every candidate meets the budget exactly.

    A candidate is one number in [0, 1] for each group. One factor scales all numbers until the target is just met, as
    `fixed` does in a plan, so that no trial is wasted on models that are too large or too small. The first candidate is
    uniform. `value = max evaluate(cut model)`, by NSGA-II with one objective.

    trials: in the whole Optuna study, over all processes. storage: an SQLite file, or the URL of a database
    (`postgresql+psycopg://user@host/name`) that processes and machines share: start the same call in each; None for
    this process alone. A stored study is resumed. predict: as in `knapsack`. seed: of this process's sampler; processes
    that share a study need different seeds, and the result then depends on their order.
    Errors: TargetMissed if removing all prunable units is not enough, MissingExtra without Optuna.

    Use: many groups that depend on each other, and an evaluation of seconds. Avoid: fewer than about fifty evaluations:
    take `knapsack` or `netadapt`.
    """
    cost = predict or partial(space.cost, target)

    def objective(trial: Any) -> float:
        counts = space.scaled(_suggested(trial, space), target, predict)
        if counts is None:
            raise TargetMissed(
                f"{target} cannot be met", "removing all prunable units is not enough", "lower min_density=, skip less"
            )
        trial.set_user_attr("counts", list(counts))
        trial.set_user_attr("cost", cost(counts))
        return space.evaluate(evaluate, counts)

    with _study(space, evaluate, storage, ["maximize"], f"evolve {target}", seed) as study:
        trials_here = _run(study, objective, trials)
        best = study.best_trial
    shares = space.shares(tuple(best.user_attrs["counts"]))
    return SearchResult(shares, float(best.value), float(best.user_attrs["cost"]), trials_here)


@search(source="Deb et al. 2002, doi:10.1109/4235.996017; Akiba et al. 2019, arXiv:1907.10902")
def evolve_front(
    space: Space,
    unit: type[Target],
    evaluate: Evaluate,
    *,
    trials: int = 100,
    storage: str | os.PathLike[str] | None = None,
    predict: Predict | None = None,
    seed: int = 0,
) -> tuple[SearchResult, ...]:
    """The Pareto front of quality and cost: no other result is better than one of these in both.

    NSGA-II with two objectives, `max evaluate` and `min cost`, over the removed fraction of each group. The initial
    population holds the dense model and one with half of every group removed.

    unit: unit of the cost: `MACs`, `Params`, `Bytes`, `Latency` (with predict=, from `latency_table`), or `Sparsity`,
    the remaining units. Other parameters are those of `evolve`. The results are sorted by cost, the smallest first.

    Use: a budget that is not fixed yet. Avoid: a fixed budget: `evolve` spends all its trials on it.
    """
    cost = predict or partial(space.cost, unit(0.5))

    def objective(trial: Any) -> tuple[float, float]:
        counts = space.removed({name: MAX_REMOVED * share for name, share in _suggested(trial, space).items()})
        trial.set_user_attr("counts", list(counts))
        return space.evaluate(evaluate, counts), cost(counts)

    with _study(space, evaluate, storage, ["maximize", "minimize"], f"front {unit.__name__}", seed) as study:
        trials_here = _run(study, objective, trials)
        best = [(space.shares(tuple(trial.user_attrs["counts"])), *trial.values) for trial in study.best_trials]
    results = [SearchResult(shares, float(value), float(spent), trials_here) for shares, value, spent in best]
    unique = {(result.cost, result.value): result for result in results}
    return tuple(unique[key] for key in sorted(unique))


def _suggested(trial: Any, space: Space) -> dict[str, float]:
    shares = {name: float(trial.suggest_float(name, 0.0, 1.0)) for name in space.names}
    return shares if any(shares.values()) else dict.fromkeys(shares, 0.5)


@contextmanager
def _study(
    space: Space,
    evaluate: Evaluate,
    storage: str | os.PathLike[str] | None,
    directions: Any,
    question: str,
    seed: int,
) -> Iterator[Any]:
    """The Optuna study of this question, space and evaluation; its connections are closed at the end."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("this search needs optuna", str(error), "pip install 'prunella[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    name = f"{question} {space.identity.plus({'metric': evaluate}).digest[:16]}" if storage else question
    opened = _open(storage)
    try:
        study = optuna.create_study(
            storage=opened, sampler=sampler, study_name=name, directions=directions, load_if_exists=True
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(dict.fromkeys(space.names, 0.5), skip_if_exists=True)
            if len(directions) > 1:
                study.enqueue_trial(dict.fromkeys(space.names, 0.0), skip_if_exists=True)
        yield study
    finally:
        if opened is not None:
            opened.remove_session()
            opened.engine.dispose()


def _open(storage: str | os.PathLike[str] | None) -> Any:
    from optuna.storages import RDBStorage

    if (url := _url(storage)) is None:
        return None
    try:
        return RDBStorage(url)
    except ImportError as error:
        why = f"{storage} needs a driver: {error}"
        raise MissingExtra("the storage cannot be opened", why, "pip install 'prunella[postgresql]'") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("optuna", "sqlalchemy", "psycopg"):
            raise
        why = " ".join(str(error).split())[:200]
        raise RequestError("the storage cannot be opened", why, "an SQLite file, or a URL that answers") from error


def _url(storage: str | os.PathLike[str] | None) -> str | None:
    if storage is None or (isinstance(storage, str) and "://" in storage):
        return storage
    path = Path(storage)
    make_folder(path.parent)
    return f"sqlite:///{path}"


def _run(study: Any, objective: Callable[[Any], Any], trials: int) -> int:
    """Run trials until the study has this number of complete ones, over all processes; the number of this process."""
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    if trials < 1:
        raise RequestError(f"trials={trials} is out of range", "a whole number of at least 1")
    if _complete(study) < trials:
        finished: list[object] = []
        enough = MaxTrialsCallback(trials, states=(TrialState.COMPLETE,))
        study.optimize(objective, callbacks=[enough, lambda _, trial: finished.append(trial)])
        return len(finished)
    return 0


def _complete(study: Any) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
