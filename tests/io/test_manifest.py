"""A sealed file: its digest is of every byte of it, and there is no way around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunella.errors import BadInput
from prunella.io.manifest import read_sealed, write_sealed

FIRST, LAST = {"zoo": 1}, {"a": {"sha256": "sha256:" + "0" * 64}}
"""What comes behind the seal, or before it; keys are sorted."""


@pytest.mark.parametrize("content", [FIRST, LAST], ids=["the seal is in the middle", "the seal is last"])
def test_every_flipped_bit_of_a_sealed_file_is_refused(tmp_path: Path, content: dict[str, object]) -> None:
    """One in the name of the seal too, which would else be a file of former days that has none."""
    file = write_sealed(tmp_path / "x.json", {"format": 2, **content})
    whole = file.read_bytes()
    assert read_sealed(file, what="x", todo="").data == {"format": 2, **content}
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(BadInput):
                read_sealed(file, what="x", todo="")


@pytest.mark.parametrize("change", [(b"\n", b""), (b": 2", b":  2"), (b"{\n", b"{\n\n"), (b',\n "sha', b', \n "sha')])
def test_the_same_data_in_another_text_is_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    file = write_sealed(tmp_path / "x.json", {"format": 2, **LAST})
    whole = file.read_bytes()
    assert whole.replace(*change, 1) != whole
    file.write_bytes(whole.replace(*change, 1))
    with pytest.raises(BadInput):
        read_sealed(file, what="x", todo="")


def test_format_1_may_have_no_seal_and_later_ones_may_not(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in ('{"a": 1}', '{"format": 1, "a": 1}'):
        file.write_text(text)
        assert read_sealed(file, what="x", todo="").integer("a") == 1
    file.write_text('{"format": 2, "a": 1}')
    with pytest.raises(BadInput, match="sha256 is missing"):
        read_sealed(file, what="x", todo="")
