"""The same run in two processes with gloo, as torchrun starts them, against one process; and training with FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunella as pr
from prunella.llm.distributed import ProcessGroup
from prunella.recovery import hold_sharded_
from tests.llm.streaming.models import data, read, write
from tests.ranks import together

REFINED = pr.llm.OneShot(pr.NM(2, 4), refine=pr.llm.Refine(epochs=1))


def net() -> nn.Module:
    """A small network, half of whose weights are masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    return pr.apply_(model, pr.plan(model, torch.zeros(2, 6), pr.Recipe(pr.magnitude, pr.Element()), target=HALF))


HALF = pr.Sparsity(0.5)


def train(model: nn.Module, *, half: int | None = None) -> None:
    """Five steps on a batch of 8, or on one half of it, whose gradients are averaged with the other's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    release = hold_sharded_(model, optimizer) if half is not None else pr.Pruner(model, optimizer).detach
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
        rows = slice(None) if half is None else slice(4 * half, 4 * half + 4)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
    release()


def job(source: Path, output: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    group = pr.llm.process_group()
    pr.llm.solve_folder(source, output / "plain", pr.llm.OneShot(), data=data(5), memory="64GB")
    pr.llm.solve_folder(source, output / "refined", REFINED, data=data(5))

    model = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(source).eval()
    pr.llm.solve_(model, data()[0], pr.llm.OneShot(), data=group.shard(data(5)), distributed=group)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, output / f"in_memory_{group.rank}.safetensors")

    small = net()
    for block in (*small, small):
        if list(block.parameters()):
            fully_shard(block)
    train(small, half=group.rank)
    whole = {name: value.full_tensor() for name, value in small.state_dict().items()}
    if group.is_main:
        save_file(whole, output / "trained.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the model in `in`. They have the variables that torchrun sets, and no new imports."""
    place = tmp_path_factory.mktemp("two")
    write(place / "in")
    together(2, lambda: job(place / "in", place), place)
    return place


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards."""
    return {k: v for file in sorted(folder.glob("model-*")) for k, v in load_file(file).items()}


@pytest.mark.slow
def test_masks_are_those_of_one_process(two: Path) -> None:
    pr.llm.solve_folder(two / "in", two / "one", pr.llm.OneShot(), data=data(5))
    one, both = weights(two / "one"), weights(two / "plain")
    assert one.keys() == both.keys()
    for name in one:
        assert one[name].ne(0).equal(both[name].ne(0)), name
        assert torch.allclose(one[name], both[name], atol=1e-6), name
    memory = [load_file(two / f"in_memory_{rank}.safetensors") for rank in range(2)]
    assert all(memory[0][name].equal(memory[1][name]) and memory[0][name].equal(both[name]) for name in both)


@pytest.mark.slow
def test_refining_gives_the_weights_of_one_process(two: Path) -> None:
    model = write(two / "fresh")
    pr.llm.solve_folder(two / "in", two / "one_refined", REFINED, data=data(5))
    one, both = weights(two / "one_refined"), weights(two / "refined")
    assert all(v.view(-1, 4).eq(0).sum(1).eq(2).all() for k, v in both.items() if k.endswith("proj.weight"))
    for name in one:
        assert one[name].ne(0).equal(both[name].ne(0)), name
        assert torch.allclose(one[name], both[name], atol=1e-5), name
    unrefined = pr.llm.OneShot(REFINED.pattern)
    pr.llm.solve_folder(two / "in", two / "one_unrefined", unrefined, data=data(5))
    plain = weights(two / "one_unrefined")
    assert (
        max(float((plain[name] - one[name]).abs().max()) for name in one) > 1e-3
    )  # what would be seen if a step were lost
    read(two / "refined", model)


@pytest.mark.slow
def test_training_shards_is_training_whole(two: Path) -> None:
    model = net()
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    train(model)
    found = load_file(two / "trained.safetensors")
    for name, value in model.named_parameters():
        assert torch.allclose(found[name], value, atol=1e-6), name
        assert not bool(found[name][zeros[name]].any()) and bool(value.ne(0).any())
    assert sum(int(zero.sum()) for zero in zeros.values()) >= 49


def test_each_process_has_a_shard_and_none_is_empty() -> None:
    found = [ProcessGroup(rank, 3).shard(list(range(7))) for rank in range(3)]
    assert found == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(pr.PruningError, match="2 batches for 3 processes"):
        ProcessGroup(2, 3).shard([0, 1])


def test_a_model_that_is_not_sharded_or_not_masked_is_refused() -> None:
    model = net()
    with pytest.raises(pr.PruningError, match="not sharded"):
        hold_sharded_(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain = nn.Linear(2, 2)
    with pytest.raises(pr.PruningError, match="no mask"):
        hold_sharded_(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
