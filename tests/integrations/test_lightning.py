"""The callback of Lightning: exact zeros at every step, checkpoints that go on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from tests.vision import torchvision_or_skip

STEPS = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries themselves
    # Lightning keeps the handlers of signals in the model; that of a timeout holds all tests of the session, which
    # every plan would then search for tensors.
    pytest.mark.timeout(method="thread"),
]


@pytest.fixture(scope="module")
def lightning() -> Any:
    torchvision_or_skip()  # torchmetrics imports it, and that of PyPI does not fit a CPU build of torch
    return pytest.importorskip("lightning.pytorch")


def module_of(lightning: Any, dropout: float = 0.1) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    return Module()


def loader() -> Any:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)


def gradual(**more: Any) -> pr.integrations.Gradual:
    recipe = pr.Recipe(granularity=pr.Element())
    return pr.integrations.Gradual(recipe, pr.Sparsity(0.75), torch.zeros(1, 8), **{"steps": 6, "every": 2, **more})


def watch(lightning: Any, seen: list[float]) -> Any:
    class Watch(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            masks, named = pr.masks_of(pl_module), dict(pl_module.named_parameters())
            assert all(bool((named[name][~mask] == 0).all()) for name, mask in masks.items())
            total = sum(mask.numel() for mask in masks.values())
            seen.append(sum(int((~mask).sum()) for mask in masks.values()) / total if total else 0.0)

    return Watch()


def fit(
    lightning: Any, folder: Path, callbacks: list[Any], *, checkpoint: Any = None, module: Any = None, **more: Any
) -> Any:
    module = module or module_of(lightning)
    torch.manual_seed(5)
    standard = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "devices": 1,
        "enable_model_summary": False, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
        "enable_checkpointing": False,
    }  # fmt: skip
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **{**standard, **more})
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize(("precision", "part"), [("32-true", ""), ("bf16-mixed", "net")])
def test_masks_are_exact_after_every_step(lightning: Any, tmp_path: Path, precision: Any, part: str) -> None:
    seen: list[float] = []
    callbacks = [pr.integrations.LightningPruning(gradual(), module=part), watch(lightning, seen)]
    _, trainer = fit(lightning, tmp_path, callbacks, precision=precision)
    assert len(seen) == 2 * STEPS and seen == sorted(seen) and seen[0] == 0
    assert seen[-1] == pytest.approx(0.75, abs=0.01)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_training_that_goes_on_gives_the_same_bits(lightning: Any, tmp_path: Path, epochs: int) -> None:
    """From where Lightning goes on exactly itself: after a run that ended with an epoch, here of 4 batches."""

    def run(epochs: int, **more: Any) -> tuple[Any, Any]:
        how = gradual(steps=7, every=1)
        callbacks = [pr.integrations.LightningPruning(how), watch(lightning, seen)]
        return fit(
            lightning, tmp_path, callbacks, module=module_of(lightning, 0.0), limit_train_batches=4, max_steps=-1,
            max_epochs=epochs, **more,
        )  # fmt: skip

    seen: list[float] = []
    whole, _ = run(4)
    _, trainer = run(epochs)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    seen.clear()
    resumed, _ = run(4, checkpoint=tmp_path / "stopped.ckpt")
    assert len(seen) == 4 * (4 - epochs) and seen[-1] == pytest.approx(0.75, abs=0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, pr.masks_of(whole)[name]) for name, mask in pr.masks_of(resumed).items())


def test_masks_that_the_model_has_are_held(lightning: Any, tmp_path: Path) -> None:
    module = module_of(lightning)
    pr.apply_(module.net, pr.plan(module.net, torch.zeros(1, 8), pr.Recipe(granularity=pr.NM(2, 4))))
    seen: list[float] = []
    fit(lightning, tmp_path, [pr.integrations.LightningPruning(module="net"), watch(lightning, seen)], module=module)
    assert set(seen) == {0.5}


@pytest.mark.parametrize("name", ["net", ""])
def test_the_teacher_is_mixed_into_the_loss_by_the_formula(lightning: Any, tmp_path: Path, name: str) -> None:
    losses: list[float] = []

    class Record(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            losses.append(float(loss))

    module, teacher = module_of(lightning, dropout=0.0), nn.Linear(8, 3)
    student = copy.deepcopy(module.net)
    how = pr.integrations.Distillation(teacher, alpha=0.25, temperature=3.0)
    callbacks = [pr.integrations.LightningPruning(module=name, distillation=how), Record()]
    settings = {"max_steps": 1, "accumulate_grad_batches": 1, "module": module}
    if not name:
        with pytest.raises(RequestError, match="training_step did not call the Module that is pruned"):
            fit(lightning, tmp_path, callbacks, **settings)
        assert "training_step" not in vars(module) and not module._forward_hooks
        return
    fit(lightning, tmp_path, callbacks, **settings)
    x, y = next(iter(loader()))
    logits, wanted = student(x), teacher(x)
    divergence = F.kl_div(F.log_softmax(logits / 3, -1), F.softmax(wanted / 3, -1), reduction="batchmean") * 9
    assert losses[0] == pytest.approx(float(0.75 * F.cross_entropy(logits, y) + 0.25 * divergence), rel=1e-5)
    assert "training_step" not in vars(module) and not module.net._forward_hooks and teacher.weight.grad is None


def test_a_training_without_an_end_needs_a_number_of_steps(lightning: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the length of the training is not known"):
        fit(lightning, tmp_path, [pr.integrations.LightningPruning(gradual(steps=0.5))], max_steps=-1, max_epochs=-1)
