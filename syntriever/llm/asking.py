"""How a request is asked: through the ledger, within the limits, once at a time. A teacher only answers it."""

import asyncio
import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from syntriever.llm import cost, verdicts
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replies import Reply, judged

T = TypeVar("T")


class Teacher(Protocol):
    """`model` goes into the ledger's keys, into rows and into records; `live` is False where answering costs nothing."""

    model: str
    live: bool
    concurrency: int

    async def answer(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class Asker:
    """Asks a teacher through the ledger, within the meter's limits."""

    def __init__(self, teacher: Teacher, ledger: Ledger | None = None, meter: cost.Meter | None = None) -> None:
        self.teacher, self.ledger, self.meter = teacher, ledger, meter or cost.Meter()
        self.from_ledger = self.thoughtful = 0  # replies that were in the ledger; that had thoughts in their text
        self._in_flight: dict[str, asyncio.Task[Reply]] = {}

    async def ask(self, request: Request) -> Reply:
        """Reply to one request, from the ledger where it was already received. The same request
        asked twice at once is sent once."""
        key = request.key(self.teacher.model)
        if self.ledger and (known := self.ledger.get(key, request.max_tokens)):
            reply = self._judged(request, known)
            if known.reason or not (reply.reason and self.ledger.retry_failed):  # not one that passed before the rule was as now
                self.from_ledger += 1
                return reply
        if not self.teacher.live:
            return self._judged(request, await self.teacher.answer(request))
        if key not in self._in_flight:
            self._in_flight[key] = asyncio.create_task(self._send(key, request))
            self._in_flight[key].add_done_callback(lambda _: self._in_flight.pop(key))
        return await self._in_flight[key]

    async def ask_all(self, requests: Iterable[Request], reminder: str = "") -> list[Reply]:
        """Replies to several requests at once, verdicts to those with choices or a grammar. All are waited for,
        and so recorded, before an error of one is raised."""
        asked = (self.ask_verdict(r, reminder) if r.choices or r.usable else self.ask(r) for r in requests)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies  # type: ignore[return-value]

    async def _send(self, key: str, request: Request) -> Reply:
        reserved = await self.meter.admit(request)
        try:
            reply = self._judged(request, await self.teacher.answer(request))
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

    def _judged(self, request: Request, reply: Reply) -> Reply:
        reply = judged(reply, request.choices, request.usable)
        self.thoughtful += reply.thoughts
        return reply

    async def ask_verdict(self, request: Request, reminder: str = "") -> Reply:
        """Reply whose text is one of `request.choices`, or `request.usable`. Anything else is asked once more, with the
        grammar spelled out, and then fails with the reason `unparsable`; it is never guessed."""
        reply = await self.ask(request)
        if reply.reason == "unparsable":
            reminder = reminder or f"Answer with exactly one word and nothing else: {' or '.join(request.choices)}."
            second = await self.ask(replace(request, prompt=f"{request.prompt}\n\n{reminder}"))
            reply = replace(second, attempts=reply.attempts + second.attempts)
        if request.choices and not reply.reason:
            reply = replace(reply, text=verdicts.parse_verdict(reply.text, request.choices) or "")
        return reply


def fence(*texts: str) -> str:
    """Delimiter around the texts of a request: a hash of them, so the same on a rerun, and nothing that a text could contain."""
    return "passage-" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def fill(prompt: str, **texts: str) -> str:
    """`prompt` with its {fields} filled in one pass: braces inside the texts stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda field: texts.get(field[1], field[0]), prompt)
