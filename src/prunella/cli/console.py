"""Terminal output of the verbs: results to stdout, progress and errors to stderr, errors as exit codes.

All output passes `printable`, because names and messages may come from files, and from code of the user.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, ParamSpec

import typer

from prunella.errors import OutOfResources, PruningError, out_of_resources, printable, system_error
from prunella.measure.clock import now, since

P = ParamSpec("P")
DONE, MISSED, MISUSE, BAD_INPUT, RESOURCES, UNSUPPORTED, INTERRUPTED, BUG = 0, 1, 2, 3, 5, 6, 7, 70


def debugging() -> bool:
    """Whether the user asked for tracebacks: `--debug` or PRUNELLA_DEBUG=1."""
    return os.environ.get("PRUNELLA_DEBUG", "") not in ("", "0")


@dataclass(frozen=True)
class Trouble:
    """An error in the form shown to the user."""

    what: str
    why: str
    todo: str
    code: int
    frames: tuple[str, ...] = ()
    """Functions of the user that were running, the innermost first."""


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split())[:400])


def explain_error(error: BaseException, options: Collection[str] = ()) -> Trouble:
    """The message for an error, and the exit code. options: the parameters of the verb, which the error may name."""
    if isinstance(error, PruningError):
        full = _resources_behind(error)
        if full is not None and error.exit_code != RESOURCES:
            # The failed step says what it was doing; the full disk or memory is the reason.
            return Trouble(_one_line(error.what), _one_line(f"{full.what}: {full.why}"), full.todo, RESOURCES)
        what, why, todo = (_one_line(as_typed(text, options)) for text in (error.what, error.why, error.todo))
        theirs = _is_raised_by_user(error)
        frames = _frames_of(error if theirs else error.__cause__)
        if frames and frames[0] not in why:
            why = f"{why} ({frames[0]})".lstrip()
        return Trouble(what, why, todo, _code_of(error, theirs), frames)
    if isinstance(error, KeyboardInterrupt):
        return Trouble("interrupted", "", "nothing was left half written; start it again", INTERRUPTED)
    if full := out_of_resources(error):
        return explain_error(full)
    if _of_user(error):
        from prunella.model.user_code import user_error

        frames = _frames_of(error)
        typed = user_error(error, "your code failed" if frames else "the model failed on what it was given")
        return Trouble(typed.what, _one_line(typed.why), typed.todo, typed.exit_code, frames)
    if isinstance(error, OSError):
        what = f"the system refuses {error.filename or 'a file'}"
        return explain_error(system_error(error, what, "check the path and its permissions"))
    why = f"{type(error).__name__}: {_one_line(error)}"
    return Trouble("this is a bug in prunella", why, "run it again with --debug and report the traceback", BUG)


def _code_of(error: PruningError, theirs: bool) -> int:
    """The exit code; an error raised by the user's own code is neither a missed target nor a bug, whatever its type."""
    return error.exit_code if not theirs or error.exit_code in (MISUSE, RESOURCES, INTERRUPTED) else BAD_INPUT


def _is_raised_by_user(error: BaseException) -> bool:
    """Whether a line of the user's code raised an error, possibly one of prunella's own types."""
    if "torch" not in sys.modules:
        return False
    from prunella.model.user_code import raised_in_user_file

    return raised_in_user_file(error)


def _of_user(error: BaseException) -> bool:
    """Whether the user's code raised the error. If torch is not imported, no code of the user has run."""
    if "torch" not in sys.modules:
        return False
    from prunella.model.user_code import raised_by_user

    return raised_by_user(error)


def _frames_of(error: BaseException | None) -> tuple[str, ...]:
    """The user's own functions that were running, the innermost first."""
    if error is None or "torch" not in sys.modules:
        return ()
    from prunella.model.user_code import user_frames

    return tuple(_one_line(frame) for frame in user_frames(error)[:_SHOWN_FRAMES])


_SHOWN_FRAMES = 8


def _resources_behind(error: BaseException) -> OutOfResources | None:
    """The exhausted resource, if it is the cause of an error, or the cause of its cause."""
    causes = list[BaseException]()
    while (cause := error.__cause__) is not None and cause not in causes:  # causes can be circular
        if shortage := out_of_resources(cause):
            return shortage
        causes.append(cause)
        error = cause
    return None


def as_typed(text: str, options: Collection[str]) -> str:
    """A message of the library in terms of the command line: `pass data=` becomes `pass --data` if the verb has it."""
    known = {name: name for name in options if name not in _ARGUMENTS or name in _SHOWN_ARGUMENTS}
    known |= {theirs: name for theirs, name in _OTHER_NAMES.items() if theirs not in options and name in options}
    names = "|".join(sorted(known, key=len, reverse=True))
    if not names:
        return text
    value = r"lambda .*|'[^']*'|\[[^\]]*\]|\w+\([\w.]*\)|[-+]?[\w.]+(?![\w(\[{'\"=])"
    keyword = re.compile(rf"(?<![\w.=-])({names})=(?:({value})|(?=[\s,;:.)`]|$))")
    return _TWICE.sub(r"\1", keyword.sub(lambda match: _option(known[match[1]], match[2] or ""), text))


_ARGUMENTS = {"model", "file", "folder", "make", "name", "kind"}
"""Parameters that are positional arguments of the command line."""
_SHOWN_ARGUMENTS = {"model", "make"}
_OTHER_NAMES = {"evaluate": "metric"}
"""Parameters of the library -> options with another name."""
_TWICE = re.compile(r"(--[\w-]+)(?: \(\1\)|, \1)(?![\w-])")
"""An option named twice, as in `overwrite=True (--overwrite)` of the library; it is shown once."""


def _option(name: str, value: str) -> str:
    """`--skip a --skip b` for `skip=['a', 'b']`, `--target macs=0.5` for `target=MACs(0.5)`."""
    if name in _ARGUMENTS:
        return name.upper() if value in ("", "True") else f"{name.upper()} {value}"
    option = f"--{name.replace('_', '-')}"
    if value.startswith("lambda "):
        return f"{option} module:function"
    value = value.strip("'")
    if value.startswith("["):
        return " ".join(f"{option} {item.strip(chr(39) + chr(34) + ' ')}" for item in value[1:-1].split(","))
    kind, _, number = value.rstrip(")").partition("(")
    if value.endswith(")"):
        return f"{option} {kind.lower()}" + (f"={number}" if number else "")
    return option if value in ("", "True") else f"{option} {value}"


def report_error(error: BaseException, options: Mapping[str, object]) -> int:
    """Report an error on stderr, and as JSON on stdout if requested; returns the exit code."""
    trouble, as_json = explain_error(error, options), bool(options.get("as_json"))
    if debugging():
        _tell("".join(traceback.format_exception(error)).rstrip())
    called = (f"called from {frame}" for frame in trouble.frames[1:])
    _tell("\n".join([f"prunella: {trouble.what}", *(f"  {p}" for p in (trouble.why, *called, trouble.todo) if p)]))
    _print_trouble(trouble, as_json=as_json)
    return trouble.code


def report_usage(message: str, shown: str, *, as_json: bool) -> int:
    """Report a usage error: the parser's text on stderr, and its message as JSON on stdout if requested."""
    _tell(shown)
    _print_trouble(Trouble(_one_line(message), "", "see --help", MISUSE), as_json=as_json)
    return MISUSE


def _print_trouble(trouble: Trouble, *, as_json: bool) -> None:
    try:
        if as_json:
            data = {"error": trouble.what, "why": trouble.why, "todo": trouble.todo, "exit": trouble.code}
            print(json.dumps({**data, "frames": list(trouble.frames)} if trouble.frames else data))
        sys.stdout.flush()
    except OSError:  # stdout is on the full disk, or closed: the exit code remains
        _drop(sys.stdout)


def _tell(text: str) -> None:
    """Write to stderr. If it is closed, the work continues."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _drop(stream: IO[str]) -> None:
    """Discard buffered output, so that Python reports no error at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_streams() -> None:
    """Give the process writable streams: one may be closed, or unable to encode some characters.

    Log records without a handler of the user are made printable too.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableFormatter())


class _PrintableFormatter(logging.Formatter):
    """Formats the message of a record without control sequences for the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record, with its traceback if it has one."""
        return printable(super().format(record))


def terminal_width() -> int | None:
    """Columns of the terminal that shows stdout; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, a reader that closes the pipe early, such as `head` or `less`, causes no error."""
    try:
        yield
    except BrokenPipeError:
        _drop(sys.stdout)


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """The verb with errors turned into a short message and an exit code, never a traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with reader_may_leave():
                function(*args, **kwargs)
                sys.stdout.flush()
        except typer.Exit:
            raise
        except BaseException as error:
            if isinstance(error, SystemExit) and not _is_raised_by_user(error):
                raise
            raise typer.Exit(report_error(error, kwargs)) from None

    return run


def emit(value: Mapping[str, Any] | Sequence[Any], text: str, *, as_json: bool) -> None:
    """The result of a verb: JSON, or text for people."""
    if as_json:
        from prunella.io.json import plain  # lazy: the parser does not need it

        text = _NOT_SHOWN.sub(_json_escape, json.dumps(plain(value), indent=2, ensure_ascii=False))
    print(text if as_json else printable(text))


_NOT_SHOWN = re.compile("[^\n -~]")


def _json_escape(match: re.Match[str]) -> str:
    """The character itself if it is printable, otherwise its JSON escape in ASCII."""
    character = match[0]
    if character.isprintable():
        return character
    return json.dumps(character)[1:-1] if ord(character) != 0x7F else "\\u007f"


def note(text: str) -> None:
    """One line for people, on stderr."""
    _tell(f"prunella: {' '.join(text.splitlines())}")


@contextlib.contextmanager
def stage(text: str, parts: int = 1) -> Iterator[Callable[..., None]]:
    """A long step: prints a line with its seconds, and on a terminal shows a spinner or a bar while it runs.

    Yields the function to call after each of its parts.
    """
    start = now()
    with _shown(text, parts) as tick:
        yield tick
    note(f"{text} ({since(start):.1f} s)")


@contextlib.contextmanager
def _shown(text: str, parts: int) -> Iterator[Callable[..., None]]:
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = (BarColumn(24), MofNCompleteColumn()) if parts > 1 else ()
    shown = TextColumn("{task.description}", markup=False)  # [brackets] in a file name are not markup
    columns = SpinnerColumn(), shown, *bar, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(text), total=parts)
        yield lambda *_: progress.advance(task)
