"""How the LLM stages work through their rows: many at once, each written when it is complete.

A stage writes one coroutine per row that awaits `Asker.ask` for each request it needs; `append_rows`
runs many of them at once.
"""

import argparse
import asyncio
import itertools
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.llm import asking, cost
from syntriever.llm.batch_api import BatchTeacher, entries_of
from syntriever.llm.ledger import Ledger
from syntriever.run import terminal


def work_through(items: Iterable[asking.T], work: Callable[[asking.T], Awaitable[object]], teacher: asking.Teacher) -> None:
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
BENIGN = {"not_recorded", "tie", "disagreement", "dropped", "pending"}

Made = jsonl.Row | list[jsonl.Row]  # what `work` makes of an item: its row, or rows that belong together

SAMPLE = 100  # rows that an estimate is made from


def append_rows(
    output: Path,
    ledger_path: Path,
    items: Iterable[asking.T],
    total: int,
    work: Callable[[asking.Asker, asking.T], Awaitable[Made]],
    teacher: asking.Teacher,
    args: argparse.Namespace,
    unit: str,
) -> tuple[Counter[str], dict[str, Any]]:
    """Run `work` on each of the `total` items and append its row to `output` as soon as it is complete.

    A row with a "reason" goes to the failed file beside the output instead (`not_recorded` and
    `pending` are only counted). Rows of one item are written at once: a kill leaves a part of them at the end of the file,
    and nowhere else. Returns how many items were "written" and how many had each reason, and what was used.
    With `--dry-run` only the estimate is made, and nothing is written.
    """
    if not teacher.live:
        ledger, meter = None, cost.Meter()
        if args.dry_run:
            terminal.say("estimate: recorded answers cost nothing")
    else:
        state = paths.batches(output)
        if not args.batch and not args.dry_run and any(entry["id"] for entry in entries_of(state)):
            how = "collect them first, with --batch, or remove that file to ask anew"
            raise BadInput(f"{paths.shown(state)}: requests are out in batches, and would be paid for twice; {how}")
        # What failed in the batches of an earlier run has been tried again: that is their result.
        retry = args.retry_failed and not (args.batch and state.is_file())
        ledger = Ledger(ledger_path, retry, read_only=args.dry_run)
        price, spent = cost.price_of(teacher.model, args.batch), ledger.used(teacher.model)
        meter = cost.Meter(price, args.max_requests, args.max_cost, spent)
        if isinstance(teacher, BatchTeacher) and not args.dry_run:
            teacher.collect(ledger, meter)
        rest = iter(items)
        sample = list(itertools.islice(rest, SAMPLE))
        items = itertools.chain(sample, rest)
        if sample:  # what the rows take at most: the work on a sample of them, with imagined replies
            imagined = cost.Imagined(teacher.model, ledger, price)
            imagining = asking.Asker(imagined, ledger)
            work_through(sample, lambda item: work(imagining, item), imagined)
            cost.say_estimate(imagined, len(sample), total, args.max_cost)
    counts: Counter[str] = Counter()
    if args.dry_run:
        return counts, {}
    asker, started = asking.Asker(teacher, ledger, meter), time.monotonic()
    # What failed before is tried again, or comes from the ledger: its old rows would be repeated.
    paths.failed(output).unlink(missing_ok=True)
    with (
        jsonl.Appender(output) as rows,
        jsonl.Appender(paths.failed(output)) as failures,
        terminal.progress(total=total, unit=unit) as bar,
    ):
        said: set[str] = set()

        async def work_and_write(item: asking.T) -> None:
            made = await work(asker, item)
            row = made if isinstance(made, dict) else {}
            reason, message = row.get("reason", "written"), row.get("message", "")
            counts[reason] += 1
            # The words of a failure once for each kind; each option that helps is a kind.
            if message and not said & {reason, message}:
                said.add(message if reason == "length" else reason)
                terminal.say(f"note:  {reason}: {message}")
            if "reason" not in row:
                rows.add(*(made if isinstance(made, list) else [made]))
            elif row["reason"] not in ("not_recorded", "pending"):
                failures.add(row)
            bar.update()

        try:
            work_through(items, work_and_write, teacher)
        except cost.LimitReached:
            if isinstance(teacher, BatchTeacher):
                teacher.submit()
            raise
        finally:
            if ledger:
                ledger.close()
            bar.close()
            terminal.say(f"asked  in {time.monotonic() - started:.0f} s; {asker.from_ledger:,} replies were in the ledger")
            if asker.thoughtful:
                terminal.say(f"note:  thoughts of the model were cut from {asker.thoughtful:,} replies")
            if meter.steps:
                terminal.say(meter.table())
    if not failures.size:
        failures.path.unlink()
    if isinstance(teacher, BatchTeacher):
        teacher.submit()
    return counts, meter.results() | ({"replies_with_thoughts": asker.thoughtful} if asker.thoughtful else {})


def check_failures(counts: Counter[str], done: int, output: Path, limit: float) -> None:
    """Report what failed; `Failed` where it is more than the share `limit` of all rows, those that
    were `done` before this run among them."""
    failed = {reason: number for reason, number in counts.items() if reason != "written" and reason not in BENIGN}
    total = sum(failed.values())
    if total:
        named = ", ".join(f"{number} {reason}" for reason, number in failed.items())
        terminal.say(
            f"       {total} failed ({named}), see {paths.shown(paths.failed(output))}; run again to ask what never arrived"
        )
    if total > limit * (counts.total() + done):
        raise Failed(f"{total} of {counts.total() + done} rows failed, more than --max-failure-rate {limit:g}")
