"""The one reader of JSON: what it refuses, and what its errors say; and that the source has no other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prunella
from prunella.errors import BadInput, OutOfResources, RequestError
from prunella.io import files
from prunella.io.json import DEEPEST, Fields, decode, encode, parse, plain, read_config, read_object, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_what_is_written_is_read(value: Any) -> None:
    assert decode(encode(value).encode()) == value
    assert decode(encode(value, indent=None, sort=False)) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1} {', "Extra data"),
        (b'{"a": 1}\0', "Extra data"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'[{"b": {"a": 1, "c": 0, "a": 1}}]', "the key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"more than {DEEPEST}"),
        (b'{"a":' * (DEEPEST + 1) + b"0" + b"}" * (DEEPEST + 1), f"more than {DEEPEST}"),
        (b"[" * 100_000, "too deep"),
        (b"[" * 100_000 + b"]" * 100_000, "too deep"),
    ],
)
def test_text_that_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(BadInput, match=why) as caught:
        read_object(file, todo="fetch it again")
    assert caught.value.what == f"{file} cannot be read" and caught.value.why.startswith("broken or cut short: ")
    assert caught.value.todo == "fetch it again"


def test_an_empty_file_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.touch()
    with pytest.raises(BadInput, match="it is an empty file"):
        read_object(file, todo="fetch it again")


def test_as_deep_as_is_allowed_and_no_deeper() -> None:
    decode("[" * DEEPEST + "]" * DEEPEST)
    decode("[[1]]", deepest=2)
    with pytest.raises(ValueError, match="more than 1"):
        decode("[[1]]", deepest=1)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(BadInput, match="at most 10000000 are read"):
        read_config(file)
    file.write_bytes(b'{"a": 1}')
    assert read_object(file, largest=8).integer("a") == 1
    with pytest.raises(BadInput, match="at most 7 are read"):
        read_object(file, largest=7)


def test_infinities_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"limit": [0.0, Infinity], "x": NaN, "y": 1e999}')
    found = read_config(file)
    assert found.value("limit").items()[1].number() == math.inf and math.isnan(found.number("x"))
    with pytest.raises(BadInput, match="not JSON"):
        read_object(file)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent cannot be read\nNo such file or directory"):
        read_object(tmp_path / "absent")
    with pytest.raises(BadInput, match="Is a directory"):
        read_object(tmp_path)


WRONG: list[tuple[Callable[[Fields], object], str]] = [
    (lambda f: f.text("absent"), "absent is missing"),
    (lambda f: f.text("n"), "n is 3, not text"),
    (lambda f: f.text("none"), "none is null, not text"),
    (lambda f: f.text("half"), "not text"),
    (lambda f: f.integer("x"), "x is 0.5, not a whole number"),
    (lambda f: f.integer("yes"), "yes is true, not a whole number"),
    (lambda f: f.integer("three"), "three is 3.0, not a whole number"),
    (lambda f: f.integer("name"), "name is 'wanda', not a whole number"),
    (lambda f: f.integer("n", low=4), "n is 3, not a whole number of at least 4"),
    (lambda f: f.integer("n", high=2), "n is 3, not a whole number of at most 2"),
    (lambda f: f.integer("n", low=0, high=2), "n is 3, not a whole number from 0 to 2"),
    (lambda f: f.number("x", low=1), "x is 0.5, not a number of at least 1"),
    (lambda f: f.number("yes"), "yes is true, not a number"),
    (lambda f: f.number("huge"), "not a number that a float can hold"),
    (lambda f: f.flag("n"), "n is 3, not true or false"),
    (lambda f: f.list_of("inner"), "inner is an object of 2, not a list"),
    (lambda f: f.value("rows").items(3), "rows is a list of 2, not a list of 3"),
    (lambda f: f.value("rows").items()[1].items(2)[1].text(), r"rows\[1\]\[1\] is 4, not text"),
    (lambda f: f.value("rows").items()[0].integers(low=2), r"rows\[0\]\[0\] is 1, not a whole number of at least 2"),
    (lambda f: f.section("rows"), "rows is a list of 2, not an object"),
    (lambda f: f.section("none"), "none is null, not an object"),
    (lambda f: f.section("inner").text("a"), "inner.a is 1, not text"),
    (lambda f: f.section("inner").section("deep").flag("b"), "inner.deep.b is missing"),
    (lambda f: f.mapping("name"), "name is 'wanda', not an object"),
]
DATA = {
    "n": 3, "x": 0.5, "three": 3.0, "name": "wanda", "yes": True, "none": None, "huge": 10**400, "half": "\ud800",
    "rows": [[1, 2], [3, 4]], "inner": {"a": 1, "deep": {}},
}  # fmt: skip


@pytest.mark.parametrize(("read", "why"), WRONG)
def test_an_error_names_key_found_and_expected(read: Callable[[Fields], object], why: str) -> None:
    with pytest.raises(BadInput, match=why) as caught:
        read(parse(json.dumps(DATA), "x.json cannot be read", todo="write it again").fields())
    assert caught.value.what == "x.json cannot be read" and caught.value.todo == "write it again"
    assert len(str(caught.value).encode().splitlines()) == 3


def test_getters_give_what_is_there() -> None:
    found = Fields(DATA, "x")
    assert (found.text("name"), found.integer("n", low=3, high=3), found.number("n"), found.flag("yes")) == (
        "wanda", 3, 3.0, True,
    )  # fmt: skip
    assert [row.integers() for row in found.list_of("rows")] == [(1, 2), (3, 4)]
    assert found.mapping("inner") == DATA["inner"] and "none" not in found and "absent" not in found
    assert found.text("absent", default="-") == "-" and found.integer("none", default=0) == 0
    assert found.section("none", optional=True).data == {} and found.list_of("absent", default=()) == ()
    assert [key for key, _ in found.section("inner").values()] == ["a", "deep"]


def test_the_top_has_to_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[1]")
    with pytest.raises(BadInput, match="it is a list of 1, not an object"):
        read_object(tmp_path / "x")


def test_writing_is_stable_sorted_and_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_json(tmp_path / "x.json", {"b": 1, "a": [1.5, None]})
    assert file.read_text() == '{\n "a": [\n  1.5,\n  null\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(file, {"a": math.nan})

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OutOfResources, match="the disk is full: No space left on device"):
        write_json(file, {"a": 2})
    assert file.read_text().startswith('{\n "a": [') and list(tmp_path.iterdir()) == [file]
    with pytest.raises(RequestError, match="No such file or directory"):
        write_json(tmp_path / "absent" / "x.json", {})


def test_plain_data_is_what_json_can_say() -> None:
    assert plain({1: (math.nan, 2.0, True), "x": Path("a"), "y": {3}}) == {"1": [None, 2.0, True], "x": "a", "y": [3]}


def test_nothing_else_reads_json() -> None:
    source = Path(prunella.__file__).parent
    found = [str(f.relative_to(source)) for f in source.rglob("*.py") if re.search(r"json\.loads?\(", f.read_text())]
    in_memory = ["llm/smaller_tokenizer.py", "planning/readable.py"]  # texts that a tokenizer and a configuration write
    assert sorted(found) == ["io/json.py", *in_memory]
