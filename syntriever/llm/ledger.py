"""Every reply a teacher gave, on disk and addressed by content, so that none is paid for twice."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm.replies import Reply, ended
from syntriever.run import lineage

GRADES = range(4)  # of a passage, 3 the best


@dataclass(frozen=True)
class Request:
    """One prompt. `choices` names the only replies a verdict may have, lower case; `usable` tells, of a reply in any other
    grammar, whether it has what was asked for."""

    step: str
    item: tuple[str, ...]  # what it is about: (query,) or (query, first passage id, second passage id)
    prompt: str
    temperature: float
    max_tokens: int
    choices: tuple[str, ...] = ()
    usable: Callable[[str], object] | None = None
    fields: tuple[str, ...] = ()  # of a reply as a JSON object, each a grade from 0 to 3
    logprobs: bool = False  # the probabilities of the first word are wanted

    @property
    def properties(self) -> dict[str, Any]:
        """What a JSON object that answers has, each with its JSON schema; nothing where the reply is to be plain text: for its
        first word to be the answer, there must be no brace before it."""
        if self.fields:
            return {name: {"type": "integer", "enum": list(GRADES)} for name in self.fields}
        return {"verdict": {"type": "string", "enum": list(self.choices)}} if self.choices and not self.logprobs else {}

    def key(self, model: str) -> str:
        """Content address: what decides the reply. `max_tokens` is left out, since a reply that came
        to its end is the same under any higher limit; `Ledger.get` sees to those that did not."""
        more = ["logprobs"] if self.logprobs else []  # keys of other requests are as ever
        return lineage.text_sha256([model, self.prompt, self.temperature, self.choices, *more])[:32]


_FIELDS: dict[str, type] = {"key": str, "model": str, "step": str, "text": str, "reason": str, "finish_reason": str}
_FIELDS |= {"prompt_tokens": int, "completion_tokens": int, "attempts": int, "max_tokens": int}


class Ledger:
    """Append-only JSONL file of the replies received.

    Its index (key to byte offset) is an SQLite table in a temporary file: memory stays the same at
    any number of replies. With `retry_failed`, unusable replies count as not received. Raises
    `BadInput` with `file:line` on a malformed row.
    """

    def __init__(self, path: Path, retry_failed: bool = False, read_only: bool = False) -> None:
        self.path, self.retry_failed = path, retry_failed
        self._usage: dict[tuple[str, str], list[int]] = {}
        self._appender = None if read_only else jsonl.Appender(path)
        self._index = jsonl.scratch("replies (key BLOB PRIMARY KEY, offset INTEGER)")
        if path.is_file():
            self._index.executemany("REPLACE INTO replies VALUES (?, ?)", self._rows())
            self._reader = path.open("rb")

    def _rows(self) -> Iterator[tuple[bytes, int | None]]:
        for number, offset, row in jsonl.read_with_offsets(self.path, _FIELDS, torn=True):
            try:
                key = bytes.fromhex(row["key"])
            except ValueError:
                raise BadInput(f"{paths.shown(self.path)}:{number}: 'key' is not hexadecimal") from None
            self._count(row["model"], row["step"], row["prompt_tokens"], row["completion_tokens"])
            yield key, None if row["reason"] and self.retry_failed else offset

    def _count(self, model: str, step: str, prompt_tokens: int, completion_tokens: int) -> None:
        usage = self._usage.setdefault((model, step), [0, 0, 0])
        for n, more in enumerate((1, prompt_tokens, completion_tokens)):
            usage[n] += more

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _ in self._usage})

    def used(self, model: str) -> tuple[int, int]:
        """Prompt and completion tokens of all replies of a model."""
        found = [usage for (name, _), usage in self._usage.items() if name == model]
        return sum(usage[1] for usage in found), sum(usage[2] for usage in found)

    def usual_completion(self, model: str, step: str) -> float | None:
        """Mean completion tokens of a step's replies so far; None below ten of them."""
        number, _, completion = self._usage.get((model, step), (0, 0, 0))
        return completion / number if number >= 10 else None

    def get(self, key: str, max_tokens: int) -> Reply | None:
        """The reply to a request, or None where it has to be asked for: it never was, or it was cut
        off at a lower limit than `max_tokens`."""
        found = self._index.execute("SELECT offset FROM replies WHERE key = ?", [bytes.fromhex(key)]).fetchone()
        if found is None or found[0] is None:
            return None
        self._reader.seek(found[0])
        row = jsonl.parse(self._reader.readline(), self.path, 0, _FIELDS)
        word = row["finish_reason"]
        cut_off = row["reason"] if word == "length" else ended(word) == "length"
        if cut_off and row["max_tokens"] < max_tokens:
            return None
        return Reply(**{name: row[name] for name in Reply.__dataclass_fields__ if name in row})

    def add(self, key: str, request: Request, model: str, reply: Reply) -> None:
        assert self._appender, "opened to be read only"
        offset = self._appender.size
        about = {"key": key, "step": request.step, "item": request.item, "model": model, "max_tokens": request.max_tokens}
        self._appender.add({**about, **{name: value for name, value in asdict(reply).items() if value is not None}})
        self._index.execute("REPLACE INTO replies VALUES (?, ?)", [bytes.fromhex(key), offset])
        self._count(model, request.step, reply.prompt_tokens, reply.completion_tokens)

    def sync(self) -> None:
        """Have all replies on disk, also if the machine is lost."""
        if self._appender:
            self._appender.sync()

    def close(self) -> None:
        self._index.close()
        if self._appender:
            self._appender.close()
