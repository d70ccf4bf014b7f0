"""The teacher: chat requests in, typed replies out, and a ledger so that none is paid for twice.

A stage writes one coroutine per row that awaits `Asker.ask` for each request it needs;
`work_through` runs many of them at once. A teacher only answers one request:

    async def answer(self, request: Request) -> Reply
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from syntriever import jsonl, paths, stage
from syntriever.errors import BadInput, Failed

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One prompt. `choices` names the only replies a verdict may have, lower case."""

    step: str
    item: tuple[str, ...]  # what it is about: (query,) or (query, first passage id, second passage id)
    prompt: str
    temperature: float
    max_tokens: int
    choices: tuple[str, ...] = ()

    def key(self, model: str) -> str:
        """Content address in the ledger: everything that decides the reply."""
        return stage.text_sha256([model, self.prompt, self.temperature, self.max_tokens, self.choices])[:32]


@dataclass(frozen=True)
class Reply:
    """What came back. `reason` is empty for a usable reply and else names why it is not."""

    text: str = ""
    reason: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1


class Teacher(Protocol):
    """`model` goes into the ledger's keys; `live` is False where answering costs nothing."""

    model: str
    live: bool
    concurrency: int

    async def answer(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class Ledger:
    """Append-only file of every reply received, addressed by content. Memory is 170 bytes a reply."""

    def __init__(self, path: Path, retry_failed: bool) -> None:
        self._appender = jsonl.Appender(path)
        self._path = path
        self._offsets: dict[bytes, int] = {}
        fields: dict[str, type | tuple[type, ...]] = {"key": str, "text": str, "reason": str}
        for number, offset, row in jsonl.read_with_offsets(path, fields):
            try:
                key = bytes.fromhex(row["key"])
            except ValueError:
                raise BadInput(f"{paths.shown(path)}:{number}: 'key' is not hexadecimal") from None
            if row["reason"] and retry_failed:
                self._offsets.pop(key, None)
            else:
                self._offsets[key] = offset
        self._reader = path.open("rb")

    def get(self, key: str) -> Reply | None:
        offset = self._offsets.get(bytes.fromhex(key))
        if offset is None:
            return None
        self._reader.seek(offset)
        row = jsonl.parse(self._reader.readline(), self._path, 0, {"key": str})
        return Reply(**{name: row[name] for name in Reply.__dataclass_fields__})

    def add(self, key: str, request: Request, model: str, reply: Reply) -> None:
        offset = self._appender.size
        self._appender.add({"key": key, "step": request.step, "item": request.item, "model": model, **asdict(reply)})
        self._offsets[bytes.fromhex(key)] = offset

    def close(self) -> None:
        self._reader.close()
        self._appender.close()


class Asker:
    """Asks a teacher, through the ledger, and keeps the counts the stage reports."""

    def __init__(self, teacher: Teacher, ledger: Ledger | None, max_requests: int | None = None) -> None:
        self.teacher, self.ledger, self.max_requests = teacher, ledger, max_requests
        self.counts: Counter[str] = Counter()
        self.started = time.monotonic()
        self._in_flight: dict[tuple[str, tuple[str, ...]], asyncio.Task[Reply]] = {}

    async def ask(self, request: Request) -> Reply:
        """Reply to one request, from the ledger where it was already received. The same request
        asked twice at once is sent once."""
        key = request.key(self.teacher.model)
        if self.ledger and (known := self.ledger.get(key)):
            self.counts["from the ledger"] += 1
            return known
        same = key, request.item
        if same not in self._in_flight:
            task = asyncio.create_task(self._send(key, request))
            self._in_flight[same] = task
            task.add_done_callback(lambda _: self._in_flight.pop(same))
        return await self._in_flight[same]

    async def ask_all(self, requests: Iterable[Request]) -> list[Reply]:
        """Replies to several requests at once, verdicts to those with choices. All are waited for,
        and so recorded, before an error of one is raised."""
        asked = (self.ask_verdict(request) if request.choices else self.ask(request) for request in requests)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies  # type: ignore[return-value]

    async def _send(self, key: str, request: Request) -> Reply:
        if self.teacher.live and self.max_requests is not None and self.counts["requests"] >= self.max_requests:
            raise Failed(f"stopped at --max-requests {self.max_requests}; run again with a higher one to go on")
        self.counts["requests"] += self.teacher.live
        reply = await self.teacher.answer(request)
        self.counts["prompt tokens"] += reply.prompt_tokens
        self.counts["completion tokens"] += reply.completion_tokens
        # A reply that never arrived (no finish reason) may be asked again; one that did is kept.
        if self.ledger and reply.finish_reason:
            self.ledger.add(key, request, self.teacher.model, reply)
        return reply

    async def ask_verdict(self, request: Request) -> Reply:
        """Reply whose text is one of `request.choices`. Anything else is asked once more, with the
        grammar spelled out, and then fails with the reason `unparsable`; it is never guessed."""
        reply = await self.ask(request)
        # A judge that talks is cut off at a few tokens: unparsable too, not a failed request.
        if reply.reason in ("", "length") and parse_verdict(reply.text, request.choices) is None:
            reminder = f"\n\nAnswer with exactly one word and nothing else: {' or '.join(request.choices)}."
            second = await self.ask(replace(request, prompt=request.prompt + reminder))
            reply = replace(second, attempts=reply.attempts + second.attempts)
        if reply.reason not in ("", "length"):
            return reply
        verdict = parse_verdict(reply.text, request.choices)
        return replace(reply, text=verdict, reason="") if verdict else replace(reply, reason="unparsable")

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        counts = ", ".join(f"{number:,} {name}" for name, number in self.counts.items() if number)
        return f"{counts or 'no request'} in {seconds:.0f} s"


def parse_verdict(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that `text` is, apart from case, quotes and a full stop; None for anything else."""
    word = text.strip().strip("\"'*`.").lower()
    return word if word in choices else None


def fill(prompt: str, **texts: str) -> str:
    """`prompt` with its {fields} filled in one pass: braces inside the texts stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda field: texts.get(field[1], field[0]), prompt)


def work_through(items: Iterable[T], work: Callable[[T], Awaitable[None]], teacher: Teacher) -> None:
    """Run `work` on every item, as many at a time as the teacher takes.

    After the first `BadInput` or `Failed` nothing new is begun; what is in flight is waited for, so
    that its replies are kept, and then the error is raised.
    """
    iterator = iter(items)
    errors: list[BadInput | Failed] = []

    async def worker() -> None:
        for item in iterator:
            try:
                await work(item)
            except (BadInput, Failed) as error:
                errors.append(error)
            if errors:
                return

    async def all_workers() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(teacher.concurrency):
                    group.create_task(worker())
        finally:
            await teacher.close()

    asyncio.run(all_workers())
    if errors:
        raise errors[0]


# Reasons that say something about the data, not that a request went wrong.
BENIGN = {"not_recorded", "tie", "disagreement"}


def append_rows(
    output: Path,
    items: Iterable[T],
    total: int,
    work: Callable[[Asker, T], Awaitable[jsonl.Row]],
    teacher: Teacher,
    args: argparse.Namespace,
    unit: str,
) -> Counter[str]:
    """Run `work` on each of the `total` items and append its row to `output` as soon as it is complete.

    A row with a "reason" goes to the failed file beside the output instead (`not_recorded` is only
    counted). Returns how many rows were "written" and how many had each reason.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    asker = Asker(teacher, Ledger(paths.ledger(output), args.retry_failed) if teacher.live else None, args.max_requests)
    # What failed before is tried again, or comes from the ledger: its old rows would be repeated.
    paths.failed(output).unlink(missing_ok=True)
    with (
        jsonl.Appender(output) as rows,
        jsonl.Appender(paths.failed(output)) as failures,
        tqdm(total=total, unit=unit) as bar,
    ):

        async def work_and_write(item: T) -> None:
            row = await work(asker, item)
            counts[row.get("reason", "written")] += 1
            if "reason" not in row:
                rows.add(row)
            elif row["reason"] != "not_recorded":
                failures.add(row)
            bar.update()

        try:
            work_through(items, work_and_write, teacher)
        finally:
            if asker.ledger:
                asker.ledger.close()
    if not failures.size:
        failures.path.unlink()
    stage.say(f"asked  {asker.summary()}")
    return counts


def check_failures(counts: Counter[str], done: int, output: Path, limit: float) -> None:
    """Report what failed; `Failed` where it is more than the share `limit` of all rows, those that
    were `done` before this run among them."""
    failed = {reason: number for reason, number in counts.items() if reason != "written" and reason not in BENIGN}
    total = sum(failed.values())
    if total:
        named = ", ".join(f"{number} {reason}" for reason, number in failed.items())
        stage.say(
            f"       {total} failed ({named}), see {paths.shown(paths.failed(output))}; run again to ask what never arrived"
        )
    if total > limit * (counts.total() + done):
        raise Failed(f"{total} of {counts.total() + done} rows failed, more than --max-failure-rate {limit:g}")
