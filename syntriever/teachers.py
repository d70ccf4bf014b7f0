"""The teachers: recorded answers, any OpenAI-compatible server, or a model in this process."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

from syntriever import jsonl, paths, stage
from syntriever.errors import BadInput, Failed
from syntriever.llm import Reply, Request, Teacher


class ReplayTeacher:
    """Recorded answers of `datasets/recorded/<dataset>/`, looked up by the query's text.

    `synthesis.jsonl` holds cot, positive, negative and verdict; `preferences.jsonl` a ranking with
    ties, from which pairwise verdicts follow. What was not recorded has the reason `not_recorded`.
    """

    model, live, concurrency = "replay", False, 64

    def __init__(self, ds: str) -> None:
        folder = paths.recorded(ds)
        if not folder.is_dir():
            raise BadInput(f"--llm replay: no recorded answers ship for {ds}. Set OPENAI_API_KEY, or try --llm smollm2")
        self._rows = {row["query"]: row for row in jsonl.read(folder / "synthesis.jsonl", {"query": str})}
        self._ranks = {
            row["query"]: {passage: rank for rank, tied in enumerate(row["ranking"]) for passage in tied}
            for row in jsonl.read(folder / "preferences.jsonl", {"query": str, "ranking": list})
        }

    async def answer(self, request: Request) -> Reply:
        query = request.item[0]
        if request.step == "compare":
            first, second = (self._ranks.get(query, {}).get(passage) for passage in request.item[1:])
            if first is None or second is None:
                return Reply(reason="not_recorded")
            return Reply("tie" if first == second else "1" if first < second else "2", finish_reason="stop")
        row = self._rows.get(query)
        if row is None:
            return Reply(reason="not_recorded")
        text = ("yes" if row["verified"] else "no") if request.step == "verify" else row[request.step]
        return Reply(text, finish_reason="stop")

    async def close(self) -> None:
        pass


class OpenAITeacher:
    """Any OpenAI-compatible server through the official client. The key comes from the environment.

    The first request goes alone: a wrong key, model or address costs one request. 429 pauses all
    workers and does not count as an attempt. What ends the run is raised once and stops the rest.
    """

    live = True

    def __init__(self, model: str, base_url: str | None, concurrency: int, attempts: int, timeout: float) -> None:
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not base_url:
            raise BadInput(
                f"--llm {model}: OPENAI_API_KEY is not set. Set it, or point --base-url at a local server, or use --llm smollm2"
            )
        # Retries are ours: one pause for all workers, and every attempt counted.
        self._client = openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self.model, self.concurrency, self._attempts = model, concurrency, attempts
        self._limit_name = "max_tokens" if base_url else "max_completion_tokens"
        self._send_temperature = True
        self._slots = asyncio.Semaphore(concurrency)
        self._probe = asyncio.Lock()
        self._proven = False
        self._stopped: BadInput | Failed | None = None
        self._paused_until = 0.0
        self._lost = 0  # requests in a row that got no answer at all

    async def answer(self, request: Request) -> Reply:
        if not self._proven:
            async with self._probe:
                if not self._proven:
                    reply = await self._answer(request)
                    if not reply.finish_reason:
                        raise self._stop(Failed(f"the server at {self._client.base_url} does not answer ({reply.reason})"))
                    self._proven = True
                    return reply
        async with self._slots:
            return await self._answer(request)

    async def _answer(self, request: Request) -> Reply:
        reply = await self._try_often(request)
        self._lost = 0 if reply.finish_reason else self._lost + 1
        if self._lost > max(20, self.concurrency):
            raise self._stop(Failed(f"{self._lost} requests in a row got no answer ({reply.reason}); run again to go on"))
        return reply

    async def close(self) -> None:
        await self._client.close()

    def _stop(self, error: BadInput | Failed) -> BadInput | Failed:
        self._stopped = error
        return error

    async def _try_often(self, request: Request) -> Reply:
        import openai

        attempt, reason, since = 1, "", time.monotonic()
        while True:
            while (wait := self._paused_until - time.monotonic()) > 0:
                # Workers wake spread out, or they would run into the same limit together.
                await asyncio.sleep(wait + random.random() * min(1.0, 0.01 * self.concurrency))
            if self._stopped:
                raise self._stopped
            wait = random.uniform(0.5, 1.0) * min(60.0, 2.0 ** (attempt - 1))
            sent = self._limit_name, self._send_temperature
            try:
                return replace(_read(await self._send(request, *sent)), attempts=attempt)
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    message = f"{self.model}: the account's quota is used up; add credit and run again"
                    raise self._stop(Failed(message)) from None
                self._pause(_retry_after(error, wait))
                if time.monotonic() - since < RATE_LIMIT_PATIENCE:
                    continue
                reason = "rate_limited"
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                raise self._stop(BadInput(f"--llm {self.model}: the server refused the key in OPENAI_API_KEY")) from None
            except openai.NotFoundError:
                message = f"--llm {self.model}: the server at {self._client.base_url} has no such model (or no such path)"
                raise self._stop(BadInput(message)) from None
            except openai.APITimeoutError:
                reason = "timeout"
            except openai.APIStatusError as error:
                if self._adapt(error, *sent):
                    continue
                if error.status_code < 500 and error.status_code not in (408, 409):
                    return Reply(reason=_refused(error), finish_reason="error", attempts=attempt)
                reason = f"http_{error.status_code}"
                wait = _retry_after(error, wait)
            except openai.APIConnectionError:
                reason = "connection"
            except (openai.APIError, ValueError):  # HTML, cut-off JSON, no choices
                reason = "bad_body"
            if attempt >= self._attempts:
                return Reply(reason=reason, attempts=attempt)
            attempt += 1
            await asyncio.sleep(wait)

    def _pause(self, seconds: float) -> None:
        """Hold all workers for as long as the server asked."""
        if seconds > RATE_LIMIT_PATIENCE:
            raise self._stop(Failed(f"{self.model}: the server asks to wait {seconds:,.0f} s; run again later"))
        if seconds > 5 and time.monotonic() + seconds > self._paused_until + 1:
            stage.say(f"note:  the server asks to wait {seconds:.0f} s")
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def _send(self, request: Request, limit_name: str, send_temperature: bool) -> Any:
        settings: dict[str, Any] = {limit_name: request.max_tokens}
        if send_temperature:
            settings["temperature"] = request.temperature
        messages = [{"role": "user", "content": request.prompt}]
        return await self._client.chat.completions.create(model=self.model, messages=messages, **settings)  # type: ignore[arg-type]

    def _adapt(self, error: Any, limit_name: str, send_temperature: bool) -> bool:
        """Change a setting that this model refused, aloud; False where that was not the error."""
        if error.status_code != 400:
            return False
        message = str(error.message)
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}[limit_name]
        if limit_name in message and other in message:
            if self._limit_name == limit_name:
                stage.say(f"note:  {self.model} takes {other} instead of {limit_name}")
                self._limit_name = other
            return True
        if "temperature" in message and send_temperature:
            if self._send_temperature:
                stage.say(f"note:  {self.model} takes no temperature; its default is used")
                self._send_temperature = False
            return True
        return False


# Seconds of being told to wait (429) after which a request, or the whole run, gives up.
RATE_LIMIT_PATIENCE = 900.0


def _refused(error: Any) -> str:
    """Why a server refuses one request for good (4xx)."""
    message = str(error.message).lower()
    if error.code == "context_length_exceeded" or "context length" in message or "maximum context" in message:
        return "context_length"
    return "content_filter" if error.code == "content_filter" else "bad_request"


def _read(completion: Any) -> Reply:
    """Reply of a chat completion; `ValueError` where the body is not one."""
    try:
        choice, usage = completion.choices[0], completion.usage
        text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None)
        finish = choice.finish_reason or "stop"
        tokens = {name: int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")}
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair could not be stored
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError("not a chat completion") from error
    reason = ""
    if refusal:
        reason = "refusal"
    elif finish in ("length", "content_filter"):
        reason = finish
    elif not text.strip():
        reason = "empty"
    return Reply(text.strip(), reason, finish, **tokens)


def _retry_after(error: Any, default: float) -> float:
    """Seconds to wait that the server asked for: `retry-after-ms`, seconds, or an HTTP date."""
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        value = headers.get("retry-after", "")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return default


def default_llm(ds: str, wanted: str | None, base_url: str | None = None) -> str:
    """The teacher's name: as asked for, else gpt-4o, else the recorded answers where no key or
    server is given."""
    if wanted:
        return wanted
    if base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY") or not paths.recorded(ds).is_dir():
        return "gpt-4o"
    stage.say(f"note:  OPENAI_API_KEY is not set; using the recorded answers that ship for {ds} (--llm replay)")
    return "replay"


def make_teacher(name: str, ds: str, args: argparse.Namespace) -> Teacher:
    """Teacher by name: `replay`, a local model (`smollm2`, a path, `hf:<Hub id>`), else an API model."""
    if name == "replay":
        return ReplayTeacher(ds)
    if name == "smollm2" or name.startswith("hf:") or os.path.isdir(name):
        from syntriever.local_llm import LocalTeacher

        return LocalTeacher(name, batch_size=args.local_batch_size, seed=args.seed)
    return OpenAITeacher(name, args.base_url, args.concurrency, args.attempts, args.timeout)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of both LLM stages."""
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--llm",
        help="gpt-4o or any model of the server; replay (recorded answers); smollm2, hf:<Hub id> or a folder (runs here). "
        "Default: gpt-4o, or replay where recorded answers ship with the dataset and OPENAI_API_KEY is not set",
    )
    group.add_argument("--base-url", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: OPENAI_BASE_URL)")
    group.add_argument("--concurrency", type=int, default=64, help="requests in flight at once (default: %(default)s)")
    group.add_argument("--attempts", type=int, default=6, help="tries per request on 429, 5xx, timeouts (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=120, help="seconds to wait for one reply (default: %(default)s)")
    group.add_argument("--max-requests", type=int, help="stop after this many paid requests (default: no limit)")
    group.add_argument("--retry-failed", action="store_true", help="ask again what was refused, truncated or filtered before")
    group.add_argument(
        "--max-failure-rate", type=float, default=0.1, help="exit 1 when a larger share of rows failed (default: %(default)s)"
    )
    group.add_argument(
        "--local-batch-size", type=int, default=32, help="prompts per batch of a local model (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=42, help="seed of shuffles and sampling (default: %(default)s)")


def check_options(args: argparse.Namespace) -> None:
    for name in ("concurrency", "attempts", "timeout", "local_batch_size"):
        if getattr(args, name) <= 0:
            raise BadInput(f"--{name.replace('_', '-')} must be positive")
    if not 0 <= args.max_failure_rate <= 1:
        raise BadInput("--max-failure-rate is a share between 0 and 1")
