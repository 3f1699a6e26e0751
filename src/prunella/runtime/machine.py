"""What decides which kernel is quickest: a choice measured on one machine says nothing of another."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import prunella
from prunella.runtime import native


def cpu_info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """The processor in words."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def fingerprint() -> dict[str, str]:
    """Measured choices hold where all of this is the same."""
    info = cpu_info()
    return {
        "cpu": cpu_name(),
        "stepping": " ".join(info.get(key, "") for key in ("cpu family", "model", "stepping")),
        "kernels": native.isa() if native.available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "prunella": prunella.__version__,
    }
