"""A callback for the Trainer of transformers, and for trainers derived from it, such as those of TRL."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.integrations.library import bases, check_library
from prunella.integrations.session import Distillation, Gradual, PruningSession
from prunella.io.nested import load_state, save_state
from prunella.model.unwrap import unwrap

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
else:
    TrainerCallback, ExportableState = bases("transformers.trainer_callback", "TrainerCallback", "ExportableState")

log = logging.getLogger(__name__)
FILE = "prunella_masks.safetensors"
"""The masks in a checkpoint of the Trainer."""


class TrainerPruning(TrainerCallback, ExportableState):
    """Hold masks at zero while a `transformers.Trainer` trains; with `gradual`, prune along a schedule as well.

    After each optimizer step masked weights are exactly 0, with gradient accumulation, clipping, mixed precision and
    data parallelism. Each checkpoint of the Trainer holds the masks (`prunella_masks.safetensors`), and
    `trainer.train(resume_from_checkpoint=...)` resumes with them. With `load_best_model_at_end` the masks are those of
    the best checkpoint; a warning is logged if its step was before the target was met. The sparsity is in the Trainer's
    log.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[TrainerPruning(Gradual(recipe, target=...))])
        trainer.train()

    gradual: how to prune in training; without it the masks of the model are held.
    distillation: adds the dense model as a teacher to the loss that the model computes itself.
    averages: moving averages of the weights, which get the same masks.
    checkpoint: the folder from which training resumes, if it is not in `output_dir`.
    Errors: MissingExtra without transformers; RequestError, BadInput and NotSupported at the start of training.
    """

    def __init__(
        self,
        gradual: Gradual | None = None,
        *,
        distillation: Distillation | None = None,
        averages: Iterable[nn.Module] = (),
        checkpoint: str | Path | None = None,
    ) -> None:
        check_library(TrainerCallback, "TrainerPruning", "transformers")
        self.session = PruningSession(gradual, tuple(averages))
        self.distillation, self.checkpoint = distillation, checkpoint
        self._handles: list[RemovableHandle] = []

    def state(self) -> dict[str, Any]:
        """The entry in the Trainer's state, which says that a checkpoint has masks."""
        return {"args": {}, "attributes": {}, "file": FILE}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Hold the masks of the model, or those of the checkpoint from which the training resumes."""
        if args.restore_callback_states_from_checkpoint and self._was_saved(state):
            raise NotSupported(
                "restore_callback_states_from_checkpoint replaces this callback by an empty one",
                "masks and schedule are restored without it",
                "leave restore_callback_states_from_checkpoint out",
            )
        model = given["model"]
        if state.global_step:
            self.session.load_state_dict(self._masks_of(self._folder(args, state), state))
        self.session.start(model, given["optimizer"], state.max_steps)
        self._handles = [] if self.distillation is None else [_add_distillation(model, self.distillation)]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prune if an update is due."""
        self.session.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **given: Any
    ) -> None:
        """Add the sparsity to the log entry."""
        if self.session.sparsity is None:
            return
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if isinstance(entry, dict):
                entry["sparsity"] = round(self.session.sparsity, 6)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write the masks into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_state(self.session.state_dict(), folder / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Release the optimizer; the masks remain with the model until `prunella.finalize`."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        pruner, how = self.session.pruner, self.session.gradual
        if best is not None and pruner is not None and (Path(best) / FILE).is_file():
            pruner.load_state_dict(load_state(Path(best) / FILE))
            if how is not None and pruner.taken < pruner.steps:
                log.warning(
                    "the best checkpoint is of step %d, before the target %s was met at step %d",
                    pruner.taken, how.target, pruner.steps,
                )  # fmt: skip
        self.session.stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _was_saved(self, state: TrainerState) -> bool:
        return type(self).__name__ in (state.stateful_callbacks or ()) and bool(state.global_step)

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.checkpoint is not None:
            return Path(self.checkpoint)
        given = args.resume_from_checkpoint
        if isinstance(given, str) and Path(given).is_dir():
            return Path(given)
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def _masks_of(self, folder: Path, state: TrainerState) -> dict[str, Tensor]:
        """The masks of a checkpoint. Errors: BadInput if they are missing or belong to another step."""
        if not (folder / FILE).is_file():
            why = f"training resumes at step {state.global_step}, and {folder.name} holds no {FILE}"
            todo = "name its folder: TrainerPruning(checkpoint=...); or start again, if it was trained without masks"
            raise BadInput("the masks of the checkpoint are missing", why, todo)
        masks: dict[str, Tensor] = load_state(folder / FILE)
        if self.session.gradual is not None and int(masks["step"]) > state.global_step:
            why = f"the masks are of step {int(masks['step'])}, the checkpoint of step {state.global_step}"
            raise BadInput(
                "the masks are of another checkpoint", why, "name its folder: TrainerPruning(checkpoint=...)"
            )
        return masks


def _add_distillation(model: nn.Module, how: Distillation) -> RemovableHandle:
    """A hook that adds the teacher to the loss of a model of transformers, until the handle is removed."""

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if not module.training:
            return None
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if loss is None or logits is None:
            why = "the model returned no loss and logits for this batch"
            todo = "give labels in the batch, without label_smoothing_factor and compute_loss_func"
            raise RequestError("distillation adds to the loss that the model computes itself", why, todo)
        keywords_of_model = {
            name: value for name, value in keywords.items() if name not in ("labels", "num_items_in_batch")
        }
        divergence = how.divergence(logits, how.teach(arguments, keywords_of_model).logits.to(logits.device))
        output.loss = (1 - how.alpha) * loss + how.alpha * _mean(divergence, keywords).to(loss)
        return output

    return unwrap(model, sharded=True).register_forward_hook(add, with_kwargs=True)


def _mean(divergence: Tensor, keywords: dict[str, Any]) -> Tensor:
    """The mean over rows with a label; over the full accumulated batch if the Trainer passes its number of items."""
    labels, items = keywords.get("labels"), keywords.get("num_items_in_batch")
    labeled = (
        labels.ne(-100).to(divergence) if isinstance(labels, Tensor) and labels.shape == divergence.shape else None
    )
    if labeled is not None:
        divergence = divergence * labeled
    count = labeled.sum().clamp_min(1) if labeled is not None else divergence.numel()
    return divergence.sum() / (count if items is None else items)
