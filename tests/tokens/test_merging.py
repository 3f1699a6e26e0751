"""Token merging: hand numbers, properties, and models that lose exactly r tokens before each block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prunella as pr
from prunella.tokens import bipartite_match, merge, unmerge
from prunella.tokens.matching import most
from tests.graphs import blocks
from tests.graphs import images as pictures


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v)
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


class Vision(nn.Module):
    """Patches of 4x4 of 16x16 images, a class token and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.first, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x[:, 0])
        return out


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vision() -> Vision:
    torch.manual_seed(0)
    return Vision().eval()


def macs(model: nn.Module, batch: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    return counter.get_total_flops() // 2


def test_four_tokens_by_hand() -> None:
    """Places 0 and 2 look at 1 and 3: (0, 1) and (0, 3) are parallel, and one of them stands for three tokens."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 3.0]]])
    found = bipartite_match(x, 1)
    assert (found.source.tolist(), found.target.tolist(), found.kept.tolist()) == ([[2]], [[3]], [[0, 1, 3]])
    merged, sizes = merge(x, torch.tensor([[1.0, 1.0, 1.0, 3.0]]), found)
    assert merged.tolist() == [[[1.0, 0.0], [1.0, 1.0], [0.0, 2.5]]] and sizes.tolist() == [[1.0, 1.0, 4.0]]
    assert unmerge(merged, found).tolist() == [[[1.0, 0.0], [1.0, 1.0], [0.0, 2.5], [0.0, 2.5]]]


def test_two_tokens_may_go_into_one() -> None:
    x = torch.tensor([[[2.0], [4.0], [9.0]]])
    merged, sizes = merge(x, torch.ones(1, 3), bipartite_match(x, 2))
    assert merged.tolist() == [[[5.0]]] and sizes.tolist() == [[3.0]]


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_what_merging_keeps(tokens: int, protected: int) -> None:
    x = torch.randn(4, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    sizes = torch.arange(1.0, tokens + 1, dtype=torch.float64).expand(4, -1)
    for r in range(most(tokens, protected) + 1):
        found = bipartite_match(x, r, protected=protected)
        merged, now = merge(x, sizes, found)
        assert merged.shape == (4, tokens - r, 6) and unmerge(merged, found).shape == x.shape
        assert torch.equal(now.sum(1), sizes.sum(1))
        torch.testing.assert_close((merged * now[..., None]).sum(1), (x * sizes[..., None]).sum(1))
        assert torch.equal(merged[:, :protected], x[:, :protected])
        assert r or merged is x
    with pytest.raises(pr.PruningError, match="cannot be merged"):
        bipartite_match(x, most(tokens, protected) + 1, protected=protected)


def test_the_edges_are_the_most_similar_ones() -> None:
    """Brute force: each even token's best odd one, and the r best of these."""
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(5))
    found = bipartite_match(x, 2, protected=1)
    cosine = torch.nn.functional.cosine_similarity(x[0, :, None], x[0, None], dim=-1)
    edges = sorted((max((cosine[a, b].item(), b) for b in (1, 3, 5, 7)), a) for a in (2, 4, 6, 8))[::-1][:2]
    assert found.source[0].tolist() == [a for _, a in edges]
    assert found.target[0].tolist() == [b for (_, b), _ in edges]


def test_no_merging_is_the_dense_model_bit_for_bit() -> None:
    model, x = vision(), images()
    dense = model(x)
    with pr.tokens.merge_tokens_(model, x, r=0):
        assert torch.equal(model(x), dense)


def test_each_block_loses_r_tokens_and_all_comes_back() -> None:
    model, x = vision(), images()
    dense, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    handles = [block.up.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1])) for block in model.blocks]
    with pr.tokens.merge_tokens_(model, x, r=5) as merging:
        seen.clear()
        model(x), model(x)
        assert seen == [12, 7, 12, 7] and merging.paths == ("blocks.0", "blocks.1")
        assert merging.sizes is not None and merging.sizes.sum(1).tolist() == [17.0] * 3
        # a token: four projections of 8x8 and two of 8x12 in a block; attention: 2 * tokens^2 * 8
        patches = 16 * 48 * 8
        expected = patches + sum(n * (4 * 64 + 2 * 96) + 2 * n * n * 8 for n in (12, 7)) + 40
        expected += 9 * 8 * 8 + 6 * 6 * 8  # to compare even tokens with odd ones
        assert macs(model, x) == 3 * expected
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), dense) and list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_loses_at_most_what_may_go() -> None:
    model, x = vision(), images()
    with pr.tokens.merge_tokens_(model, x, r=100) as merging:
        model(x)
        assert merging.sizes is not None and merging.sizes.shape == (3, 5)  # 17, 9, 5


def test_tokens_that_are_equal_are_merged_without_a_loss_before_a_block_that_treats_each_alone() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Alone(), Alone(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 5, 4).repeat_interleave(2, 1)  # pairs at places 2k, 2k + 1
    dense = model(x)
    found = bipartite_match(model[0](x), 5)
    assert found.target.sort().values.tolist() == [[1, 3, 5, 7, 9]] * 2
    merged, sizes = merge(x, torch.ones(2, 10), found)
    assert sizes.tolist() == [[2.0] * 5] * 2
    torch.testing.assert_close(unmerge(model(merged), found), dense)


def test_a_vision_transformer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    ).eval()
    batch = {"pixel_values": images()}
    dense, cost = model(**batch).logits, macs(model, batch)
    with pr.tokens.merge_tokens_(model, batch, r=0):
        assert torch.equal(model(**batch).logits, dense)
    with pr.tokens.merge_tokens_(model, batch, r=4) as merging:
        assert len(merging.paths) == 2
        assert model(**batch).logits.shape == dense.shape and macs(model, batch) < 0.8 * cost
        assert not torch.equal(model(**batch).logits, dense)
    assert torch.equal(model(**batch).logits, dense)


def test_models_that_cannot_lose_tokens_are_refused_by_a_sentence() -> None:
    with pytest.raises(pr.PruningError, match="no residual blocks"):
        pr.tokens.merge_tokens_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3, 4), r=1)
    with pytest.raises(pr.PruningError, match="count tokens"):
        pr.tokens.merge_tokens_(vision(), images(), r=-1)
    with pytest.raises(pr.PruningError, match=r"no stream of tokens|not take"):
        pr.tokens.merge_tokens_(blocks().eval(), pictures()[0], r=1)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.inner = nn.ModuleList([Gate() for _ in range(2)]), False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, torch.ones(x.shape[1], 1))
        return x


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * mask


def test_masks_of_tokens_are_refused() -> None:
    model = Masked().eval()
    with pytest.raises(pr.PruningError, match="a further tensor"):
        pr.tokens.merge_tokens_(model, torch.randn(2, 6, 4), r=1)


class Placed(nn.Module):
    """A bias for all tokens inside the block: nothing to see from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("place", torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * self.place


def test_a_model_made_for_all_tokens_is_refused_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Placed(), Placed())).eval()
    x = torch.randn(2, 6, 4)
    dense = model(x)
    with pytest.raises(pr.PruningError, match="does not run with fewer tokens"):
        pr.tokens.merge_tokens_(model, x, r=1)
    assert torch.equal(model(x), dense)
