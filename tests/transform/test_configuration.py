"""After a cut a model's own `save_pretrained` writes what its class reads again, or refuses in a sentence."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.io.load import import_transformers

BATCH = {"input_ids": torch.arange(32).view(2, 16)}


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("transformers")
    return import_transformers()


@pytest.fixture
def llama(transformers: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


CHANNELS = pr.Recipe(pr.magnitude, pr.Channel(), equal_widths=True)
BLOCKS = pr.Recipe(pr.magnitude, pr.Depth())


def cut(model: nn.Module, recipe: pr.Recipe, keep: float = 0.85, batch: Any = BATCH) -> Any:
    return pr.shrink(model, pr.plan(model, batch, recipe, target=pr.Params(keep)))


@pytest.mark.parametrize(("recipe", "keep"), [(CHANNELS, 0.85), (BLOCKS, 0.75)])
def test_uniform_cuts_are_read_again(llama: Any, recipe: pr.Recipe, keep: float, tmp_path: Path) -> None:
    dense = copy.deepcopy(llama.config.to_dict())
    small = cut(llama, recipe, keep)
    small.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path)
    assert torch.equal(again(**BATCH).logits, small(**BATCH).logits)
    assert small.config is small.model.config and small.config.to_dict() != dense == llama.config.to_dict()
    further = cut(small, CHANNELS, 0.9)
    further.save_pretrained(tmp_path / "further")
    assert type(llama).from_pretrained(tmp_path / "further").config.intermediate_size < small.config.intermediate_size


def uneven(llama: Any) -> Any:
    """Another width in each layer."""
    only = pr.plan(llama, BATCH, pr.Recipe(), target=pr.Params(0.95), only=["model.layers.0.mlp*"])
    return pr.shrink(llama, only), only


def test_what_no_configuration_describes_refuses_to_be_written(llama: Any, tmp_path: Path) -> None:
    small, plan = uneven(llama)
    for model in (small, small.model, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with pytest.raises(NotSupported, match="from_pretrained cannot read") as caught:
            model.save_pretrained(tmp_path)
    assert "prunella.save" in caught.value.todo and not list(tmp_path.iterdir())
    assert small.config.intermediate_size == 48
    llama.save_pretrained(tmp_path / "dense")
    saved = pr.save(small, tmp_path / "small", plan=plan)
    assert torch.equal(pr.load(saved.path)(**BATCH).logits, small(**BATCH).logits)


def test_a_model_that_is_described_is_saved_with_its_plan_too(llama: Any, tmp_path: Path) -> None:
    plan = pr.plan(llama, BATCH, CHANNELS, target=pr.Params(0.85))
    small = pr.shrink(llama, plan)
    assert pr.save(small, tmp_path / "small", plan=plan).reader == "from_pretrained"
    low, _ = pr.compress.low_rank(small, rank=4)
    saved = pr.save(low, tmp_path / "low", plan=plan)
    assert torch.allclose(pr.load(saved.path)(**BATCH).logits, low(**BATCH).logits, atol=1e-6)


class Wrapped(nn.Module):
    """In the shape of a module of sentence-transformers: a model inside, pooled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model, self.word_embedding_dimension = model, model.config.hidden_size

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.auto_model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        mask = features["attention_mask"][..., None].to(tokens[0].dtype)
        return {**features, "sentence_embedding": (tokens[0] * mask).sum(1) / mask.sum(1)}

    def save(self, path: Path) -> None:
        self.auto_model.save_pretrained(path)


def test_a_part_inside_a_wrapper_is_written_as_it_is(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).eval()
    model = nn.Sequential(Wrapped(bert))
    batch = ({**BATCH, "attention_mask": torch.ones(2, 16, dtype=torch.int64)},)
    plan = pr.plan(model, batch, target=pr.Params(0.9), only=["*intermediate.dense*"])
    small: Any = pr.shrink(model, plan)
    small[0].save(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert again.config.intermediate_size < 48 and bert.config.intermediate_size == 48
    features = batch[0]
    assert torch.equal(again(**features)[0], small[0].auto_model(**features)[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_the_dense_model_are_not_written_beside_a_cut_one(llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"])).eval()
    small = cut(model, pr.Recipe(pr.magnitude, pr.Channel()))
    with pytest.raises(NotSupported, match="from_pretrained cannot read"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_of_other_kinds_are_left_alone() -> None:
    class Writes(nn.Linear):
        def save_pretrained(self, folder: Path) -> str:
            return str(folder)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Writes(8, 2))
    x = torch.randn(2, 4)
    small = pr.shrink(model, pr.plan(model, x, target=pr.Params(0.5)))
    with pytest.raises(NotSupported, match="a Writes that from_pretrained cannot read"):
        small[2].save_pretrained("x")  # type: ignore[index]
    plain = pr.shrink(model, pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5)))
    assert plain[2].save_pretrained("x") == "x"  # type: ignore[index]
