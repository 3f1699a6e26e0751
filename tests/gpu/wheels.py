"""Collect the wheels that `make gpu` installs on a machine without a network: all but torch, which is there.

python tests/gpu/wheels.py FOLDER [--python 3.11] [--platform manylinux_2_28_x86_64]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "numpy>=1.26", "setuptools")


def needed() -> list[str]:
    """What the package and these tests need beside torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [entry for entry in project["dependencies"] if re.split(r"[<>=!~ ]", entry)[0] != "torch"]
    return [*names, *TESTS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--platform", default="", help="of the machine with the GPU, if it is another one")
    parser.add_argument("--needed", action="store_true", help="print the names, and collect nothing")
    asked = parser.parse_args()
    if asked.needed:
        print(" ".join(needed()))
        return 0
    command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--dest", str(asked.folder)]
    command += ["--quiet", "--disable-pip-version-check", "--python-version", asked.python]
    command += ["--platform", asked.platform] if asked.platform else []
    print(f"collecting wheels for Python {asked.python} in {asked.folder}")
    return subprocess.run([*command, *needed()], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
