"""What may be done in one file only, so that it is done right everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import prunella

SOURCE = Path(prunella.__file__).parent


def files_with(pattern: str) -> set[str]:
    expression = re.compile(pattern, re.MULTILINE)
    texts = {str(file.relative_to(SOURCE)): file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py")}
    return {name for name, text in texts.items() if expression.search(text)}


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        (r"get_rng_state|set_rng_state|fork_rng|random\.[gs]et_?state|np\.random\.(seed|get_state)", "model/rng.py"),
        (r"^import random as|\brandom\.seed\(|torch\.manual_seed\(", "model/rng.py"),
        (r"set_fastpath_enabled", "model/state.py"),
        (r"_orig_mod\b(?!\.)|\bDistributedDataParallel\b(?!`)|\bAveragedModel\b(?!`)", "model/unwrap.py"),
    ],
)
def test_one_file_does_it(pattern: str, file: str) -> None:
    assert files_with(pattern) == {file}


def test_a_dictionary_that_others_fill_is_copied_in_one_step() -> None:
    """`list(d.items())` makes a tuple for each entry; garbage that is collected meanwhile may import and fill `d`."""
    assert not files_with(r"list\((vars\(|sys\.modules)")


def test_training_flags_are_set_back_by_the_guard_alone() -> None:
    assert files_with(r"\.training = (?!False)") == {"model/state.py", "recovery/batchnorm.py"}


def test_plain_data_alone_is_copied_without_the_one_copy() -> None:
    """Each of these copies a configuration, a state dict or a table of conversions, never a model."""
    plain = {
        "graph/solve/block_counters.py", "llm/streaming/conversion.py", "lottery/session.py",
        "planning/config_search.py", "planning/readable.py",
    }  # fmt: skip
    assert files_with(r"copy\.deepcopy\(") == {"model/copying.py", *plain}
