"""Processes that torch's process group joins, forked from this one: they have its imports."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path


def together(count: int, work: Callable[[], object], logs: Path) -> None:
    """Do work in so many processes with the variables that torchrun sets; what one raises is shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        _child(work, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, logs / f"{rank}.log")
        for rank in range(count)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * count, [file.read_text()[-3000:] for file in logs.glob("*.log")]


def _child(work: Callable[[], object], environment: dict[str, str], log: Path) -> int:
    """The number of a forked process that does this work; what it raises is in the log."""
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment)
            work()
            os._exit(0)
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(1)
    return child
