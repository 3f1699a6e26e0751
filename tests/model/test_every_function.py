"""Every function that takes a model, times every object that a model may be inside or hold."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import prunella as pr
from prunella.errors import PruningError
from prunella.model.unwrap import unwrap
from tests.graphs import convnet, images

IMAGES = images(2)
pytestmark = pytest.mark.usefixtures("one_process")
X = IMAGES[0]
LABELED = [(x, torch.zeros(2).long()) for x in IMAGES]
MASKS, HALF = pr.Recipe(granularity=pr.Element()), pr.Sparsity(0.5)


def base() -> nn.Module:
    return convnet().eval()


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def holding(value: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        model.extra = value(model)
        return model

    return wrap


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compile": compiled,
    "AveragedModel": AveragedModel,
    "nested": lambda model: AveragedModel(compiled(nn.DataParallel(model))),
    "cached activation": holding(lambda model: model(X)),
    "lock": holding(lambda model: threading.Lock()),
    "open file": holding(lambda model: Path(__file__).open()),  # noqa: SIM115
}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    made: list[nn.Module] = []

    def build(model: nn.Module) -> nn.Module:
        made.append(WRAPPERS[request.param](model))
        return made[-1]

    yield build
    for model in made:
        file = vars(model).get("extra")
        if hasattr(file, "close"):
            file.close()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@cache
def plan() -> pr.Plan:
    return pr.plan(base(), X, target=pr.MACs(0.5))


@cache
def mask_plan() -> pr.Plan:
    return pr.plan(base(), X, MASKS, target=HALF)


def masked(model: nn.Module) -> nn.Module:
    return pr.apply_(model, mask_plan())


def small(model: nn.Module) -> nn.Module:
    return pr.shrink(model, plan())


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.01)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unwrap(model).named_parameters()}


def carried(model: nn.Module) -> Any:
    optimizer, cut = sgd(model), small(model)
    pr.transform.carry_(optimizer, model, cut, plan())
    return [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]


def gates(model: nn.Module) -> Any:
    units = pr.train.coupled_units(model, X)
    pr.train.l0_gates_(model, units)
    return pr.train.merge_gates_(model) and None


def gradual(model: nn.Module) -> Any:
    pr.Pruner(model, sgd(model), recipe=MASKS, target=HALF, inputs=X, steps=1).step()
    return pr.masks_of(model)


def space(model: nn.Module) -> Any:
    return pr.search.space(model, X, pr.Recipe())


def ticket(model: nn.Module) -> Any:
    spec = pr.lottery.TrainingSpec(
        train=pr.lottery.descent(LABELED, loss, lr=0.01), steps=2, evaluate=lambda model: 1.0
    )
    found = pr.lottery.find_ticket(model, spec, prune=pr.lottery.imp(X, rate=0.5), rounds=1)
    return len(found.rounds) if hasattr(found, "rounds") else None


USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "plan": lambda m, _: pr.plan(m, X, target=pr.MACs(0.5)).keep,
    "plan with a loss": lambda m, _: (
        pr.plan(m, X, pr.Recipe(pr.taylor), target=HALF, data=LABELED, loss=loss).keep
    ),
    "apply_": lambda m, _: weights(masked(m)),
    "masks_of": lambda m, _: pr.masks_of(masked(m)),
    "finalize": lambda m, _: weights(pr.finalize(masked(m))),
    "shrink": lambda m, _: weights(small(m)),
    "as_program": lambda m, _: pr.as_program(m, X)(X),
    "export": lambda m, to: pr.export(m, to / "m.safetensors", inputs=X) and None,
    "export a program": lambda m, to: pr.export(m, to / "m.pt2", inputs=X) and None,
    "save": lambda m, to: pr.save(m, to / "m", factory=base).files,
    "report": lambda m, _: pr.report(m, small(m), X, plan=plan()) and None,
    "recalibrate_bn": lambda m, _: pr.recalibrate_bn(m, IMAGES),
    "reconstruct": lambda m, _: pr.reconstruct(small(m), m, IMAGES, plan()).fits,
    "finetune": lambda m, _: pr.finetune(m, LABELED, loss, steps=1, lr=0.01).loss,
    "distill": lambda m, _: pr.distill(base(), m, IMAGES, steps=1, lr=0.01).loss,
    "distill_features": lambda m, _: pr.recovery.distill_features(m, ["0"])(m, X),
    "distill_attention": lambda m, _: pr.recovery.distill_attention(m, ["0"])(m, X),
    "correct_statistics": lambda m, _: pr.recovery.correct_statistics(m, base(), IMAGES),
    "fold_means": lambda m, _: pr.recovery.fold_means(small(m), m, IMAGES, plan()).folds,
    "Pruner": lambda m, _: gradual(m),
    "carry_": lambda m, _: carried(m),
    "collapsed": lambda m, _: pr.transform.collapsed(masked(m)),
    "permute": lambda m, _: pr.transform.permute(m, X, pr.NM(1, 2), rounds=1).orders,
    "reapply_": lambda m, _: weights(pr.transform.reapply_(masked(m))),
    "reinitialized": lambda m, _: pr.transform.reinitialized(masked(m), seed=0) and None,
    "import_plan": lambda m, _: pr.importers.import_plan(m, X, masked(base()).state_dict()).masks,
    "imported": lambda m, _: pr.importers.import_plan(base(), X, masked(m).state_dict()).masks,
    "plan_zeros": lambda m, _: pr.planning.plan_zeros(pr.apply_(m, plan()), X).keep,
    "count": lambda m, _: pr.metrics.count(m),
    "effective_macs": lambda m, _: pr.metrics.effective_macs(masked(m), X),
    "effective_sparsity": lambda m, _: pr.metrics.effective_sparsity(masked(m), X).direct,
    "compression_ratio": lambda m, _: pr.metrics.compression_ratio(m, small(m)),
    "side_effects": lambda m, _: pr.metrics.side_effects(m, small(m), LABELED) and None,
    "agreement": lambda m, _: pr.search.agreement(m, IMAGES)(m),
    "scan": lambda m, _: pr.search.scan(space(m), lambda model: 1.0, ratios=(0.5,)).curves,
    "netadapt": lambda m, _: (
        pr.search.netadapt(space(m), pr.MACs(0.7), lambda model: 1.0, step=0.2, tune=lambda model: model).shares
    ),
    "low_rank": lambda m, _: pr.compress.low_rank(m, rank=2) and None,
    "deep_compression_": lambda m, _: pr.compress.deep_compression_(masked(m)) and None,
    "round_weights_": lambda m, _: pr.compress.round_weights_(m, bits=8) and None,
    "to_int8_": lambda m, _: pr.compress.to_int8_(m) and None,
    "solve_": lambda m, _: pr.llm.solve_(m, X, pr.llm.one_shot(pr.Element(), 0.5), data=IMAGES) and None,
    "alpha_sparsities": lambda m, _: dict(pr.llm.alpha_sparsities(m, X, sparsity=0.5)),
    "barrier": lambda m, _: pr.lottery.barrier(m, m.state_dict(), m.state_dict(), lambda m: 1.0, points=3).errors,
    "find_ticket": lambda m, _: ticket(m),
    "compare": lambda m, _: pr.experiments.compare(m, {"a": lambda s: base()}, {"q": lambda m: 1.0}, seeds=[0]) and 0,
    "coupled_units": lambda m, _: pr.train.group_lasso(pr.train.coupled_units(m, X))(m),
    "l0_gates_": lambda m, _: gates(m),
    "top_kast_": lambda m, _: pr.train.top_kast_(m, mask_plan(), extra=0.1) and None,
    "DropGrow": lambda m, _: (
        pr.train.DropGrow(masked(m), sgd(m), rule=pr.train.set_(), steps=3).kept
    ),
    "sparse": lambda m, _: pr.sparse(masked(m), X, seconds=0.01) and None,
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.allclose(one, other, atol=1e-6)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.parametrize("use", USES)
def test_it_does_what_it_does_to_the_bare_model(
    use: str, wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    assert same(USES[use](wrap(base()), tmp_path), of_bare(use))


@cache
def of_bare(use: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return USES[use](base(), Path(folder))


# -- torch.nn.utils.prune -----------------------------------------------------------------------------------------


def pruned() -> nn.Module:
    model = base()
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    prune.ln_structured(model[3], "weight", 0.5, n=2, dim=0)  # type: ignore[index]
    return model


def permanent() -> nn.Module:
    """The same with plain weights and masks of prunella."""
    return pr.transform.plain_weights_(pruned())


TAKES = (
    "plan", "plan with a loss", "apply_", "masks_of", "finalize", "shrink", "save", "report", "import_plan", "Pruner",
    "carry_", "plan_zeros", "count", "scan", "as_program", "export", "imported", "collapsed",
)  # fmt: skip


def test_plain_weights_compute_the_same_with_the_same_parameters() -> None:
    model, made = pruned(), pruned()
    parameters = {id(p) for p in made.parameters()}
    before = model(X)
    pr.transform.plain_weights_(made)
    assert torch.equal(made(X), before) and {id(p) for p in made.parameters()} == parameters
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in base().named_parameters()}
    assert int((~pr.masks_of(made)["0.weight"]).sum()) == made[0].weight.numel() // 2  # type: ignore[index]


@pytest.mark.parametrize("use", TAKES)
def test_a_model_under_torchs_pruning_is_taken_as_it_is(use: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    model = pruned()
    assert same(USES[use](model, tmp_path), USES[use](permanent(), tmp_path / "plain"))


def test_reading_such_a_model_leaves_it_alone() -> None:
    model = pruned()
    model(X).sum().backward()
    small = pr.shrink(model, pr.plan(model, X, target=pr.MACs(0.5)))
    assert prune.is_pruned(model) and "0.weight_orig" in model.state_dict()
    assert all(p.grad is not None for p in small.parameters()) and not prune.is_pruned(small)
    prune.remove(model[0], "weight")  # type: ignore[index]


@pytest.mark.parametrize("use", ["solve_", "coupled_units", "low_rank", "find_ticket", "top_kast_", "round_weights_"])
def test_other_functions_take_it_or_say_what_to_do(use: str, tmp_path: Path) -> None:
    try:
        USES[use](pruned(), tmp_path)
    except PruningError as error:
        assert error.todo and ("plain_weights_" in error.todo or use == "low_rank")  # which refuses any masks


def test_masks_of_torchs_pruning_are_masks_and_are_dropped() -> None:
    model = pruned()
    prune.random_unstructured(model[3], "bias", 1)  # type: ignore[index]
    masks, before = pr.masks_of(model), model(X)
    assert sorted(masks) == ["0.weight", "3.bias", "3.weight"] and prune.is_pruned(model)
    assert all(torch.equal(mask, model.get_buffer(f"{name}_mask") != 0) for name, mask in masks.items())
    assert pr.masks_of(nn.DataParallel(model)).keys() == masks.keys()
    plain = pr.finalize(model)
    assert plain is model and torch.equal(plain(X), before) and not prune.is_pruned(plain)
    assert pr.masks_of(plain) == {} and plain.state_dict().keys() == base().state_dict().keys()
