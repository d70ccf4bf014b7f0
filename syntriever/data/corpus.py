"""The passages of a dataset, read from disk as they are asked for."""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import terminal

UNFIT = re.compile(r"[\s\0]")  # what an id in a TREC file must not have


def normal(text: str) -> str:
    """What texts that count as one have in common: their characters in Unicode's composed form (NFC), white space
    stripped and collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def rows_with_id(path: Path) -> Iterator[tuple[int, int, jsonl.Row]]:
    """(line number, byte offset, row) of a file of passages or queries."""
    for line, offset, row in jsonl.read_with_offsets(path, {"_id": str, "text": str}):
        if not row["_id"]:
            raise BadInput(f"{paths.shown(path)}:{line}: field '_id' is empty")
        yield line, offset, row


class Corpus:
    """Passages of `corpus.jsonl` by position or id, read from disk as they are asked for.

    Passages with the same text (`normal`) are one wherever texts are compared: `twin` is the first of them.
    Memory is the ids plus 32 bytes a passage (about 350 MB for MS MARCO's 8.8M passages), and 16 a repeated text.
    Raises `BadInput` with `file:line` on a malformed or repeated passage.
    """

    def __init__(self, ds: str) -> None:
        self.path = paths.corpus(ds)
        ids, starts, ends = bytearray(), array("q"), array("q", [0])
        texts = array("Q")
        self.empty = 0  # passages without title and text
        self.unfit: str | None = None  # an id that no TREC file can hold
        for line, offset, row in terminal.progress(rows_with_id(self.path), desc=f"scan {ds}", unit="passage"):
            if not isinstance(row.get("title"), str | None):
                raise BadInput(f"{paths.shown(self.path)}:{line}: field 'title' has type {type(row['title']).__name__}")
            ids += row["_id"].encode()
            starts.append(offset)
            ends.append(len(ids))
            text = normal(self._text(row))
            texts.append(jsonl.hash64(text))
            self.empty += not text
            if self.unfit is None and UNFIT.search(row["_id"]):
                self.unfit = row["_id"]
        if not starts:
            raise BadInput(f"{paths.shown(self.path)} is empty")
        if self.empty:
            terminal.say(f"note:  {paths.shown(self.path)} has {self.empty} passages without any text")
        self._ids, self._ends, self._starts = bytes(ids), np.array(ends, np.int64), np.array(starts, np.int64)
        hashes = np.fromiter((jsonl.hash64(self.id(i)) for i in range(len(self))), np.uint64, len(self))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._file = self.path.open("rb")
        self._repeats, self._firsts = self._find_twins(np.frombuffer(texts, np.uint64))
        self.repeats = len(self._repeats)  # passages that have the text of one before them
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1:
            second = int(self._order[at])
            first = self.position(self.id(second))
            if first is not None and first != second:
                where = f"{paths.shown(self.path)}:{self._line(second)}"
                raise BadInput(f"{where}: passage id {self.id(second)!r} was already used on line {self._line(first)}")

    @staticmethod
    def _text(row: jsonl.Row) -> str:
        """What the encoder and the teacher see: title and text, as BEIR joins them."""
        return f"{row.get('title') or ''} {row['text']}".strip()

    def _find_twins(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ascending positions of the passages whose text stands before, and those of its first passage. Only texts
        whose hash occurs twice are read and compared."""
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
        repeats, firsts, seen, last = array("q"), array("q"), {}, None
        for at in again.tolist():
            if last != at - 1:  # another hash, or the first passage of this one
                seen = {normal(self.text(int(order[at - 1]))): int(order[at - 1])}
            last, position = at, int(order[at])
            first = seen.setdefault(normal(self.text(position)), position)
            if first != position:
                repeats.append(position)
                firsts.append(first)
        ascending = np.argsort(repeats)
        return np.array(repeats, np.int64)[ascending], np.array(firsts, np.int64)[ascending]

    def _line(self, position: int) -> int:
        """Number of the line that a passage stands on, for messages."""
        self._file.seek(0)
        return self._file.read(int(self._starts[position])).count(b"\n") + 1

    def __len__(self) -> int:
        return len(self._starts)

    def id(self, position: int) -> str:
        return self._ids[self._ends[position] : self._ends[position + 1]].decode()

    def position(self, passage_id: str) -> int | None:
        """Row number of a passage, or None where the corpus has no such id."""
        wanted = np.uint64(jsonl.hash64(passage_id))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self) and self._hashes[at] == wanted:
            if self.id(int(self._order[at])) == passage_id:
                return int(self._order[at])
            at += 1
        return None

    def twins(self, positions: np.ndarray) -> np.ndarray:
        """For each position that of the first passage with the same text: its own where none stands before it."""
        if not self.repeats:
            return positions
        at = np.searchsorted(self._repeats, positions).clip(max=self.repeats - 1)
        return np.where(self._repeats[at] == positions, self._firsts[at], positions)

    def twin(self, position: int) -> int:
        return int(self.twins(np.array([position]))[0])

    def first_id(self, passage_id: str) -> str:
        """Id of the first passage with the same text; the id itself where the corpus lacks it."""
        position = self.position(passage_id) if self.repeats else None
        return passage_id if position is None else self.id(self.twin(position))

    def same_text(self, passage_id: str) -> list[str]:
        """Ids of all passages with the text of one, which is the first of them."""
        position = self.position(passage_id)
        others = self._repeats[self._firsts == position].tolist() if self.repeats else []
        return [passage_id, *map(self.id, others)]

    def distinct(self, passage_ids: Iterable[str]) -> Iterator[str]:
        """The ids without those whose text one before them has."""
        seen: set[str] = set()
        for passage_id in passage_ids:
            if (first := self.first_id(passage_id)) not in seen:
                seen.add(first)
                yield passage_id

    def text(self, position: int) -> str:
        self._file.seek(int(self._starts[position]))
        return self._text(jsonl.parse(self._file.readline(), self.path, position + 1, {"text": str}))

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Texts of the rows [start, stop), in order."""
        for position in range(start, len(self) if stop is None else stop):
            yield self.text(position)

    def by_id(self, passage_id: str) -> str:
        """Text of a passage; `BadInput` where the corpus has no such id."""
        position = self.position(passage_id)
        if position is None:
            raise BadInput(f"{paths.shown(self.path)} has no passage {passage_id!r}")
        return self.text(position)
