"""Every relative link of the texts leads somewhere in a clone, or to a page that the text says how to make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)\s]+)\)")
GENERATED = {
    line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if "docs/" in line
}
"""What `make docs` makes: files and folders below the root."""


def is_generated(place: Path) -> bool:
    name = place.relative_to(ROOT).as_posix()
    return any(name == made or name.startswith(f"{made}/") for made in GENERATED)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{text.relative_to(ROOT)}")
def test_every_relative_link_leads_somewhere(text: Path) -> None:
    if is_generated(text):
        return
    content = text.read_text(encoding="utf-8")
    for link in LINK.findall(content):
        place = (text.parent / link.partition("#")[0]).resolve()
        if is_generated(place):
            assert "make docs" in content, f"{link} is made by `make docs`, and {text.name} does not say so"
        else:
            assert place.exists(), f"{link} in {text.name} leads nowhere"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{text.relative_to(ROOT)}")
def test_every_anchor_is_a_heading(text: Path) -> None:
    if is_generated(text):
        return
    for link in re.findall(r"\]\(((?!https?://)[^)\s]*#[^)\s]+)\)", text.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        place = (text.parent / name).resolve() if name else text
        if place.suffix == ".md" and not is_generated(place):
            assert anchor in anchors(place), f"{link} in {text.name}: no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
