"""The README.md of a folder with a pruned model, as the model card that Hugging Face shows."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from prunella._version import __version__
from prunella.errors import printable
from prunella.io.files import write_atomic
from prunella.measure.text import significant

CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """The fields of a card. base: what was pruned. kind: the class that reads it. sparsity: of the pruned layers.

    calibration: which data, and how much; perplexity: where it was measured, on which text, dense and pruned.
    """

    base: str
    kind: str
    method: str
    pattern: str
    sparsity: float
    calibration: str = ""
    perplexity: tuple[str, float, float] | None = None


def write_card(folder: Path, card: Card) -> Path:
    """Write README.md. Text is quoted as data: neither a name nor a description can add a field or a tag."""
    return write_atomic(folder / CARD, render_card(card).encode())


def render_card(card: Card) -> str:
    """The card as Markdown with its front matter."""
    rows = {
        "base": card.base,
        "method": card.method,
        "pattern": card.pattern,
        "sparsity of the pruned layers": f"{card.sparsity:.4f}",
    }
    if card.calibration:
        rows["calibration"] = card.calibration
    if card.perplexity:
        text, dense, pruned = card.perplexity
        rows[f"perplexity on {text}"] = f"{significant(dense)} dense, {significant(pruned)} pruned"
    template = Template((files("prunella.io") / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        quoted_base=json.dumps(_line(card.base)),
        base=_escaped(card.base),
        rows="\n".join(f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows.items()),
        kind=_escaped(card.kind),
        version=__version__,
    )


def _escaped(text: str) -> str:
    """Text in a table of Markdown: no tags, no links, no other cells."""
    return re.sub(r"[|`\[\]]", lambda match: f"&#{ord(match[0])};", html.escape(_line(text)))


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
