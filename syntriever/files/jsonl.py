"""JSONL that survives bad input, kills and full disks.

Files are UTF-8 and split on b"\n" only: U+2028 and its kin are legal inside JSON strings, so
`str.splitlines` would tear rows apart.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from syntriever.errors import BadInput, Failed
from syntriever.files.paths import shown

Row = dict[str, Any]
Fields = Mapping[str, type]  # that a row has to have


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):  # 1e999: it could be read, but not written again
        raise ValueError(f"{number} is beyond a float")
    return value


@functools.cache
def _say_integer_ids(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first talks
        print(f"note:  {shown(path)} has whole numbers as ids; they are read as text", flush=True)


def parse(line: bytes, path: Path, number: int, fields: Fields) -> Row:
    """Row of one line, with every name of `fields` present and of its type, else `BadInput`. An id
    (`_id`, `query_id`, ...) that is a whole number is read as text, which is said once per file."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_reject_constant, parse_float=_finite)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except UnicodeEncodeError:
        raise BadInput(f"{shown(path)}:{number}: holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{shown(path)}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{shown(path)}:{number}: not a JSON row ({error})") from None
    if not isinstance(row, dict):
        raise BadInput(f"{shown(path)}:{number}: a row must be a JSON object, not {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise BadInput(f"{shown(path)}:{number}: field {name!r} is missing")
        if name.endswith("_id") and kind is str and type(row[name]) is int:
            row[name] = str(row[name])
            _say_integer_ids(path)
        if not isinstance(row[name], kind):
            raise BadInput(f"{shown(path)}:{number}: field {name!r} has type {type(row[name]).__name__}")
    return row


def opened(path: Path) -> BinaryIO:
    """An input, open for reading. Raises `BadInput` where it is not there, is no file, or may not be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"{shown(path)}: {(error.strerror or str(error)).lower()}") from None


def read(path: Path, fields: Fields | None = None, torn: bool = False) -> Iterator[Row]:
    """Rows of `path`, one at a time. A BOM, CRLF and blank lines are accepted.

    Raises `BadInput` naming `file:line` on anything that is not a JSON object with `fields`; with
    `torn`, a last line that has no end yet is left out instead.
    """
    return (row for _, _, row in read_with_offsets(path, fields or {}, torn))


def read_with_offsets(path: Path, fields: Fields, torn: bool = False) -> Iterator[tuple[int, int, Row]]:
    """(line number, byte offset, row) of every row of `path`."""
    offset = 0
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line, start = line[3:], 3
            if not line.strip():
                continue
            try:
                row = parse(line, path, number, fields)
            except BadInput:
                if torn and not line.endswith(b"\n"):
                    return
                raise
            yield number, start, row


def dumps(row: Row) -> bytes:
    """One line. NaN is refused: no other reader would take it."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Binary file that appears as `path` only when the block ends well and all bytes are on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path), str(path.parent)):
            raise  # not this file: something the block read
        raise Failed(f"cannot write {shown(path)}: {error.strerror or error}; the previous file is untouched") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document atomically."""
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


class Table:
    """Rows of a JSONL file by the value of one field, read from disk as they are asked for.

    Memory is the keys and an offset each. Raises `BadInput` with `file:line` on a malformed row or
    a key that occurs twice, or where `check(row)` returns a complaint.
    """

    def __init__(self, path: Path, key: str, fields: Fields, check: Callable[[Row], str | None] = lambda row: None) -> None:
        self.path, self.fields = path, {key: str, **fields}
        self._offsets: dict[str, tuple[int, int]] = {}
        for number, offset, row in read_with_offsets(path, self.fields):
            if row[key] in self._offsets:
                raise BadInput(f"{shown(path)}:{number}: {key} {row[key]!r} was already on line {self._offsets[row[key]][0]}")
            if complaint := check(row):
                raise BadInput(f"{shown(path)}:{number}: {complaint}")
            self._offsets[row[key]] = number, offset
        self._file = path.open("rb")

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Row | None:
        """The row of `key`, or None."""
        if key not in self._offsets:
            return None
        number, offset = self._offsets[key]
        self._file.seek(offset)
        return parse(self._file.readline(), self.path, number, self.fields)


def hash64(text: str) -> int:
    """Hash of a key for tables that hold millions: two of n keys share one with probability n²/2^65."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Seen:
    """A set of keys in 8 bytes each."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = np.unique(np.fromiter(map(hash64, keys), np.uint64))

    def __contains__(self, key: str) -> bool:
        wanted = np.uint64(hash64(key))
        at = int(np.searchsorted(self._hashes, wanted))
        return at < len(self._hashes) and bool(self._hashes[at] == wanted)

    def __len__(self) -> int:
        return len(self._hashes)


def scratch(table: str) -> sqlite3.Connection:
    """A new SQLite table, `name (columns)`, in a temporary file: for what would grow without bound in memory."""
    connection = sqlite3.connect("", isolation_level=None)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute(f"CREATE TABLE {table} WITHOUT ROWID")
    connection.execute("BEGIN")  # never ended: the table goes with the connection
    return connection


def mend(path: Path) -> None:
    """Cut off the torn last line that a kill may have left; a complete one only lacks its newline."""
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        found = -1
        while position > 0 and found < 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            position = start
        last = position + found + 1 if found >= 0 else 0
        if last == end:
            return
        file.seek(last)
        try:
            json.loads(file.read())
            file.write(b"\n")
        except (ValueError, RecursionError):
            file.truncate(last)


class Appender(AbstractContextManager["Appender"]):
    """Append-only JSONL of a resumable stage: each row is complete on disk or not there.

    A row is with the kernel when `add` returns (safe against a killed process), and synced every
    few seconds and on `close` (safe against a lost machine).
    """

    SYNC_SECONDS = 5.0

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        mend(path)
        self.size = self._file.seek(0, os.SEEK_END)
        self._synced = time.monotonic()

    def add(self, *rows: Row) -> None:
        """Append rows that belong together. On a full disk none of them stays, and the file is cut back to what was there."""
        lines = b"".join(map(dumps, rows))
        try:
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(28, os.strerror(28))
        except OSError as error:
            self._file.truncate(self.size)
            raise Failed(f"cannot write {shown(self.path)}: {error.strerror}; rerun to resume") from error
        self.size += len(lines)
        if time.monotonic() - self._synced > self.SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()
