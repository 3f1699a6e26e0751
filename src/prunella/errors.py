"""The errors of prunella, each with what was asked, what was found and what to do.

PruningError                        exit code of the command line
|-- RequestError (ValueError)       2   the request makes no sense: unknown method, pattern that matches nothing
|-- MissingExtra (ImportError)      2   an optional package is needed
|-- TargetMissed                    1   a target cannot be met; says how far it got and what stopped it
|-- CheckFailed                     1   a check of the result failed: the result is not written
|-- BadInput (ValueError)           3   a file or a model is broken, or not to be trusted
|-- NotSupported                    6   this model or operation cannot be pruned exactly; says where and why
`-- Interrupted                     7   stopped on purpose; the run can be resumed
"""

from __future__ import annotations


class PruningError(Exception):
    """Base of all errors: `what` happened, `why`, and what `todo`."""

    exit_code = 70

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        self.what, self.why, self.todo = what, why, todo
        super().__init__("\n".join(part for part in (what, why, todo) if part))


class RequestError(PruningError, ValueError):
    """The request makes no sense."""

    exit_code = 2


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
    """A file or a model is broken or not to be trusted."""

    exit_code = 3


class NotSupported(PruningError):
    """This cannot be done exactly, or not on this machine."""

    exit_code = 6


class Interrupted(PruningError):
    """Stopped on purpose; can be resumed."""

    exit_code = 7
