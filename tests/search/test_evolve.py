"""The evolutionary search: within its budget, by one process, by two on one file, and on a real database server."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunella as pr
from prunella.search import Space, evolve, evolve_front, space
from tests.graphs import convnet, images
from tests.search.test_netadapt import quality

optuna = pytest.importorskip("optuna", reason="needs the extra `search`")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore::DeprecationWarning")
ROOT = Path(__file__).parents[2]
WORKER = """
import sys, time, warnings
from pathlib import Path
import prunella as pr
from tests.graphs import convnet, images
from tests.search.test_netadapt import quality
from tests.stopping import at_every_tick
here = Path(sys.argv[3])

def meet():  # in its first trial each waits for that of the other: a busy machine may start one of them much later
    (here / sys.argv[2]).touch()
    while len(list(here.iterdir())) < 2:
        time.sleep(0.01)

at_every_tick(meet)
cuts = pr.search.space(convnet().eval(), images()[0], pr.Recipe())
found = pr.search.evolve(cuts, pr.MACs(0.4), quality, trials=10, storage=sys.argv[1], seed=int(sys.argv[2]))
print(found.tried, found.value, found.cost)
"""


def cuts() -> Space:
    return space(convnet().eval(), images()[0], pr.Recipe())


def test_every_trial_is_within_the_budget_and_the_best_is_found() -> None:
    whole, seen = cuts(), list[float]()
    budget = whole.budget(pr.MACs(0.4))

    def watched(model: object) -> float:
        seen.append(2.0 * sum(model.get_submodule(n).weight.numel() * k for n, k in (("0", 36), ("3", 9), ("7", 1))))  # type: ignore[attr-defined]
        return quality(model)  # type: ignore[arg-type]

    found = evolve(whole, pr.MACs(0.4), watched, trials=25)
    assert len(seen) == found.tried == 25 and max(seen) <= budget
    assert found.cost == whole.cost(pr.MACs(1), whole.removed(found.shares)) <= budget
    uniform = whole.scaled(dict.fromkeys(whole.names, 0.5), pr.MACs(0.4))
    assert uniform is not None and found.value >= whole.evaluate(quality, uniform)
    plan = pr.plan(whole.model, images()[0], pr.Recipe(allocation=found.allocation), target=pr.MACs(0.4))
    assert {row.name: 1 - row.kept / row.total for row in plan.rows} == pytest.approx(found.shares)


def test_the_same_seed_finds_the_same() -> None:
    one, two = (evolve(cuts(), pr.Params(0.5), quality, trials=6, seed=3) for _ in range(2))
    assert (one.shares, one.value) == (two.shares, two.value)


def test_the_front_has_nothing_that_another_beats() -> None:
    front = evolve_front(cuts(), pr.MACs, quality, trials=25)
    assert len(front) > 2
    for a, b in itertools.pairwise(front):
        assert a.cost < b.cost and a.value < b.value
    assert front[-1].value == max(one.value for one in front)


def test_a_study_goes_on_and_other_models_have_their_own(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "study.db"
    first = evolve(cuts(), pr.MACs(0.4), quality, trials=4, storage=file)
    again = evolve(cuts(), pr.MACs(0.4), quality, trials=6, storage=file)
    assert (first.tried, again.tried) == (4, 2) and again.value >= first.value
    other = space(convnet(seed=1).eval(), images()[0], pr.Recipe())
    assert evolve(other, pr.MACs(0.4), quality, trials=1, storage=file).tried == 1


def workers(storage: str, environment: dict[str, str] | None = None) -> list[list[float]]:
    lines = [sys.executable, "-W", "ignore", "-c", WORKER, storage]
    env = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as place:
        running = [
            subprocess.Popen([*lines, str(seed), place], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
            for seed in (1, 2)
        ]
        out = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [[float(word) for word in text.split()] for text in out]


def check(found: list[list[float]], storage: str) -> None:
    """Both did some, together as many as asked and at most one more each, and the best of all is known."""
    tried = [int(row[0]) for row in found]
    kept = optuna.storages.RDBStorage(storage)
    study = optuna.load_study(study_name=optuna.get_all_study_names(kept)[0], storage=kept)
    trials, best = len(study.trials), study.best_value
    kept.remove_session()
    kept.engine.dispose()
    assert min(tried) >= 1 and 9 <= sum(tried) <= 11 and trials == 1 + sum(tried)
    assert max(row[1] for row in found) == best


@pytest.mark.slow
def test_two_processes_share_one_file(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    evolve(cuts(), pr.MACs(0.4), quality, trials=1, storage=file)  # makes the tables
    check(workers(str(file)), f"sqlite:///{file}")


def postgres_folder() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL server of our own, stopped at the end."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs psycopg: pip install 'prunella[postgresql]'")
    binaries = postgres_folder()
    if binaries is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    user = {}
    if os.getuid() == 0:  # the server refuses to be root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("needs the user postgres, since the server does not run as root")
        user = {"user": owner.pw_uid, "group": owner.pw_gid}
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        if user:
            os.chown(folder, user["user"], user["group"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def do(*words: str) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)  # type: ignore[call-overload]

        do(str(binaries / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "prunella", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        do(
            str(binaries / "pg_ctl"),
            "-D",
            str(folder / "data"),
            "-o",
            options,
            "-l",
            str(folder / "log"),
            "-w",
            "start",
        )
        try:
            yield f"postgresql+psycopg://prunella@127.0.0.1:{port}/postgres"
        finally:
            do(str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")


@pytest.mark.slow
def test_two_processes_share_a_postgresql_server(server: str) -> None:
    evolve(cuts(), pr.MACs(0.4), quality, trials=1, storage=server)
    check(workers(server), server)


def test_a_storage_that_does_not_answer_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but longer than the head of one would be" * 20)
    with pytest.raises(pr.PruningError, match="storage cannot be opened"):
        evolve(cuts(), pr.MACs(0.4), quality, trials=1, storage=tmp_path / "text.db")
