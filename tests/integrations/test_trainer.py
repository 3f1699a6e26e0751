"""The callback of the Trainer of transformers: exact zeros at every step, checkpoints that go on bit for bit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, NotSupported, RequestError
from tests.vision import torchvision_or_skip

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 8


@pytest.fixture(autouse=True)
def _vision() -> None:
    torchvision_or_skip()  # the torchvision of PyPI does not import beside a CPU build of torch


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
        hidden_dropout_prob=0.1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def examples(count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(20, (count, 6), generator=generator), torch.randint(3, (count,), generator=generator)
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(tokens, labels, strict=True)]


def arguments(folder: Path, **more: Any) -> Any:
    standard = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": "none",
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**standard, **more})


def gradual(**more: Any) -> pr.integrations.Gradual:
    example = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
    recipe = pr.Recipe(granularity=pr.Element())
    return pr.integrations.Gradual(recipe, pr.Sparsity(0.8), example, **{"steps": 6, "every": 2, **more})


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Whether all that is masked is zero, at the end of every step; and the sparsity."""

    def __init__(self) -> None:
        self.zeros: list[bool] = []
        self.sparsities: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        masks, named = pr.masks_of(given["model"]), dict(given["model"].named_parameters())
        self.zeros.append(all(bool((named[name][~mask] == 0).all()) for name, mask in masks.items()))
        total = sum(mask.numel() for mask in masks.values())
        self.sparsities.append(sum(int((~mask).sum()) for mask in masks.values()) / total if total else 0.0)


def trained(folder: Path, callback: Any, *others: Any, resume: str | None = None, **more: Any) -> tuple[Any, Any]:
    trainer = transformers.Trainer(
        network(), arguments(folder, **more), train_dataset=examples(), callbacks=[callback, *others],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model, trainer


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"optim": "adafactor"}, {"optim": "sgd"}])
def test_masks_are_exact_after_every_step(tmp_path: Path, more: dict[str, Any]) -> None:
    watch = Watch()
    model, trainer = trained(tmp_path, pr.integrations.TrainerPruning(gradual()), watch, **more)
    assert watch.zeros == [True] * STEPS
    assert watch.sparsities[0] == 0 and watch.sparsities == sorted(watch.sparsities)
    assert watch.sparsities[-1] == pytest.approx(0.8, abs=1e-3) and watch.sparsities[5] == watch.sparsities[-1]
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged[-1] == pytest.approx(0.8, abs=1e-3)
    assert sum(int((p == 0).sum()) for p in pr.finalize(model).parameters()) > 0


def test_masks_that_the_model_has_are_held(tmp_path: Path) -> None:
    model = network()
    plan = pr.plan(model, gradual().inputs or (), pr.Recipe(granularity=pr.NM(2, 4)))
    pr.apply_(model, plan)
    before, watch = {name: mask.clone() for name, mask in pr.masks_of(model).items()}, Watch()
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=examples(), callbacks=[pr.integrations.TrainerPruning(), watch]
    )
    trainer.train()
    assert watch.zeros == [True] * STEPS and before
    assert all(torch.equal(mask, before[name]) for name, mask in pr.masks_of(model).items())


@pytest.mark.parametrize("step", [3, 4, 7])
def test_a_training_that_goes_on_gives_the_same_bits(tmp_path: Path, step: int) -> None:
    more = {"save_strategy": "steps", "save_steps": step}
    whole, _ = trained(tmp_path / "one", pr.integrations.TrainerPruning(gradual()), **more)
    checkpoint = str(tmp_path / "one" / f"checkpoint-{step}")
    watch = Watch()
    resumed, _ = trained(tmp_path / "one", pr.integrations.TrainerPruning(gradual()), watch, resume=checkpoint, **more)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, pr.masks_of(whole)[name]) for name, mask in pr.masks_of(resumed).items())
    assert watch.zeros == [True] * (STEPS - step)


def test_a_checkpoint_elsewhere_is_named_and_one_without_masks_is_refused(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = trained(tmp_path / "one", pr.integrations.TrainerPruning(gradual()), **more)
    checkpoint = tmp_path / "one" / "checkpoint-4"
    with pytest.raises(BadInput, match=r"at step 4, and checkpoint-4 holds no prunella_masks"):
        trained(tmp_path / "two", pr.integrations.TrainerPruning(gradual()), resume=str(checkpoint), **more)
    named = pr.integrations.TrainerPruning(gradual(), checkpoint=checkpoint)
    resumed, _ = trained(tmp_path / "two", named, resume=str(checkpoint), **more)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(NotSupported, match="leave restore_callback_states_from_checkpoint out"):
        trained(
            tmp_path / "two", pr.integrations.TrainerPruning(gradual()), resume=str(checkpoint),
            restore_callback_states_from_checkpoint=True, **more,
        )  # fmt: skip


def test_the_best_checkpoint_comes_back_with_its_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = iter([0.1, 0.9, 0.2, 0.3])
    more = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True,
    }  # fmt: skip
    trainer = transformers.Trainer(
        network(), arguments(tmp_path, **more), train_dataset=examples(), eval_dataset=examples(4),
        compute_metrics=lambda _: {"score": next(values)}, callbacks=[pr.integrations.TrainerPruning(gradual())],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    masks = pr.masks_of(trainer.model)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) / total < 0.79
    assert "the best checkpoint is of step 4, before the target sparsity=0.8 was met at step 6" in caplog.text


class Logits(nn.Module):
    """A teacher that always says the same."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.logits.expand(len(input_ids), -1)})()


@pytest.mark.parametrize("items", [None, 8])
def test_the_teacher_is_mixed_into_the_loss_by_the_formula(items: int | None) -> None:
    from prunella.integrations.trainer import _add_distillation

    model, wanted = network(), torch.tensor([3.0, 0.0, -3.0])
    batch = {"input_ids": torch.zeros(4, 6, dtype=torch.long), "labels": torch.tensor([0, 1, 2, -100])}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = model(**batch)
    teacher = Logits(wanted)
    handle = _add_distillation(model, pr.integrations.Distillation(teacher, alpha=0.25, temperature=3.0))
    more = {} if items is None else {"num_items_in_batch": items}
    mixed = model(**batch, **more)
    rows = F.kl_div(
        F.log_softmax(plain.logits / 3, -1), F.softmax(wanted / 3, -1).expand(4, -1), reduction="none"
    ).sum(-1)[:3] * 9  # fmt: skip
    expected = 0.75 * plain.loss + 0.25 * rows.sum() / (3 if items is None else items)
    assert torch.allclose(mixed.loss, expected, atol=1e-5)
    mixed.loss.backward()
    assert teacher.logits.grad is None and teacher.training
    handle.remove()
    assert torch.equal(model(**batch).loss, plain.loss)


def test_distillation_from_the_dense_model_in_a_training(tmp_path: Path) -> None:
    dense = network(1)
    before = copy.deepcopy(dense.state_dict())
    callback = pr.integrations.TrainerPruning(gradual(), distillation=pr.integrations.Distillation(dense))
    model, _ = trained(tmp_path, callback)
    plain, _ = trained(tmp_path, pr.integrations.TrainerPruning(gradual()))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not model._forward_hooks
    smoothed = {"label_smoothing_factor": 0.1}
    with pytest.raises(RequestError, match="without label_smoothing_factor"):
        trained(tmp_path, callback, **smoothed)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"steps": 0}, "steps=0 is out of range"),
        ({"steps": 1.5}, "a fraction in"),
        ({"steps": True}, "steps=True is out of range"),
        ({"every": 0}, "every=0 is out of range"),
    ],
)
def test_settings_are_checked(more: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        gradual(**more)


def test_a_training_that_is_too_short_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, pr.integrations.TrainerPruning(gradual(steps=9)))
    assert "the training ends at step 8, before the target is met at step 9" in caplog.text


def test_a_callback_whose_library_is_missing_says_how_to_get_it() -> None:
    from prunella.errors import MissingExtra
    from prunella.integrations.library import bases, check_library

    (base,) = bases("no_such_library", "Callback")
    with pytest.raises(MissingExtra, match=r"pip install 'prunella\[lightning\]'"):
        check_library(base, "LightningPruning", "lightning")
    check_library(object, "LightningPruning", "lightning")
