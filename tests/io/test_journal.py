"""The journal: what was recorded comes back after a kill, and what cannot be read is refused and left as it is."""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from prunella.errors import BadInput, Locked, OutOfResources, PruningError, RequestError
from prunella.io import journal
from prunella.io.identity import Identity
from prunella.io.journal import FORMAT, FORMER, NAME, open_journal, open_records
from tests.stopping import records

ASKED = Identity({"weights": "sha256:ab", "seed": "0"})


def values(folder: Path) -> dict[str, object]:
    """What the journal of a folder says."""
    with open_records(folder, lambda: ASKED) as known:
        return {key: known[key] for key in known}


def written(folder: Path, count: int = 20) -> bytes:
    """The bytes of a journal with some records."""
    with open_records(folder, lambda: ASKED) as known:
        for k in range(count):
            known.add(f"key {k}", {"value": k / 3, "name": "x" * k})
    return (folder / NAME).read_bytes()


def put(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_bytes(content)
    return folder


def test_records_come_back_as_they_were_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    plain = {"a": [1, 0.1, True, None, "ü\ud7ff", {"b": [math.inf, -math.inf]}], "float": "inf", "small": 5e-324}
    with open_records(tmp_path, lambda: ASKED) as known:
        known.add("one", {"value": 1})
        known.add("two", plain)
        known.add("one", {"value": (2.0, 3)})
        assert known.added == 3 and known["one"] == {"value": [2.0, 3]} and "three" not in known
        here = {key: known[key] for key in known}
    assert values(tmp_path) == here and list(here) == ["one", "two"] and here["two"] == plain
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAME]
    with open_records(tmp_path, lambda: ASKED) as known:
        known.add("nan", {"value": math.nan})
    assert math.isnan(values(tmp_path)["nan"]["value"])  # type: ignore[index]


def test_a_number_is_made_once_and_without_a_folder_nothing_is_identified() -> None:
    def never() -> Identity:
        pytest.fail("an identity takes time, and nobody asks for it")

    with open_records(None, never) as known:
        assert [known.number("a", lambda: 1 / 3), known.number("a", lambda: 0.0)] == [1 / 3, 1 / 3] and known.added == 1
        known.add("text", {"value": "x"})
        with pytest.raises(BadInput, match="is not a number"):
            known.number("text", lambda: 0.0)


def test_what_is_no_plain_data_is_refused_and_the_journal_stays_sound(tmp_path: Path) -> None:
    with open_records(tmp_path, lambda: ASKED) as known:
        for payload in ({"a": {1: 2}}, {"a": object()}, {"a": b"x"}, {"a": {1, 2}}):
            with pytest.raises(RequestError, match="cannot be written"):
                known.add("bad", payload)
        known.add("good", {"value": 1})
    assert values(tmp_path) == {"good": {"value": 1}}


def test_another_identity_is_refused_with_what_changed(tmp_path: Path) -> None:
    before = written(tmp_path)
    other = Identity({"weights": "sha256:cd", "seed": "1"})
    said = r"journal.sqlite is not continued\nit holds another run: its weights and seed changed \(seed: 0, now 1\)\n"
    with pytest.raises(RequestError, match=said), open_records(tmp_path, lambda: other):
        pytest.fail("the records of another run were given")
    assert (tmp_path / NAME).read_bytes() == before


def test_identities_live_beside_each_other_where_that_is_asked_for(tmp_path: Path) -> None:
    other = Identity({"seed": "1"})
    with open_journal(tmp_path) as journal:
        journal.add(ASKED, "cell", {"score": 0.5})
        journal.add(other, "cell", {"score": 0.25})
    with open_journal(tmp_path) as journal:
        assert journal.known(ASKED, "cell") == {"score": 0.5} and journal.known(other, "cell") == {"score": 0.25}
        assert journal.known(other, "no") is None and journal.keys(other) == ["cell"] and len(journal.identities) == 2


# -- files that cannot be read ---------------------------------------------------------------------------------------


def test_a_flipped_bit_changes_no_value_unseen_and_no_byte_is_mended(tmp_path: Path) -> None:
    sound, rng, refused = written(tmp_path / "sound"), random.Random(0), 0
    expected = values(tmp_path / "sound")
    places = [*range(100), *(rng.randrange(len(sound)) for _ in range(300))]
    for number, place in enumerate(places):
        content = bytearray(sound)
        content[place] ^= 1 << rng.randrange(8)
        folder = put(tmp_path / f"flipped-{number}", bytes(content))
        try:
            assert values(folder) == expected  # a bit that means nothing
        except BadInput as error:
            refused += 1
            assert str(folder / NAME) in error.what and error.todo
            assert (folder / NAME).read_bytes() == bytes(content)
    assert refused > 100


@pytest.mark.parametrize("part", [0, 1, 15, 16, 99, 100, 511, 512, 4095, 4096, 8192, -4096, -1])
def test_a_file_that_was_cut_short_is_damaged_and_stays(tmp_path: Path, part: int) -> None:
    content = written(tmp_path / "sound", 60)[:part]
    folder = put(tmp_path / "cut", content)
    with pytest.raises(BadInput, match=r"is damaged\n(.|\n)*restore it from a copy"):
        values(folder)
    assert (folder / NAME).read_bytes() == content


def test_files_of_others_and_of_a_newer_version_are_told_apart(tmp_path: Path) -> None:
    folder = put(tmp_path / "text", b"not a database, but longer than the head of one would be" * 20)
    with pytest.raises(BadInput, match="is damaged\nit is cut short, or another program wrote it"):
        values(folder)
    (tmp_path / "foreign").mkdir()
    with closing(sqlite3.connect(tmp_path / "foreign" / NAME)) as database:
        database.execute("CREATE TABLE records (a)")
    with pytest.raises(BadInput, match="is not a journal of prunella"):
        values(tmp_path / "foreign")
    for form, said in ((FORMAT + 1, f"newer prunella\nits format is {FORMAT + 1}, and this"), (0, "there never was")):
        written(tmp_path / f"form-{form}")
        with closing(sqlite3.connect(tmp_path / f"form-{form}" / NAME)) as database:
            database.execute(f"PRAGMA user_version = {form}")
        with pytest.raises(BadInput, match=said):
            values(tmp_path / f"form-{form}")
    (tmp_path / "folder" / NAME).mkdir(parents=True)
    with pytest.raises(PruningError):
        values(tmp_path / "folder")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE number = 3",
        "DELETE FROM records WHERE number > 15",
        "DELETE FROM records",
        "INSERT INTO identities (digest, parts) VALUES ('x', '{}')",
        "UPDATE head SET records = 19",
        "DELETE FROM head",
        "DROP TABLE head",
        "UPDATE records SET payload = '{\"value\": 7}' WHERE number = 3",
        "UPDATE records SET number = 30 WHERE number = 20",
        "UPDATE records SET key = 'key 5' WHERE number = 3",
        "UPDATE identities SET parts = '{}'",
        "DELETE FROM identities",
        "DROP TABLE records",
    ],
)
def test_records_that_were_changed_or_removed_are_noticed(tmp_path: Path, statement: str) -> None:
    written(tmp_path)
    with closing(sqlite3.connect(tmp_path / NAME)) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(BadInput, match="is damaged"):
        values(tmp_path)


def test_an_identity_without_records_is_missed_too(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        journal.introduce(ASKED)
        journal.introduce(Identity({"seed": "1"}))
    with closing(sqlite3.connect(tmp_path / NAME)) as database:
        database.execute("DELETE FROM identities WHERE number = 2")
        database.commit()
    with pytest.raises(BadInput, match="is damaged"):
        values(tmp_path)


def test_a_journal_of_format_2_is_read_and_given_a_head(tmp_path: Path) -> None:
    written(tmp_path, 3)
    expected = values(tmp_path)
    with closing(sqlite3.connect(tmp_path / NAME)) as database:
        database.executescript("DROP TABLE head; PRAGMA user_version = 2;")
    assert values(tmp_path) == expected == values(tmp_path)
    with closing(sqlite3.connect(tmp_path / NAME)) as database:
        assert database.execute("SELECT records FROM head").fetchall() == [(3,)]
        database.execute("PRAGMA user_version = 2")  # with a head it cannot be of format 2
    with pytest.raises(BadInput, match="is damaged"):
        values(tmp_path)


def test_a_record_that_does_not_fit_on_the_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    """SQLite does not say that a file size limit or a quota was met: a file beside the journal tells."""
    written(tmp_path, 2)
    with open_records(tmp_path, lambda: ASKED) as known:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
        try:
            with pytest.raises(OutOfResources, match=f"cannot write {tmp_path / NAME}") as caught:
                known.add("large", {"value": "x" * 100_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.exit_code == 5 and "large" not in known
        known.add("small", {"value": 1})
    assert list(values(tmp_path)) == ["key 0", "key 1", "small"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAME]


def test_a_faulty_disk_is_not_called_a_full_one(tmp_path: Path) -> None:
    """SQLite gives one number for a write that failed, whether the disk is broken or a limit is met."""
    failed = sqlite3.OperationalError("disk I/O error")
    failed.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    with pytest.raises(RequestError, match="disk I/O error") as caught, journal._told(tmp_path / NAME):
        raise failed
    assert caught.value.exit_code == 2 and "check the disk" in caught.value.todo


@pytest.mark.parametrize("name", FORMER)
def test_journals_of_the_first_version_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"asked": "x"}\n{"key": "a", "value": 1.0}\n')
    with pytest.raises(RequestError, match=rf"is not continued\n{name} was written by prunella 0.1"):
        values(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write"):
        values(tmp_path / "file")


# -- kills and other processes ---------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tests.io.test_journal import ASKED
from prunella.io.journal import open_records
with open_records(sys.argv[1], lambda: ASKED) as known:
    k = 0
    while True:
        if f"key {k}" not in known:
            known.add(f"key {k}", {"value": k / 3})
            print(k, flush=True)
        k += 1
"""


def test_what_was_recorded_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    words, root, told = [sys.executable, "-c", WRITER, str(tmp_path)], Path(__file__).parents[2], -1
    for _ in range(2):
        with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(25):
                told = int(process.stdout.readline())
            with pytest.raises(Locked, match=f"process {process.pid} on"):
                values(tmp_path)
            os.kill(process.pid, signal.SIGKILL)
            told = max([told, *map(int, process.stdout.read().split())])
        assert records(tmp_path) in (told + 1, told + 2)  # the last one may not have been told
    known = values(tmp_path)
    assert len(known) > told >= 49 and all(known[f"key {k}"] == {"value": k / 3} for k in range(told + 1))


def test_a_process_that_ends_lets_the_next_one_in(tmp_path: Path) -> None:
    with open_journal(tmp_path):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path(__file__).parents[2],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert f"Locked: {tmp_path / NAME} is in use" in done.stderr and time.monotonic() - start < 60
    written(tmp_path, 1)
    assert values(tmp_path) == {"key 0": {"value": 0.0, "name": ""}}


@pytest.mark.parametrize(
    "hostile",
    [
        "DROP TABLE records; CREATE VIEW records AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
        "SELECT n AS number, 'a' AS identity, 'b' AS key, '{}' AS payload, '' AS chain FROM r",
        "CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM records; END",
        "CREATE TABLE more (x)",
    ],
    ids=["a view without end", "a trigger", "another table"],
)
def test_a_journal_with_views_or_triggers_is_damaged_and_stays(tmp_path: Path, hostile: str) -> None:
    written(tmp_path)
    with closing(sqlite3.connect(tmp_path / NAME)) as database:
        database.executescript(hostile)
    before = (tmp_path / NAME).read_bytes()
    start = time.process_time()
    with pytest.raises(BadInput, match="is damaged"):
        values(tmp_path)
    assert time.process_time() - start < 1 and (tmp_path / NAME).read_bytes() == before


def test_the_notes_of_somebody_else_in_place_of_a_journal_are_kept(tmp_path: Path) -> None:
    """The journals of 0.1 emptied such a file: whatever lies there is refused and stays, to the last byte."""
    for name, content in ((NAME, b"my notes, line 1\nmy notes, line 2\n"), ("journal.jsonl", b"my notes\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(PruningError):
            values(folder)
        assert (folder / name).read_bytes() == content and [file.name for file in folder.iterdir()] == [name]
