"""The passages of a dataset, read from disk as they are asked for."""

from array import array
from collections.abc import Iterator

import numpy as np

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import terminal


class Corpus:
    """Passages of `corpus.jsonl` by position or id, read from disk as they are asked for.

    Memory is the ids plus 32 bytes a passage (about 350 MB for MS MARCO's 8.8M passages).
    Raises `BadInput` with `file:line` on a malformed or repeated passage.
    """

    def __init__(self, ds: str) -> None:
        self.path = paths.corpus(ds)
        ids, starts, ends = bytearray(), array("q"), array("q", [0])
        self.empty = 0  # passages without title and text
        fields: dict[str, type | tuple[type, ...]] = {"_id": str, "text": str}
        for line, offset, row in terminal.progress(jsonl.read_with_offsets(self.path, fields), desc=f"scan {ds}", unit="passage"):
            if not isinstance(row.get("title"), str | None):
                raise BadInput(f"{paths.shown(self.path)}:{line}: field 'title' has type {type(row['title']).__name__}")
            ids += row["_id"].encode()
            starts.append(offset)
            ends.append(len(ids))
            self.empty += not self._text(row)
        if not starts:
            raise BadInput(f"{paths.shown(self.path)} is empty")
        if self.empty:
            print(f"note:  {paths.shown(self.path)} has {self.empty} passages without any text", flush=True)
        self._ids, self._ends, self._starts = bytes(ids), np.array(ends, np.int64), np.array(starts, np.int64)
        hashes = np.fromiter((jsonl.hash64(self.id(i)) for i in range(len(self))), np.uint64, len(self))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._file = self.path.open("rb")
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
