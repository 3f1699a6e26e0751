"""Small files that ask for much: depth, repetition, sizes that are only declared, archives, links, numbers without end.

    python -m tests.fuzz.bombs [--every 5] [READER ...]

Every bomb is put in the place of every file of every reader, each read in a process of its own. What is wrong: an error
that is not the package's or has another exit code than 2, 3 or 6, more than a second of the processor or 200 MB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.faults.processes import Ended, start
from tests.fuzz.readers import READERS, Reader

SECONDS, MEMORY, HANGS, SLEEPS = 1.0, 200_000, 5, 120
"""Of the processor; kilobytes; seconds of the processor, and of the clock, after which a read is ended."""
ALLOWED = {0, 2, 3, 6}
"""0 where the bomb is no part of what is read, or is what the format allows."""
DEEP = 200_000
Bomb = Callable[[Path], object]


def _header(text: bytes, size: int | None = None, body: int = 0) -> Bomb:
    """A safetensors file with this header; size: what it says of the header's length. The body is a hole."""

    def write(file: Path) -> None:
        file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text)
        if body:
            os.truncate(file, 8 + len(text) + body)

    return write


def _json(text: str | bytes) -> Bomb:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode())


def _metadata(text: str) -> bytes:
    """A header whose metadata says this where a plan or a state is expected."""
    return json.dumps({"__metadata__": dict.fromkeys(("prunella.plan", "prunella.state"), text)}).encode()


def _values(value: str) -> Bomb:
    """A JSON object in which the value of every key is another one."""

    def write(file: Path) -> object:
        keys = json.loads(file.read_bytes())
        fields = ",".join(f"{json.dumps(key)}:{value if k == len(keys) // 2 else json.dumps(keys[key])}"
                          for k, key in enumerate(keys))  # fmt: skip
        return file.write_text("{" + fields + "}")

    return write


def _pickle(value: bytes, data: bytes = b"") -> Bomb:
    """A checkpoint of torch whose pickle is this one."""

    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", value)
            archive.writestr("x/byteorder", "little")
            archive.writestr("x/version", "3\n")
            if data:
                archive.writestr("x/data/0", data)

    return write


def _laughing(levels: int = 40) -> Any:
    value: Any = {"w": torch.zeros(2)}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def _saved(value: Callable[[], Any], new: bool = True) -> Bomb:
    return lambda file: torch.save(value(), file, _use_new_zipfile_serialization=new)


def _ring() -> Any:
    ring: dict[str, Any] = {"w": torch.zeros(2)}
    ring["again"] = ring
    return ring


def _packed(file: Path) -> None:
    """The archive with every part compressed, and zeros for its largest."""
    made = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            largest = max(source.infolist(), key=lambda p: p.file_size)
            target.writestr(part.filename, bytes(300 << 20) if part is largest else source.read(part))
    file.write_bytes(made.getvalue())


def _directory(file: Path) -> None:
    """The archive whose directory says that a part has 2 GB."""
    data = bytearray(file.read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 20 : place + 28] = (2 << 30).to_bytes(4, "little") * 2
    file.write_bytes(data)


def _many(file: Path) -> None:
    """An archive of very many parts."""
    with zipfile.ZipFile(file, "w") as archive:
        for k in range(60_000):
            archive.writestr(f"x/{k}", b"")


def _link(target: str) -> Bomb:
    def write(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return write


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


NOTHING = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
TENSOR = '{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'
ANY: Mapping[str, Bomb] = {
    "empty": lambda file: os.truncate(file, 0),
    "2 GB of a hole behind it": lambda file: os.truncate(file, 2 << 30),
    "2 GB of nothing but a hole": lambda file: (os.truncate(file, 0), os.truncate(file, 2 << 30)),
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to itself": lambda file: _link(file.name)(file),
    "a link out of the folder": lambda file: _link("/etc/hostname")(file),
    "a pipe": _pipe,
    "a folder": _folder,
    "deep lists": _json("[" * DEEP + "]" * DEEP),
    "deep objects": _json('{"a":' * DEEP + "1" + "}" * DEEP),
    "lists without end": _json("[" * DEEP),
    "a key twice": _json('{"a":1,"a":2}'),
    "NaN": _json('{"a":NaN}'),
    "half a character": _json('{"a":"\\ud800"}'),
    "a number of a million digits": _json('{"a":' + "9" * 1_000_000 + "}"),
    "no UTF-8": _json(b'{"a":"\xff\xfe"}'),
    "UTF-16": _json('{"a":1}'.encode("utf-16")),
    "30 MB of lists": _json("[" + "[]," * 10_000_000 + "0]"),
    "31 MB of a text": _json('{"a":"' + "x" * 31_000_000 + '"}'),
    "31 MB of wide text": _json('{"a":"' + "\\u4e00" * 5_000_000 + '\U0001f600"}'),
}
OBJECT: Mapping[str, Bomb] = {
    f"{name} as a value": _values(value)
    for name, value in {
        "deep lists": "[" * 90 + "]" * 90, "deeper lists": "[" * 500 + "]" * 500, "NaN": "NaN", "infinity": "-Infinity",
        "1e999": "1e999", "10^400": "1" + "0" * 400, "10^30": "1" + "0" * 30, "-1": "-1", "2^63": str(1 << 63),
        "a million numbers": "[" + "1," * 1_000_000 + "1]", "null": "null", "truth": "true", "text": '"\\u001b[2J"',
        "half a character": '"\\ud800"', "an empty object": "{}", "an empty list": "[]", "a path": '"../../../etc/x"',
    }.items()
}  # fmt: skip
TENSORS: Mapping[str, Bomb] = {
    "a header of 2^63 bytes": _header(b"{}", 1 << 63),
    "a header of 2 GB": _header(b"{}", 2 << 30, 2 << 30),
    "a header of 99 MB": _header(b"{}", 99_000_000, 99_000_000),
    "a header of 30 MB": _header(b"{" + b" " * 30_000_000 + b"}"),
    "a tensor of 2 GB that is not there": _header(TENSOR.format(shape="[536870912]", end=2 << 30).encode()),
    "a tensor of 2^62 values": _header(TENSOR.format(shape=f"[{1 << 62}]", end=1 << 64).encode()),
    "a tensor of nothing of 2^62 rows": _header(TENSOR.format(shape=f"[{1 << 62},0]", end=0).encode()),
    "a hundred thousand tensors": _header(("{" + ",".join(f'"t{k}":{NOTHING}' for k in range(100_000)) + "}").encode()),
    "metadata that is deep": _header(_metadata("[" * 90_000)),
    "metadata that is long": _header(_metadata("[" + "1," * 8_000_000 + "1]")),
    "metadata of a plan that is deep": _header(
        _metadata('{"version":4,"sha256":"","plan":' + "[" * 90 + "]" * 90 + "}")
    ),
}
ARCHIVE: Mapping[str, Bomb] = {
    "compressed zeros": _packed,
    "2 GB in the directory": _directory,
    "sixty thousand parts": _many,
    "deep lists in a pickle": _pickle(b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."),
    "deep tuples in a pickle": _pickle(b"\x80\x02)" + b"\x85" * DEEP + b"."),
    "a number of 2 GB in a pickle": _pickle(b"\x80\x02\x8b" + (2 << 30).to_bytes(4, "little", signed=False) + b"."),
    "a text of 4 GB in a pickle": _pickle(b"\x80\x02X" + (0xFFFFFFFF).to_bytes(4, "little") + b"x."),
    "a memory of 2^31 entries": _pickle(b"\x80\x02Kar" + (0x7FFFFFFF).to_bytes(4, "little") + b"."),
    "one mapping 2^40 times": _saved(_laughing),
    "a mapping in itself": _saved(_ring),
    "one mapping 2^40 times, in an old file": _saved(_laughing, new=False),
    "a mapping in itself, in an old file": _saved(_ring, new=False),
    "a pickle that runs": lambda file: file.write_bytes(pickle.dumps(_Runs())),
}
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 30)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)
RECIPES: Mapping[str, Bomb] = {
    "deep flow": _json("[" * 20_000),
    "deep flow that ends": _json("[" * 900 + "]" * 900),
    "aliases of aliases": _json("a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
                                                        for a, b in zip("abcdefghi", "bcdefghij", strict=True))),
    "merges of merges": _json(MERGED),
    "a tag of Python": _json("x: !!python/object/apply:os.system ['true']\n"),
    "an alias to itself": _json("&a [*a]\n"),
}  # fmt: skip


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def bombs_of(file: Path) -> dict[str, Bomb]:
    """The bombs for a file, by its kind. A recipe is a text in a checkpoint, not a file."""
    kinds = {".json": OBJECT, ".safetensors": TENSORS, ".plan": TENSORS, ".pt": ARCHIVE, ".pt2": ARCHIVE}
    return dict(RECIPES) if file.suffix == ".yaml" else {**ANY, **kinds.get(file.suffix, {})}


def read(reader: Reader, folder: Path) -> Ended:
    """Read a folder in a process of its own, which is ended if it takes too long."""

    def limits() -> None:
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + HANGS, used + HANGS))
        signal.alarm(SLEEPS)

    return start(lambda: reader.read(folder), folder.parent, first=limits).wait()


def wrong(ended: Ended, sound: Ended) -> str:
    """What is wrong with how a bomb was read, if anything; the sound folder says what reading takes anyway."""
    if ended.code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return f"no end within {HANGS} s"
    if ended.code not in ALLOWED or "Traceback" in ended.said or "it ran" in ended.said:
        return f"exit code {ended.code}: {ended.said[-1200:]}"
    if ended.cpu - sound.cpu > SECONDS:
        return f"{ended.cpu:.1f} s"
    return f"{(ended.memory - sound.memory) // 1000} MB" if ended.memory - sound.memory > MEMORY else ""


def cases(reader: Reader, home: Path, every: int = 1) -> Iterator[tuple[str, str]]:
    """Every bomb in the place of every file, and what was wrong. every: only each so-many-th."""
    kept, folder = home / "sound", home / "x"
    kept.mkdir(parents=True)
    reader.build(kept)
    shutil.copytree(kept, folder)
    reader.read(folder)  # what is loaded at the first read does not count
    sound = read(reader, folder)
    pairs = [(file, name) for file in sorted(kept.rglob("*")) if file.is_file() for name in bombs_of(file)]
    for file, name in pairs[::every]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        place = folder / file.relative_to(kept)
        try:
            bombs_of(file)[name](place)
        except (ValueError, AttributeError, zipfile.BadZipFile):
            continue  # a bomb of another kind
        yield f"{file.relative_to(kept)}: {name}", wrong(read(reader, folder), sound)


def main() -> int:
    """Exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="only every so-many-th bomb")
    asked = parser.parse_args()
    names, failures = asked.readers, 0
    for reader in (reader for reader in READERS if not names or reader.name in names):
        number = 0
        with tempfile.TemporaryDirectory() as home:
            for what, said in cases(reader, Path(home).resolve() / reader.name.replace(" ", "_"), asked.every):
                number += 1
                if said:
                    failures += 1
                    print(f"{reader.name}, {what}: {said}", flush=True)
        print(f"{reader.name}: {number} bombs", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
