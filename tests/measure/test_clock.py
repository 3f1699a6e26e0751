"""One clock, which a test can set."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella
from prunella.cli.console import stage
from prunella.measure.clock import fake_clock, now, since, thread_time
from prunella.measure.timing import own_clock, side_by_side

pytestmark = pytest.mark.usefixtures("every_sample")

SOURCE = Path(prunella.__file__).parent


def test_the_clock_goes_forward() -> None:
    start = now()
    assert since(start) >= 0 and since(start - 5) >= 5


def test_a_fake_clock_is_read_until_the_end_of_its_block() -> None:
    with pytest.raises(KeyError), fake_clock(iter([10.0, 12.5]).__next__):
        start = now()
        assert since(start) == 2.5
        raise KeyError
    assert 0 <= since(now()) < 1


def test_a_stage_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_clock(itertools.chain([100.0], itertools.repeat(107.25)).__next__), stage("planning"):
        pass
    assert "planning (7.2 s)" in capsys.readouterr().err


def test_a_measurement_stops_when_its_seconds_are_over() -> None:
    """This clock goes on by uneven steps, so that the interval of the ratio stays wide."""
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    steps = itertools.accumulate(itertools.cycle([1e-2, 3e-2, 1e-2, 5e-2, 2e-2]))
    with fake_clock(lambda: next(steps)):
        found = side_by_side(model, model, x, x, seconds=0.5)
    assert "median of 15 interleaved rounds" in found.how


def test_with_one_thread_other_programs_do_not_count() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert own_clock() is thread_time
        torch.set_num_threads(2)
        assert own_clock() is now
    finally:
        torch.set_num_threads(threads)


def test_no_other_file_reads_the_time() -> None:
    reads = re.compile(
        r"\bperf_counter|\bmonotonic\(|\btime\.time\(|\bthread_time\(\) *->|^import time\b", re.MULTILINE
    )
    found = {str(f.relative_to(SOURCE)) for f in SOURCE.rglob("*.py") if reads.search(f.read_text(encoding="utf-8"))}
    assert found == {"measure/clock.py"}
