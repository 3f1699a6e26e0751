"""One call: every target is met, no stage leaves a worse model, and what is left out is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunella as pr
from prunella.app.prune import asked_of
from prunella.app.prune_data import split
from prunella.app.prune_groups import residual_streams
from prunella.app.prune_plan import REFITTED, _by_norm, _Measured, planned
from prunella.app.prune_recover import Pair, _kept, _polyak, vertex
from prunella.app.prune_stages import Progress, StageTimer, seconds_of
from prunella.errors import BadInput, NotSupported, RequestError, TargetMissed
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.io.journal import Records
from prunella.measure.clock import fake_clock
from prunella.metrics import Timing
from prunella.model.forward import judged
from prunella.search.measured import cosine_distance, curves, distance_of, divergence
from tests.zoo import convolutional as conv
from tests.zoo import odd
from tests.zoo.test_zoo import CASES


class Wide(nn.Module):
    """Two groups of 32 and 64 channels behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.b, self.c = nn.Conv2d(32, 64, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)) * 9)


def _images(count: int = 6, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def _names(pruned: pr.Pruned) -> list[str]:
    return [stage.name for stage in pruned.history]


def _met(pruned: pr.Pruned) -> bool:
    return all(
        getattr(pruned.plan.after, target.name) <= target.absolute(getattr(pruned.plan.before, target.name)) + 1e-6
        for target in pruned.targets
    )


def _finer(pruned: pr.Pruned) -> list[str]:
    """Groups whose widths are finer than hardware likes, as the plan says."""
    remarks = [remark for remark in pruned.plan.remarks if remark.startswith("finer widths: ")]
    return [name for name in pruned.plan.keep if any(f"{name} (multiple of " in remark for remark in remarks)]


def test_targets_are_met_and_the_model_is_as_before() -> None:
    model, data = Wide().eval(), _images()
    before = copy.deepcopy(model.state_dict())
    pruned = pr.prune(model, data[0][:2], target=[pr.MACs(0.5), pr.Params(0.4)], data=data)
    assert _met(pruned) and pruned.plan.after.macs < pruned.plan.before.macs
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    finer = _finer(pruned)
    assert {int(keep.sum()) % 8 for name, keep in pruned.plan.keep.items() if name not in finer} == {0}
    assert len(finer) == 1
    assert _names(pruned) == [
        "groups", "statistics", "measured losses", "allocation", "cut", "compare", "reconstruct",
        "bn", "distill",
    ]  # fmt: skip
    assert str(pruned).startswith(f"macs={pruned.plan.got:.4g} (asked 0.5), params=")
    assert pruned.report.metrics[0].before == 864 + 64 + 2112 + 325


def test_the_plan_is_the_one_of_the_model() -> None:
    """Without recovery the model is what `shrink` makes of the plan, which the oracle has proven."""
    model, data = Wide().eval(), _images()
    pruned = pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=data, recover="none")
    small = pr.shrink(model, pruned.plan)
    assert torch.equal(small(data[0]), pruned.model(data[0]))
    assert verify(model, small, pruned.plan.changes, data[0][:2]).exact
    assert str(pruned).startswith("NOT RECOVERED, not usable yet: recover= or the budget left it out")


def test_no_stage_returns_a_worse_model() -> None:
    """A learning rate that destroys the network is undone, and the history says so."""
    model, data = Wide().eval(), _images()
    pruned = pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=data, recover={"steps": 8, "lr": 300.0})
    trained = pruned.history[-1]
    assert trained.name == "distill" and "undone" in trained.note and trained.after == trained.before
    for stage in pruned.history:
        if stage.before is not None and stage.after is not None:
            assert stage.after <= stage.before * (1.001 if stage.name == "bn" else 1)
    same = pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=data, recover="reconstruct")
    assert torch.equal(same.model(data[0]), pruned.model(data[0]))
    assert pruned.distance == same.distance and pruned.distance < pruned.history[5].after  # type: ignore[operator]


def test_without_data_the_first_line_says_what_to_give_and_no_group_is_emptied() -> None:
    model = Wide().eval()
    with torch.no_grad():
        model.a.weight.mul_(1e-3)  # a layer with small weights is not cut before all others
    pruned = pr.prune(model, _images()[0][:2], target=pr.MACs(0.5))
    assert str(pruned).splitlines()[0].startswith("NOT RECOVERED, not usable yet: pass data=...")
    assert _met(pruned) and all(int(keep.sum()) >= 0.25 * len(keep) for keep in pruned.plan.keep.values())
    assert pruned.distance is None and "left out: there is no data" in pruned.history[-1].note


def test_losses_by_norm_grow_without_limit_as_a_group_is_emptied() -> None:
    losses = _by_norm(torch.tensor([3.0, 1.0, 2.0]), [0, 1, 2, 3])
    expected = [0, -math.log(1 - 1 / 14), -math.log(1 - 5 / 14)]
    assert [losses[n] for n in range(3)] == pytest.approx(expected, abs=1e-5) and losses[3] > 20


def test_residual_streams_are_found_and_stay_where_the_target_allows() -> None:
    cases = [
        (conv.ResNet, {"stem.0", "block2.conv2.0"}), (conv.VGG, set()), (conv.SqueezeExcite, set()),
        (conv.MobileNet, {"stem.0"}), (conv.DenseNet, set()),
    ]  # fmt: skip
    for build, expected in cases:
        model, x = build().eval(), torch.randn(2, 3, 8, 8)  # type: ignore[operator]
        groups = couple(model, x).groups
        producers = {m.entity.removesuffix(".weight") for g in groups if g.name in residual_streams(model, groups, x)
                     for m in g.members if m.role == "out"}  # fmt: skip
        assert expected <= producers and bool(expected) == bool(producers), build
    resnet, data = conv.ResNet().eval(), _images()
    inner = pr.prune(resnet, data[0][:2], target=pr.MACs(0.7), data=data, recover="none")
    assert set(inner.plan.keep) == {"block1.conv1.0", "block2.conv1.0", "block3.conv1.0"}
    deep = pr.prune(resnet, data[0][:2], target=pr.MACs(0.1), data=data, recover="none")
    assert _met(deep) and "stem.0" in deep.plan.keep and "residual stream" in deep.history[0].note


@pytest.mark.parametrize(
    "name", ["shufflenet", "mobilenet", "group norm", "grouped queries", "shared twice", "densenet"]
)
def test_small_networks_meet_two_targets(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, data = case.build().eval(), [torch.randn(8, *case.shape[1:]) for _ in range(3)]
    pruned = pr.prune(model, torch.randn(case.shape), target=[pr.MACs(0.7), pr.Params(0.75)], data=data)
    assert _met(pruned)
    assert pruned.model(data[0]).shape == model(data[0]).shape


def test_tokens_and_dictionaries() -> None:
    model = odd.TiedLanguageModel().eval()
    data = [torch.randint(0, 10, (8, 5)) for _ in range(3)]
    pruned = pr.prune(model, data[0][:2], target=pr.MACs(0.7), data=data)
    assert _met(pruned) and pruned.model(data[0]).shape == model(data[0]).shape


@pytest.mark.parametrize("pack", [lambda x: (x, torch.zeros(len(x))), lambda x: [x, torch.zeros(len(x))]])
def test_labels_of_a_loader_are_left_out(pack: Callable[[Tensor], Any]) -> None:
    model, data = Wide().eval(), _images()
    plain = pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=data, recover="none")
    labeled = pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=[pack(x) for x in data], recover="none")
    assert all(torch.equal(labeled.plan.keep[name], keep) for name, keep in plain.plan.keep.items())


def test_a_quarter_is_held_out_and_never_fitted() -> None:
    batches = split(Wide(), _images(8), None)
    assert (len(batches.fit), len(batches.held_out)) == (6, 2)
    assert not any(fit is held for fit in batches.fit for held in batches.held_out)
    single = split(Wide(), [{"x": torch.arange(8.0), "scale": 3}], None)
    assert single.fit[0]["x"].tolist() == [0, 1, 2, 3, 4, 5] and single.held_out[0]["x"].tolist() == [6, 7]
    assert single.fit[0]["scale"] == 3
    alone = split(Wide(), [torch.ones(1, 3)], None)
    assert "nothing is held out" in alone.note and alone.fit == alone.held_out


def test_a_budget_leaves_out_what_takes_long_and_says_so() -> None:
    """Every look at the clock takes a second: there is time for nothing but the plan."""
    seconds = iter(range(10**6))
    with fake_clock(lambda: float(next(seconds))):
        pruned = pr.prune(Wide().eval(), _images()[0][:2], target=pr.MACs(0.5), data=_images(), budget="8s")
    notes = {stage.name: stage.note for stage in pruned.history}
    assert _met(pruned) and "scores without measured losses for lack of time" in notes["measured losses"]
    assert notes["reconstruct"] == "left out: the budget is used up" and notes["distill"].startswith("left out")
    assert str(pruned).startswith("NOT RECOVERED")


def test_a_latency_is_met_with_other_targets() -> None:
    def measure(dense: nn.Module, small: nn.Module, inputs: Any, small_inputs: Any) -> Timing:
        ratio = pr.metrics.count(small).params / pr.metrics.count(dense).params
        return Timing(dense=10.0, small=10 * ratio, low=ratio, high=ratio, how="by parameters")

    target = [pr.Latency(0.6, measure=measure), pr.MACs(0.8)]
    pruned = pr.prune(Wide().eval(), _images()[0][:2], target=target, data=_images(), recover="none")
    assert _met(pruned) and pruned.plan.after.latency / pruned.plan.before.latency <= 0.6
    with pytest.raises(TargetMissed, match=r"latency=0\.001 cannot be met"):
        pr.prune(Wide().eval(), _images()[0][:2], target=pr.Latency(0.001, measure=measure), data=_images())


def test_targets_out_of_reach_say_what_binds() -> None:
    model, x = Wide().eval(), _images()[0][:2]
    with pytest.raises(TargetMissed, match=r"params=0\.001 cannot be met: removing all prunable units leaves params="):
        pr.prune(model, x, target=[pr.MACs(0.9), pr.Params(0.001)])
    with pytest.raises(TargetMissed, match="would remove nothing"):
        pr.prune(model, x, target=pr.MACs(1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 0.5}, {"target": []}, {"target": pr.MACs(0.5), "recover": "all"},
        {"target": pr.MACs(0.5), "recover": {"step": 3}}, {"target": pr.MACs(0.5), "budget": "soon"},
        {"target": [pr.Latency(0.5), pr.Latency(0.6)]},
    ],
)  # fmt: skip
def test_wrong_requests(wrong: dict[str, Any]) -> None:
    with pytest.raises((RequestError, TypeError)):
        pr.prune(Wide(), _images()[0], **wrong)


def test_progress_is_told_with_the_time_left() -> None:
    told: list[Progress] = []
    pr.prune(
        Wide().eval(),
        _images()[0][:2],
        target=pr.MACs(0.5),
        data=_images(),
        recover="reconstruct",
        on_stage=told.append,
    )
    stages = dict.fromkeys(entry.stage for entry in told)
    assert list(stages)[:3] == ["groups", "statistics", "measured losses"]
    assert all(entry.left >= 0 for entry in told) and told[-1].done == told[-1].total
    assert Progress("x", 1, 4, 2.0).left == 6.0


def test_budgets_are_read() -> None:
    assert [seconds_of(text) for text in ("2min", "90s", 5, "1.5h", None)] == [120, 90, 5, 5400, None]


def test_the_same_seed_gives_the_same_model() -> None:
    model, data = Wide().eval(), _images()
    first, second = (pr.prune(model, data[0][:2], target=pr.MACs(0.5), data=data) for _ in range(2))
    assert torch.equal(first.model(data[0]), second.model(data[0]))


@pytest.mark.parametrize("share", [0.6, 0.5, 0.4])
@pytest.mark.parametrize("data", [None, _images()])
def test_few_groups_use_what_widths_for_hardware_leave_of_the_budget(share: float, data: list[Tensor] | None) -> None:
    pruned = pr.prune(Wide().eval(), _images()[0][:2], target=pr.MACs(share), data=data, recover="none")
    assert 0.97 * share <= pruned.plan.got <= share
    odd = [name for name, keep in pruned.plan.keep.items() if int(keep.sum()) % 8]
    assert set(odd) <= set(_finer(pruned))
    assert not odd or "of the budget would be unused" in str(pruned)


def test_enough_groups_keep_widths_for_hardware() -> None:
    pruned = pr.prune(Wide().eval(), _images()[0][:2], target=pr.MACs(0.51), recover="none")
    assert pruned.plan.got > 0.97 * 0.51 and not _finer(pruned)
    assert {int(keep.sum()) % 8 for keep in pruned.plan.keep.values()} == {0}


class Answering(nn.Module):
    """Returns a loss first, where it is given labels, as the models of transformers do."""

    def __init__(self, pack: Callable[[dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self.a, self.b, self.pack = nn.Linear(8, 64), nn.Linear(64, 4), pack

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.b(self.a(x).relu())
        return self.pack({"loss": nn.functional.cross_entropy(logits, labels), "logits": logits})


@pytest.mark.parametrize("pack", [dict, lambda named: SimpleNamespace(**named), lambda named: tuple(named.values())])
def test_a_loss_beside_the_outputs_is_not_what_is_compared(pack: Callable[[dict[str, Tensor]], Any]) -> None:
    batches = [{"x": torch.randn(16, 8), "labels": torch.randint(0, 4, (16,))} for _ in range(4)]
    pruned = pr.prune(Answering(pack).eval(), batches[0], target=pr.MACs(0.5), data=batches, recover={"steps": 2})
    assert "KL divergence" in str(pruned) and _names(pruned)[-1] == "distill"
    curve = pr.distill(pruned.model, pruned.dense, batches, steps=2, lr=1e-3)
    assert len(curve.loss) == 2


def test_what_is_compared_has_an_axis_of_samples() -> None:
    batch, table, out = torch.randn(6, 8), torch.randn(3, 5), torch.randn(6, 5)
    assert judged((out.mean(), torch.arange(6), table, out), batch) is out
    assert judged({"logits": out[:, :1], "a": table}, batch) is not table
    assert distance_of(judged(out[:, 0], batch)) is cosine_distance
    assert judged(out[:, 0], batch).shape == (1, 1, 6)  # type: ignore[union-attr]
    with pytest.raises(NotSupported, match="single numbers"):
        judged({"loss": out.mean()}, batch)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def _rows(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_named(value: float) -> None:
    batches = _rows()
    batches[3][2, 1] = value
    with pytest.raises(BadInput, match="batch 3 of data= is not finite"):
        pr.prune(_mlp(), batches[0], target=pr.MACs(0.5), data=batches)


def test_numbers_of_the_model_that_are_not_finite_are_told() -> None:
    for number in (3, 5):  # for the fit, and held out
        batches = _rows()
        batches[number][0, 0] = -99
        with pytest.raises(BadInput, match=f"the outputs for batch {number} of data= are not finite"):
            pr.prune(nn.Sequential(Root(), _mlp()).eval(), batches[0], target=pr.MACs(0.5), data=batches)
    batches = [batch.double() * 1e160 for batch in _rows()]  # their squares are infinite
    with pytest.raises(BadInput, match=r"the inputs of 2\.weight are not finite"):
        pr.prune(_mlp().double(), batches[0] / 1e160, target=pr.MACs(0.5), data=batches)


def test_one_number_for_each_sample_is_compared() -> None:
    model = nn.Sequential(_mlp(), nn.Linear(4, 1), nn.Flatten(0)).eval()
    pruned = pr.prune(model, _rows()[0], target=pr.MACs(0.5), data=_rows(), recover={"steps": 2})
    assert "one minus the cosine" in str(pruned) and pruned.distance is not None


class Root(nn.Module):
    """NaN for a few numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 9).sqrt()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torch.randn(64, 8), "data= is one Tensor"), ({"x": torch.randn(64, 8)}, "data= is one dict"),
        (5, "data= is not an iterable of batches but of type int"), (list(torch.randn(9, 8)), "data= holds samples"),
        (TensorDataset(torch.randn(9, 8), torch.zeros(9)), "data= holds samples"),
    ],
)  # fmt: skip
def test_data_that_is_no_batches_is_refused(data: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pr.prune(_mlp(), torch.randn(2, 8), target=pr.MACs(0.5), data=data)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_guards_of_the_caller_do_not_stop_the_training(guard: Callable[[], Any]) -> None:
    def pruned(loss: Any = None) -> pr.Pruned:
        return pr.prune(_mlp(), _rows()[0], target=pr.MACs(0.5), data=_rows(), recover={"steps": 4}, loss=loss)

    torch.manual_seed(0)
    expected = pruned()
    with guard():
        given = _rows()
    with guard():
        torch.manual_seed(0)
        model = _mlp()
        found = pr.prune(model, given[0], target=pr.MACs(0.5), data=given, recover={"steps": 4})
        pruned(lambda model, batch: model(batch).sum())
    assert _names(found)[-1] == "distill" and found.distance == pytest.approx(expected.distance, rel=1e-3)
    assert not any(p.is_inference() or not p.requires_grad for p in found.model.parameters())


def test_a_model_of_the_inference_mode_is_not_trained() -> None:
    with torch.inference_mode():
        model = _mlp()
    with pytest.raises(RequestError, match="cannot be trained"):
        pr.finetune(model, _rows(), lambda model, batch: model(batch).sum(), steps=1, lr=0.1)


def test_a_guard_of_the_caller_does_not_stop_finetune() -> None:
    for guard in (torch.no_grad, torch.inference_mode):
        model = _mlp()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with guard():
            pr.finetune(model, _rows(), lambda model, batch: model(batch).square().sum(), steps=1, lr=0.1)
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class Stubborn(nn.Sequential):
    """Cannot be put into training mode."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            raise ValueError("not for training")
        return self


def test_a_model_that_cannot_train_is_refitted_alone() -> None:
    pruned = pr.prune(Stubborn(*_mlp()).eval(), _rows()[0], target=pr.MACs(0.5), data=_rows())
    assert "undone: train() of the model failed, ValueError: not for training" in pruned.history[-1].note
    refitted = next(stage for stage in pruned.history if stage.name == "reconstruct")
    assert pruned.distance == refitted.after and not pruned.model.training


@pytest.mark.parametrize("wrong", [{"seed": "a"}, {"seed": -1}, {"folder": ""}])
def test_no_seed_and_no_folder(wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=next(iter(wrong))):
        pr.prune(_mlp(), _rows()[0], target=pr.MACs(0.5), data=_rows(), **wrong)
    assert not list(tmp_path.iterdir())


class Chain(nn.Module):
    """Three inner groups of one size, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.ReLU())), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_early_losses_count_less_if_later_layers_are_refitted() -> None:
    torch.manual_seed(0)
    model, seen = Chain().eval(), []
    data = [torch.randn(64, 24) for _ in range(4)]
    asked = asked_of(model, data[0], target=pr.MACs(0.5), data=data, loss=None, skip=(), only=(), seed=0)

    def note(self: Any, order: Any, points: Any) -> dict[str, float]:
        seen.append(remaining(self, order, points))
        return seen[-1]

    remaining = _Measured._remaining
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Measured, "_remaining", note)
        for refits in (True, False):
            planned(replace(asked, refits=refits), StageTimer(), Records(None, None))
    assert list(seen[0].values()) == pytest.approx([REFITTED, REFITTED**0.5, 1.0])
    assert list(seen[1].values()) == [1.0, 1.0, 1.0]


def test_a_plan_for_a_plain_cut_does_not_count_on_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        "prunella.app.prune.planned", lambda given, *rest: asked.append(given.refits) or planned(given, *rest)
    )
    for recover in ("none", "reconstruct"):
        pr.prune(
            Chain().eval(), torch.randn(2, 24), target=pr.MACs(0.5), data=[torch.randn(32, 24)] * 4, recover=recover
        )
    assert asked == [False, True]


def test_a_distance_is_measured_again_only_if_the_model_has_changed() -> None:
    model, data = Wide().eval(), _images()
    plan = pr.plan(model, data[0], target=pr.MACs(0.5))
    pair = Pair(model, pr.shrink(model, plan), plan, split(model, data, None), lambda net, batch: net(batch), 0)
    first = pair.distance()
    pair.remember(first)
    calls: list[int] = []
    pair.small.register_forward_hook(lambda *_: calls.append(1))
    assert pair.present() == first and not calls
    pair.remember(first)
    with torch.no_grad():
        pair.small.norm.running_mean += 1  # type: ignore[union-attr, operator]
    assert pair.present() != first and calls


def test_a_training_that_gains_nothing_is_undone_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    data = [torch.randn(32, 8) for _ in range(8)]
    pruned = pr.prune(model, data[0], target=pr.MACs(0.5), data=data, recover={"steps": 4, "lr": 1e-12})
    trained = pruned.history[-1]
    assert trained.note.endswith("undone: it gains nothing") and trained.after == trained.before


@pytest.mark.parametrize("curvature", [0.5, 20.0])
def test_the_learning_rate_is_a_share_of_the_step_that_the_gradients_allow(curvature: float) -> None:
    """Of `k |w|^2 / 2` the step to zero is `1 / (2 k)`, wherever it starts; the norms keep their statistics."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked: Any = SimpleNamespace(small=model, data=SimpleNamespace(fit=[torch.randn(5, 3)] * 4), seed=0)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return curvature * model.train()[0].weight.square().sum() / 2 + 0 * model(batch).sum()  # type: ignore[index]

    assert _polyak(asked, loss) == pytest.approx(1 / (2 * curvature), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("overshoot", [2.0, 4.0])
def test_a_state_between_the_first_and_the_last_is_kept_if_it_is_best(overshoot: float) -> None:
    """A training that goes `overshoot` times as far as the dense weights."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    data, plan = [torch.randn(64, 8) for _ in range(4)], cast(Any, None)
    small = copy.deepcopy(model)
    pair = Pair(model, small, plan, split(model, data, None), lambda net, batch: net(batch), 0)
    weight, dense = small[0].weight, model[0].weight.detach()
    timer = StageTimer()
    with torch.no_grad():
        weight += 0.3 * torch.randn(4, 8)
        start = pair.distance()
        with timer.stage("distill") as stage, _kept(pair, stage, between=True):
            weight += overshoot * (dense - weight)
            small[1].num_batches_tracked += 7
    assert torch.allclose(weight, dense, atol=0.01) and (pair.distance() < 0.02 * start)
    assert small[1].num_batches_tracked == 7 and timer.history[0].after == pytest.approx(pair.distance())
    assert "the best state on held-out data is kept, not the last" in timer.history[0].note


def test_the_vertex_of_a_parabola() -> None:
    for where in (0.2, 0.5, 0.9):
        assert vertex(*((a - where) ** 2 + 3 for a in (0.0, 0.5, 1.0))) == pytest.approx(where)
    assert vertex(3.0, 2.0, 1.0) is None and vertex(1.0, 2.0, 1.0) is None and vertex(3.0, 1.0, 0.9) is not None
    assert vertex(1.0, 1.3, 2.0) is None  # least before the first state


def test_losses_of_logits_are_measured_at_a_temperature_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    distances: list[Any] = []

    def note(*args: Any, distance: Any, **rest: Any) -> Any:
        distances.append(distance)
        return curves(*args, distance=distance, **rest)

    monkeypatch.setattr("prunella.app.prune_plan.curves", note)
    data = [torch.randn(32, 24) for _ in range(4)]
    for model in (Chain().eval(), nn.Sequential(Chain(), nn.Unflatten(1, (5, 1))).eval()):
        pr.prune(model, data[0], target=pr.MACs(0.5), data=data, recover="none")
    x, y = torch.randn(2, 4, 5)
    assert distances[0](x, y) == divergence(x, y, 2.0) and distances[1] is None
