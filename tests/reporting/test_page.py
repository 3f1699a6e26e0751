"""The page: safe whatever a model calls its layers, nothing fetched, and it fits a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prunella.errors import RequestError
from prunella.graph.data import Frozen
from prunella.measure.timing import Ratio
from prunella.reporting.chart import clean_svg, curve_chart, latency_chart
from prunella.reporting.page import headline, render_page, tiles, why_kept, write_page
from prunella.reporting.report import Curve, LayerWidth, Report

from .test_report import made

HOSTILE = "<img src=x onerror=alert(1)>\"&'</style></script><script>alert(2)</script>"
VOID = {"meta", "img", "br", "link", "hr", "input"}
PAGE = "html head meta title style body main header section footer figure details summary ul li pre"
TABLE = "p h1 h2 i b span small dl dt dd div table thead tbody tr th td"
DRAWING = "svg g path use defs clippath rect text tspan"
ELEMENTS = {*PAGE.split(), *TABLE.split(), *DRAWING.split()}


class Reader(HTMLParser):
    """Checks that tags nest, and collects elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def good() -> Report:
    return made()


@pytest.fixture(scope="module")
def evil(good: Report) -> Report:
    """The same report with a hostile text wherever a text comes from a model or a user."""
    return replace(
        good,
        model=HOSTILE,
        inputs=HOSTILE,
        command=HOSTILE,
        recipe={HOSTILE: HOSTILE},
        metrics=tuple(replace(m, name=HOSTILE) if m.unit == "score" else m for m in good.metrics),
        layers=tuple(replace(layer, name=HOSTILE) for layer in good.layers),
        widths=(LayerWidth(HOSTILE, HOSTILE, 1, 2),),
        frozen=(Frozen(HOSTILE, 0, 1, HOSTILE, HOSTILE),),
        curve=Curve(((0.0, 1.0), (1.0, 2.0)), HOSTILE, HOSTILE, 1.5),
        environment={**good.environment, "processor": HOSTILE},
    )


def test_the_page_is_sound_and_offline(good: Report) -> None:
    page = render_page(good)
    reader = read(page)
    assert reader.elements <= ELEMENTS and "script" not in reader.elements
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in reader.attributes if name == "href")
    policy = next(value for name, value in reader.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script" not in policy and "unsafe-eval" not in policy


def test_the_page_says_it_all(good: Report) -> None:
    text = " ".join("".join(read(render_page(good)).text).split())
    for said in (
        "50% fewer multiply-adds and 1.62× faster, accuracy 0.913 → 0.905.",
        "1.62x faster [1.55, 1.70] in 5 interleaved rounds",
        "95 % interval 1.55 to 1.70",
        "Asked for macs=0.5, got macs=0.48",
        "8 of 16",
        "16×8 → 8×8",
        "output of the model",
        "net.py:7",
        "prunella run net:make",
        good.environment["torch"],
        "1 of ",
    ):
        assert said in text, said


def test_hostile_names_are_text(evil: Report) -> None:
    page = render_page(evil)
    reader = read(page)
    assert reader.elements <= ELEMENTS
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert "".join(reader.text).count(HOSTILE) >= 12
    assert page.count("</style>") == 1 and "<img" not in page and "<script" not in page


def test_the_same_report_gives_the_same_bytes(good: Report, tmp_path: Path) -> None:
    assert render_page(good) == render_page(good)
    path = write_page(good, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render_page(good)
    with pytest.raises(RequestError, match="cannot write"):
        write_page(good, tmp_path / "absent" / "report.html")


def test_ids_are_unique(good: Report) -> None:
    ids = [value for name, value in read(render_page(good)).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0


def test_charts_show_the_numbers_in_the_colors_of_the_page(good: Report) -> None:
    chart = latency_chart(good.latency)
    assert "ms per forward pass" in chart and "var(--pruned)" in chart and "var(--dense)" in chart
    assert "#0102" not in chart and "metadata" not in chart and chart.count("<use") >= 6
    curve = curve_chart(Curve(((0.0, 1.0), (5.0, 3.0)), "loss", "epoch", 2.0))
    assert "loss" in curve and "epoch" in curve and "dense 2" in curve
    ElementTree.fromstring(chart)


def test_svg_is_cleaned() -> None:
    source = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="alert(1)">
    <script>alert(1)</script><foreignObject><p>x</p></foreignObject><image xlink:href="http://x/y.png"/>
    <style>* {fill: red}</style><a xlink:href="javascript:alert(1)"><path d="M 0 0"/></a>
    <g id="k" clip-path="url(#c)" style="fill: url(http://x/y)"><use xlink:href="#m"/><use xlink:href="http://x"/></g>
    <text style="font: 9px 'DejaVu Sans'">a &lt;b&gt;</text></svg>"""
    clean = clean_svg(source, "p")
    assert clean == (
        '<svg role="img"><g id="p-k" clip-path="url(#p-c)"><use href="#p-m" /><use /></g>'
        "<text style=\"font: 9px 'DejaVu Sans'\">a &lt;b&gt;</text></svg>"
    )


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Ratio(1.02, 0.97, 1.06), "50% fewer multiply-adds, no faster on this device, accuracy 0.913 → 0.905."),
        (Ratio(0.5, 0.4, 0.8), "50% fewer multiply-adds, 2.00× slower, accuracy 0.913 → 0.905."),
    ],
)
def test_no_speed_up_is_said_first(good: Report, ratio: Ratio, said: str) -> None:
    slow = replace(good, latency=replace(good.latency, ratios=(ratio,)))
    assert headline(slow) == said
    assert tiles(slow)[0].tone == "plain" and tiles(good)[0].tone == "good"


def test_reasons_are_grouped(good: Report) -> None:
    frozen = (Frozen("a", 0, 1, "why", "f:1"), Frozen("b", 1, 2000, "why", "f:1"), Frozen("c", 0, 1, "other", ""))
    kept = why_kept(replace(good, frozen=frozen))
    assert [(k.reason, k.where, k.names) for k in kept] == [
        ("why", "f:1", ("a, axis 0 (1)", "b, axis 1 (2,000)")),
        ("other", "", ("c, axis 0 (1)",)),
    ]


def test_long_tables_are_folded(good: Report) -> None:
    many = replace(good, layers=good.layers * 20, widths=good.widths * 30)
    assert render_page(many).count("<details>") == render_page(good).count("<details>") + 2


def test_a_report_with_little_in_it(good: Report) -> None:
    bare = replace(
        good, widths=(), frozen=(), curve=None, target=None, recipe={}, command="", layers=(), pass_seconds=(0.0, 0.0),
        metrics=tuple(m for m in good.metrics if m.unit != "score"),
    )  # fmt: skip
    text = "".join(read(render_page(bare)).text)
    assert "Recovery" not in text and "What was kept" not in text and "Asked for" not in text


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PROBE = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><script>
document.getElementById("page").onload = function () {{
  var d = this.contentDocument, e = d.documentElement, wide = [];
  d.querySelectorAll("main *").forEach(function (n) {{
    var r = n.getBoundingClientRect();
    if (r.width && (r.right > {width} + 1 || r.left < -1)) wide.push(n.tagName + "." + n.className);
  }});
  document.title = "scroll=" + e.scrollWidth + " wide=" + wide.slice(0, 3).join(",") +
    " ran=" + (d.defaultView.hacked || "no") + " font=" + getComputedStyle(d.querySelector("h1")).fontSize;
}};
</script>"""


def browse(page: str, width: int, folder: Path) -> str:
    """The title that the probe gives itself: how wide the page lays itself out in a frame of that width."""
    probe = folder / f"probe{width}.html"
    probe.write_text(PROBE.format(page=html.escape(page), width=width), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<title>(scroll=.*?)</title>", done.stdout)
    assert found, done.stderr[-500:]
    return found[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_runs(evil: Report, tmp_path: Path, width: int) -> None:
    long_name = "encoder.layer.11.attention.self.query_projection_with_a_very_long_name.weight" * 2
    hostile = "<img src=x onerror=window.hacked='yes'>"
    layers = tuple(replace(layer, name=name) for layer in evil.layers for name in (hostile, long_name))
    page = render_page(replace(evil, layers=layers, widths=(LayerWidth(long_name, "channel", 1, 1_000_000),)))
    assert browse(page, width, tmp_path).startswith(f"scroll={width} wide= ran=no")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_probe_sees_an_overflow(tmp_path: Path) -> None:
    page = "<!DOCTYPE html><main><h1 style='width:900px'>x</h1></main>"
    assert "wide=H1." in browse(page, 390, tmp_path)
