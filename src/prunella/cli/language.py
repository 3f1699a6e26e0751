"""Verbs that use a language model, dense or pruned: how well it predicts a text, and what it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage
from prunella.cli.device import placed
from prunella.cli.texts import EVAL_SEQLEN

if TYPE_CHECKING:
    from torch import Tensor, nn

LanguageModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a folder that `llm` or `run` wrote, a FILE.gguf or smollm2.",
        show_default=False,
    ),
]
Seqlen = Annotated[int, typer.Option("--eval-seqlen", help="Most tokens in a window.")]


def eval_(
    model: LanguageModel,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="The text.", show_default=False)],
    dense: Annotated[
        str | None,
        typer.Option("--dense", metavar="MODEL", help="The dense model it was pruned from, for agreement and speed."),
    ] = None,
    eval_samples: Annotated[int, typer.Option("--eval-samples", help="Most windows of the text.")] = 32,
    eval_seqlen: Seqlen = EVAL_SEQLEN,
    as_json: options.Json = False,
) -> None:
    """Perplexity of a language model on a text; with --dense also agreement, a sample of text and tokens a second."""
    from prunella.app.language import check_left_to_right, held_out_file, judge_lm
    from prunella.errors import RequestError
    from prunella.measure.text import significant

    if eval_samples < 1:
        raise RequestError("there is nothing to evaluate on", f"--eval-samples {eval_samples}", "the minimum is 1")
    network, folder = open_language_model(model)
    held_out = held_out_file(folder, data, samples=eval_samples, seqlen=eval_seqlen)
    if dense is not None:
        other, place = open_language_model(dense)
        same = held_out_file(place, data, samples=eval_samples, seqlen=eval_seqlen)
        if not same.tokens.equal(held_out.tokens):
            why = "their tokenizers split the text differently, so their perplexities cannot be compared"
            raise RequestError(f"{model} and {dense} read {data} as other tokens", why, "leave --dense out")
        with stage("comparing both models on text"):
            judged = judge_lm(other, network, held_out, tokenizer=_tokenizer(folder))
        emit(judged.data(), str(judged), as_json=as_json)
        return
    check_left_to_right(network, held_out.tokens[:1])
    with stage("evaluating"):
        value = held_out.perplexity(network)
    result = {"perplexity": value, "text": held_out.where, "tokens": held_out.tokens.numel()}
    emit(result, f"perplexity {significant(value)} on {held_out.where}, without overlap", as_json=as_json)


def chat(
    model: LanguageModel,
    new: Annotated[int, typer.Option("--new", help="Most tokens of an answer.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", help="0: the most likely token each time; 1: samples from the distribution of the model."
        ),
    ] = 0.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Talk with a language model: each line of stdin is a turn. A model without a chat template continues the text.

    Ctrl-D ends it. Works in a pipe too: printf 'Once upon a time' | prunella chat pruned
    """
    network, folder = open_language_model(model)
    talk = _Talk(network, _tokenizer(folder), new, temperature, seed)
    if not talk.templated:
        note(f"{model} has no chat template: it continues what you write")
    turns: list[dict[str, str]] = []
    for line in _lines():
        answer = talk.answer(line)
        turns.append({"prompt": line, "answer": answer})
        if not as_json:
            emit([], answer, as_json=False)
            sys.stdout.flush()
    if as_json:
        emit({"turns": turns}, "", as_json=True)


def open_language_model(spec: str) -> tuple[nn.Module, Path]:
    """A model, and the folder with its tokenizer: a result of `run` and `llm` as well as any other."""
    from prunella.errors import RequestError
    from prunella.io.artifact import load
    from prunella.io.files import MARKER
    from prunella.io.kind_of_path import described_path
    from prunella.io.load import load_model, model_folder

    folder = model_folder(spec)
    if not folder.is_dir():
        todo = "give a Hugging Face folder, a folder that `llm` or `run` wrote, FILE.gguf or smollm2"
        raise RequestError(f"{spec} is not a folder of a language model", described_path(spec), todo)
    with stage(f"loading {spec}"):
        return placed(load(folder) if (folder / MARKER).is_file() else load_model(str(folder))), folder


def _tokenizer(folder: Path) -> Any:
    from prunella.llm.text import tokenizer_of

    return tokenizer_of(folder)


def _lines() -> Iterator[str]:
    """Lines of stdin that are not empty; on a terminal with a mark that it is the reader's turn."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


class _Talk:
    """A conversation: what was said, and the answer to the next line."""

    def __init__(self, model: nn.Module, tokenizer: Any, new: int, temperature: float, seed: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.new, self.temperature, self.seed = new, temperature, seed
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.messages: list[dict[str, str]] = []
        self.text = ""

    def answer(self, line: str) -> str:
        """What the model says to a line."""
        from prunella.llm.generate import continued

        prompt = self._prompt(line)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(limit, int):
            prompt = prompt[:, -max(limit - self.new, limit // 2) :]  # of a long talk the end counts
        written = continued(self.model, prompt, new=self.new, temperature=self.temperature, seed=self.seed)
        answer = str(self.tokenizer.decode(written.tolist(), skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        self.text += answer
        return answer.strip() if self.templated else answer

    def _prompt(self, line: str) -> Tensor:
        if self.templated:
            self.messages.append({"role": "user", "content": line})
            text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        else:
            self.text += f"\n{line}" if self.text else line
            text = self.text
        tokens: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.templated).input_ids
        return tokens
