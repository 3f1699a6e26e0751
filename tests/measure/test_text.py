"""One writer of tables and one format of numbers: plain text, the same on every terminal."""

from __future__ import annotations

import math

import pytest

from prunella.measure import text
from prunella.measure.text import table


def test_a_table_by_hand() -> None:
    rows = [("conv", "4/8", 12), ("a longer name", "16/16", 1234)]
    assert table(("name", "kept", "n"), rows, right=(1, 2)).split("\n") == [
        "name            kept     n",
        "conv             4/8    12",
        "a longer name  16/16  1234",
    ]


def test_what_rich_would_read_as_markup_is_text() -> None:
    assert table((), [("[red]w[/red]", ":smile:", "https://x.y")]) == "[red]w[/red]  :smile:  https://x.y"


def test_neither_terminal_nor_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("x" * 300, "1"), ("y", "2")]
    plain = table(("name", "n"), rows)
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert table(("name", "n"), rows) == plain and "\x1b" not in plain
    assert len(plain.split("\n")) == 3 and "x" * 300 + "  1" in plain


def test_a_cell_stays_in_its_line() -> None:
    assert table((), [("a\nb", "c\td"), ("", ""), ("e", "")]).split("\n") == ["a b  c d", "", "e"]
    assert table(("name", "n"), []) == "name  n" and table((), []) == ""


def test_columns_are_as_wide_as_a_terminal_shows_them() -> None:
    wide, narrow = table((), [("層", "1"), ("ab", "2")]).split("\n")
    assert (wide, narrow) == ("層  1", "ab  2")


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (999.6, "1.00 k", "1.00 kB"),
        (1234, "1.23 k", "1.23 kB"),
        (86_400, "86.4 k", "86.4 kB"),
        (999_499, "999 k", "999 kB"),
        (999_501, "1.00 M", "1.00 MB"),
        (11_689_512, "11.7 M", "11.7 MB"),
        (-4.09e9, "-4.09 G", "-4.09 GB"),
        (2e15, "2000 T", "2000 TB"),
        (12.5, "12.5", "12.5 B"),
        (math.inf, "–", "–"),
    ],
)
def test_counts_and_bytes(value: float, count: str, size: str) -> None:
    assert (text.short_count(value), text.byte_size(value)) == (count, size)


def test_the_other_numbers() -> None:
    assert text.exact_count(11_689_512) == "11,689,512"
    assert [text.significant(x) for x in (0.91324, 3.0, math.nan)] == ["0.9132", "3", "–"]
    assert [text.duration(x) for x in (0.01234, 0.9999, 2.5, math.nan)] == ["12.3 ms", "1 s", "2.5 s", "–"]
    assert [text.duration(x) for x in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2 h"]
    assert [text.duration(x) for x in (172_799, 172_800, 2.86e6)] == ["48 h", "2 days", "33.1 days"]
    assert (text.ratio(1.618), text.percent(0.4909), text.percent(0.4909, 2)) == ("1.62x", "49.1%", "49.09%")
    assert (text.interval(0.951, 1.06, ".2f"), text.interval(1, 2.5)) == ("[0.95, 1.06]", "[1, 2.5]")
    assert (text.spread(3, 2.64575), text.spread(3, math.nan)) == ("3 ± 2.6", "3")
    assert (text.change("4", "2"), text.change("4", "4")) == ("4 -> 2", "4")
