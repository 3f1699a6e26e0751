"""What decides which kernel is quickest: a choice measured on one machine says nothing of another."""

from __future__ import annotations

import torch

from prunella._version import __version__
from prunella.measure.machine import cpu_info, cpu_name
from prunella.runtime.kernels import library as native


def fingerprint() -> dict[str, str]:
    """Measured choices hold where all of this is the same."""
    info = cpu_info()
    return {
        "cpu": cpu_name(),
        "stepping": " ".join(info.get(key, "") for key in ("cpu family", "model", "stepping")),
        "kernels": native.isa() if native.available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "prunella": __version__,
    }
