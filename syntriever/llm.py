"""How the LLM stages ask: many requests at once, each through the ledger, each row written when it
is complete.

A stage writes one coroutine per row that awaits `Asker.ask` for each request it needs;
`append_rows` runs many of them at once. A teacher only answers one request:

    async def answer(self, request: Request) -> Reply
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from syntriever import cost, jsonl, paths, stage
from syntriever.errors import BadInput, Failed
from syntriever.ledger import Ledger, Reply, Request

T = TypeVar("T")


class Teacher(Protocol):
    """`model` goes into the ledger's keys; `live` is False where answering costs nothing."""

    model: str
    live: bool
    concurrency: int

    async def answer(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


@runtime_checkable
class Deferred(Protocol):
    """A teacher that answers later: `Reply(reason="pending")` until a run that `collect`s the reply."""

    def collect(self, ledger: Ledger, meter: cost.Meter) -> None: ...

    def submit(self) -> None: ...


class Asker:
    """Asks a teacher through the ledger, within the meter's limits."""

    def __init__(self, teacher: Teacher, ledger: Ledger | None = None, meter: cost.Meter | None = None) -> None:
        self.teacher, self.ledger, self.meter = teacher, ledger, meter or cost.Meter()
        self.from_ledger = 0
        self._in_flight: dict[str, asyncio.Task[Reply]] = {}

    async def ask(self, request: Request) -> Reply:
        """Reply to one request, from the ledger where it was already received. The same request
        asked twice at once is sent once."""
        key = request.key(self.teacher.model)
        if self.ledger and (known := self.ledger.get(key, request.max_tokens)):
            self.from_ledger += 1
            return checked(request, known)
        if not self.teacher.live:
            return checked(request, await self.teacher.answer(request))
        if key not in self._in_flight:
            self._in_flight[key] = asyncio.create_task(self._send(key, request))
            self._in_flight[key].add_done_callback(lambda _: self._in_flight.pop(key))
        return await self._in_flight[key]

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
        reserved = await self.meter.admit(request)
        try:
            reply = checked(request, await self.teacher.answer(request))
        except BaseException:
            self.meter.settle(reserved)  # others may wait for what it reserved
            raise
        pending = reply.reason == "pending"
        self.meter.settle(0.0 if pending else reserved)
        if not pending:
            self.meter.add(request.step, reply)
        if self.ledger and reply.finish_reason:
            self.ledger.add(key, request, self.teacher.model, reply)
        return reply

    async def ask_verdict(self, request: Request) -> Reply:
        """Reply whose text is one of `request.choices`. Anything else is asked once more, with the
        grammar spelled out, and then fails with the reason `unparsable`; it is never guessed."""
        reply = await self.ask(request)
        if reply.reason == "unparsable":
            reminder = f"\n\nAnswer with exactly one word and nothing else: {' or '.join(request.choices)}."
            second = await self.ask(replace(request, prompt=request.prompt + reminder))
            reply = replace(second, attempts=reply.attempts + second.attempts)
        return reply if reply.reason else replace(reply, text=parse_verdict(reply.text, request.choices) or "")


def checked(request: Request, reply: Reply) -> Reply:
    """`reply`, with the reason `unparsable` where it should be a verdict and is none. A judge that
    talks is cut off after a few tokens: unparsable too, rather than a truncated reply."""
    if request.choices and reply.reason in ("", "length", "empty"):
        return replace(reply, reason="" if parse_verdict(reply.text, request.choices) else "unparsable")
    return reply


def parse_verdict(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that `text` is, apart from case, quotes and a full stop, or that it names as
    {"verdict": choice}; None for anything else."""
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text, object_pairs_hook=list)  # pairs, to see a name that stands there twice
        except (ValueError, RecursionError):
            return None
        if len(fields) != 1 or fields[0][0] != "verdict" or not isinstance(fields[0][1], str):
            return None
        text = fields[0][1]
    word = text.strip().strip("\"'*`.").lower()
    return word if word in choices else None


def fill(prompt: str, **texts: str) -> str:
    """`prompt` with its {fields} filled in one pass: braces inside the texts stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda field: texts.get(field[1], field[0]), prompt)


def work_through(items: Iterable[T], work: Callable[[T], Awaitable[None]], teacher: Teacher) -> None:
    """Run `work` on every item, as many at a time as the teacher takes.

    After the first error of the input, the teacher or the disk nothing new is begun; what is in flight
    is waited for, so that its replies are kept, and then the error is raised.
    """
    iterator = iter(items)
    errors: list[Exception] = []

    async def worker() -> None:
        for item in iterator:
            try:
                await work(item)
            except (BadInput, Failed, OSError, sqlite3.Error) as error:
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


# Reasons that say something about the data, or that only more time is needed: no request went wrong.
BENIGN = {"not_recorded", "tie", "disagreement", "pending"}

SAMPLE = 100  # rows that an estimate is made from


def append_rows(
    output: Path,
    ledger_path: Path,
    items: Iterable[T],
    total: int,
    work: Callable[[Asker, T], Awaitable[jsonl.Row]],
    teacher: Teacher,
    args: argparse.Namespace,
    unit: str,
) -> tuple[Counter[str], dict[str, Any]]:
    """Run `work` on each of the `total` items and append its row to `output` as soon as it is complete.

    A row with a "reason" goes to the failed file beside the output instead (`not_recorded` and
    `pending` are only counted). Returns how many rows were "written" and how many had each reason, and what was used.
    With `--dry-run` only the estimate is made, and nothing is written.
    """
    from tqdm import tqdm

    if not teacher.live:
        ledger, meter = None, cost.Meter()
        if args.dry_run:
            stage.say("estimate: recorded answers cost nothing")
    else:
        # What failed in the batches of an earlier run has been tried again: that is their result.
        retry = args.retry_failed and not (args.batch and paths.batches(output).is_file())
        ledger = Ledger(ledger_path, retry, read_only=args.dry_run)
        price, spent = cost.price_of(teacher.model, args.batch), ledger.used(teacher.model)
        meter = cost.Meter(price, args.max_requests, args.max_cost, spent)
        if isinstance(teacher, Deferred) and not args.dry_run:
            teacher.collect(ledger, meter)
        rest = iter(items)
        sample = list(itertools.islice(rest, SAMPLE))
        items = itertools.chain(sample, rest)
        estimate(sample, total, work, teacher.model, ledger, price, args.max_cost)
    counts: Counter[str] = Counter()
    if args.dry_run:
        return counts, {}
    asker, started = Asker(teacher, ledger, meter), time.monotonic()
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
            elif row["reason"] not in ("not_recorded", "pending"):
                failures.add(row)
            bar.update()

        try:
            work_through(items, work_and_write, teacher)
        except cost.LimitReached:
            if isinstance(teacher, Deferred):
                teacher.submit()
            raise
        finally:
            if ledger:
                ledger.close()
            bar.close()
            stage.say(f"asked  in {time.monotonic() - started:.0f} s; {asker.from_ledger:,} replies were in the ledger")
            if meter.steps:
                stage.say(meter.table())
    if not failures.size:
        failures.path.unlink()
    if isinstance(teacher, Deferred):
        teacher.submit()
    return counts, meter.results()


def estimate(
    sample: list[T],
    total: int,
    work: Callable[[Asker, T], Awaitable[jsonl.Row]],
    model: str,
    ledger: Ledger,
    price: cost.Price | None,
    max_cost: float | None,
) -> None:
    """Print what the rows take at most: `work` on a sample of them, with imagined replies."""
    if not sample:
        return
    imagined = cost.Imagined(model, ledger, price)
    asker = Asker(imagined, ledger)

    async def imagine(item: T) -> None:
        await work(asker, item)

    work_through(sample, imagine, imagined)
    cost.say_estimate(imagined, len(sample), total, max_cost)


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
