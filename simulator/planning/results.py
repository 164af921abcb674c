"""Answers on disk: one SQLite file per sweep, keyed by the content of the question, readable while the sweep runs."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from simulator.errors import ProfileError

#: packages and modules that decide no answer; a change in them does not make stored answers old
_AROUND = ("calibration", "cli", "executors.py", "formats", "planning", "plots", "report.py", "validation")
_TABLES = """
create table meta (name text primary key, value text not null) strict;
create table answers (key text primary key, question text not null, answer text not null) strict;
"""


def canonical(data: Any) -> str:
    """Return `data` as JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(question: str) -> str:
    """Return the key of a question in canonical JSON: 128 bits of its SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:32]


@cache
def made_by() -> str:
    """Return the version of Myriad and a fingerprint of the code that decides answers."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] not in _AROUND:
            digest.update(str(inside).encode() + b"\0" + path.read_bytes())
    try:
        number = version("myriad-simulator")
    except PackageNotFoundError:  # a checkout that is not installed
        number = "checkout"
    return f"{number}+{digest.hexdigest()[:12]}"


class Answers:
    """The answers of a sweep, in a file.

    Parameters
    ----------
    path : str or Path
        Made when it does not exist. Only the process that opens it writes; others may read meanwhile (WAL).

    Raises
    ------
    ProfileError
        When the file is something else, or was made by another version; it is left as it is.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ProfileError(f"{self.path}: there is no folder {self.path.parent}; make it first")
        if self.path.exists() and self.path.stat().st_size:
            _refuse_others(self.path)
        try:
            self._file = sqlite3.connect(self.path, timeout=30)
            self._file.execute("pragma journal_mode = wal")
            self._make_tables()
        except sqlite3.Error as error:
            raise ProfileError(f"{self.path} cannot be opened for writing: {error}") from None

    def _make_tables(self) -> None:
        """Make the tables in one transaction: a driver that dies here leaves an empty file, which the next one takes."""
        self._file.execute("begin immediate")
        if not self._file.execute("select 1 from sqlite_master where name = 'meta'").fetchone():
            for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                self._file.execute(statement)
            self._file.execute("insert into meta values ('made_by', ?)", (made_by(),))
        self._file.commit()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def known(self) -> dict[str, dict[str, Any]]:
        """Return every stored answer by its key."""
        return {key: json.loads(answer) for key, answer in self._file.execute("select key, answer from answers")}

    def add(self, key: str, question: str, answer: Mapping[str, Any]) -> None:
        """Store one answer for good before returning; a second one of the same key changes nothing."""
        with self._file:
            self._file.execute("insert or ignore into answers values (?, ?, ?)", (key, question, canonical(answer)))


def _refuse_others(path: Path) -> None:
    """Raise when `path` is no sweep or another version's; opened for reading alone."""
    try:
        with closing(_reading(path)) as file:
            tables = {name for (name,) in file.execute("select name from sqlite_master where type = 'table'")}
            found = file.execute("select value from meta where name = 'made_by'").fetchone() if "meta" in tables else None
    except sqlite3.Error as error:
        raise ProfileError(f"{path} is not a file of sweep answers ({error}); choose another name") from None
    if not tables:
        return  # its driver died before it made them
    if not found or "answers" not in tables:
        raise ProfileError(f"{path} is a database of something else; choose another name")
    if found[0] != made_by():
        raise ProfileError(
            f"{path} was answered by Myriad {found[0]}, this is {made_by()}: answers of two versions do not belong in one table; "
            "choose another file, or read the old one with stored_answers"
        )


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)


def stored_answers(path: str | Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield key, question and answer of everything in a file of answers, whatever version made it; also while it is written.

    Raises
    ------
    ProfileError
        When there is no such file or it is something else.
    """
    if not Path(path).is_file():
        raise ProfileError(f"{path}: no such file of answers")
    try:
        with closing(_reading(Path(path))) as file:
            for key, question, answer in file.execute("select key, question, answer from answers order by key"):
                yield key, json.loads(question), json.loads(answer)
    except sqlite3.Error as error:
        raise ProfileError(f"{path} is not a file of sweep answers ({error})") from None
