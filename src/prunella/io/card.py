"""The README.md of a folder with a pruned model, as the model card that Hugging Face shows."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from prunella._version import __version__
from prunella.errors import printable
from prunella.io.files import write_atomic
from prunella.io.source_card import SourceCard
from prunella.measure.text import percent, significant

CARD = "README.md"
_ZEROS = (
    "The zeros are stored like other weights: the folder is as large as the dense one, and any reader of the format "
    "loads it."
)
_SMALLER = "The tensors of this model are smaller than those of the dense model."


@dataclass(frozen=True)
class Card:
    """The fields of a card. base: what was pruned. kind: the class that reads it. sparsity: of the pruned layers.

    calibration: which data, and how much; perplexity: where it was measured, on which text, dense and pruned. source:
    licence and base model, which are passed on. numbers: further rows. texts: heading -> what the model wrote. program:
    the library that reads the folder where plain `from_pretrained` does not. sparsity None: the shapes are smaller.
    """

    base: str
    kind: str
    method: str
    pattern: str
    sparsity: float | None
    calibration: str = ""
    perplexity: tuple[str, float, float] | None = None
    source: SourceCard = field(default_factory=SourceCard)
    numbers: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    plain: bool = True


def write_card(folder: Path, card: Card) -> Path:
    """Write README.md. Text is quoted as data: neither a name nor a description can add a field or a tag."""
    return write_atomic(folder / CARD, render_card(card).encode())


def render_card(card: Card) -> str:
    """The card as Markdown with its front matter."""
    template = Template((files("prunella.io") / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        front="\n".join(
            f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in _front_matter(card).items()
        ),
        base=_escaped(card.base),
        rows="\n".join(f"| {_escaped(name)} | {_escaped(value)} |" for name, value in _rows(card).items()),
        about=_SMALLER if card.sparsity is None else _ZEROS,
        code=_code(card),
        parts="".join(f"\n## {_escaped(name)}\n\n{_quoted(text)}\n" for name, text in card.texts.items()),
        version=__version__,
    )


def _rows(card: Card) -> dict[str, str]:
    rows = {"base": card.base, "method": card.method, "pattern": card.pattern}
    if card.sparsity is not None:
        rows["sparsity of the pruned layers"] = f"{card.sparsity:.4f} ({percent(card.sparsity)})"
    if card.calibration:
        rows["calibration"] = card.calibration
    if card.perplexity:
        text, dense, pruned = card.perplexity
        rows[f"perplexity on {text}"] = f"{significant(dense)} dense, {significant(pruned)} pruned"
    rows |= card.numbers
    rows["licence"] = _licence(card.source)
    return rows | ({"command": card.command} if card.command else {})


def _licence(source: SourceCard) -> str:
    if source.licence and source.licence != "other":
        return f"{source.licence}, that of the base"
    if source.licence_link:
        return f"that of the base: {source.licence_link}"
    return "that of the base, whose folder does not state it"


def _front_matter(card: Card) -> dict[str, Any]:
    """What a hub reads; each value is JSON, which YAML contains, in one line."""
    source, entries = card.source, dict[str, Any](library_name="transformers" if card.plain else "prunella")
    if source.licence:
        entries["license"] = source.licence
        entries |= {"license_name": source.licence_name} if source.licence_name else {}
        entries |= {"license_link": source.licence_link} if source.licence_link else {}
    if source.base:
        entries["base_model"] = source.base
    if source.languages:
        entries["language"] = list(source.languages)
    if "LMHead" in card.kind or "CausalLM" in card.kind:
        entries["pipeline_tag"] = "text-generation"
    entries["tags"] = ["prunella", "pruned"]
    if card.perplexity:
        text, _, pruned = card.perplexity
        text = text.rpartition(" of ")[2]
        data = {"name": _line(text), "type": re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "text"}
        value = {"type": "perplexity", "value": float(f"{pruned:.6g}"), "name": "perplexity"}
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": [value]}
        entries["model-index"] = [{"name": f"{_line(card.base)}, pruned", "results": [result]}]
    return entries


def _code(card: Card) -> str:
    if card.plain:
        kind = _escaped(card.kind)
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("path/to/this/folder")'
    return 'import prunella as pr\n\nmodel = pr.load("path/to/this/folder")'


def _quoted(text: str) -> str:
    """A text as a quotation, which nothing in it can end."""
    lines = [_escaped(line) or "&nbsp;" for line in text.splitlines()]
    return "\n".join(f"> {line}  " for line in lines)


def _escaped(text: str) -> str:
    """Text in a table of Markdown: no tags, no links, no other cells."""
    return re.sub(r"[|`\[\]*#\\]", lambda match: f"&#{ord(match[0])};", html.escape(_line(text), quote=False))


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
