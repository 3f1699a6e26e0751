"""A plan file gives back exactly what went in, or one clear error."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunella.allocation import global_
from prunella.errors import BadInput, RequestError
from prunella.graph.cut.changes import Along, Changes, Renumbered
from prunella.graph.data import Frozen, ReasonKind
from prunella.io import plan_file
from prunella.io.plan_file import load_plan, save_plan
from prunella.planning.accounting import Amount, Row
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.targets import MACs
from prunella.transform.shrink import shrink

DATA = Path(__file__).parent / "data"


def make_plan() -> Plan:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5, 2, generator=generator) > 0.5
    return Plan(
        recipe={"criterion": "wanda", "rounds": 3, "betas": (0.9, 0.999), "skip": ["fc"], "ratio": {1: 0.1}, "x": None},
        target=MACs(1 / 3),
        before=Amount(10.0, 1e9, 40.0, 9.0),
        after=Amount(5.0, 1e9 / 3, 20.0, 4.0),
        keep={"a.conv": torch.tensor([True, False, True])},
        masks={"b.weight": mask, "scalar": torch.tensor(True)},
        changes=Changes(
            cuts={"a.conv.weight": {0: torch.tensor([0, 2]), 1: torch.tensor([], dtype=torch.int64)}},
            attributes={("a", "num_heads"): 3, ("a:config", "intermediate_size"): 7},
            along=(Along("layer_norm", 2, -1, torch.tensor([0, 3])), Along("mean", 0, 1, torch.tensor([1]), 1, 3)),
            renumbered=(Renumbered((0,), ((1, 2),), torch.tensor([5, 6])),),
            dropped={"a.blocks": ("1", "4")},
            lists={("a", "scales"): (1, 4)},
        ),
        rows=(Row("a.conv", "channel", 2, 3, 10, 5, 1e9, 0.1),),
        frozen=(Frozen("b.weight", 0, 4, "output of the model", "net.py:12", ReasonKind.SOURCE),),
        weights={"a.conv.weight": torch.randn(2, 3, generator=generator).to(torch.bfloat16)},
        inputs={"ids": torch.arange(6).view(2, 3), "nested": (torch.ones(1), [None, 2])},
        others=({"ids": torch.arange(3).view(1, 3)},),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, e.name), getattr(b, e.name)) for e in fields(a))
    return type(a) is type(b) and bool(a == b)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    plan = make_plan()
    back = load_plan(save_plan(plan, tmp_path / "p.plan"))
    for entry in fields(Plan):
        assert same(getattr(plan, entry.name), getattr(back, entry.name)), entry.name


def test_a_plan_without_a_target_is_read_without_one(tmp_path: Path) -> None:
    assert load_plan(save_plan(replace(make_plan(), target=None), tmp_path / "p")).target is None


def test_what_0_1_wrote_is_read() -> None:
    plan = load_plan(DATA / "channels_0_1.plan")
    assert plan.target == MACs(0.9) and plan.got == pytest.approx(240 / 304)
    assert plan.keep["up"].nonzero().flatten().tolist() == [0, 3, 4, 5, 6, 7]
    assert plan.cuts["up.weight"][0].tolist() == plan.cuts["mid.weight"][1].tolist() == [0, 3, 4, 5, 6, 7]
    assert Recipe.read(plan.recipe) == Recipe(
        allocation=global_, min_density=0.25, round_to=2, seed=3, equal_widths=True
    )
    assert "multiples of 2" in str(plan) and [entry.entity for entry in plan.frozen] == ["mid.weight", "down.weight"]


def test_blocks_that_0_1_dropped_are_read_and_what_it_made_up_is_not() -> None:
    plan = load_plan(DATA / "depth_0_1.plan")
    assert plan.dropped == {"layers": ("1",)} and plan.keep["layers"].tolist() == [True, False, True]
    assert plan.target is None and plan.got == pytest.approx(1 / 3)


def test_a_plan_of_one_example_is_read() -> None:
    """Format 3, the last without further examples."""
    plan = load_plan(DATA / "format_3.plan")
    (call,) = plan.changes.along
    assert (call.name, call.number, call.axis, call.example) == ("layer_norm", 0, 1, 0)
    assert plan.others == () and plan.inputs.shape == (2, 6) and len(call.kept) == 4  # type: ignore[union-attr]


def test_a_plan_that_does_not_count_the_calls_of_a_run_is_read() -> None:
    """Format 4."""
    plan = load_plan(DATA / "format_4.plan")
    (call,) = plan.changes.along
    assert (call.name, call.number, call.example, call.calls) == ("layer_norm", 0, 0, 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    small: Any = shrink(model, plan)
    assert small[0].out_features == len(call.kept) == 4


def test_the_same_plan_gives_the_same_bytes_and_no_pickle(tmp_path: Path) -> None:
    one, two = save_plan(make_plan(), tmp_path / "1"), save_plan(make_plan(), tmp_path / "2")
    assert one.read_bytes() == two.read_bytes()
    assert list(tmp_path.iterdir()) == [one, two] or sorted(tmp_path.iterdir()) == [one, two]


def test_masks_are_packed_to_bits(tmp_path: Path) -> None:
    plan = replace(make_plan(), masks={"w": torch.ones(800_000, dtype=torch.bool)})
    assert save_plan(plan, tmp_path / "p").stat().st_size < 110_000


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = save_plan(make_plan(), tmp_path / "p")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadInput, match="truncated or damaged"):
        load_plan(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_plan(make_plan(), tmp_path / "p")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="damaged"):
        load_plan(path)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_plan(tmp_path / "absent")
    save_file({"x": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(BadInput, match="is not a plan"):
        load_plan(tmp_path / "weights")
    monkeypatch.setattr(plan_file, "VERSION", 99)
    newer = save_plan(make_plan(), tmp_path / "newer")
    monkeypatch.undo()
    with pytest.raises(BadInput, match="the file has 99"):
        load_plan(newer)


def test_code_is_not_data(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds a builtin_function"):
        save_plan(replace(make_plan(), recipe={"criterion": print}), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_what_the_text_of_a_plan_says_is_in_the_digest(tmp_path: Path) -> None:
    """A plan whose cuts were taken out, or whose numbers were changed, is another plan."""
    path = save_plan(make_plan(), tmp_path / "p")
    data = path.read_bytes()
    for old, new in ((b"num_heads", b"num_heedz"), (b"output of the model", b"output of the motel")):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        with pytest.raises(BadInput, match="damaged"):
            load_plan(path)


def test_a_cut_of_a_module_that_the_model_does_not_have_is_misuse_not_a_bug() -> None:
    """Found by fuzzing: a name such as `../x` was looked up among the modules before anything checked it."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    changes = Changes(cuts={"../x": {0: torch.tensor([0])}})
    with pytest.raises(RequestError):
        shrink(model, replace(make_plan(), changes=changes, masks={}, weights={}, keep={}))
