"""The tests of this folder run on a GPU, and are skipped with a reason where there is none.

`PRUNELLA_GPU=cpu` rehearses them on the CPU: that shows that the tests themselves are right, and nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ASKED = os.environ.get("PRUNELLA_GPU", "cuda")
HERE = Path(__file__).parent


def missing() -> str:
    """Why there is no GPU to test on; empty if there is one."""
    if ASKED == "cpu" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"no GPU: torch {torch.__version__} was built without one"
    return f"no GPU: torch {torch.__version__} finds no device of its driver"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them with the reason."""
    why = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The device on which the tests ran."""
    if ASKED != "cpu" and torch.cuda.is_available():
        terminalreporter.write_line(f"on {torch.cuda.get_device_name()}, torch {torch.__version__}")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The device; its cached memory is free before and after."""
    device = torch.device(ASKED)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@pytest.fixture
def real(gpu: torch.device) -> torch.device:
    """The device, for tests that mean nothing in a rehearsal."""
    if gpu.type != "cuda":
        pytest.skip("a rehearsal on the CPU")
    return gpu
