"""The machine and libraries that a measured choice is valid for: elsewhere another kernel may be the fastest."""

from __future__ import annotations

import torch

from prunella._version import __version__
from prunella.measure.machine import cpu_info, cpu_name
from prunella.runtime.kernels import library


def fingerprint() -> dict[str, str]:
    """Measured choices are valid where all of this is the same."""
    info = cpu_info()
    return {
        "cpu": cpu_name(),
        "stepping": " ".join(info.get(key, "") for key in ("cpu family", "model", "stepping")),
        "kernels": library.isa() if library.available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "prunella": __version__,
    }
