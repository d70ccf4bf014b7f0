"""A teacher behind OpenAI's HTTP API: OpenAI itself, vLLM, Ollama, llama.cpp and their kin."""

import asyncio
import itertools
import math
import os
import random
import re
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.llm.ledger import Reply, Request
from syntriever.llm.pace import Pace
from syntriever.run import terminal

# Seconds of being told to wait (429) after which a request, or the whole run, gives up.
RATE_LIMIT_PATIENCE = 900.0


class OpenAITeacher:
    """Asks through the official client. The key comes from the environment.

    The first request goes alone: a wrong key, model or address costs one request. 429 pauses all
    workers and does not count as an attempt. What ends the run is raised once and stops the rest.
    A capability that the server lacks is done without, after one line that says so.
    """

    live = True

    def __init__(self, model: str, base_url: str | None, concurrency: int, attempts: int, timeout: float) -> None:
        import httpx2
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not base_url:
            raise BadInput(
                f"--llm {model}: OPENAI_API_KEY is not set. Set it, or point --base-url at a local server, or use --llm smollm2"
            )
        # Retries are ours: one pause for all workers, and every attempt counted. A connection for each
        # worker stays open, where the client's default keeps 100; a client looks through all of its own at
        # every request, so that several with few each take a fraction of the time of one with many.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
        patience = httpx2.Timeout(timeout, connect=min(timeout, 15.0))
        self.options: dict[str, Any] = {"api_key": key or "none", "base_url": base_url, "max_retries": 0, "timeout": patience}
        self._clients = [
            openai.AsyncOpenAI(**self.options, http_client=openai.DefaultAsyncHttpxClient(limits=limits, timeout=patience))
            for _ in range(math.ceil(concurrency / 64))
        ]
        self._client, self._turns = self._clients[0], itertools.cycle(self._clients)
        self._response = httpx2.Response
        self.model, self.concurrency, self._attempts = model, concurrency, attempts
        self._limit_name = "max_tokens" if base_url else "max_completion_tokens"
        self._takes_temperature = self._takes_schema = True
        self._adapted: set[str] = set()
        self._slots = asyncio.Semaphore(concurrency)
        self._pace = Pace(concurrency)
        self._probe = asyncio.Lock()
        self.proven = False
        self._stopped: BadInput | Failed | None = None
        self._paused_until = 0.0
        self._lost = 0  # requests in a row that got no answer at all

    async def answer(self, request: Request) -> Reply:
        if not self.proven:
            async with self._probe:
                if not self.proven:
                    reply = await self._answer(request)
                    if not reply.finish_reason:
                        raise self._stop(Failed(f"the server at {self._client.base_url} does not answer ({reply.reason})"))
                    self.proven = True
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
        for client in self._clients:
            await client.close()

    def _stop(self, error: BadInput | Failed) -> BadInput | Failed:
        self._stopped = error
        return error

    def body(self, request: Request) -> dict[str, Any]:
        """The request as JSON, with the settings that this server has not refused."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": request.prompt}]}
        body[self._limit_name] = request.max_tokens
        if self._takes_temperature:
            body["temperature"] = request.temperature
        if request.choices and self._takes_schema:
            verdict = {"verdict": {"type": "string", "enum": list(request.choices)}}
            schema = {"type": "object", "properties": verdict, "required": ["verdict"], "additionalProperties": False}
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            }
        return body

    async def _send(self, body: dict[str, Any]) -> Any:
        """One HTTP exchange. The client's typed models are passed by: they double its work."""
        return await next(self._turns).post("/chat/completions", body=body, cast_to=self._response)

    async def _try_often(self, request: Request) -> Reply:
        import openai

        attempt, reason, since = 1, "", time.monotonic()
        while True:
            await self._pace.turn()
            while (wait := self._paused_until - time.monotonic()) > 0:
                # Workers wake spread out, or they would run into the same limit together.
                await asyncio.sleep(wait + random.random() * min(1.0, 0.01 * self.concurrency))
            if self._stopped:
                raise self._stopped
            wait = random.uniform(0.5, 1.0) * min(60.0, 2.0 ** (attempt - 1))
            body = self.body(request)
            try:
                response = await self._send(body)
                reply = replace(self.read(request, response.json()), attempts=attempt)
                self._pace.heard(response.headers, reply.prompt_tokens + reply.completion_tokens)
                return reply
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise self._stop(Failed(used_up(self.model))) from None
                self._pause(_retry_after(error, wait))
                if time.monotonic() - since < RATE_LIMIT_PATIENCE:
                    continue
                reason = "rate_limited"
            except openai.APITimeoutError:
                reason = "timeout"
            except openai.APIStatusError as error:
                if fatal := self.fatal(error.status_code):
                    raise self._stop(fatal) from None
                problem: Any = error.body  # FastAPI's has no message, but all in "detail"
                message = str((isinstance(problem, dict) and problem.get("message")) or problem or error.message)
                if self.adapt(error.status_code, message, body):
                    continue
                if error.status_code < 500 and error.status_code not in (408, 409):
                    return Reply(reason=refusal(error.code, message), finish_reason="error", attempts=attempt)
                reason = f"http_{error.status_code}"
                wait = min(60.0, _retry_after(error, wait))
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
            terminal.say(f"note:  the server asks to wait {seconds:.0f} s")
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def fatal(self, status: int) -> BadInput | None:
        """The error of a status after which no other request can succeed."""
        if status in (401, 403):
            return BadInput(f"--llm {self.model}: the server refused the key in OPENAI_API_KEY")
        if status == 404:
            return BadInput(f"--llm {self.model}: the server at {self._client.base_url} has no such model (or no such path)")
        return None

    def adapt(self, status: int, message: str, body: dict[str, Any]) -> bool:
        """Do without a setting of `body` that the server refused; False where that was not the error."""
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        unknown = re.search("unsupported|not support|unrecogni|unknown|unexpected|extra|not permitted|instead", message, re.I)
        if status not in (400, 422):
            return False
        if "response_format" in body and re.search("response_format|json_schema|schema|structured|grammar", message, re.I):
            self._once("schema", "takes no JSON schema; verdicts are read from plain text")
            self._takes_schema = False
        elif not unknown:
            return False
        elif "temperature" in body and "temperature" in message:
            self._once("temperature", "takes no temperature; its default is used")
            self._takes_temperature = False
        elif name := next((name for name in other if name in body and re.search(rf"\b{name}\b", message)), None):
            if name in self._adapted:  # neither name is taken: another error
                return False
            if self._limit_name == name:
                self._once(other[name], f"takes {other[name]} instead of {name}")
                self._limit_name = other[name]
        else:
            return False
        return True

    def _once(self, what: str, said: str) -> None:
        if what not in self._adapted:
            self._adapted.add(what)
            terminal.say(f"note:  {self.model} {said}")

    def read(self, request: Request, completion: Any) -> Reply:
        """Reply of a chat completion; `ValueError` where the JSON is not one."""
        try:
            choice = completion["choices"][0]
            message, usage = choice["message"], completion.get("usage")
            text = (message.get("content") or "").encode("utf-8", "replace").decode()  # half a surrogate pair
            finish = str(choice.get("finish_reason") or "stop")
            if not usage:
                self._once("usage", "reports no usage; tokens and cost are estimates (four bytes a token)")
                usage = {"prompt_tokens": len(request.prompt.encode()) // 4, "completion_tokens": len(text.encode()) // 4}
            tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
            refused = bool(message.get("refusal"))
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError("not a chat completion") from error
        reason = ""
        if refused:
            reason = "refusal"
        elif finish in ("length", "content_filter"):
            reason = finish
        elif not text.strip():
            reason = "empty"
        return Reply(text.strip(), reason, finish, **tokens)


def used_up(model: str) -> str:
    return f"{model}: the account's quota is used up; add credit and run again"


def refusal(code: Any, message: str) -> str:
    """Why a server refuses one request for good (4xx)."""
    message = message.lower()
    if code == "context_length_exceeded" or "context length" in message or "maximum context" in message:
        return "context_length"
    return "content_filter" if code == "content_filter" else "bad_request"


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
