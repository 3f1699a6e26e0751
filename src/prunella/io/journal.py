"""The finished work of a run, on disk: SQLite records from which a killed run resumes, never truncated or deleted.

A file `journal.sqlite`. A record is `(identity, key) -> JSON`; of two with the same key the later one counts. A
record is on the disk (`synchronous=FULL`) before `add` returns. Each carries a digest over itself and the record before
it, and the head stores their number and the last digest, so that a changed byte or a missing record is detected. A file
that cannot be read is an error, and is not changed. One process at a time has a journal open: see `io/lock.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from prunella.errors import BadInput, PruningError, RequestError, system_error
from prunella.io.files import flush, write_atomic, writing
from prunella.io.identity import Identity
from prunella.io.json import decode
from prunella.io.lock import locked
from prunella.io.temporary import discard, temporary_file

NAME = "journal.sqlite"
APPLICATION, FORMAT = 0x5052554E, 3
"""`PRUN`; format 1 were the text files of prunella 0.1, and 2, which had no head, is given one."""
FORMER = ("journal.jsonl", "journal.json", "ticket.json", "cells")
"""Names of the journals of prunella 0.1."""

Payload = Mapping[str, Any]
"""Plain data: texts, numbers, lists and mappings with text keys."""

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
CREATE TABLE identities (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, parts TEXT NOT NULL) STRICT;
CREATE TABLE records (
    number INTEGER PRIMARY KEY, identity TEXT NOT NULL, key TEXT NOT NULL, payload TEXT NOT NULL, chain TEXT NOT NULL
) STRICT;
"""
_HEAD = """
CREATE TABLE head (records INTEGER NOT NULL, identities TEXT NOT NULL, chain TEXT NOT NULL) STRICT;
INSERT INTO head VALUES (0, '', '');
"""
_ROOM = 1 << 16
_MAGIC = b"SQLite format 3\0"
_OURS = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
         sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN}  # fmt: skip
"""Errors of the disk or its permissions; all others are errors of the file."""
_WRITES = {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC,
           sqlite3.SQLITE_IOERR_TRUNCATE}  # fmt: skip
"""SQLite hides the number of the system error, which may be the limit on file sizes."""
_NO_ROOM = "the limit on file sizes (ulimit -f) allows no more bytes of it"


class Journal:
    """An open journal: all its records in memory, new ones on the disk. Made by `open_journal`."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path, self._database = path, database
        self.identities: dict[str, Identity] = {}
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._chain, self._count = "", 0
        with _told(path):
            form = _check_format(path, database)
            self._read()
            if form == FORMAT:
                self._check_head()
            else:
                self._add_head()
            database.execute("PRAGMA journal_mode = WAL")  # stays what it was where the file system has no such memory
            database.execute("PRAGMA wal_autocheckpoint = 1")  # then only the last record may be outside the file
            database.execute("PRAGMA synchronous = FULL")

    def known(self, identity: Identity, key: str) -> dict[str, Any] | None:
        """The last payload recorded under this key, None if there is none."""
        return self._known.get((identity.digest, key))

    def keys(self, identity: Identity) -> list[str]:
        """The keys of one identity, in the order in which they were first recorded."""
        return [key for digest, key in self._known if digest == identity.digest]

    def add(self, identity: Identity, key: str, payload: Payload) -> None:
        """Record a payload; it is on the disk when this returns. Errors: RequestError for what is not plain data."""
        text = _encoded(key, payload)
        chain = _link(self._chain, identity.digest, key, text)
        with self._transaction() as database:
            self._insert_identity(identity)
            row = (identity.digest, key, text, chain)
            database.execute("INSERT INTO records (identity, key, payload, chain) VALUES (?, ?, ?, ?)", row)
            self._write_head(self._count + 1, chain, {**self.identities, identity.digest: identity})
        self.identities[identity.digest] = identity
        self._chain, self._count = chain, self._count + 1
        self._known[identity.digest, key] = _decoded(decode(text))

    def introduce(self, identity: Identity) -> None:
        """Record the parts of an identity, so that a later refusal can name the differences."""
        if identity.digest not in self.identities:
            with self._transaction():
                self._insert_identity(identity)
                self._write_head(self._count, self._chain, {**self.identities, identity.digest: identity})
            self.identities[identity.digest] = identity

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: the changes of the block reach the disk together, or not at all."""
        with _told(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _insert_identity(self, identity: Identity) -> None:
        if identity.digest not in self.identities:
            row = (identity.digest, json.dumps(dict(identity.parts)))
            self._database.execute("INSERT INTO identities (digest, parts) VALUES (?, ?)", row)

    def _write_head(self, count: int, chain: str, identities: Mapping[str, Identity]) -> None:
        row = (count, _all_of(identities), chain)
        self._database.execute("UPDATE head SET records = ?, identities = ?, chain = ?", row)

    def _check_head(self) -> None:
        """Check that the head agrees with the records and identities. Errors: BadInput."""
        rows = self._database.execute("SELECT records, identities, chain FROM head").fetchall()
        if rows != [(self._count, _all_of(self.identities), self._chain)]:
            raise _damaged(self.path, "its last records are not the ones that were written last")

    def _add_head(self) -> None:
        """Add the head, which a journal of format 2 does not have."""
        with self._transaction() as database:
            for statement in filter(str.strip, _HEAD.split(";")):
                database.execute(statement)
            self._write_head(self._count, self._chain, self.identities)
            database.execute(f"PRAGMA user_version = {FORMAT}")

    def _read(self) -> None:
        """Read and check all. Errors: BadInput."""
        for (said,) in self._database.execute("PRAGMA integrity_check"):
            if said != "ok":
                raise _damaged(self.path, str(said))
        for digest, parts in self._database.execute("SELECT digest, parts FROM identities ORDER BY number"):
            self.identities[digest] = _identity(self.path, digest, parts)
        rows = self._database.execute("SELECT number, identity, key, payload, chain FROM records ORDER BY number")
        for place, (number, digest, key, text, chain) in enumerate(rows, 1):
            self._chain = _link(self._chain, digest, key, text)
            if number != place or chain != self._chain or digest not in self.identities:
                raise _damaged(self.path, f"record {place} is not the one that was written")
            self._known[digest, key] = _decoded(decode(text))
            self._count = place


class Records:
    """The records of one identity; without a journal only in memory. Made by `open_records`."""

    def __init__(self, journal: Journal | None, identity: Identity | None) -> None:
        self._journal, self._identity = journal, identity
        self._known: dict[str, dict[str, Any]] = {}
        self.added = 0
        """The number of records of this process."""
        if journal is not None and identity is not None:
            self._known = {key: journal.known(identity, key) or {} for key in journal.keys(identity)}

    @property
    def kept(self) -> bool:
        """Whether the records are on the disk."""
        return self._journal is not None

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def add(self, key: str, payload: Payload) -> None:
        """Record a payload; with a journal it is on the disk when this returns."""
        if self._journal is not None and self._identity is not None:
            self._journal.add(self._identity, key, payload)
        self._known[key] = _decoded(decode(_encoded(key, payload)))
        self.added += 1

    def number(self, key: str, make: Callable[[], float]) -> float:
        """The recorded number of that key; if there is none, that of `make`, which is recorded with all digits."""
        if key not in self._known:
            self.add(key, {"value": float(make())})
        value = self._known[key].get("value")
        if not isinstance(value, float):
            raise BadInput(f"the record {key!r} is not a number", f"found {value!r}", "choose another folder")
        return value


@contextmanager
def open_journal(folder: str | os.PathLike[str]) -> Iterator[Journal]:
    """The journal of a folder, new or existing, locked while the block runs.

    Errors: Locked while another process has it; BadInput if it cannot be read; RequestError for one of prunella 0.1
    or if the folder is not writable.
    """
    path = Path(folder) / NAME
    with locked(path):
        _refuse_former(path.parent)
        if not path.exists():
            write_atomic(path, _create)
        with _told(path):
            database = sqlite3.connect(path, isolation_level=None)
        with closing(database):
            yield Journal(path, database)


@contextmanager
def open_records(folder: str | os.PathLike[str] | None, identify: Callable[[], Identity]) -> Iterator[Records]:
    """The records of the run in a folder; without a folder only in memory, and without an identity.

    Errors: RequestError, with the differences, if the folder holds a run of another identity; those of `open_journal`.
    """
    if folder is None:
        yield Records(None, None)
        return
    with open_journal(folder) as journal:
        identity = identify()
        check_same(journal, identity)
        journal.introduce(identity)
        yield Records(journal, identity)


def check_same(journal: Journal, identity: Identity) -> None:
    """Errors: RequestError, with the differences, unless the journal is empty or has this identity."""
    if not journal.identities or identity.digest in journal.identities:
        return
    last = list(journal.identities.values())[-1]
    why = f"it holds another run: {last.difference(identity)}"
    todo = f"repeat the earlier call unchanged, choose another folder, or remove {journal.path.parent} to start again"
    raise RequestError(f"{journal.path} is not continued", why, todo)


def _create(path: Path) -> None:
    """A journal without records, complete before it has its name: an empty file is a damaged one."""
    with _told(path), closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # a file without its final name needs no rollback
        database.executescript(f"BEGIN; {_SCHEMA} {_HEAD} COMMIT;")


def _check_format(path: Path, database: sqlite3.Connection) -> int:
    """2 or 3. Errors: BadInput for any other file."""
    with path.open("rb") as file:  # SQLite takes a file of a few bytes for an empty database
        head = file.read(len(_MAGIC))
    if head != _MAGIC:
        raise _damaged(path, "it is cut short, or another program wrote it" if head else "it is empty")
    application, form = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application != APPLICATION:
        raise BadInput(f"{path} is not a journal of prunella", "another program wrote it", "choose another folder")
    if form > FORMAT:
        why = f"its format is {form}, and this version reads {FORMAT}"
        raise BadInput(f"{path} is of a newer prunella", why, "install that version, or choose another folder")
    has_head = bool(database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'head'").fetchone()[0])
    if form not in (2, FORMAT) or has_head != (form == FORMAT):
        raise _damaged(path, f"it says that its format is {form}, which there never was")
    if _objects(database) != _own_objects(int(form)):
        raise _damaged(path, "it holds other tables, or views and triggers, which run when they are read")
    return int(form)


def _objects(database: sqlite3.Connection) -> set[tuple[Any, ...]]:
    """The tables, views and triggers of a database, as they were declared."""
    database.execute("PRAGMA trusted_schema = OFF")
    return set(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 100"))


@cache
def _own_objects(form: int) -> set[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_SCHEMA + (_HEAD if form > 2 else ""))
        return _objects(database)


def _refuse_former(folder: Path) -> None:
    for name in FORMER:
        if (folder / name).exists():
            why = f"{name} was written by prunella 0.1, whose records do not state everything they depend on"
            raise RequestError(f"the run in {folder} is not continued", why, "choose another folder")


def _identity(path: Path, digest: str, text: str) -> Identity:
    parts = decode(text)
    if not isinstance(parts, dict) or Identity(parts).digest != digest:
        raise _damaged(path, "an identity is not the one that was written")
    return Identity(parts)


def _all_of(identities: Mapping[str, Identity]) -> str:
    return sha256("".join(identities).encode()).hexdigest() if identities else ""


def _link(before: str, identity: str, key: str, payload: str) -> str:
    return sha256(json.dumps([before, identity, key, payload]).encode()).hexdigest()


def _encoded(key: str, payload: Payload) -> str:
    try:
        return json.dumps(_plain(payload), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the record {key!r} cannot be written", str(error), "record plain data") from error


def _plain(value: Any) -> Any:
    """JSON has no infinities: they are written as `{"float": "inf"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys are texts")
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if list(value) == ["float"] and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Translate errors of SQLite, and of the data in it, to errors of prunella."""
    try:
        yield
    except sqlite3.Error as error:
        whole = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        code = whole & 0xFF
        if code == sqlite3.SQLITE_IOERR:  # SQLite hides the system's error number; a write to another file shows it
            _try_to_write(path)
        if whole in _WRITES and _at_limit(path):
            raise system_error(OSError(errno.EFBIG, _NO_ROOM), f"cannot write {path}", "") from error
        if code in _OURS:
            todo = "check the disk and its permissions"
            raise system_error(error, f"cannot write {path}", todo, kind=RequestError) from error
        raise _damaged(path, str(error)) from error
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        if isinstance(error, PruningError):
            raise
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _try_to_write(path: Path) -> None:
    """Write the size of a record to a file next to the journal. Errors: OutOfResources if there is no room."""
    with writing(path, needed=_ROOM):
        trial = temporary_file(path)
        try:
            trial.write_bytes(bytes(_ROOM))
            flush(trial)
        finally:
            discard(trial)


def _at_limit(path: Path) -> bool:
    """Whether the limit on file sizes leaves no room for a record in this file."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return False
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    files = [path, path.with_name(f"{path.name}-wal")]
    largest = max((file.stat().st_size for file in files if file.exists()), default=0)
    return limit != resource.RLIM_INFINITY and largest + _ROOM > limit


def _damaged(path: Path, why: str) -> BadInput:
    todo = "restore it from a copy, or choose another folder; nothing was changed in it"
    return BadInput(f"{path} is damaged", " ".join(why.split())[:200], todo)
