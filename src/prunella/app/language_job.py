"""The whole job on a language model: which plan, which recovery, and how it ends.

Structure (depth, heads, neurons, width, experts, tokens) is planned by a recipe. Masks are solved block by block in a
folder; where they are recovered, that folder becomes a plan. Both are jobs for `app.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella import criteria
from prunella.allocation import uniform
from prunella.app.job import Finish, Job, Judged, Planner, Recovery, RecoveryStep
from prunella.app.language import HeldOut, judge_lm
from prunella.errors import BadInput, CheckFailed, NotSupported, RequestError
from prunella.granularity import Channel, Depth, Expert, Head, Vocabulary, Width
from prunella.io.card import Card, write_card
from prunella.io.files import copy_file
from prunella.io.importers import import_plan
from prunella.io.load import class_of, load_model, load_unfinished
from prunella.io.source_card import licence_files, read_source_card
from prunella.llm.calibration import Split
from prunella.llm.recipe import OneShot
from prunella.llm.smaller_tokenizer import closed, cuts_alike, smaller
from prunella.llm.streaming import solve_folder
from prunella.llm.streaming.progress import is_finished
from prunella.llm.streaming.runner import OnBlock
from prunella.llm.streaming.writer import Closed, in_words
from prunella.llm.text import text_tokens, tokenizer_of
from prunella.measure.text import percent, short_count
from prunella.model.device import device_of, placed_if_they_fit
from prunella.model.forward import first_tensor, forward
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.registry.serialize import described
from prunella.reporting.extra import reason_without
from prunella.reporting.page import write_page
from prunella.reporting.report import report
from prunella.reporting.section import Section
from prunella.targets import Target
from prunella.types import Inputs

PAGE = "report.html"
JUDGED = "language"
"""The entry of a record with what `judge_lm` said."""
NOT_RECOVERED = "NOT RECOVERED, the cut alone: --recover lora recovers it"
Unit = Channel | Head | Width | Depth | Expert | Vocabulary


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean negative log-likelihood of each token after those before it, in nats."""
    logits = first_tensor(forward(model, batch))
    words = batch["input_ids"][:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(words), -1).float(), words)


def structural_recipe(units: Sequence[Unit]) -> Recipe:
    """The recipe that is usual for these units, in shapes that plain `from_pretrained` reads."""
    kinds = {type(unit) for unit in units}
    chosen = tuple(units)
    if Vocabulary in kinds:
        if len(kinds) > 1:
            raise RequestError("vocabulary goes alone", "its tokens are chosen by a text", "prune the rest after it")
        return Recipe(granularity=chosen)
    if Depth in kinds:
        if len(kinds) > 1:
            raise RequestError("depth goes alone", "blocks are compared with blocks only", "prune the rest after it")
        return Recipe(criteria.block_influence, chosen, uniform)
    if Expert in kinds and len(kinds) == 1:
        return Recipe(criteria.reap, chosen, uniform, equal_widths=True)
    by_activation = Width in kinds or Expert in kinds
    criterion = criteria.activation_norm if by_activation else criteria.fluctuation
    return Recipe(criterion, chosen, uniform, equal_widths=True)


def usual_recovery(units: Sequence[Unit]) -> tuple[RecoveryStep, ...]:
    """What costs a few passes and no training; nothing where the residual stream is another one."""
    fits = all(isinstance(unit, Channel | Head | Depth) for unit in units)
    return (RecoveryStep("match"),) if fits else ()


def tokens_in(folder: Path, files: Sequence[str], model: nn.Module) -> Vocabulary:
    """The tokens of texts, with those that every text needs: special ones, and single bytes.

    Errors: RequestError without a text.
    """
    if not files:
        why = "the tokens that a text needs are kept, and the model's own text has all of them"
        raise RequestError("vocabulary needs a text", why, "give --data FILE.txt")
    tokenizer = tokenizer_of(folder)
    kept = {int(token) for file in files for token in torch.unique(text_tokens(folder, file))}
    kept = closed(tokenizer, kept | set(tokenizer.all_special_ids))
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return Vocabulary(tuple(sorted(token for token in kept if token < table.weight.shape[0])))


@dataclass(frozen=True)
class LanguageModel:
    """A dense model in a folder, with the text that it is judged by. name: what to call it. command: how it began."""

    folder: Path
    name: str
    held_out: HeldOut | None
    calibration: str
    command: str = ""

    def tokenizer(self) -> Any:
        """None where the folder has none."""
        try:
            return tokenizer_of(self.folder)
        except BadInput:
            return None

    def finish(self, method: str, pattern: str) -> Finish:
        """The end of a job: both models on text, and the card."""
        return Finish(partial(_judged, self), partial(_write, self, method, pattern), NOT_RECOVERED)

    def perplexity(self, model: nn.Module) -> Mapping[str, float]:
        """Of a model on the held-out text, as a metric of a job: here lower is better."""
        assert self.held_out is not None
        return {"perplexity": self.held_out.perplexity(model)}


def _judged(source: LanguageModel, dense: nn.Module, small: nn.Module, plan: Plan | None) -> Judged:
    if source.held_out is None:
        return Judged()
    try:
        return _compared(source, source.held_out, dense, small, plan)
    except NotSupported as error:
        return Judged((Section("As a language model", f"not judged: {error.what}, {error.why}"),))


def _compared(
    source: LanguageModel, held_out: HeldOut, dense: nn.Module, small: nn.Module, plan: Plan | None
) -> Judged:
    renumbered = plan.renumbered if plan is not None else ()
    kept = renumbered[0].kept if renumbered else None
    if kept is not None:
        held_out = held_out.known_to(kept)
    judged = judge_lm(
        dense, small, held_out, tokenizer=source.tokenizer(),
        small_tokens=None if kept is None else lambda tokens: torch.searchsorted(kept, tokens.cpu()),
        large_tokens=None if kept is None else lambda tokens: kept[tokens],
    )  # fmt: skip
    return Judged(judged.sections(), {JUDGED: judged.data()})


def _write(
    source: LanguageModel, method: str, pattern: str, folder: Path, reader: str, plan: Plan, end: Judged
) -> None:
    for file in licence_files(source.folder):
        copy_file(file, folder / file.name)
    if plan.renumbered:
        _checked(source, plan.renumbered[0].kept).save_pretrained(str(folder))
    before, after = plan.before, plan.after
    masks = plan.masks.values()
    total = sum(mask.numel() for mask in masks)
    sparsity = None if plan.changes or not total else 1 - sum(int(mask.sum()) for mask in masks) / total
    numbers = {} if sparsity is not None else {"parameters": _change(before.params, after.params)}
    numbers |= {} if sparsity is not None else {"multiply-adds": _change(before.macs, after.macs)}
    card = Card(
        source.name, str(class_of(source.folder).__name__), method, pattern, sparsity,
        source.calibration, source=read_source_card(source.folder), numbers=numbers, command=source.command,
        plain=reader == "from_pretrained",
    )  # fmt: skip
    write_card(folder, with_numbers(card, end))


def _checked(source: LanguageModel, kept: Tensor) -> Any:
    """The tokenizer of the smaller model. Errors: CheckFailed unless it cuts the held-out text as that of the base."""
    tokenizer = source.tokenizer()
    made = smaller(tokenizer, kept)
    rows = () if source.held_out is None else source.held_out.tokens
    for row in [row for row in rows if bool(torch.isin(row, kept).all())][:4]:
        text = tokenizer.decode(row.tolist(), skip_special_tokens=True)
        if not cuts_alike(tokenizer, made, kept, text):
            why = "its words are others on the text that both were judged by"
            raise CheckFailed("no tokenizer fits the smaller model", why, "keep the vocabulary")
    return made


def _change(before: float, after: float) -> str:
    return f"{short_count(before)} dense, {short_count(after)} now ({percent(after / before - 1)})"


def with_numbers(card: Card, end: Judged) -> Card:
    """The card with what both models were judged by."""
    data = end.record.get(JUDGED)
    if data is None:
        return card
    rows = dict(card.numbers)
    table_rows = end.sections[0].rows
    for name, dense, small in table_rows[1:]:
        rows[name] = f"{dense} dense, {small} pruned" if dense else small
    samples = data["samples"]
    texts = {} if samples is None else {
        "The dense model, behind the same words": samples["prompt"] + samples["dense"],
        "This model": samples["prompt"] + samples["pruned"],
    }  # fmt: skip
    dense, small = data["perplexity"]
    return replace(card, perplexity=(data["text"], dense, small), numbers=rows, texts=texts)


# -- structure ---------------------------------------------------------------------------------------------------------


def structured_job(
    source: LanguageModel, units: Sequence[Unit], recipe: Recipe, target: Target | None, data: Sequence[Any],
    recovery: Recovery, *, skip: Sequence[str] = (), seed: int = 0,
) -> Job:  # fmt: skip
    """A smaller model: planned by the recipe, recovered, and judged on text."""
    criterion = described(recipe.criterion)["name"]
    names = ", ".join(type(unit).__name__.lower() for unit in units)
    kept = any(isinstance(unit, Vocabulary) for unit in units)
    method = "tokens that no text needs" if kept else f"{criterion}, the same share of every layer"
    steps = ", ".join(map(str, recovery.steps))
    return Job(
        replace(recipe, seed=seed), target, data=data, loss=next_token_loss, recovery=recovery,
        metric=None if kept or source.held_out is None else source.perplexity, skip=skip,
        source=str(source.folder), command=source.command, loadable="transformers" if recipe.equal_widths else None,
        finish=source.finish(f"{method}{f'; recovered by {steps}' if steps else ''}", names),
    )  # fmt: skip


# -- masks -------------------------------------------------------------------------------------------------------------


def masked_job(
    source: LanguageModel, how: OneShot, split: Split, recovery: Recovery, *, skip: Sequence[str] = (),
    seed: int = 0, on_block: OnBlock | None = None,
) -> Job:  # fmt: skip
    """A masked model that is recovered: solved block by block in a folder, which becomes the plan."""
    data = list(split.data)
    asked = {"recipe": how, "data": data, "held out": list(split.held_out), "skip": list(skip)}

    def make(model: nn.Module, inputs: Inputs, folder: Path | None) -> Plan:
        if folder is None:
            raise RequestError("the masks need a folder for their work", "", "give data that can be told apart")
        if not is_finished(folder):  # it is finished if a kill came between the last block and the plan
            where = device_of(model)
            solve_folder(source.folder, folder, how, data=split, skip=skip, on_block=on_block, device=where)
        plan = import_plan(model, inputs, folder)
        return replace(plan, recipe=described(how))

    method, pattern = in_words(how)
    return Job(
        Recipe(seed=seed), None, data=data, loss=next_token_loss, recovery=recovery,
        metric=None if source.held_out is None else source.perplexity,
        source=str(source.folder), command=source.command, planner=Planner(make, asked),
        finish=source.finish(f"{method}; recovered by {', '.join(map(str, recovery.steps))}", pattern),
    )  # fmt: skip


@dataclass
class FolderEnd:
    """The end of a folder of masks: both models in memory, one page, and the card. judged: what was said.

    device: where both are judged if they fit, else on the CPU.
    """

    source: LanguageModel
    device: str = "cpu"
    judged: Judged | None = None

    def close(self, folder: Path, config: Path, card: Card) -> Closed:
        """For `solve_folder`."""
        dense = load_model(str(self.source.folder))
        small = load_unfinished(folder, config, type(dense))
        place = placed_if_they_fit([dense, small], self.device)
        assert self.source.held_out is not None
        inputs = {"input_ids": self.source.held_out.tokens[:1, :32].to(place)}
        end = _judged(self.source, dense, small, None)
        compared = report(dense, small, inputs, command=self.source.command, rounds=10).adding(*end.sections)
        missing = reason_without(partial(write_page, compared, folder / PAGE), PAGE)
        told = "\n\n".join(map(str, end.sections))
        self.judged = Judged(end.sections, {**end.record, "missing": missing, "told": told})
        named = replace(card, base=self.source.name, command=self.source.command)
        return Closed(with_numbers(named, end), end.record)
