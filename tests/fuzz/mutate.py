"""Changes of sound files: of bytes, of JSON by its structure, of the parts of archives; from one seeded generator."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

Bytes = Callable[[bytes], bytes]
"""What is done to the inner text of a file, after which the outer one is made whole again."""
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 255, 1 << 31, 1 << 63, -(1 << 63), 10**12, 10**30, 0.5, -0.0, 1e308, 1e999,
    float("nan"), "", "0", "-1", "\0", "../../x", "/etc/passwd", "\x1b[2J\r\n", "\u202egnp", "\U0001f600" * 9,
    "__class__", "weight", "float32", "sha256:" + "0" * 64, "x" * 5000, [], {}, [[]], [0], [-1], [None], {"a": 1},
    {"": {}}, [10**12, 10**12], [1] * 4000, {str(k): k for k in range(2000)},
)  # fmt: skip


def flipped(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Bytes changed, cut off, added, moved or taken from another file: one to three times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_EDITS)(bytearray(data or b"\0"), rng, other)
    return data


def _bits(data: bytearray, rng: random.Random, _: bytes) -> bytes:
    for _number in range(rng.choice((1, 1, 2, 8, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _values(data: bytearray, rng: random.Random, _: bytes) -> bytes:
    place = rng.randrange(len(data))
    data[place : place + rng.choice((1, 1, 2, 4, 8))] = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f", b"9", b"{", b'"'))
    return bytes(data)


def _cut(data: bytearray, rng: random.Random, _: bytes) -> bytes:
    return bytes(data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))])


def _longer(data: bytearray, rng: random.Random, _: bytes) -> bytes:
    return bytes(data) + rng.choice((b"\0", b"\n", b"xyz", rng.randbytes(rng.randrange(1, 4000)), bytes(data)))


def _moved(data: bytearray, rng: random.Random, _: bytes) -> bytes:
    start, size, to = (rng.randrange(len(data)) for _ in range(3))
    part = data[start : start + size]
    if rng.random() < 0.5:
        del data[start : start + size]
    data[to:to] = part
    return bytes(data)


def _spliced(data: bytearray, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other) or 1) :]


_EDITS = (_bits, _bits, _values, _values, _cut, _longer, _moved, _spliced)


def json_changed(text: bytes, rng: random.Random) -> bytes:
    """A JSON text whose structure was changed in one to three places; now and then as no JSON writer would."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _node_changed(value, rng)
    changed = json.dumps(value, indent=rng.choice((None, 1)))
    trick = rng.random()
    if trick < 0.05:
        deep = rng.choice((60, 400, 5000))
        changed = changed.replace("null", "[" * deep + "]" * deep, 1)
    elif trick < 0.1 and '"' in changed:
        start = changed.index('"')
        changed = changed.replace(
            changed[start : changed.find(",", start) + 1], changed[start : changed.find(",", start) + 1] * 2, 1
        )
    elif trick < 0.13:
        changed = changed.replace('": ', '\\ud800": ', 1)
    return changed.encode()


def _node_changed(value: Any, rng: random.Random) -> Any:
    """The value with one node that is something else; nodes deep inside are as likely as those at the top."""
    places = list(_places(value))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.3:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
    elif what < 0.4 and isinstance(holder, dict):
        holder[rng.choice(("", "0", "../x", "\x1b[31m", str(key) + "x", "weight", "a.b.c"))] = holder[key]
    elif what < 0.5 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(ODD))
    elif what < 0.65 and isinstance(holder[key], int | float):
        holder[key] = holder[key] + rng.choice((-1, 1, 2, 0.5, 1 << 40, -(1 << 40)))
    else:
        holder[key] = rng.choice(ODD)
    return value


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Any:
    level, seen = [value], 0
    while level and seen < 20_000:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            seen += 1
            yield holder, key
            level.append(holder[key])


def header_changed(data: bytes, rng: random.Random, inner: Bytes | None = None) -> bytes:
    """A safetensors file with another header. inner: applied to the text in its metadata, where there is one."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    texts = header.get("__metadata__") or {}
    key = next((key for key in texts if key.startswith("prunella")), None)
    if inner is not None and key is not None:
        texts[key] = inner(texts[key].encode()).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = json_changed(json.dumps(header).encode(), rng)
    return len(text).to_bytes(8, "little") + text + rest


def archive_changed(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """An archive with one part changed, left out, twice there, renamed or compressed, and otherwise sound."""
    made, what = io.BytesIO(), rng.random()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w") as target:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = source.read(name)
            if name == chosen and what < 0.6:
                structured = name.endswith(".json") and rng.random() < 0.7
                content = json_changed(content, rng) if structured else flipped(content, rng, other)
            if name == chosen and 0.6 <= what < 0.7:
                continue
            kind = zipfile.ZIP_DEFLATED if name == chosen and what > 0.9 else zipfile.ZIP_STORED
            content = bytes(50_000_000) if kind == zipfile.ZIP_DEFLATED else content
            target.writestr(f"{name}x" if name == chosen and 0.7 <= what < 0.8 else name, content, kind)
    return made.getvalue()
