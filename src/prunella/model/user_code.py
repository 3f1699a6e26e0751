"""Errors and results of the user's code: the frames of the user's functions, and checks of returned values."""

from __future__ import annotations

import functools
import linecache
import math
import opcode
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunella.errors import BadInput, PruningError, RequestError, one_line, out_of_resources

_OWN = f"{Path(__file__).parents[1]}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_INSTALLED = tuple({f"{sysconfig.get_paths()[key]}{os.sep}" for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_STANDARD = tuple({f"{sysconfig.get_paths()[key]}{os.sep}" for key in ("stdlib", "platstdlib")})
_RAISES = frozenset(opcode.opmap[name] for name in ("RAISE_VARARGS", "RERAISE") if name in opcode.opmap)
_CALLS_OF_OTHERS = (f"nn{os.sep}modules{os.sep}module.py", f"utils{os.sep}data{os.sep}")
"""Files of torch that run a module or a dataset: functions that they call count as the user's, wherever installed."""
_PASS_ON = frozenset({"__torch_function__", "__torch_dispatch__", "<lambda>"})
"""Functions of prunella that pass a call on unchanged: an error raised through them comes from that call."""
_WRITTEN = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)')


@dataclass(frozen=True)
class Frame:
    """A running function: its file, line and name."""

    file: str
    line: int
    function: str

    @property
    def own(self) -> bool:
        """Whether it is a function of prunella."""
        return self.file.startswith(_OWN)

    @property
    def of_user(self) -> bool:
        """Whether it is in a file of the user: neither of prunella, nor of Python, nor of an installed package."""
        return not self.own and not self.file.startswith(("<", *_INSTALLED)) and "site-packages" not in self.file

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        path = os.path.relpath(self.file)
        name = short(self.file) if path.startswith(os.pardir) or not self.of_user else path
        return f"{name}:{self.line}, in {self.function}" + (f": {source[:120]}" if source else "")


def short(path: str) -> str:
    """A short path: from the package on, or the last two parts."""
    parts = Path(path).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])


def user_frames(error: BaseException) -> tuple[Frame, ...]:
    """The user's own frames of an error or of its causes, the innermost first; also those of another process."""
    own = tuple(frame for frame in _frames(error) if frame.of_user)
    cause = error.__cause__
    return own[::-1] or (user_frames(cause) if cause is not None else ())


def raised_by_user(error: BaseException, *, at_boundary: bool = False) -> bool:
    """Whether code of the user raised an error: their function, dataset or model, called by prunella.

    at_boundary: the caller has just called a function of the user, so that all code except prunella's is the user's.
    """
    if isinstance(error.__cause__, StopIteration):  # of a generator: Python raises another error in its place
        error = error.__cause__
    frames = list(_frames(error))
    last = max((k for k, frame in enumerate(frames) if frame.own and frame.function not in _PASS_ON), default=-1)
    inner = frames[last + 1 :]
    called = any(frame.of_user or _calls_others(frame) for frame in inner)
    return called or (at_boundary and last <= 0)


def raised_in_user_file(error: BaseException) -> bool:
    """Whether the line that raised an error is the user's own, whatever the type of the error."""
    frames = list(_frames(error))
    return bool(frames) and frames[-1].of_user


def advice_on(error: BaseException, otherwise: str) -> str:
    """What to do about an error of a model. otherwise: if an operation failed, for example on a wrong shape.

    If a `raise` or an `assert` of the model's own code made the error, its words count: advice on shapes is false.
    """
    return (
        "the model's own code refuses there: give it what it asks for, or change it" if own_check(error) else otherwise
    )


def own_check(error: BaseException) -> Frame | None:
    """The function whose `raise` or `assert` made an error; None for an operation that failed, and inside torch."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or step.tb_frame.f_code.co_code[step.tb_lasti] not in _RAISES:
        return None
    code = step.tb_frame.f_code
    frame = Frame(code.co_filename, step.tb_lineno, code.co_name)
    standard = frame.file.startswith(_STANDARD) and "site-packages" not in frame.file
    return None if frame.own or standard or frame.file.startswith(_TORCH) else frame


def told(error: BaseException) -> str:
    """The type of an error, the first line of its message and the innermost line of the user's code."""
    frame = own_check(error) or next(iter(user_frames(error)), None)
    return f"{one_line(error)} ({frame})" if frame else one_line(error)


def user_error(error: BaseException, what: str) -> PruningError:
    """The typed error for an error of the user's code, with the line that raised it."""
    frames = user_frames(error) or tuple(_frames(error))[::-1]
    place = next((frame for frame in frames if not frame.own and not frame.file.startswith(_TORCH)), None)
    why = " ".join(f"{type(error).__name__}: {_text(error)}".partition("Original Traceback")[0].split())
    todo = "fix it there; --debug shows the full traceback"
    return out_of_resources(error) or BadInput(what, f"{why} ({place})" if place else why, todo)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a class of the user's own may fail even there
        return "it has no text"


def call_user(function: Callable[..., Any], spec: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user; its errors are reported as the user's, with the line. Errors of prunella pass."""
    try:
        return function(*args, **kwargs)
    except PruningError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and not args and not kwargs and _not_entered(error):
            todo = "give a function that takes no arguments, and passes them on itself"
            raise BadInput(f"{spec} cannot be called", one_line(error), todo) from error
        if raised_by_user(error, at_boundary=True):
            raise user_error(error, f"{spec} failed") from error
        raise


def _not_entered(error: BaseException) -> bool:
    """Whether a call failed before the function ran, since its arguments do not fit; the first frame is the caller."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None


def as_user_function(function: Callable[..., Any], spec: str) -> Callable[..., Any]:
    """The function, called by `call_user`; its contents in an identity are those of the function itself."""
    return functools.wraps(function)(functools.partial(call_user, function, spec))


def number_of(value: Any, what: str) -> float:
    """A number that a function of the user returned. Errors: RequestError for anything else, also for a truth value."""
    cause: Exception | None = None
    if not isinstance(value, str | bytes | bool | complex) and _type_of(value) not in ("bool", "complex"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            cause = error
    raise RequestError(f"{what} must return one number", f"it returned {_named(value)}", _NUMBER) from cause


_NUMBER = "return a float, higher is better"


def _type_of(value: Any) -> str:
    """`bool`, `complex` or another word for the type of a tensor or an array; empty for other values."""
    name = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return "complex" if name.startswith("complex") else name


def _named(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str | bytes):
        return f"the text {value[:40]!r}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a {type(value).__name__} of {_type_of(value)} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def quality_of(value: Any, what: str, of: str, *, dense: bool) -> float:
    """The quality that a function of the user returned for a model. of: describes the model.

    Errors: RequestError for anything but a number, BadInput for NaN and for infinity. A cut model may be infinitely
    bad; the dense one may not.
    """
    number = number_of(value, what)
    if math.isnan(number) or number == math.inf or (dense and math.isinf(number)):
        why = f"it gave {'NaN' if math.isnan(number) else number} for {of}"
        raise BadInput("the evaluation is not a number", why, "return a number for every model; higher is better")
    return number


def _frames(error: BaseException) -> Iterator[Frame]:
    """The frames from the outermost on; after them those that the error quotes from another process."""
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        yield Frame(code.co_filename, step.tb_lineno, code.co_name)
        step = step.tb_next
    quoted = [_text(error)] if "Original Traceback" in _text(error) else []
    if type(error.__cause__).__name__ == "_RemoteTraceback":
        quoted.append(str(error.__cause__))
    for text in quoted:
        yield from (Frame(file, int(line), name) for file, line, name in _WRITTEN.findall(text))


def _calls_others(frame: Frame) -> bool:
    return frame.file.startswith(_TORCH) and frame.file.removeprefix(_TORCH).startswith(_CALLS_OF_OTHERS)
