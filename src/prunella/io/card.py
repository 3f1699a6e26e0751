"""The README.md of a folder with a pruned model, as the model card that Hugging Face shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from prunella._version import __version__
from prunella.io.files import write_atomic

CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """What a card says. base: what was pruned. kind: the class that reads it. sparsity: of the layers that were pruned.

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
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["quoted"] = json.dumps
    template = environment.from_string((files("prunella.io") / "card.md").read_text(encoding="utf-8"))
    clean = {name: _line(value) if isinstance(value, str) else value for name, value in vars(card).items()}
    return template.render(**clean, version=__version__)


def _line(text: str) -> str:
    return " ".join(text.split())
