"""One run does not know of another; sizes that happen to be equal, one or zero; the result is an ordinary model."""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.traps.nets import SHAPE, Flat, Image, half, picture
from tests.oracle import (
    assert_untouched,
    check_exact,
    cut,
    produced_by,
    random_keep,
    run,
    settle,
    snapshot,
)
from tests.zoo import convolutional as conv
from tests.zoo import odd
from torch import Tensor, nn

from prunella.errors import BadInput, PruningError
from prunella.graph.cut.changes import attributes, cuts
from prunella.graph.cut.surgery import cut_
from prunella.graph.solve.groups import couple

# --- one run does not know of another


_SEEN: list[Tensor] = []


class _Recorder(nn.Module):
    """Installs a hook at its first run and remembers that it did, as transformers does to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        _SEEN.clear()
        if not getattr(self, "hooked", False):
            self.inner.register_forward_hook(lambda module, given, out: _SEEN.append(out))
            self.hooked = True
        out = self.head(self.inner(x).relu())
        assert len(_SEEN) == 1, f"recorded {len(_SEEN)} times"
        return out


def test_hooks_that_a_run_installs_go_with_the_mark_that_they_are_there() -> None:
    torch.manual_seed(0)
    model = _Recorder()
    for _ in range(2):
        couple(model, torch.randn(2, 6))
        assert not model.inner._forward_hooks and not hasattr(model, "hooked")
    check_exact(model, torch.randn(2, 6))
    model(torch.randn(2, 6))
    assert len(model.inner._forward_hooks) == 1


def test_a_second_run_knows_nothing_of_the_first() -> None:
    torch.manual_seed(0)
    model, other = settle(conv.ShuffleNet()), settle(odd.AttentionBlock(kv_heads=2))
    x, y = torch.randn(SHAPE), torch.randn(2, 5, 16)
    first = picture(couple(model, x))
    between = picture(couple(other, y))
    cut(model, couple(model, x), half(couple(model, x)))
    assert picture(couple(model, x)) == first and picture(couple(other, y)) == between
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    assert type(x.shape[0]) is int and type(other.attention.heads) is int


def test_a_cut_model_is_cut_again() -> None:
    checked = check_exact(conv.ResNet(option_a=True), torch.randn(SHAPE), fraction=0.3)
    again = check_exact(checked.small.float(), torch.randn(SHAPE), fraction=0.3, seed=1)
    assert again.graph.params(again.keep) < checked.graph.params(checked.keep) == again.graph.params()


def test_training_mode_statistics_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(4)
    before = snapshot(model)
    couple(model, torch.ones(SHAPE))
    assert_untouched(before, snapshot(model))
    assert torch.is_grad_enabled() and model[1].num_batches_tracked == 0


class Raises(odd.Attention):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("no such luck")


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model, x = Raises(16, 4, 4), torch.randn(2, 5, 16)
    before = snapshot(model)
    with pytest.raises(BadInput, match="no such luck"):
        couple(model, x)
    assert_untouched(before, snapshot(model))
    assert type(model.heads) is int and not nn.modules.module._global_forward_hooks
    assert type(torch.ones(3).shape[0]) is int


# --- sizes that happen to be equal, to be one, or to be zero


@pytest.mark.parametrize("batch", [1, 3, 8, 12])
def test_groups_do_not_depend_on_the_batch(batch: int) -> None:
    model = settle(conv.SqueezeExcite())
    usual = {g.name: g.size for g in couple(model, torch.randn(2, 3, 8, 8)).groups}
    assert {g.name: g.size for g in couple(model, torch.randn(batch, 3, 12, 12)).groups} == usual
    check_exact(model, torch.randn(batch, 3, 8, 8))


@pytest.mark.parametrize("time", [1, 4, 16])
def test_groups_do_not_depend_on_the_sequence(time: int) -> None:
    checked = check_exact(odd.AttentionBlock(kv_heads=2), torch.randn(4, time, 16))
    assert {g.size for g in checked.graph.groups} == {2, 24}


def test_an_empty_batch_or_map_couples_the_same_or_is_refused() -> None:
    model = settle(conv.GroupNormNet())
    usual = {g.name: g.size for g in couple(model, torch.randn(SHAPE)).groups}
    for shape in ((0, 3, 8, 8), (2, 3, 0, 0)):
        try:
            found = {g.name: g.size for g in couple(model, torch.zeros(shape)).groups}
        except PruningError as refusal:
            assert refusal.what and refusal.why
        else:
            assert found == usual


def test_maps_of_one_pixel_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = check_exact(model, torch.randn(2, 3, 4, 4)).graph
    assert (produced_by(graph, "0").size, produced_by(graph, "2").size) == (8, 6)


def test_groups_of_one_unit_are_never_emptied() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 8), nn.Linear(8, 2))
    checked = check_exact(model, torch.randn(3, 6), fraction=0.99)
    assert checked.small[0].weight.shape == (1, 6) and checked.small[1].weight.shape == (1, 1)


PARTS = {
    "half": lambda m, x: torch.cat([x, F.max_pool2d(x[:, : m.half], 3, 1, 1)], 1),
    "two of a normalized group": lambda m, x: torch.cat(
        [F.group_norm(x, m.norms), F.max_pool2d(x.narrow(1, 0, m.pair), 3, 1, 1)], 1
    ),
    "a part that is dropped": lambda m, x: (F.group_norm(x, m.norms), F.max_pool2d(x.narrow(1, 0, m.pair), 3, 1, 1))[0],
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_an_axis_is_never_emptied(name: str, seed: int) -> None:
    check_exact(Image(PARTS[name]), Image.example(), fraction=0.99, seed=seed)


# --- the cut model is an ordinary model


def test_a_cut_model_trains_saves_and_loads() -> None:
    model = settle(conv.MobileNet())
    x = torch.randn(SHAPE)
    graph = couple(model, x)
    keep = random_keep(graph)
    one, two = cut(model, graph, keep), cut(settle(conv.MobileNet(), seed=1), graph, keep)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(run(two, x), run(one, x))
    one.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in one.parameters())


def test_gradients_and_flags_are_cut_with_their_parameters() -> None:
    model: Any = settle(conv.VGG())
    x = torch.randn(SHAPE)
    graph = couple(model, x)
    model(x).sum().backward()
    model.conv2.weight.requires_grad_(False)
    before = model.conv1.weight.grad.clone()
    cut_(model, cuts(graph, half(graph)), attributes(graph, half(graph)))
    assert not model.conv2.weight.requires_grad and model.conv1.weight.requires_grad
    torch.testing.assert_close(model.conv1.weight.grad, before[::2], rtol=0, atol=0)
    assert model.fc1.weight.grad.shape == model.fc1.weight.shape == (5, 24)


def test_coupling_works_without_data() -> None:
    model = settle(conv.ResNet())
    wanted = {g.name: g.size for g in couple(model, torch.randn(SHAPE)).groups}
    empty = conv.ResNet().to("meta").eval()
    graph = couple(empty, torch.empty(SHAPE, device="meta"))
    assert {g.name: g.size for g in graph.groups} == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_their_type(dtype: torch.dtype) -> None:
    model = settle(Flat(lambda m, x: x)).to(dtype)
    graph = couple(model, Flat.example().to(dtype))
    small: Any = cut(model, graph, half(graph))
    assert small.first.weight.dtype == dtype and small.first.weight.shape == (6, 6)
    assert graph.bytes() == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def test_channels_last_weights_stay_channels_last() -> None:
    model = settle(Image(lambda m, x: x)).to(memory_format=torch.channels_last)
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last).eval()
    check_exact(model, Image.example())
    graph = couple(wide, torch.randn(SHAPE))
    small: Any = cut(wide, graph, half(graph))
    assert small[1].weight.is_contiguous(memory_format=torch.channels_last) and not small[1].weight.is_contiguous()


def test_imports_while_garbage_is_collected_disturb_no_run() -> None:
    """A finalizer may import, and the garbage collector runs whenever it likes."""
    names, thresholds = [f"_made_by_the_collector_{number}" for number in range(2000)], gc.get_threshold()
    left = iter(names)

    def importing(phase: str, _: object) -> None:
        if (name := next(left, None)) is not None:
            sys.modules[name] = ModuleType(name)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    gc.callbacks.append(importing)
    gc.set_threshold(1)
    try:
        graph = couple(model, torch.randn(2, 4))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(importing)
        for name in names:
            sys.modules.pop(name, None)
    assert [group.size for group in graph.groups] == [6]
