"""The one counter of multiply-adds against formulas worked by hand, against torch's own, and against plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.measure.count import count_work, measured_macs
from prunella.model.state import untouched


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return x


class Attention(nn.Module):
    """Grouped queries by one call, as in Llama; with a causal mask, whose zeros are work too."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, groups * self.size)
        self.v, self.o = nn.Linear(width, groups * self.size), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.groups, self.size)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.groups, self.size)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


class Language(nn.Module):
    """GPT: an embedding, a block of attention and a layer, tied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(50, 16), Attention(groups=4)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x)
        out: Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return out


class Patches(nn.Module):
    """ViT: patches by a convolution, a class token, an encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, stride=4), nn.Parameter(torch.randn(1, 1, 16))
        self.layer, self.head = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        out: Tensor = self.head(self.layer(tokens)[:, 0])
        return out


class Experts(nn.Module):
    """A mixture: every token goes to one of three experts by a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Pyramid(nn.Module):
    """A detector: a backbone, an upsampled lateral sum, and one head that reads both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.lateral = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1)])
        self.head = nn.Conv2d(6, 7, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.one(x)
        coarse = self.two(fine)
        top = self.lateral[1](coarse)
        return [self.head(self.lateral[0](fine) + F.interpolate(top, scale_factor=2.0)), self.head(top)]


class Computed(nn.Module):
    """Products without a layer: einsum, a vector, a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.vector = nn.Parameter(torch.randn(6, 8, 5)), nn.Parameter(torch.randn(6))
        self.both = nn.Bilinear(6, 8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.einsum("bik,oik->bo", torch.stack([x**k for k in range(5)], -1), self.mixed)
        return y @ self.vector, self.both(y, x)


def _attention(batch: int, tokens: int, width: int, inner: int = 0) -> int:
    """Two products of a square of tokens over the width."""
    return batch * tokens * tokens * (width + (inner or width))


IMAGE = torch.randn(2, 3, 8, 8)
STEPS = torch.randn(2, 5, 6)
TOKENS = torch.randint(0, 50, (2, 7))
ENCODER = _attention(2, 5, 16) + 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "convolution": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), IMAGE, 2 * 6 * 3 * 9 * 16),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 6, 6), 8 * 2 * 9 * 16),
    "depthwise": (lambda: nn.Conv2d(4, 8, (3, 1), groups=4), torch.randn(1, 4, 6, 6), 8 * 3 * 4 * 6),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), torch.randn(2, 4, 5, 5), 2 * 4 * 3 * 9 * 25),
    "volume": (lambda: nn.Conv3d(2, 4, 3, padding=1), torch.randn(1, 2, 4, 4, 4), 4 * 2 * 27 * 64),
    "without a batch": (lambda: nn.Conv1d(3, 5, 4), torch.randn(3, 10), 5 * 3 * 4 * 7),
    "residual": (Residual, IMAGE, 2 * 64 * 9 * (3 * 8 + 3 * 8 * 8)),
    "vision transformer": (
        Patches,
        IMAGE,
        2 * 4 * 16 * 3 * 16 + _attention(2, 5, 16) + 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 16 * 5,
    ),
    "encoder, fused": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        torch.randn(2, 5, 16),
        2 * ENCODER,
    ),
    "grouped queries": (Attention, torch.randn(2, 7, 16), _attention(2, 7, 16) + 2 * 7 * 16 * (16 + 8 + 8 + 16)),
    "language model": (
        Language, TOKENS, _attention(2, 7, 16) + 2 * 7 * (4 * 16 * 16 + 2 * 16 * 64 + 16 * 50)
    ),
    "mixture of experts": (Experts, torch.randn(9, 8), 9 * 8 * (3 + 8)),
    "lstm": (lambda: nn.LSTM(6, 8, 2, bidirectional=True), STEPS, 10 * 2 * 32 * ((6 + 8) + (16 + 8))),
    "lstm with projections": (lambda: nn.LSTM(6, 8, proj_size=3), STEPS, 10 * (32 * (6 + 3) + 8 * 3)),
    "gru": (lambda: nn.GRU(6, 8, batch_first=True), STEPS, 10 * 24 * (6 + 8)),
    "rnn cell": (lambda: nn.RNNCell(6, 8), torch.randn(3, 6), 3 * 8 * (6 + 8)),
    "detector": (
        Pyramid,
        IMAGE,
        2 * (16 * 8 * 3 * 9 + 4 * 16 * 8 * 9 + 16 * 6 * 8 + 4 * 6 * 16 + (16 + 4) * 7 * 6 * 9),
    ),
    "computed": (Computed, torch.randn(3, 8), 3 * (6 * 8 * 5 + 6 + 4 * 6 * 8)),
    "lookups are free": (
        lambda: nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 2)), TOKENS, 2 * 8 * 2
    ),
}  # fmt: skip
BEYOND_TORCH = {"lstm", "computed"}
"""torch's counter has no formula for a recurrent kernel, nor for products with vectors and bilinear forms."""


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_hand_formula_plan_and_torch_agree(name: str) -> None:
    torch.manual_seed(0)
    build, inputs, wanted = CASES[name]
    model = build().eval()
    work = count_work(model, inputs)
    assert work.macs == wanted and not work.uncounted
    assert couple(model, inputs).macs() == wanted
    with torch.inference_mode():  # where composite operations arrive as one
        assert count_work(model, inputs) == work
    if name not in BEYOND_TORCH:
        assert _by_torch(model, inputs) == wanted


def _by_torch(model: nn.Module, inputs: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with untouched(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kernel_behind_a_layer_does_not_matter(dtype: torch.dtype) -> None:
    for model in (nn.LSTM(6, 8), nn.GRU(6, 8), nn.MultiheadAttention(6, 2)):
        args = (STEPS,) * (3 if isinstance(model, nn.MultiheadAttention) else 1)
        usual = measured_macs(model.eval(), args)
        assert measured_macs(model.to(dtype), tuple(x.to(dtype) for x in args)) == usual


def test_packed_sequences_count_their_own_steps() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 6), torch.tensor([5, 3]))
    assert measured_macs(nn.LSTM(6, 8), (packed,)) == 8 * 32 * (6 + 8)


def test_every_layer_of_a_list_counts_once_and_keeps_its_name() -> None:
    work = count_work(Residual().eval(), IMAGE)
    each = 2 * 64 * 9 * 8 * 8
    assert work.by_module == {"stem": 2 * 64 * 9 * 3 * 8, **{f"blocks.{k}": each for k in range(3)}}
    assert work.by_weight == {f"{name}.weight": macs for name, macs in work.by_module.items()}


def test_work_with_the_weight_of_another_module_belongs_to_that_module() -> None:
    work = count_work(nn.MultiheadAttention(16, 4, batch_first=True).eval(), (torch.randn(2, 5, 16),) * 3)
    assert work.by_module == {"": 10 * 3 * 16 * 16 + _attention(2, 5, 16), "out_proj": 10 * 16 * 16}


def test_the_model_stays_as_it_is_and_wrappers_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = torch.get_rng_state()
    assert measured_macs(nn.DataParallel(model), torch.randn(3, 6)) == measured_macs(model, torch.randn(3, 6)) == 72
    assert model.training and int(model[1].num_batches_tracked) == 0
    torch.set_rng_state(before)


# -- what nobody knows ---------------------------------------------------------------------------------------------


@torch.library.custom_op("prunella_work::mix", mutates_args=())
def mix(x: Tensor, weight: Tensor) -> Tensor:
    """A product that no counter can see into."""
    return x @ weight.t()


@torch.library.custom_op("prunella_work::known_mix", mutates_args=())
def known_mix(x: Tensor, weight: Tensor) -> Tensor:
    """The same, with a formula."""
    return x @ weight.t()


@register_flop_formula(torch.ops.prunella_work.known_mix)
def _flops(x: Any, weight: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


class Mixed(nn.Module):
    def __init__(self, *, known: bool) -> None:
        super().__init__()
        self.known, self.hidden = known, nn.Parameter(torch.randn(30, 6))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        operation: Any = known_mix if self.known else mix
        return operation(x, 2 * self.hidden), self.down(self.up(x).relu())


def test_a_custom_operation_is_named_with_the_parameters_behind_it() -> None:
    work = count_work(Mixed(known=False).eval(), torch.randn(4, 6))
    assert work.macs == 4 * (6 * 9 + 9 * 2)
    assert work.uncounted == {"prunella_work.mix": 1} and work.hidden == {"prunella_work.mix": ("hidden",)}


def test_the_formula_of_torchs_counter_makes_it_known() -> None:
    work = count_work(Mixed(known=True).eval(), torch.randn(4, 6))
    assert work.macs == 4 * (30 * 6 + 6 * 9 + 9 * 2) and not work.uncounted


def test_plan_report_and_speedup_say_first_what_is_not_counted() -> None:
    model, x = Mixed(known=False).eval(), torch.randn(4, 6)
    plan = pr.plan(model, x, target=pr.MACs(0.6))
    line = "not counted in MACs: prunella_work.mix (1 call), which reads 68.4% of the parameters"
    assert str(plan).splitlines()[0] == line
    small = pr.shrink(model, plan)
    for given in (plan, None):
        report = pr.report(model, small, x, plan=given, rounds=5)
        assert str(report).splitlines()[1] == line and report.data()["caveats"] == (line,)
        assert (report.metric("multiply-adds").before, report.metric("multiply-adds").after) == (
            plan.before.macs,
            plan.after.macs,
        )


def test_a_target_is_of_all_the_work_and_the_least_is_told() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mid = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 4, 1)
            self.rnn, self.head = nn.LSTM(4, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            start = torch.full((1, 1, 32), 0.1)  # a size that no cut can follow
            out: Tensor = self.head(self.rnn(self.mid(self.conv(x).relu()).permute(2, 0, 1), (start, start))[0])
            return out

    model, x = Recurrent().eval(), torch.randn(1, 2, 6)
    recurrent, rest = 6 * 128 * (4 + 32), 6 * (2 * 8 + 8 * 4 + 32 * 3)
    plan = pr.plan(model, x, target=pr.MACs(0.995))
    assert plan.before.macs == recurrent + rest and plan.got <= 0.995
    with pytest.raises(
        pr.PruningError, match=r"cannot be met: removing all prunable units leaves macs=0.9097"
    ) as caught:
        pr.plan(model, x, target=pr.MACs(0.5))
    assert "rnn.weight_hh_l0" in caught.value.why and "starts from a state that is not cut" in caught.value.why


@pytest.mark.parametrize("build", [Residual, Language, Patches], ids=lambda build: build.__name__)
def test_masks_count_as_effective_multiply_adds(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), TOKENS if build is Language else IMAGE
    plan = pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.MACs(0.7))
    masked = pr.apply_(model, plan)
    assert pr.metrics.effective_macs(masked, x) == plan.after.macs
    assert measured_macs(masked, x) == plan.before.macs


def test_layouts_without_sizes_are_named_and_not_guessed() -> None:
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    assert count_work(nn.Linear(8, 4), rows).uncounted == {"linear": 1}


def test_what_a_plain_tensor_is_filled_with_is_no_weight() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            held = torch.zeros(len(x), 8)
            held[:, :] = self.first(x)
            out: Tensor = self.last(held)
            return out

    work = count_work(Filled().eval(), torch.randn(3, 6))
    assert work.by_weight == {"first.weight": 144, "last.weight": 48}
