"""Lightning: a callback prunes while `fit` runs, and distils the dense network. Half a minute."""

from __future__ import annotations

import torch

from parts import accuracy, digits, loss, network, options, train  # isort: skip (it comes before what reads torchvision)
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import prunella as pr


class Digits(LightningModule):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    given = options(__doc__)
    data, test = digits()
    dense = train(network(), data, 1 if given.quick else 10)
    module = Digits(network())
    module.net.load_state_dict(dense.state_dict())
    steps = 4 if given.quick else 240
    recipe, target, often = pr.recipes.global_magnitude(), pr.Sparsity(0.9), max(1, steps // 20)
    gradual = pr.integrations.Gradual(recipe, target, torch.zeros(2, 1, 8, 8), steps=int(0.7 * steps), every=often)
    pruning = pr.integrations.LightningPruning(
        gradual, module="net", distillation=pr.integrations.Distillation(dense, alpha=0.5)
    )
    trainer = Trainer(
        max_steps=steps, callbacks=[pruning], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 64, shuffle=True))
    sparsity = float(trainer.callback_metrics["sparsity"])
    print(
        f"accuracy {accuracy(dense, test):.3f} dense, {accuracy(module.net, test):.3f} at a sparsity of {sparsity:.2f}"
    )


if __name__ == "__main__":
    main()
