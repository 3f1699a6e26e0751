from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, RequestError
from prunella.model.masks import finalize, masks_of, pack, reapply_, records, slice_masks_
from prunella.transform.apply import apply_
from tests.hand import hand_plan


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def _mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5), (4, 3, 3, 3), (0, 4)])
def test_packing_is_lossless_and_one_bit_a_weight(shape: tuple[int, ...]) -> None:
    mask = _mask(*shape)
    packed = pack(mask)
    assert torch.equal(packed.unpack(), mask) and packed.unpack().dtype == torch.bool
    assert packed.bits.numel() == -(-mask.numel() // 8)


def test_masked_weights_are_zero_and_the_others_are_untouched() -> None:
    net, mask = _net(), _mask(5, 16)
    before = copy.deepcopy(net.state_dict())
    assert apply_(net, hand_plan(masks={"3.weight": mask})) is net
    after = net.state_dict()
    assert list(after) == list(before)
    assert torch.equal(after["3.weight"], torch.where(mask, before["3.weight"], 0.0))
    assert all(torch.equal(after[k], before[k]) for k in before if k != "3.weight")
    assert torch.equal(masks_of(net)["3.weight"], mask) and list(masks_of(net)) == ["3.weight"]


def test_cuts_zero_parameters_along_every_axis_and_no_buffer() -> None:
    net, kept = _net(), torch.tensor([0, 3])
    net[1].running_mean += 1
    columns = torch.cat([torch.arange(0, 4), torch.arange(12, 16)])
    cuts = {
        "0.weight": {0: kept},
        "0.bias": {0: kept},
        "1.weight": {0: kept},
        "1.bias": {0: kept},
        "1.running_mean": {0: kept},
        "3.weight": {0: torch.tensor([1, 2]), 1: columns},
    }
    dense = copy.deepcopy(net)
    apply_(net, hand_plan(cuts=cuts))
    assert net[0].weight[[1, 2]].abs().sum() == 0 and net[0].bias[[1, 2]].abs().sum() == 0
    assert torch.equal(net[0].weight[kept], dense[0].weight[kept])
    assert torch.equal(net[1].running_mean, dense[1].running_mean)
    expected = torch.zeros(5, 16, dtype=torch.bool)
    expected[1:3, columns] = True
    assert torch.equal(net[3].weight != 0, expected)
    assert torch.equal(masks_of(net)["3.weight"], expected)


def test_masks_and_cuts_of_one_parameter_meet() -> None:
    net, mask = _net(), _mask(5, 16)
    apply_(net, hand_plan(masks={"3.weight": mask}, cuts={"3.weight": {0: torch.tensor([2])}}))
    expected = torch.zeros(5, 16, dtype=torch.bool)
    expected[2] = mask[2]
    assert torch.equal(net[3].weight != 0, expected)


def test_new_weights_are_copied_in_before_masking() -> None:
    net, mask = _net(), _mask(5, 16)
    apply_(net, hand_plan(masks={"3.weight": mask}, weights={"3.weight": torch.full((5, 16), 7.0)}))
    assert torch.equal(net[3].weight, 7.0 * mask)


def test_nan_under_a_mask_becomes_zero() -> None:
    net, mask = _net(), _mask(5, 16)
    with torch.no_grad():
        net[3].weight[~mask] = float("nan")
    apply_(net, hand_plan(masks={"3.weight": mask}))
    assert torch.equal(net[3].weight[~mask], torch.zeros(int((~mask).sum())))


def test_a_second_plan_adds_to_the_first_unless_it_may_regrow() -> None:
    first, second = _mask(5, 16, seed=1), _mask(5, 16, seed=2)
    net = apply_(_net(), hand_plan(masks={"3.weight": first}))
    assert torch.equal(masks_of(apply_(net, hand_plan(masks={"3.weight": second})))["3.weight"], first & second)
    apply_(net, hand_plan(masks={"3.weight": second}), regrow=True)
    assert torch.equal(masks_of(net)["3.weight"], second)
    apply_(net, hand_plan(masks={"0.bias": _mask(4)}), regrow=True)
    assert list(masks_of(net)) == ["0.bias"]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (hand_plan(masks={"9.weight": _mask(5, 16)}), "not a parameter"),
        (hand_plan(masks={"3.weight": _mask(16, 5)}), "shape"),
        (hand_plan(cuts={"gone": {0: torch.tensor([0])}}), "not a parameter"),
        (hand_plan(cuts={"3.weight": {1: torch.tensor([16])}}), "axis 1"),
        (hand_plan(cuts={"3.bias": {1: torch.tensor([0])}}), "axis 1"),
        (hand_plan(weights={"3.weight": torch.zeros(2)}), "shape"),
        (hand_plan(masks={"0.weight": _mask(4, 3, 3, 3), "3.bias": _mask(9)}), "shape"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan: object, words: str) -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RequestError, match=words):
        apply_(net, plan)  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not masks_of(net)


def test_a_tied_tensor_has_one_mask_under_all_its_names() -> None:
    net, mask = _Tied(), _mask(7, 3)
    apply_(net, hand_plan(masks={"embed.weight": mask}))
    found = masks_of(net)
    assert set(found) == {"embed.weight", "head.weight"}
    assert all(torch.equal(m, mask) for m in found.values())
    assert len({id(packed) for _, _, packed in records(net)}) == 1
    replica = copy.deepcopy(net)
    assert replica.head.weight is replica.embed.weight
    assert len({id(packed) for _, _, packed in records(replica)}) == 1
    assert masks_of(net.head).keys() == {"weight"}


def test_both_names_of_a_tied_tensor_in_one_plan_meet() -> None:
    net = _Tied()
    plan = hand_plan(cuts={"embed.weight": {0: torch.tensor([1, 2])}, "head.weight": {1: torch.tensor([0])}})
    apply_(net, plan)
    assert torch.count_nonzero(net.head.weight) == 2


def test_deepcopy_carries_the_masks_and_shares_nothing() -> None:
    net, mask = _net(), _mask(5, 16)
    apply_(net, hand_plan(masks={"3.weight": mask}))
    replica = copy.deepcopy(net)
    finalize(net)
    assert not masks_of(net) and torch.equal(masks_of(replica)["3.weight"], mask)
    with torch.no_grad():
        replica[3].weight.fill_(1)
    assert torch.equal(reapply_(replica)[3].weight, mask.float())
    assert not torch.equal(net[3].weight, replica[3].weight)


def test_pickle_carries_the_masks() -> None:
    net, mask = _net(), _mask(5, 16)
    apply_(net, hand_plan(masks={"3.weight": mask}))
    replica = pickle.loads(pickle.dumps(net))
    assert torch.equal(masks_of(replica)["3.weight"], mask)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    fresh = _net()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh[3].weight, net[3].weight)


def test_compile_and_wrappers_see_the_same_names() -> None:
    net, mask = _net(), _mask(5, 16)
    apply_(net, hand_plan(masks={"3.weight": mask}))
    x = torch.randn(2, 3, 4, 4)
    expected = net.eval()(x)
    torch._dynamo.reset()  # what other tests compiled counts toward its limit for a class
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert list(masks_of(compiled)) == ["3.weight"] == list(masks_of(nn.DataParallel(net)))
    other = _mask(4)
    apply_(compiled, hand_plan(masks={"0.bias": other}))
    assert torch.equal(masks_of(net)["0.bias"], other)
    assert torch.allclose(compiled(x), net(x)) and not torch.equal(compiled(x), expected)
    assert finalize(compiled) is compiled and not masks_of(net)


def test_masks_hold_while_a_distributed_wrapper_trains(tmp_path: Path) -> None:
    net, mask = _net(), _mask(5, 16)
    names = list(net.state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        apply_(wrapped, hand_plan(masks={"3.weight": mask}))
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
        with pr.Pruner(wrapped, optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                wrapped(torch.randn(2, 3, 4, 4)).square().mean().backward()
                optimizer.step()
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    assert list(net.state_dict()) == names and list(masks_of(net)) == ["3.weight"]
    assert not bool(net[3].weight[~mask].any()) and bool(net[3].weight[mask].all())


def test_a_replaced_submodule_takes_its_mask_away() -> None:
    net = apply_(_net(), hand_plan(masks={"3.weight": _mask(5, 16)}))
    net[3] = nn.Linear(16, 2)
    assert not masks_of(net)


def test_finalize_keeps_every_bit_and_finds_revived_weights() -> None:
    net = apply_(_net(), hand_plan(masks={"3.weight": _mask(5, 16)}))
    before = copy.deepcopy(net.state_dict())
    assert finalize(copy.deepcopy(net)).state_dict().keys() == before.keys()
    with torch.no_grad():
        net[3].weight.add_(1)
    with pytest.raises(CheckFailed, match=r"3\.weight"):
        finalize(net)
    finalize(reapply_(net))
    mask = before["3.weight"] != 0
    assert torch.equal(net[3].weight.detach() != 0, mask)
    assert not any("_prunella_masks" in module.__dict__ for module in net.modules())


def test_finalize_is_bit_equal() -> None:
    net = apply_(_net(), hand_plan(masks={"3.weight": _mask(5, 16)}))
    before = copy.deepcopy(net.state_dict())
    after = finalize(net).state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before) and list(after) == list(before)


def test_a_mask_of_another_shape_is_named_and_slicing_repairs_it() -> None:
    net, mask = _net(), _mask(5, 16)
    kept = torch.tensor([0, 2, 5])
    apply_(net, hand_plan(masks={"3.weight": mask}))
    net[3].weight = nn.Parameter(net[3].weight.detach()[:, kept])
    with pytest.raises(CheckFailed, match=r"3\.weight"):
        masks_of(net)
    slice_masks_(net, {"3.weight": {1: kept}})
    assert torch.equal(masks_of(net)["3.weight"], mask[:, kept])


def test_slicing_away_everything_masked_leaves_no_mask() -> None:
    net, kept = _net(), torch.tensor([1, 4])
    cuts = {"3.weight": {0: kept}, "3.bias": {0: kept}}
    apply_(net, hand_plan(cuts=cuts))
    net[3].weight, net[3].bias = nn.Parameter(net[3].weight.detach()[kept]), nn.Parameter(net[3].bias.detach()[kept])
    assert not masks_of(slice_masks_(net, cuts))


def test_a_spectral_norm_in_training_mode_is_cut_as_it_is() -> None:
    """Read in this mode it would take a step of its power iteration during the cut, in the smaller model alone."""
    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), normed, nn.ReLU(), nn.Linear(16, 3)).train()
    small = pr.shrink(model, pr.plan(model, torch.randn(4, 8), target=pr.MACs(0.6)))
    assert small.training and all(module.training for module in small.modules())
