"""Digests of what the methods give on small models, to prove that a change of the code changed no result.

    python benchmarks/digests/run.py record before.json [--only PATTERN]
    python benchmarks/digests/run.py compare before.json after.json

A record has a SHA-256 for each part of each cell: the masks of a plan, the weights of the smaller model, its outputs
and so on. Two records are to be made on one machine with the same libraries, since other ones add in another order.
Where the request is refused, the class of the error is what counts. Nothing is timed, and nothing is downloaded.
`compare` ends with 0 where all is equal, and with 1 after a list of what differs, is missing or is new.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> Iterator[str]:
    """A line for each digest that is not the same in both records."""
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            yield f"missing    {name}: {first[name][:24]}"
        elif name not in first:
            yield f"new        {name}: {second[name][:24]}"
        elif first[name] != second[name]:
            yield f"different  {name}: {first[name][:24]} -> {second[name][:24]}"


def compare(first: Path, second: Path) -> int:
    """Print what differs; the exit code."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (first, second))
    for line in differences(one["environment"], other["environment"]):
        print("environment", line)
    found = list(differences(one["digests"], other["digests"]))
    print(*found, f"{len(one['digests'])} and {len(other['digests'])} digests, {len(found)} differ", sep="\n")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="*", help="pattern of names of cells")
    comparing = verbs.add_parser("compare")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    asked = parser.parse_args()
    if asked.verb == "compare":
        return compare(asked.first, asked.second)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")  # before they are imported
    importlib.import_module("vision")  # torchvision has its operators before anything imports it
    from record import environment, prepare, record

    prepare()
    made = {"environment": environment(), "digests": record(asked.only)}
    asked.out.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
