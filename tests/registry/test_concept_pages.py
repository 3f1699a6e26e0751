"""The pages of the 85 concepts: each section is whole, its numbers are recorded, its pictures are those of the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from prunella.registry.concepts import search

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#]+\.md)[^)]*\)")
NUMBER = re.compile(r"(?<![\w.:/])\d*\.\d+|\d+,\d{3}")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TABLE, PICTURES = script("concept_table"), script("pictures")
ROWS = TABLE.read()
PAGES = sorted({row.page.partition("#")[0] for row in ROWS})


def unrecorded(text: str, page: Path) -> list[str]:
    """The numbers of a statement that none of the pages it links to has."""
    linked = [page.parent / link for link in LINK.findall(text)]
    known = " ".join(place.read_text(encoding="utf-8") for place in linked)
    plain = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
    return [number for number in NUMBER.findall(plain) if number not in known]


def test_every_concept_has_a_whole_section() -> None:
    assert len(ROWS) == TABLE.COUNT and len(PAGES) == 13
    assert [fault for row in ROWS for fault in TABLE._section_faults(row)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_measured_number_stands_on_the_page_it_links_to(row: object) -> None:
    stated = f"{TABLE.part(row, 'Measured')} {TABLE.part(row, 'Avoid')}"
    assert unrecorded(stated, DOCS / row.page.partition("#")[0]) == []  # type: ignore[attr-defined]


def test_a_number_without_a_record_is_seen() -> None:
    page = DOCS / "concepts" / "criteria.md"
    assert unrecorded("it has 78.5 and 12.34 ([here](../benchmarks.md#x))", page) == ["12.34"]
    assert unrecorded("it has 78.5", page) == ["78.5"]


def test_what_is_missing_in_a_section_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "section", lambda row: "Formula: `x`\n\n- **Measured:** not here.\n")
    faults = TABLE._section_faults(ROWS[0])
    assert faults == ["no Avoid in its section", "no Source in its section", "no Also called in its section",
                      "no lines that run in its section"]  # fmt: skip


@pytest.mark.parametrize("picture", PICTURES.PICTURES, ids=lambda picture: picture.__name__)
def test_a_picture_is_what_the_script_draws_and_is_used_with_words(picture: object) -> None:
    name = f"{picture.__name__}.svg"  # type: ignore[attr-defined]
    drawn = picture()  # type: ignore[operator]
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == drawn, "run python docs/pictures.py"
    root = ElementTree.fromstring(drawn)
    assert root.get("role") == "img" and len(root.get("aria-label", "")) > 20
    texts = " ".join((DOCS / page).read_text(encoding="utf-8") for page in (*PAGES, "index.md"))
    assert re.search(rf"!\[[^\]]{{20,}}\]\((\.\./)?pictures/{name}\)", texts)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("GMP", "Gradual cubic pruning (AGP)"),
        ("semi-structured", "Semi-structured pruning (N:M, blocks)"),
        ("L1-norm pruning", "Filter pruning"),
        ("filter pruning", "Filter pruning"),
        ("SNIP", "SNIP"),
        ("FLOPs", "FLOPs and theoretical speed-up"),
        ("GFLOPs", "FLOPs and theoretical speed-up"),
        ("winning ticket", "Lottery ticket hypothesis"),
        ("weight_orig", "Life of a mask"),
        ("network slimming", "Batch-norm scaling factor"),
        ("ToMe", "Dynamic/contextual, token, expert pruning"),
        ("LoRA", "Adapters on a sparse base"),
        ("DepGraph", "Coupled groups and physical removal"),
        ("knowledge distillation", "Distillation"),
        ("movement pruning", "Movement pruning"),
        ("optimal brain surgeon", "OBS"),
    ],
)
def test_a_concept_is_found_under_its_common_names(words: str, name: str) -> None:
    assert name in [concept.name for concept in search(words)][:3]
