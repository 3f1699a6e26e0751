"""Nested state comes back from a file as what it was, or there is one clear error; what 0.1 wrote is read."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.nested import Packer, equal, load_state, save_state, unpack

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TENSORS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).to(dtype))
)
STATES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=3),
        st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """`equal`, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = list(zip(one.items(), other.items(), strict=False))
        return len(one) == len(other) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return equal(one, other)


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_a_state_comes_back_as_what_it_was(state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        back = load_state(save_state(state, Path(folder) / "state"))
    assert same(back, state) and equal(back, state)


@given(STATES)
def test_the_json_of_a_state_is_json(state: Any) -> None:
    packer = Packer()
    entry = json.loads(json.dumps(packer.pack(state, "state")))
    assert same(unpack(entry, packer.tensors), state)


def test_numbers_that_are_not_finite_and_numbers_of_numpy(tmp_path: Path) -> None:
    given_ = {"best": math.inf, "worst": -math.inf, "none": math.nan, "np": np.float64(0.1), "i": np.int32(3)}
    back = load_state(save_state(given_, tmp_path / "x"))
    assert back["best"] == math.inf and back["worst"] == -math.inf and math.isnan(back["none"])
    assert back["np"] == 0.1 and back["i"] == 3 and type(back["i"]) is int


def test_tensors_are_copies_and_views_are_taken_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    back = load_state(save_state({"a": whole, "b": whole[2:], "c": whole.view(2, 3).T}, tmp_path / "x"))
    assert back["b"].equal(whole[2:]) and back["c"].equal(whole.view(2, 3).T)
    (tmp_path / "x").write_bytes(b"")
    assert back["a"].equal(whole)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"state\.a\[0\] cannot be written: it holds a builtin_function"):
        save_state({"a": [print]}, tmp_path / "x")
    deep: Any = 0
    for _ in range(150):
        deep = [deep]
    with pytest.raises(RequestError, match="more than 300"):
        save_state({"deep": {"deep": deep}, "more": [deep, [deep]]}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def old_file(path: Path, state: Any, *, version: Any = 1, **tensors: Tensor) -> Path:
    """A file of the state of tickets as 0.1 wrote it."""
    save_file(tensors, path, metadata={"prunella.state": json.dumps({"version": version, "state": state})})
    return path


def test_what_0_1_wrote_is_read(tmp_path: Path) -> None:
    state = ["dict", ["w", ["tensor", "0"]], [1, ["list", 1, 2.5, None, ["tuple", "x", True]]],
             ["seen", ["counter", ["a", 2]]], ["best", math.inf]]  # fmt: skip
    back = load_state(old_file(tmp_path / "x", state, **{"0": torch.ones(2)}))
    assert same(back, {
        "w": torch.ones(2), 1: [1, 2.5, None, ("x", True)], "seen": Counter(a=2), "best": math.inf,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("state", "version", "why"),
    [
        (["list"], 4, "version is 4, not a whole number from 1 to 3"),
        (["list"], "1", "version is '1'"),
        (["set", 1], 1, "'set' is not a kind of value"),
        ({"pickle": "x"}, 2, "'pickle' is not a kind of value"),
        ({"tensor": "t9"}, 2, "KeyError"),
        ({"tensor": ["t9"]}, 2, "TypeError"),
        ({"list": 3}, 2, "TypeError"),
        ({"dict": [[{"value": 1}]]}, 2, "ValueError"),
        ({"dict": [[{"list": []}, {"value": 1}]]}, 2, "TypeError"),
        ({"list": [], "tuple": []}, 2, "ValueError"),
        ({"value": [1]}, 2, "a value is neither a list nor an object"),
        ({}, 2, "ValueError"),
        ([], 1, "IndexError"),
    ],
)
def test_a_state_that_is_broken(tmp_path: Path, state: Any, version: Any, why: str) -> None:
    file = old_file(tmp_path / "x", state, version=version, t0=torch.ones(1))
    with pytest.raises(BadInput, match=why) as caught:
        load_state(file)
    assert caught.value.what == f"{file} is not a sound state"


def test_files_that_are_no_state(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a sound state"):
        load_state(tmp_path / "absent")
    save_file({"x": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(BadInput, match=r"without 'prunella\.state'"):
        load_state(tmp_path / "weights")
    file = save_state({"a": torch.ones(3)}, tmp_path / "x")
    data = file.read_bytes()
    for cut in (0, 4, 40, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(BadInput, match="not a sound state"):
            load_state(file)
    save_file({}, tmp_path / "twice", metadata={"prunella.state": '{"version": 2, "version": 2, "state": {}}'})
    with pytest.raises(BadInput, match="is there twice"):
        load_state(tmp_path / "twice")
