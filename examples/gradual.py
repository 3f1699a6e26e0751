"""Gradual pruning in a loop with bf16 autocast, a moving average and resume, which ends in the same bits. A minute."""

from __future__ import annotations

from pathlib import Path

import torch
from parts import accuracy, batches, digits, loss, network, options
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prunella as pr


class Training:
    """All that a checkpoint holds."""

    def __init__(self, steps: int) -> None:
        self.model = network().train()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.pruner = pr.Pruner(
            self.model, self.optimizer, recipe=pr.recipes.erk_magnitude(), target=pr.Sparsity(0.9),
            inputs=torch.zeros(2, 1, 8, 8), steps=int(0.75 * steps), every=max(1, steps // 20), averages=[self.average],
        )  # fmt: skip

    @property
    def parts(self) -> dict[str, object]:
        """By name; each has a state."""
        return {k: v for k, v in vars(self).items() if hasattr(v, "state_dict")}

    def save(self, file: Path, step: int) -> None:
        torch.save({"step": step, **{name: part.state_dict() for name, part in self.parts.items()}}, file)  # type: ignore[attr-defined]

    def load(self, file: Path) -> int:
        state = torch.load(file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])  # type: ignore[attr-defined]
        return int(state["step"])

    def run(self, data: list[tuple[torch.Tensor, torch.Tensor]], first: int, last: int) -> None:
        for step in range(first, last):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(self.model, data[step % len(data)])
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.pruner.step()
            self.schedule.step()
            self.average.update_parameters(self.model)


def main() -> None:
    given = options(__doc__)
    data, test = digits()
    steps, some = 20 if given.quick else 400, batches(data)
    whole = Training(steps)
    whole.run(some, 0, steps)
    stopped = Training(steps)
    stopped.run(some, 0, steps // 2)
    stopped.save(given.out / "half.pt", steps // 2)
    resumed = Training(steps)
    resumed.run(some, resumed.load(given.out / "half.pt"), steps)
    same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    zeros = [int((p == 0).sum()) for p in whole.average.module.parameters()]
    print(f"{sum(zeros)} zeros in the average; accuracy {accuracy(whole.average.module, test):.3f}; resumed: {same}")
    assert same


if __name__ == "__main__":
    main()
