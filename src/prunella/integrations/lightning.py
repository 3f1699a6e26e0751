"""A callback for the Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunella.errors import RequestError
from prunella.integrations.library import bases, check_library
from prunella.integrations.session import Distillation, Gradual, PruningSession
from prunella.model.forward import first_tensor

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    (Callback,) = bases("lightning.pytorch", "Callback")


class LightningPruning(Callback):
    """Hold masks at zero while a Lightning `Trainer` trains; with `gradual`, prune along a schedule as well.

    After each optimizer step masked weights are exactly 0, with gradient accumulation, clipping, mixed precision and
    data parallelism. The masks are in the state of the callback, so each checkpoint of Lightning holds them, and
    `trainer.fit(module, ckpt_path=...)` resumes with them. The sparsity is logged as `sparsity`.

        trainer = Trainer(max_steps=1000, callbacks=[LightningPruning(Gradual(recipe, target=..., inputs=batch))])
        trainer.fit(module, loader)

    gradual: how to prune in training, in steps of `trainer.global_step`; without it the masks of the model are held.
    module: the name of the network in the LightningModule that is pruned, and whose output the teacher is compared
        with; "" is all of it, which then needs a `forward`.
    distillation: adds the dense network as a teacher to the loss of `training_step`.
    averages: moving averages of the weights, which get the same masks.
    """

    def __init__(
        self,
        gradual: Gradual | None = None,
        *,
        module: str = "",
        distillation: Distillation | None = None,
        averages: Iterable[nn.Module] = (),
    ) -> None:
        check_library(Callback, "LightningPruning", "lightning")
        self.session, self.distillation = PruningSession(gradual, tuple(averages)), distillation
        self.module, self._counted = module, 0
        self._undo: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the masks of the model, or those of the checkpoint from which the training resumes."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            why = "neither max_epochs nor max_steps says when the training ends"
            if self.session.gradual is not None and isinstance(self.session.gradual.steps, float):
                raise RequestError("the length of the training is not known", why, "give steps= as a number")
            total = 2**62
        network = pl_module.get_submodule(self.module)
        self.session.start(network, trainer.optimizers, int(total))
        self._counted = trainer.global_step
        if self.distillation is not None:
            self._undo = _add_distillation(pl_module, network, self.distillation)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune if an update is due; batches of an accumulation count once."""
        while self._counted < trainer.global_step:
            self._counted += 1
            self.session.step()
        if self.session.sparsity is not None:
            pl_module.log("sparsity", self.session.sparsity)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the optimizers; the masks remain with the model until `prunella.finalize`."""
        self.session.stop()
        self._remove_distillation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module."""
        self._remove_distillation()

    def state_dict(self) -> dict[str, Any]:
        """Step and masks, for the checkpoint."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict` from a checkpoint."""
        self.session.load_state_dict(state_dict)

    def _remove_distillation(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def _add_distillation(pl_module: LightningModule, network: nn.Module, how: Distillation) -> Callable[[], None]:
    """Add the teacher of a network to the loss of `training_step`; the returned function removes it."""
    passes: list[Tensor] = []

    def compare(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if module.training:
            expected = first_tensor(_logits(how.teach(arguments, keywords)))
            passes.append(how.divergence(first_tensor(_logits(output)), expected).mean())

    handle: RemovableHandle = network.register_forward_hook(compare, with_kwargs=True)
    own = pl_module.training_step

    def training_step(*arguments: Any, **keywords: Any) -> Any:
        passes.clear()
        result = own(*arguments, **keywords)
        if result is None:  # the step is skipped
            return None
        if not passes:
            why = f"training_step did not call the {type(network).__name__} that is pruned"
            raise RequestError("distillation found no logits", why, "name the network: LightningPruning(module=...)")
        divergence = sum(passes[1:], passes[0]) / len(passes)
        loss: Tensor = result["loss"] if isinstance(result, dict) else result  # type: ignore[assignment]
        mixed = (1 - how.alpha) * loss + how.alpha * divergence
        return {**result, "loss": mixed} if isinstance(result, dict) else mixed

    pl_module.training_step = training_step  # type: ignore[method-assign]

    def undo() -> None:
        handle.remove()
        del pl_module.training_step

    return undo


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)
