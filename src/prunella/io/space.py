"""Checks before a run: room on the disk, permission to write, and an output apart from the sources."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from prunella.errors import OutOfResources, RequestError
from prunella.io.files import check_file_name, check_free, writing
from prunella.io.temporary import check_name, clean_up, discard, followed, temporary_file


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Errors: OutOfResources, with both numbers, unless `needed` bytes are free on the disk of `path`."""
    try:
        free = shutil.disk_usage(_standing(Path(path))).free
    except OSError:  # a file system that does not report it
        return
    if free < needed:
        why = f"the disk is full: {needed:,} bytes are needed, and {free:,} are free"
        raise OutOfResources(f"cannot write {os.fspath(path)}", why, "free some space, or write elsewhere")


def check_output_file(path: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Errors: RequestError unless a file can be written at `path` and `path` is not a source. Leaves no file.

    A source `module:name` is the file of its code.
    """
    final = followed(path)
    check_file_name(final)
    check_apart(final, *sources, *map(_code_of, sources))
    with writing(final):
        clean_up(final.parent)
        discard(temporary_file(final))


def check_output_folder(
    path: str | os.PathLike[str], *sources: str | os.PathLike[str] | None, overwrite: bool = False
) -> None:
    """Errors: RequestError unless a folder can be written at `path`, apart from the sources. Leaves no file."""
    check_name(path)
    check_free(Path(path), overwrite=overwrite)
    check_apart(path, *sources)
    check_writable(path)


def check_folder_of_weights(path: str | os.PathLike[str]) -> None:
    """`check_writable` for a folder that transformers reads. Errors: also RequestError for a name that is not UTF-8."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        name = os.path.abspath(path).encode(errors="replace").decode()
        why = "its name is not UTF-8, and the library of safetensors reads no such file"
        raise RequestError(f"cannot write {name}", why, "choose another name") from error
    check_writable(path)


def check_room_for_journal(folder: str | os.PathLike[str]) -> None:
    """Errors: RequestError unless files can be written in the folder, which need not exist. Leaves no file."""
    check_writable(Path(folder) / "journal")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Errors: RequestError unless a file can be created at `path`, in its nearest existing folder."""
    final = followed(path).absolute()
    check_name(final)
    standing = _standing(final.parent)
    with writing(path):
        blocked = next((place for place in final.parents if os.path.lexists(place) and not place.is_dir()), None)
        if blocked is not None and blocked.is_symlink():
            what, why = f"cannot write {os.fspath(path)}", f"{blocked} is a link that leads to no folder"
            raise RequestError(what, why, "choose another folder")
        if blocked is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(blocked))
        clean_up(standing)
        discard(temporary_file(standing / final.name))


def check_apart(output: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Errors: RequestError if the output is a source, inside a source, or contains one, under any name.

    The targets of links in a source are sources too. Sources that do not exist (such as the name of a model) and None
    are ignored; a file contains nothing.
    """
    for source in sources:
        if source is None or not os.path.exists(source):
            continue
        for place in (os.fspath(source), *_links_of(os.fspath(source))):
            if relation := _relation(os.fspath(output), place):
                why = f"it {relation} {place}, which is read"
                raise RequestError(f"cannot write {os.fspath(output)}", why, "choose another output")


def _code_of(source: str | os.PathLike[str] | None) -> Path | None:
    """The file of `package.module:name` or `path/to/file.py:name`, if it lies below the current folder."""
    module, mark, _ = os.fspath(source or "").rpartition(":")
    if not mark:
        return None
    whole = Path(module.replace(".", "/"))
    places = (Path(module), whole.with_suffix(".py"), whole / "__init__.py") if module else ()
    return next((place for place in places if place.is_file()), None)


def _links_of(source: str) -> list[str]:
    """The links in a folder: in the cache of Hugging Face, all weights are links."""
    if not os.path.isdir(source):
        return []
    with os.scandir(source) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and os.path.exists(entry.path)]


def _relation(output: str, source: str) -> str:
    if _is_inside(output, source):
        return "is the same as" if _is_inside(source, output) else "lies inside of"
    return "lies around" if _is_inside(source, output) else ""


def _is_inside(path: str, holder: str) -> bool:
    """Whether `path` is `holder` or below it: links are followed, and existing files are compared by identity."""
    if not os.path.exists(holder):
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(holder))
    real = Path(os.path.realpath(path))
    return any(os.path.exists(place) and os.path.samefile(place, holder) for place in (real, *real.parents))


def _standing(path: Path) -> Path:
    """The path itself, or the nearest existing folder above it."""
    whole = path.absolute()
    return next((place for place in (whole, *whole.parents) if place.is_dir()), whole)
