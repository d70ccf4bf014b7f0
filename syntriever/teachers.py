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

    The first request goes alone: a wrong key or model costs one request. 429 pauses all workers.
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
        self._proven = False
        self._probe = asyncio.Lock()
        self._paused_until = 0.0

    async def answer(self, request: Request) -> Reply:
        if not self._proven:
            async with self._probe:
                if not self._proven:
                    reply = await self._try_often(request)
                    self._proven = True
                    return reply
        async with self._slots:
            return await self._try_often(request)

    async def close(self) -> None:
        await self._client.close()

    async def _try_often(self, request: Request) -> Reply:
        import openai

        reason = ""
        for attempt in range(1, self._attempts + 1):
            while (wait := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait + random.random() * 0.1)
            backoff = random.uniform(0.5, 1.0) * min(60.0, 2.0 ** (attempt - 1))
            try:
                return replace(_read(await self._send(request)), attempts=attempt)
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise Failed(f"{self.model}: the account's quota is used up; add credit and run again") from None
                reason = "rate_limited"
                self._paused_until = max(self._paused_until, time.monotonic() + _retry_after(error, backoff))
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                raise BadInput(f"--llm {self.model}: the server refused the key in OPENAI_API_KEY") from None
            except openai.NotFoundError:
                raise BadInput(f"--llm {self.model}: the server at {self._client.base_url} has no such model") from None
            except openai.BadRequestError as error:
                if self._adapt(error):
                    continue
                return Reply(
                    reason="context_length" if error.code == "context_length_exceeded" else "bad_request", attempts=attempt
                )
            except openai.APITimeoutError:
                reason = "timeout"
            except openai.APIStatusError as error:
                reason = f"http_{error.status_code}"
            except openai.APIConnectionError:
                reason = "connection"
            except (openai.APIError, ValueError):  # HTML, cut-off JSON, no choices
                reason = "bad_body"
            if reason != "rate_limited":
                await asyncio.sleep(backoff)
        return Reply(reason=reason, attempts=self._attempts)

    async def _send(self, request: Request) -> Any:
        settings: dict[str, Any] = {self._limit_name: request.max_tokens}
        if self._send_temperature:
            settings["temperature"] = request.temperature
        messages = [{"role": "user", "content": request.prompt}]
        return await self._client.chat.completions.create(model=self.model, messages=messages, **settings)  # type: ignore[arg-type]

    def _adapt(self, error: Any) -> bool:
        """Drop a setting this model does not take, once and aloud; False where that is not the error."""
        message = str(error.message)
        if self._limit_name in message and "max_" in self._limit_name:
            other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}[self._limit_name]
            if other not in message:
                return False
            stage.say(f"note: {self.model} takes {other} instead of {self._limit_name}")
            self._limit_name = other
            return True
        if "temperature" in message and self._send_temperature:
            stage.say(f"note: {self.model} takes no temperature; its default is used")
            self._send_temperature = False
            return True
        return False


def _read(completion: Any) -> Reply:
    """Reply of a chat completion; `ValueError` where the body is not one."""
    if not getattr(completion, "choices", None):
        raise ValueError("no choices")
    choice = completion.choices[0]
    text, finish = choice.message.content or "", choice.finish_reason or "stop"
    reason = ""
    if getattr(choice.message, "refusal", None):
        reason = "refusal"
    elif finish in ("length", "content_filter"):
        reason = finish
    elif not text.strip():
        reason = "empty"
    usage = completion.usage
    return Reply(
        text=text.strip(),
        reason=reason,
        finish_reason=finish,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


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


def default_llm(ds: str, wanted: str | None) -> str:
    """The teacher's name: as asked for, else gpt-4o, else the recorded answers where no key is set."""
    if wanted:
        return wanted
    if os.environ.get("OPENAI_API_KEY") or not paths.recorded(ds).is_dir():
        return "gpt-4o"
    stage.say(f"note: OPENAI_API_KEY is not set; using the recorded answers that ship for {ds} (--llm replay)")
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
