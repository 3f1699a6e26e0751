"""The errors of prunella. Each says what happened, why, and what to do.

PruningError                        exit code of the command line
|-- RequestError (ValueError)       2   the request is not valid: unknown method, pattern that matches nothing
|   `-- Locked                      2   another run is writing to the same folder
|-- MissingExtra (ImportError)      2   an optional package is needed
|-- TargetMissed                    1   a target cannot be met; the message names the limit and its cause
|-- CheckFailed                     1   a check of the result failed: the result is not written
|-- BadInput (ValueError)           3   a file or a model is broken or not trusted
|-- OutOfResources                  5   the disk or the memory is full
|-- NotSupported                    6   this model or operation cannot be pruned exactly; the message says where and why
`-- Interrupted                     7   stopped on purpose; the run can be resumed

`system_error` maps errors of the operating system to these errors: a full disk is always `OutOfResources`.
"""

from __future__ import annotations

import difflib
import errno
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

_FULL = frozenset((errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)))
ACCELERATOR_FULL = ("CUDA out of memory", "HIP out of memory", "XPU out of memory", "MPS backend out of memory")
"""Messages of accelerators without free memory; torch has a type of error for most of them, `OutOfMemoryError`."""
_MEMORY = ("can't allocate memory",)
_SYSTEM = re.compile(r"\(os error (\d+)\)")
_SHORT_WRITE = ("unexpected pos", "database or disk is full")
"""Messages of torch's archive writer and of SQLite after an incomplete write."""


def printable(text: str) -> str:
    """The text with escapes for characters that a terminal would interpret, since names may come from files.

    Escape, carriage return, direction marks, half characters and all other unprintable characters become `\\x1b`,
    `\\r`, `\\u202e`. Line ends are kept.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return "    " if character == "\t" else character.encode("unicode_escape").decode()


def near_names(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`did you mean magnitude or magnitude_global?`, of the nearest known names; empty if none is near."""
    names = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), list(names), 3, cutoff)
    return f"did you mean {' or '.join(names[entry] for entry in near)}?" if near else ""


class PruningError(Exception):
    """Base of all errors: `what` happened, `why`, and what `todo`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> try:
        ...     pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.001))
        ... except pr.PruningError as error:
        ...     print(error.what)
        macs=0.001 cannot be met: removing all prunable units leaves macs=0.0625 (24 of 384, asked 0.384)
    """

    exit_code = 70

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        self.what, self.why, self.todo = printable(what), printable(why), printable(todo)
        super().__init__("\n".join(part for part in (self.what, self.why, self.todo) if part))


class RequestError(PruningError, ValueError):
    """The request is not valid."""

    exit_code = 2


class Locked(RequestError):
    """Another run is writing to the same folder or file."""


class MissingExtra(PruningError, ImportError):
    """An optional package is needed."""

    exit_code = 2


class TargetMissed(PruningError):
    """A target cannot be met."""

    exit_code = 1


class CheckFailed(PruningError):
    """A check of the result failed."""

    exit_code = 1


class BadInput(PruningError, ValueError):
    """A file or a model is broken or not trusted."""

    exit_code = 3


class OutOfResources(PruningError):
    """The disk or the memory is full."""

    exit_code = 5


class NotSupported(PruningError):
    """An operation that cannot be done exactly, or not on this machine."""

    exit_code = 6


class Interrupted(PruningError):
    """The run was stopped on purpose and can be resumed."""

    exit_code = 7


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def out_of_resources(error: BaseException) -> OutOfResources | None:
    """The error for a full disk, a quota, a file size limit, or too little memory; None for any other error.

    safetensors, torch and SQLite wrap the system's error in their own types. Such errors are recognized by their text.
    """
    if isinstance(error, OutOfResources):
        return error
    text, number = str(error), error_number(error)
    if number in _FULL or (not isinstance(error, OSError) and any(part in text for part in _SHORT_WRITE)):
        return OutOfResources("the disk is full", text, "free some space, or write elsewhere")
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in ACCELERATOR_FULL):
        return OutOfResources("out of memory", text, "use smaller batches, or leave --device out and run on the CPU")
    short = isinstance(error, MemoryError) or number == errno.ENOMEM
    if short or any(part in text for part in _MEMORY):
        return OutOfResources("out of memory", text, "use a smaller example (--inputs) or a smaller model")
    return None


def error_number(error: BaseException) -> int | None:
    """The error number of the operating system. Libraries in Rust write this number into their message."""
    if isinstance(error, OSError):
        return error.errno
    match = _SYSTEM.search(str(error))
    return int(match[1]) if match else None


def system_error(error: BaseException, what: str, todo: str, *, kind: type[PruningError] = BadInput) -> PruningError:
    """The typed error for an error of the system: `OutOfResources` if disk or memory is full, else `kind`.

    `what` names the file, as in "cannot write x.plan". The reason is the message of the system.
    """
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    full = out_of_resources(error)
    return OutOfResources(what, f"{full.what}: {reason}", full.todo) if full else kind(what, reason, todo)


# -- names that do not exist ------------------------------------------------------------------------------------------


class MissingName(AttributeError):
    """A name that a namespace of prunella does not have; its text suggests similar names.

    The text is made on display: `hasattr` and imports of submodules also ask for names that do not exist.
    """

    def __init__(self, namespace: str, name: str) -> None:
        super().__init__(f"No {namespace} attribute {name}")
        self.namespace, self.missing = namespace, name

    def __str__(self) -> str:
        text = super().__str__()
        hint = "" if self.missing.startswith("_") else suggestion(self.namespace, self.missing)
        return f"{text}; {hint}" if hint else text


MissingName.__module__ = "builtins"  # as a traceback shows it
MissingName.__name__ = MissingName.__qualname__ = "AttributeError"


def suggesting(namespace: str, lazy: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a namespace: `lazy` first, then an error that suggests similar names."""

    def get(name: str) -> Any:
        try:
            if lazy is not None:
                return lazy(name)
        except AttributeError as error:
            if not str(error).startswith(f"No {namespace} attribute {name}"):
                raise
        raise MissingName(namespace, name)

    return get


def suggestion(namespace: str, name: str) -> str:
    """The full name of a name in another namespace, or a similar name; empty if there is none."""
    spaces = _namespaces()
    full = {other: space for space, names in spaces.items() for other in names if space != "prunella"}
    full |= dict.fromkeys(spaces["prunella"], "prunella")
    if name in full:
        return f"it is {full[name]}.{name}"
    own = spaces.get("prunella" if namespace == "prunella" else f"prunella.{namespace.rpartition('.')[2]}", ())
    near = difflib.get_close_matches(name, own, 1, 0.75)
    if near:
        return f"did you mean {near[0]!r}?"
    near = difflib.get_close_matches(name, full, 1, 0.75)
    return f"did you mean {full[near[0]]}.{near[0]}?" if near else ""


@cache
def _namespaces() -> dict[str, tuple[str, ...]]:
    """The names of each namespace, read from its source: nothing is imported."""
    import ast
    from pathlib import Path

    def parsed(file: Path) -> ast.Module:
        return ast.parse(file.read_text(encoding="utf-8"))

    def listed(tree: ast.Module) -> tuple[str, ...]:
        for node in tree.body:
            if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]:
                return tuple(ast.literal_eval(node.value)) if isinstance(node.value, ast.List) else ()
        defined = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        return tuple(name for name in defined if not name.startswith("_"))

    root = Path(__file__).parent
    face = parsed(root / "__init__.pyi")
    spaces = {"prunella": listed(face)}
    for node in face.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            place = root.joinpath(*(node.module or ".").split("."), alias.name)
            files = (place / "__init__.pyi", place / "__init__.py", place.with_suffix(".py"))
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                spaces[f"prunella.{alias.name}"] = listed(parsed(file))
    return spaces
