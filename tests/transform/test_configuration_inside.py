"""A transformers model inside other objects: after a cut its `save_pretrained` writes what its class reads again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import prunella as pr
from prunella.errors import NotSupported
from prunella.io.load import import_transformers
from prunella.planning.parts import call_of, merged, readable_parts, reads_itself
from tests.cli.conftest import with_words

IDS = {"input_ids": torch.arange(16).view(2, 8)}
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
EVEN = pr.Recipe(pr.magnitude, pr.Channel(), equal_widths=True)
UNEVEN = pr.Recipe(pr.magnitude, pr.Channel(), allocation=pr.global_)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def hf() -> Any:
    pytest.importorskip("transformers")
    return import_transformers()


def bert(hf: Any) -> Any:
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**SIZES)).eval()


def llama(hf: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


def adapted(model: nn.Module, *targets: str) -> Any:
    """Under LoRA, with adapters that change the outputs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


class Classifier(nn.Module):
    """A user's module around a model of transformers. directly: calls `forward` itself, past the hooks."""

    def __init__(self, model: nn.Module, *, directly: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.directly = model, nn.Linear(32, 3), directly

    def forward(self, input_ids: Tensor) -> Tensor:
        call = self.body.forward if self.directly else self.body
        return self.head(call(input_ids=input_ids).last_hidden_state[:, 0])  # type: ignore[no-any-return]


class Held(nn.Module):
    """One more level."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleList([model])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net[0](input_ids)  # type: ignore[no-any-return]


def shrunk(model: nn.Module, recipe: pr.Recipe = EVEN, keep: float = 0.85) -> Any:
    return pr.shrink(model, pr.plan(model, IDS, recipe, target=pr.MACs(keep)))


WRAPPED: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any]]] = {
    "module": (lambda hf: Classifier(bert(hf)), lambda small: small.body),
    "forward": (lambda hf: Classifier(bert(hf), directly=True), lambda small: small.body),
    "nested": (lambda hf: Held(Classifier(bert(hf))), lambda small: small.net[0].body),
    "parallel": (lambda hf: nn.DataParallel(llama(hf)), lambda small: small),
    "average": (lambda hf: AveragedModel(llama(hf)), lambda small: small),
    "compiled": (lambda hf: torch.compile(llama(hf), backend="eager"), lambda small: small),  # type: ignore[misc]
    "parallel inside": (lambda hf: nn.DataParallel(Classifier(bert(hf))), lambda small: small.body),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_inside_is_read_again_after_an_even_cut(hf: Any, name: str, tmp_path: Path) -> None:
    build, inner = WRAPPED[name]
    model = build(hf)
    part = inner(shrunk(model))
    assert part.config.intermediate_size < 64
    part.save_pretrained(tmp_path)
    again = type(part).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**IDS)[0], part(**IDS)[0])


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_inside_refuses_to_be_written_after_an_uneven_cut(hf: Any, name: str, tmp_path: Path) -> None:
    build, inner = WRAPPED[name]
    part = inner(shrunk(build(hf), UNEVEN))
    assert part.config.intermediate_size == 64
    with pytest.raises(NotSupported, match="from_pretrained cannot read") as caught:
        part.save_pretrained(tmp_path)
    assert "or plan with equal_widths=True" in caught.value.todo and not list(tmp_path.iterdir())


TARGETS = {"llama": (llama, ("q_proj", "down_proj")), "bert": (bert, ("query", "value"))}


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_refused_until_they_are_merged_and_then_read_again(
    hf: Any, name: str, copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    build, targets = TARGETS[name]
    small = copied(shrunk(adapted(build(hf), *targets)))
    expected = small(**IDS)[0]
    for writer in (small, small.base_model.model):
        with pytest.raises(NotSupported, match="from_pretrained cannot read") as caught:
            writer.save_pretrained(tmp_path)
        assert "merge_and_unload" in caught.value.todo and not list(tmp_path.iterdir())
    assert small.base_model.model.config.intermediate_size < 64 and small.config is small.base_model.model.config
    plain = small.merge_and_unload()
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**IDS)[0], expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_an_uneven_cut_stay_refused_and_the_advice_is_true(hf: Any, tmp_path: Path) -> None:
    model = adapted(llama(hf), "q_proj")
    plan = pr.plan(model, IDS, UNEVEN, target=pr.MACs(0.85))
    small: Any = pr.shrink(model, plan)
    with pytest.raises(NotSupported, match="from_pretrained cannot read") as caught:
        small.save_pretrained(tmp_path)
    assert "before the adapters are merged, or merge them before the plan" in caught.value.todo
    saved = pr.save(small, tmp_path / "small", plan=plan)
    again = pr.load(saved.path, factory=lambda: adapted(llama(hf), "q_proj"))
    assert torch.equal(again(**IDS).logits, small(**IDS).logits)
    with pytest.raises(NotSupported, match="from_pretrained cannot read"):
        small.merge_and_unload().save_pretrained(tmp_path / "merged")
    before = adapted(llama(hf), "q_proj").merge_and_unload()
    plan = pr.plan(before, IDS, UNEVEN, target=pr.MACs(0.85))
    saved = pr.save(pr.shrink(before, plan), tmp_path / "plain", plan=plan)
    assert pr.load(saved.path)(**IDS).logits.shape == (2, 8, 64)


def test_a_further_cut_forgets_what_the_first_has_set(hf: Any, tmp_path: Path) -> None:
    model = adapted(llama(hf), "q_proj")
    first = shrunk(model, UNEVEN)
    element = pr.plan(first, IDS, pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.3))
    assert "save_pretrained" not in vars(pr.shrink(first, element))
    assert "save_pretrained" in vars(shrunk(first, UNEVEN, 0.95))
    mine = llama(hf)
    mine.save_pretrained = str  # a writer that the user has set
    assert vars(shrunk(mine))["save_pretrained"] is str


def test_a_wrapper_with_cut_layers_of_its_own_is_not_written_and_the_model_inside_is(hf: Any, tmp_path: Path) -> None:
    class Around(Classifier):
        def __init__(self) -> None:
            super().__init__(bert(hf))
            self.head = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 3))  # type: ignore[assignment]

        def save_pretrained(self, folder: Path) -> None:
            raise AssertionError("it was written")

    small = shrunk(Around())
    assert small.head[0].out_features < 48
    with pytest.raises(NotSupported, match="from_pretrained cannot read") as caught:
        small.save_pretrained(tmp_path)
    assert "equal_widths" not in caught.value.todo, "it was asked for"


@pytest.fixture
def folder(hf: Any, tmp_path: Path) -> Path:
    bert(hf).save_pretrained(tmp_path / "bert")
    with_words(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_sentence_transformer_is_written_and_read_again(hf: Any, folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    dense = library.SentenceTransformer(str(folder), device="cpu").eval()
    batch = ({**IDS, "attention_mask": torch.ones(2, 8, dtype=torch.int64)},)
    plan = pr.plan(dense, batch, EVEN, target=pr.Params(0.9))
    small: Any = pr.shrink(dense, plan)
    for verb in ("save_pretrained", "save"):
        getattr(small, verb)(str(tmp_path / verb))
        again = library.SentenceTransformer(str(tmp_path / verb), device="cpu").eval()
        assert again[0].auto_model.config.intermediate_size < 64
        expected = small({key: value.clone() for key, value in batch[0].items()})["sentence_embedding"]
        assert torch.equal(again({**batch[0]})["sentence_embedding"], expected)
    uneven: Any = pr.shrink(dense, pr.plan(dense, batch, UNEVEN, target=pr.Params(0.9)))
    for verb in ("save_pretrained", "save"):
        with pytest.raises(NotSupported, match="from_pretrained cannot read"):
            getattr(uneven, verb)(str(tmp_path / f"uneven {verb}"))


class Saves(nn.Module):
    """Has a writer of its own. through: it writes the model inside by that model's writer."""

    def __init__(self, model: Any, *, through: bool) -> None:
        super().__init__()
        self.inner, self.through = model, through

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids)[0]  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path) -> str:
        if self.through:
            self.inner.save_pretrained(folder / "inner")
        return "written"


def test_a_wrapper_that_writes_past_the_smaller_model_says_so(hf: Any, tmp_path: Path) -> None:
    through, past = (shrunk(Saves(bert(hf), through=through)) for through in (True, False))
    assert through.save_pretrained(tmp_path) == "written" and "save_pretrained" not in vars(through.inner)
    assert type(through.inner).from_pretrained(tmp_path / "inner").config.intermediate_size < 64
    with pytest.raises(NotSupported, match="wrote a Saves without the smaller model inside"):
        past.save_pretrained(tmp_path)


def test_parts_and_their_calls(hf: Any) -> None:
    model = adapted(bert(hf), "query")
    assert not reads_itself(model) and reads_itself(model.base_model.model)
    assert readable_parts(Held(model)) == ["net.0.base_model.model"] and readable_parts(nn.Linear(2, 2)) == []
    plain = merged(model)
    assert plain is not model and "base_model.model.encoder.layer.0.attention.self.query.weight" in plain.state_dict()
    assert merged(plain.base_model.model) is plain.base_model.model
    direct = Classifier(bert(hf), directly=True)
    call = call_of(direct, direct.body, IDS)
    assert call is not None and torch.equal(call["input_ids"], IDS["input_ids"]) and "forward" not in vars(direct.body)
    assert call_of(direct, nn.Linear(2, 2), IDS) is None
