"""The kind of file or folder at a path, and the verb that opens it: for errors about a path of the wrong kind.

A file is recognized by its first bytes, an archive by the names of its parts. File names are ignored: downloads often
save an error page as `model.safetensors`.
"""

from __future__ import annotations

import codecs
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from prunella.errors import BadInput
from prunella.io.pickled_class import class_in


@dataclass(frozen=True)
class FileKind:
    """said: `an image (PNG)`. verbs: the verbs that open it. todo: advice if another kind is needed.

    format: the format name of its reader; "" without a reader in prunella.
    """

    said: str
    verbs: str = ""
    todo: str = ""
    format: str = ""

    def __str__(self) -> str:
        return f"it is {self.said}: {self.verbs}" if self.verbs else f"it is {self.said}"


_HEAD = 4096
_FOLDERS = (
    ("manifest.json", FileKind("a folder that prunella saved", "verify, report and inspect open it")),
    ("config.json", FileKind("a Hugging Face folder", "inspect, plan, run and llm open it")),
    ("journal.sqlite", FileKind("the folder of a run that resumes", "the call that made it goes on in it")),
)
_NO_MODEL = FileKind("a folder that holds no model")
_DEVICE = FileKind("a pipe or a device, not a file", todo="give a file")
_EMPTY = FileKind("an empty file", todo="fetch or write it again")
_OTHER = FileKind("a file of another kind")
_TEXT = FileKind("a text file")
_JSON = FileKind("a JSON text", format="json")
_PAGE = FileKind("a web page (HTML), as a server sends it in place of a file", todo="fetch the file itself")
_POINTER = FileKind("a pointer of Git LFS, and the file itself was not fetched", todo="fetch it with git lfs pull")
_PLAN = FileKind("a plan", "show opens it", format="safetensors")
_WEIGHTS = FileKind("a safetensors file", "--weights takes it", "name it FILE.safetensors", "safetensors")
_CHECKPOINT = FileKind("a checkpoint of torch", "--weights takes FILE.pt with --allow-pickle", "", "torch")
_PROGRAM = FileKind("a program of torch.export", "inspect opens FILE.pt2", format="program")
_SCRIPT = FileKind("a program of TorchScript", todo="give what the script was made of, as package.module:factory")
_ZIP = FileKind("a zip archive", todo="unpack it, and give what is in it")
_MAGIC = (
    (
        b"SQLite format 3\0",
        FileKind("the journal of a run", "the call that made it goes on with its folder", "", "sqlite"),
    ),
    (b"GGUF", FileKind("a GGUF file", "inspect and plan open it", "name it FILE.gguf", "gguf")),
    (b"\x89PNG\r\n\x1a\n", FileKind("an image (PNG)")),
    (b"\xff\xd8\xff", FileKind("an image (JPEG)")),
    (b"GIF8", FileKind("an image (GIF)")),
    (b"%PDF-", FileKind("a PDF document")),
    (b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file, as Keras writes it", todo="build the model in torch first")),
    (b"\x93NUMPY", FileKind("an array of NumPy")),
    (b"\x1f\x8b", FileKind("a file compressed by gzip", todo="unpack it, and give what is in it")),
    (b"BZh", FileKind("a file compressed by bzip2", todo="unpack it, and give what is in it")),
    (b"\xfd7zXZ\0", FileKind("a file compressed by xz", todo="unpack it, and give what is in it")),
    (b"\x28\xb5\x2f\xfd", FileKind("a file compressed by zstd", todo="unpack it, and give what is in it")),
    (b"7z\xbc\xaf\x27\x1c", FileKind("an archive of 7-Zip", todo="unpack it, and give what is in it")),
    (b"Rar!", FileKind("an archive of RAR", todo="unpack it, and give what is in it")),
    (b"\x7fELF", FileKind("a program or a library of this system")),
    (b"MZ", FileKind("a program or a library of Windows")),
)
_PAGES = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|\?xml)\b", re.IGNORECASE | re.DOTALL)
_POINTERS = b"version https://git-lfs"
_ONNX = re.compile(rb"\x08[\x01-\x20][\x12:\x1a\x42]")


def described_path(path: str | os.PathLike[str]) -> str:
    """`it is a plan: show opens it`; `no such file or folder` for a path that does not exist."""
    place = Path(path)
    try:
        return str(kind_of(place))
    except OSError as error:
        return "no such file or folder" if not os.path.lexists(place) else f"it cannot be read ({error.strerror})"


def kind_of(place: Path) -> FileKind:
    """The kind of file or folder at a path. Errors: OSError if there is none, or it cannot be read."""
    if place.is_dir():
        return next((kind for name, kind in _FOLDERS if (place / name).is_file()), _NO_MODEL)
    if place.exists() and not place.is_file():
        return _DEVICE
    with place.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return _EMPTY
    if head.startswith(b"PK"):
        return _archive(place)
    known = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    return known or _tensors_or_pickle(head) or _text(head) or _other(head)


def is_plan(place: Path) -> bool:
    """Whether a file begins as a plan does, or is empty."""
    try:
        return kind_of(place) in (_PLAN, _EMPTY)
    except OSError:
        return False


def refuse_other_kind(file: Path, *formats: str, what: str, give: str) -> None:
    """Errors: BadInput if a file is clearly of another kind than the formats. A reader calls it after a failure.

    what: the first line of the error. give: the advice, if the kind itself has none.
    """
    try:
        kind = kind_of(file)
    except OSError:
        return
    if kind is _OTHER or kind.format in formats:
        return
    raise BadInput(what, str(kind), kind.todo or give)


def _tensors_or_pickle(head: bytes) -> FileKind | None:
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return _PLAN if b'"prunella.plan"' in head else _WEIGHTS
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return _pickle(head)
    return None


def _pickle(head: bytes) -> FileKind:
    """A checkpoint, or the object of a class: torch wrote its files so until 1.6, after a few numbers of its own."""
    held = class_in(head)
    return _object(held) if held else _CHECKPOINT


def _object(held: str) -> FileKind:
    todo = "save its state_dict() where its code is, and give that as --weights (weights=) of package.module:factory"
    return FileKind(f"a pickle of an object, {held}", "its code would run when it is read", todo, "object")


def _archive(place: Path) -> FileKind:
    """A zip archive, by the names of its parts."""
    try:
        with zipfile.ZipFile(place) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            if "constants.pkl" in names:
                return _SCRIPT
            if "archive_format" in names or any(name.startswith(("models/", "serialized_exported")) for name in names):
                return _PROGRAM
            if "data.pkl" not in names:
                return _ZIP
            with archive.open(archive.namelist()[names.index("data.pkl")]) as part:
                held = class_in(part.read(_HEAD))
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError, RuntimeError):
        return _OTHER  # cut short, maybe: what reads it says so
    return _object(held) if held else _CHECKPOINT


def _text(head: bytes) -> FileKind | None:
    if head.startswith(_POINTERS):
        return _POINTER
    if _PAGES.match(head):
        return _PAGE
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\t\n\r\f" for character in text):
        return None
    return _JSON if text.lstrip()[:1] in ("{", "[") else _TEXT


def _other(head: bytes) -> FileKind:
    if _ONNX.match(head):
        return FileKind("a model of ONNX", todo="give the model in torch that it was exported from")
    return _OTHER
