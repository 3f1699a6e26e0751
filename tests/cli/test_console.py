"""Progress on stderr, and errors of the library in the words of the command line."""

from __future__ import annotations

import pytest

from prunella.cli.console import as_typed, stage

OPTIONS = ("data", "loss", "skip", "target", "lr", "overwrite", "allow_pickle", "granularity", "min_density")


def test_a_line_for_each_stage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("first", 3) as tick:
        for _ in range(3):
            tick()
    with stage("second") as tick:
        tick(5, "anything")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split()[:2] for line in shown.err.splitlines()] == [["prunella:", "first"], ["prunella:", "second"]]


def test_a_stage_that_fails_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), stage("broken"):
        1 / 0  # noqa: B018
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("taylor needs `grad`: pass data= and loss=", "taylor needs `grad`: pass --data and --loss"),
        ("for example lr=1e-4, or data=", "for example --lr 1e-4, or --data"),
        ("min_density=0.2 is too much", "--min-density 0.2 is too much"),
        ("leave them out: skip=['a', 'b.c']", "leave them out: --skip a --skip b.c"),
        (
            "for example target=MACs(0.5) or target=Sparsity(0.9)",
            "for example --target macs=0.5 or --target sparsity=0.9",
        ),
        ("use granularity=Depth()", "use --granularity depth"),
        ("or pass overwrite=True (--overwrite) to replace it", "or pass --overwrite to replace it"),
        ("allow it (--allow-pickle, allow_pickle=True): tensors", "allow it (--allow-pickle): tensors"),
        ("for example loss=lambda model, batch: model(batch)", "for example --loss module:function"),
        ("macs=0.5 and ridge=2 are no options here", "macs=0.5 and ridge=2 are no options here"),
        ("--loss=x is typed already", "--loss=x is typed already"),
        ("the pattern skip='no*' matches nothing", "the pattern --skip no* matches nothing"),
    ],
)
def test_errors_name_the_options_of_the_verb(text: str, typed: str) -> None:
    assert as_typed(text, OPTIONS) == typed
    assert as_typed(text, ()) == text


def test_ratios_and_counts_are_said_as_a_verb_has_them() -> None:
    said = "leave ratios= and counts= out"
    assert as_typed(said, {"ratio", "count"}) == "leave --ratio and --count out"
    assert as_typed(said, {"ratios"}) == "leave --ratios and counts= out"  # those of `scan`
