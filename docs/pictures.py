"""The pictures of the concept pages, drawn by code: `python docs/pictures.py` writes docs/pictures/*.svg.

Each is a light card of its own, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / "pictures"
WIDTH = 480
INK, KEPT, PRUNED, NEW, LINE = "#1f1b2e", "#5e35b1", "#e2dcf0", "#c75300", "#6b6580"
"""Text, what stays, what goes, what is new, and lines: each text color has a contrast of 4.5 or more on white."""


def card(height: int, label: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(label)}" font-family="sans-serif" font-size="15" text-anchor="middle" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, *, fill: str = INK, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def box(
    x: float, y: float, width: float, height: float, fill: str, *, edge: str = "#ffffff", dash: bool = False
) -> str:
    dashes = ' stroke-dasharray="4 3"' if dash else ""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
    return f'{shape} fill="{fill}" stroke="{edge}" stroke-width="1.5"{dashes}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, *, color: str = LINE) -> str:
    angle = math.atan2(y2 - y1, x2 - x1)
    sides = [(x2 - 9 * math.cos(angle + turn), y2 - 9 * math.sin(angle + turn)) for turn in (-0.45, 0.45)]
    head = " ".join(f"L{x:.1f} {y:.1f}" for x, y in (sides[0], (x2, y2), sides[1]))
    start = f"M{x1:g} {y1:g} L{x2:g} {y2:g} M{sides[0][0]:.1f} {sides[0][1]:.1f}"
    return f'<path d="{start} {head}" stroke="{color}" stroke-width="2" fill="none"/>'


def grid(x: float, y: float, kept: Callable[[int, int], bool], *, size: int = 8, step: int = 12) -> list[str]:
    cells = [(row, column) for row in range(size) for column in range(size)]
    return [box(x + c * step, y + r * step, step, step, KEPT if kept(r, c) else PRUNED) for r, c in cells]


def named_box(x: float, y: float, words: str, *, width: float = 110, fill: str = KEPT) -> list[str]:
    ink = "#ffffff" if fill != PRUNED else INK
    return [box(x, y, width, 40, fill), text(x + width / 2, y + 25, words, fill=ink)]


def granularities() -> str:
    chance = random.Random(3)
    single = {(r, c): chance.random() < 0.5 for r in range(8) for c in range(8)}
    pairs = {(r, g): set(chance.sample(range(4), 2)) for r in range(8) for g in range(2)}
    blocks = {(r, c): chance.random() < 0.5 for r in range(4) for c in range(4)}
    ladder: list[tuple[str, Callable[[int, int], bool]]] = [
        ("single weights", lambda r, c: single[r, c]),
        ("2:4", lambda r, c: c % 4 in pairs[r, c // 4]),
        ("blocks", lambda r, c: blocks[r // 2, c // 2]),
        ("kernels", lambda r, c: (r * 5 + c // 4 * 3) % 4 < 2),
        ("filters", lambda r, c: r in (0, 2, 3, 6)),
        ("layers", lambda r, c: r not in (4, 5)),
    ]
    parts: list[str] = []
    for place, (name, kept) in enumerate(ladder):
        x, y = 36 + place % 3 * 156, 20 + place // 3 * 150
        parts += [*grid(x, y, kept), text(x + 48, y + 120, name)]
    return card(310, "Six granularities on one weight: single weights, 2:4, blocks, kernels, filters, layers", parts)


def two_of_four() -> str:
    values = (0.9, -0.1, 0.4, 0.2, -0.3, 0.8, 0.1, -0.7)
    kept = (0, 2, 5, 7)
    parts = [text(WIDTH / 2, 26, "one row: every four keep the two largest")]
    for place, value in enumerate(values):
        x = 22 + place * 54 + place // 4 * 10
        stays = place in kept
        parts += [box(x, 40, 50, 38, KEPT if stays else PRUNED)]
        parts += [text(x + 25, 64, f"{value:g}" if stays else "0", fill="#ffffff" if stays else INK)]
    parts += [text(WIDTH / 2, 110, "stored: the values, and two bits for each position")]
    for place, source in enumerate(kept):
        x = 44 + place * 100
        parts += [box(x, 122, 50, 38, KEPT), text(x + 25, 146, f"{values[source]:g}", fill="#ffffff")]
        parts += [box(x + 50, 122, 34, 38, "#ffffff", edge=LINE), text(x + 67, 146, f"{source % 4:02b}")]
    return card(176, "Two of every four consecutive weights are kept, and stored with their positions", parts)


def coupling() -> str:
    def channels(x: float, y: float) -> list[str]:
        dots = [box(x + k * 18, y, 14, 14, KEPT if k != 2 else PRUNED, edge=LINE, dash=k == 2) for k in range(4)]
        return [*dots, f'<path d="M{x + 35:g} {y - 1:g} l16 16 m0 -16 l-16 16" stroke="{NEW}" stroke-width="2"/>']

    parts = [*named_box(14, 90, "stem", width=86), *named_box(150, 30, "conv 1"), *named_box(290, 30, "conv 2")]
    parts += [*named_box(388, 90, "next", width=78), text(338, 116, "+", bold=True)]
    parts += [f'<circle cx="338" cy="110" r="15" fill="none" stroke="{LINE}" stroke-width="2"/>']
    parts += [arrow(100, 110, 322, 110), arrow(104, 104, 148, 56), arrow(260, 50, 288, 50), arrow(338, 70, 338, 94)]
    parts += [arrow(353, 110, 386, 110), *channels(24, 142), *channels(312, 142), *channels(392, 142)]
    parts += [text(WIDTH / 2, 192, "the sum couples them: channel 3 goes from all three, or stays")]
    return card(210, "stem and conv 2 are added, so a channel goes from both and from what reads the sum", parts)


def schedules() -> str:
    left, top, width, height = 54, 24, 300, 190

    def path(values: list[float]) -> str:
        points = [(left + width * k / (len(values) - 1), top + height * (1 - v)) for k, v in enumerate(values)]
        return " ".join(f"{'M' if k == 0 else 'L'}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(points))

    steps = [k / 60 for k in range(61)]
    survivors = [1 - 0.5 ** math.ceil(t * 4) if t else 0.0 for t in steps]
    curves = [
        ("one-shot", [0.94 if t > 0.02 else 0.0 for t in steps], KEPT, "2 4"),
        ("cubic", [0.94 * (1 - (1 - t) ** 3) for t in steps], KEPT, ""),
        ("linear", [0.94 * t for t in steps], LINE, ""),
        ("cosine", [0.94 * (1 - math.cos(math.pi * t)) / 2 for t in steps], NEW, "8 4"),
        ("rounds", survivors, NEW, ""),
    ]
    axes = f"M{left} {top} V{top + height} H{left + width}"
    parts = [f'<path d="{axes}" stroke="{INK}" stroke-width="1.5" fill="none"/>']
    for place, (name, values, color, dash) in enumerate(curves):
        style = f'stroke="{color}" stroke-width="2.5" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        y = top + 20 + place * 34
        parts += [f'<path d="{path(values)}" {style}/>', f'<path d="M372 {y} h30" {style}/>']
        parts += [text(408, y + 5, name, anchor="start")]
    parts += [text(left - 6, top + 12, "0.94", anchor="end"), text(left - 6, top + height, "0", anchor="end")]
    parts += [text(left + width / 2, top + height + 26, "training steps"), text(left + 30, top - 6, "sparsity")]
    return card(258, "Sparsity over training steps for one-shot, cubic, linear, cosine and rounds", parts)


def tickets() -> str:
    parts = [*named_box(20, 30, "early weights"), *named_box(185, 30, "train"), *named_box(350, 30, "prune")]
    parts += [arrow(130, 50, 183, 50), arrow(295, 50, 348, 50), arrow(405, 72, 405, 118)]
    parts += [*named_box(300, 120, "rewind survivors", width=166, fill=NEW), arrow(300, 140, 240, 140)]
    parts += [arrow(240, 140, 240, 74), text(130, 136, "the mask stays,"), text(130, 156, "round after round")]
    return card(180, "Train, prune the smallest weights, rewind the survivors to early values, train again", parts)


def drop_grow() -> str:
    chance = random.Random(1)
    cells = [(r, c) for r in range(8) for c in range(8)]
    first = set(chance.sample(cells, 20))
    dropped = set(chance.sample(sorted(first), 5))
    grown = set(chance.sample(sorted(set(cells) - first), 5))
    step, parts = 18, [text(112, 26, "drop the smallest"), text(368, 26, "grow elsewhere")]
    for x, kept in ((40, first), (296, (first - dropped) | grown)):
        for r, c in cells:
            fill = KEPT if (r, c) in kept else PRUNED
            fill = NEW if (r, c) in grown and x > 100 else fill
            parts.append(box(x + c * step, 40 + r * step, step, step, fill))
    for r, c in dropped:
        corner = f"M{40 + c * step + 4} {40 + r * step + 4}"
        parts.append(f'<path d="{corner} l10 10 m0 -10 l-10 10" stroke="#ffffff" stroke-width="2.5"/>')
    parts += [arrow(200, 112, 280, 112), text(WIDTH / 2, 212, "20 weights before, 20 weights after")]
    return card(228, "Five weights are dropped and five grown, so that their number stays", parts)


def obs_update() -> str:
    parts = [
        f'<path d="M40 180 H320 M60 20 V200" stroke="{INK}" stroke-width="1.5"/>',
        text(332, 196, "w₁"),
        text(44, 26, "w₂"),
    ]
    for radius in (26, 56, 88):
        shape = f'rx="{radius * 1.5:g}" ry="{radius * 0.5:g}" transform="rotate(-32 190 96)"'
        parts.append(f'<ellipse cx="190" cy="96" {shape} fill="none" stroke="{KEPT}" stroke-width="1.5"/>')
    parts += ['<circle cx="190" cy="96" r="5"/>', arrow(190, 96, 190, 174), arrow(190, 96, 104, 175, color=NEW)]
    parts += [
        text(312, 60, "trained weights", anchor="start"),
        arrow(308, 58, 200, 92),
        text(204, 150, "w₂ = 0: the loss rises", anchor="start"),
    ]
    parts += [text(70, 216, "w₂ = 0 and w₁ updated (OBS): it rises less", fill=NEW, anchor="start")]
    return card(232, "Setting one weight to zero, with and without the update of the other weight", parts)


def knapsack() -> str:
    groups = (("A", (60, 42, 24), 1), ("B", (90, 66, 36), 2), ("C", (48, 36, 18), 0))
    parts = [text(WIDTH / 2, 24, "options of each group: a cost and a loss")]
    x = 40
    for name, costs, chosen in groups:
        for place, cost in enumerate(costs):
            parts.append(box(x + place * 36, 140 - cost, 30, cost, KEPT if place == chosen else PRUNED, edge=LINE))
        parts.append(text(x + 52, 160, f"group {name}"))
        x += 140
    parts += [box(40, 176, 42 * 2.4, 26, KEPT), box(40 + 42 * 2.4, 176, 36 * 2.4, 26, KEPT)]
    parts += [box(40 + 78 * 2.4, 176, 48 * 2.4, 26, KEPT), box(40, 176, 130 * 2.4, 26, "none", edge=NEW, dash=True)]
    parts += [text(362, 195, "budget", fill=NEW, anchor="start")]
    return card(220, "One option from each group; the chosen costs fit the budget", parts)


def kv_groups() -> str:
    parts = [text(34, 50, "query", anchor="start"), text(34, 130, "key, value", anchor="start")]
    for group in range(4):
        fill = PRUNED if group == 2 else KEPT
        ink = INK if group == 2 else "#ffffff"
        x = 124 + group * 86
        for head in range(2):
            parts += [box(x + head * 38, 28, 34, 34, fill, edge=LINE, dash=group == 2)]
            parts += [text(x + head * 38 + 17, 50, str(group * 2 + head), fill=ink)]
            parts += [f'<path d="M{x + head * 38 + 17} 64 L{x + 36} 104" stroke="{LINE}" stroke-width="1.5"/>']
        parts += [box(x, 106, 72, 36, fill, edge=LINE, dash=group == 2), text(x + 36, 130, str(group), fill=ink)]
    parts += [text(WIDTH / 2, 174, "a key-value head goes with the query heads that read it")]
    return card(190, "Key-value head 2 goes together with query heads 4 and 5", parts)


def block_reconstruction() -> str:
    parts = [text(12, 28, "dense", anchor="start", bold=True), text(12, 128, "pruned", anchor="start", bold=True)]
    for y, fills in ((40, (PRUNED, PRUNED)), (140, (KEPT, NEW))):
        parts += [*named_box(90, y, "block 1", fill=fills[0]), *named_box(250, y, "block 2", fill=fills[1])]
        parts += [text(28, y + 25, "text"), arrow(46, y + 20, 88, y + 20), arrow(200, y + 20, 248, y + 20)]
        parts += [arrow(360, y + 20, 408, y + 20), text(436, y + 25, "out")]
    parts += [
        arrow(436, 74, 436, 144, color=NEW),
        arrow(436, 144, 436, 78, color=NEW),
        text(382, 116, "compare", fill=NEW),
    ]
    parts += [text(240, 206, "block 2 is solved on what the pruned block 1 gives it")]
    return card(222, "A block is solved on the inputs of the pruned model, toward the outputs of the dense one", parts)


def dense_cut_recovered() -> str:
    """The demo's MiniLM: multiply-adds and recall, as the table of the README says."""
    rows = (("dense", "2.87 G", 0.586, 12), ("cut", "1.43 G", 0.525, 6), ("recovered", "1.43 G", 0.586, 6))
    parts: list[str] = []
    for place, (name, cost, quality, width) in enumerate(rows):
        x = 14 + place * 160
        fill = (LINE, NEW, KEPT)[place]
        parts += [text(x + 66, 32, name, bold=True)]
        for layer in range(3):
            left = x + 66 - width * 5
            parts += [box(left + 10 * k, 50 + 30 * layer, 9, 20, fill) for k in range(width)]
        parts += [text(x + 66, 166, cost), text(x + 66, 188, "multiply-adds")]
        parts += [box(x + 16, 204, 100, 16, PRUNED), box(x + 16, 204, 100 * quality, 16, fill)]
        parts += [text(x + 66, 246, f"recall {quality:.3f}")]
        if place:
            parts += [arrow(x - 22, 90, x - 2, 90)]
    label = (
        "A network dense, cut to half of its multiply-adds with less recall, and recovered to the recall that it had"
    )
    return card(264, label, parts)


PICTURES = (
    dense_cut_recovered,
    granularities, two_of_four, coupling, schedules, tickets, drop_grow, obs_update, knapsack, kv_groups,
    block_reconstruction,
)  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for picture in PICTURES:
        (FOLDER / f"{picture.__name__}.svg").write_text(picture(), encoding="utf-8")
