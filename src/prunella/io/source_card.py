"""What the folder of a model says of its origin: licence, base model, languages. Read as data, line by line.

The front matter of a README is YAML, which can make much of little (`&a [*a, *a]`): only plain entries of one line, or
lists of them, are read, and only values that a hub accepts.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunella.errors import BadInput
from prunella.io.json import read_config

_LARGEST = 65_536
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`owner/name` of a model on a hub."""
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,60}")
_LINK = re.compile(r"https://[\w./%#?=&~+-]{1,200}|LICENSE[\w.-]{0,40}")
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
"""Files that have to go where the weights go."""


@dataclass(frozen=True)
class SourceCard:
    """What is known of a model that is pruned; empty where its folder does not say.

    licence: the identifier, `apache-2.0`. licence_name, licence_link: of a licence that has no identifier. base: the
    model on a hub that this one is, or comes from. languages: codes.
    """

    licence: str = ""
    licence_name: str = ""
    licence_link: str = ""
    base: str = ""
    languages: tuple[str, ...] = ()


def read_source_card(folder: Path) -> SourceCard:
    """The README.md and the config.json of a folder; nothing in them is an error."""
    entries = _front_matter(folder / "README.md")
    licence = _first(entries.get("license", ()), _WORD)
    name, link = _first(entries.get("license_name", ()), _WORD), _first(entries.get("license_link", ()), _LINK)
    if not licence and (texts := licence_files(folder)) and _LINK.fullmatch(texts[0].name):
        licence, name, link = "other", "license-of-the-base", texts[0].name
    return SourceCard(
        licence.lower(),
        name,
        link,
        _own_name(folder) or _first(entries.get("base_model", ()), _ID),
        tuple(word for word in entries.get("language", ()) if _WORD.fullmatch(word))[:20],
    )


def licence_files(folder: Path) -> list[Path]:
    """The texts of its licence."""
    found = {file for pattern in LICENCES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.stat().st_size <= 1_000_000)


def _own_name(folder: Path) -> str:
    """The name on a hub under which the model was fetched, where its configuration says it."""
    try:
        name = read_config(folder / "config.json").data.get("_name_or_path")
    except BadInput:
        return ""
    return name if isinstance(name, str) and _ID.fullmatch(name) and not Path(name).exists() else ""


def _front_matter(file: Path) -> dict[str, tuple[str, ...]]:
    """The entries between the two lines `---` at the start of a README: key -> its value, or the entries of a list."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        head, mark, body = stream.read(_LARGEST).decode("utf-8", "replace").partition("---\n")
    block, end, _ = body.partition("\n---")
    if head.strip() or not mark or not end:
        return {}
    entries: dict[str, list[str]] = {}
    key = ""
    for line in block.splitlines():
        item = re.fullmatch(r"\s*-\s+(.+)", line)
        if item is not None and key:
            entries[key].append(_plain(item[1]))
        elif entry := re.fullmatch(r"([a-z_]+):\s*(.*)", line):
            key = entry[1]
            entries[key] = [_plain(part) for part in re.sub(r"^\[(.*)\]$", r"\1", entry[2]).split(",") if part.strip()]
    return {name: tuple(values) for name, values in entries.items()}


def _plain(text: str) -> str:
    return text.strip().strip("\"'")


def _first(values: tuple[str, ...], form: re.Pattern[str]) -> str:
    return next((value for value in values if form.fullmatch(value)), "")


def card_of_gguf(file: Path) -> str:
    """A README with what the head of a GGUF file says of licence, languages and origin, each in a form that is known.

    Empty without the package gguf, by which transformers reads such files.
    """
    try:
        reader: Any = importlib.import_module("gguf").GGUFReader(str(file))
    except ImportError:
        return ""

    def said(key: str) -> list[str]:
        value = reader.fields[key].contents() if key in reader.fields else []
        return [str(entry) for entry in (value if isinstance(value, list) else [value])][:20]

    url = next((url for key in _ORIGINS for url in said(key)), "")
    entries = {
        "license": _first(tuple(said("general.license")), _WORD),
        "license_name": _first(tuple(said("general.license.name")), _WORD),
        "license_link": _first(tuple(said("general.license.link")), _LINK),
        "base_model": _first((url.removeprefix("https://huggingface.co/"),), _ID),
        "language": ", ".join(word for word in said("general.languages") if _WORD.fullmatch(word)),
    }
    lines = [f"{name}: {value}" for name, value in entries.items() if value]
    return "\n".join(["---", *lines, "---", ""]) if lines else ""


_ORIGINS = ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url")
