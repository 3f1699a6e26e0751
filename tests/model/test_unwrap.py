"""Every wrapper times every verb: names are those of the bare model, and so is what the verb does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import prunella as pr
from prunella.errors import NotSupported
from prunella.model.unwrap import unwrap
from tests.graphs import convnet, images, mlp, square_loss

Wrap = Callable[[nn.Module], nn.Module]


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


pytestmark = pytest.mark.usefixtures("one_process")
WRAPPERS: dict[str, Wrap] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compile": compiled,
    "AveragedModel": AveragedModel,
    "compile of DistributedDataParallel": lambda model: compiled(DistributedDataParallel(model)),
    "DataParallel of compile": lambda model: nn.DataParallel(compiled(model)),
    "AveragedModel of compile of DataParallel": lambda model: AveragedModel(compiled(nn.DataParallel(model))),
}
MASKS = pr.Recipe(granularity=pr.Element())
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return WRAPPERS[request.param]


def bare_model() -> nn.Sequential:
    return mlp(8)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_the_bare_model_is_found(wrap: Wrap) -> None:
    wrapped = wrap(bare_model())
    assert type(unwrap(wrapped)) is nn.Sequential and names(unwrap(wrapped)) == names(bare_model())
    assert unwrap(unwrap(wrapped)) is unwrap(wrapped)


def test_an_attribute_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    holder = Holder()
    assert unwrap(holder) is holder


@pytest.mark.parametrize("recipe", [pr.Recipe(), MASKS, pr.Recipe(pr.criteria.taylor)])
def test_plan(wrap: Wrap, recipe: pr.Recipe) -> None:
    model, wrapped = bare_model(), wrap(bare_model())
    made, expected = (
        pr.plan(one, X, recipe, target=pr.Sparsity(0.5), data=[X], loss=square_loss, skip=["4"])
        for one in (wrapped, model)
    )
    assert made.masks.keys() == expected.masks.keys() and made.keep.keys() == expected.keep.keys()
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in made.masks.items())
    assert all(torch.equal(mask, expected.keep[name]) for name, mask in made.keep.items())


def test_apply_masks_of_reapply_and_finalize(wrap: Wrap) -> None:
    model, wrapped = bare_model(), wrap(bare_model())
    plan = pr.plan(model, X, MASKS, target=pr.Sparsity(0.5))
    assert pr.apply_(wrapped, plan) is wrapped and same(unwrap(wrapped), pr.apply_(model, plan))
    masks = pr.masks_of(wrapped)
    assert masks.keys() == pr.masks_of(model).keys() == plan.masks.keys()
    weight = unwrap(wrapped).get_parameter("0.weight")
    with torch.no_grad():
        weight.fill_(1.0)
    pr.transform.reapply_(wrapped)
    assert torch.equal(weight != 0, masks["0.weight"])
    pr.finalize(wrapped)
    assert pr.masks_of(wrapped) == {}


def test_shrink_gives_a_bare_model(wrap: Wrap) -> None:
    model, wrapped = bare_model(), wrap(bare_model())
    plan = pr.plan(model, X, target=pr.Sparsity(0.5))
    small = pr.shrink(wrapped, plan)
    assert type(small) is nn.Sequential and same(small, pr.shrink(model, plan))
    assert same(unwrap(wrapped), model)


def test_carry(wrap: Wrap) -> None:
    wrapped = wrap(bare_model())
    optimizer = torch.optim.Adam(unwrap(wrapped).parameters(), lr=0.1)
    unwrap(wrapped)(X).square().sum().backward()
    optimizer.step()
    plan = pr.plan(wrapped, X, target=pr.Sparsity(0.5))
    small = wrap(pr.shrink(wrapped, plan))
    pr.transform.carry_(optimizer, wrapped, small, plan)
    trained = optimizer.param_groups[0]["params"]
    assert {id(p) for p in trained} == {id(p) for p in unwrap(small).parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trained)


def test_permute(wrap: Wrap) -> None:
    model, wrapped = convnet().eval(), wrap(convnet().eval())
    x = images()[0]
    found, expected = (pr.transform.permute(one, x, pr.NM(1, 2), rounds=2) for one in (wrapped, model))
    assert found.orders.keys() == expected.orders.keys() and same(found.model, expected.model)


def test_save(wrap: Wrap, tmp_path: Path) -> None:
    model, wrapped = bare_model(), wrap(bare_model())
    plan = pr.plan(wrapped, X, target=pr.Sparsity(0.5))
    pr.save(wrap(pr.shrink(wrapped, plan)), tmp_path / "small", plan=plan, factory=bare_model)
    assert same(pr.load(tmp_path / "small", factory=bare_model), pr.shrink(model, plan).eval())


def test_count_report_and_zeros(wrap: Wrap) -> None:
    model, wrapped = bare_model(), wrap(bare_model())
    assert pr.metrics.count(wrapped) == pr.metrics.count(model)
    pr.apply_(wrapped, pr.plan(wrapped, X, target=pr.Sparsity(0.5)))
    pr.apply_(model, pr.plan(model, X, target=pr.Sparsity(0.5)))
    zeros, expected = pr.planning.plan_zeros(wrapped, X), pr.planning.plan_zeros(model, X)
    assert zeros.keep.keys() == expected.keep.keys()
    assert pr.transform.collapsed(wrapped) == pr.transform.collapsed(model)
    assert pr.metrics.effective_macs(wrapped, X) == pr.metrics.effective_macs(model, X)


def test_training_toward_zeros_names_the_bare_parameters(wrap: Wrap) -> None:
    wrapped = wrap(bare_model())
    units = pr.train.coupled_units(wrapped, X)
    penalty: Tensor = pr.train.group_lasso(units)(wrapped)
    expected = pr.train.group_lasso(pr.train.coupled_units(bare_model(), X))(bare_model())
    assert torch.equal(penalty, expected)


def test_batch_norms_are_measured_inside_a_wrapper(wrap: Wrap) -> None:
    model, wrapped = convnet(), wrap(convnet())
    data = [images()[0]]
    assert pr.recalibrate_bn(wrapped, data) == pr.recalibrate_bn(model, data) == ("1", "4")
    assert same(unwrap(wrapped), model)


def test_a_checkpoint_of_a_wrapped_model_is_imported(wrap: Wrap) -> None:
    model = bare_model()
    plan = pr.plan(model, X, MASKS, target=pr.Sparsity(0.5))
    masked = wrap(pr.apply_(model, plan))
    imported = pr.importers.import_plan(wrap(bare_model()), X, masked.state_dict())
    assert imported.masks.keys() == plan.masks.keys()
    assert all(torch.equal(mask, plan.masks[name]) for name, mask in imported.masks.items())


def test_sharded_weights_are_refused_with_what_to_do() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = bare_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(NotSupported, match="prune the model before it is sharded"):
        pr.plan(model, X, target=pr.Sparsity(0.5))
    with pytest.raises(NotSupported, match="FSDP"):
        pr.shrink(model, pr.plan(bare_model(), X, target=pr.Sparsity(0.5)))
    assert unwrap(model, sharded=True) is model
