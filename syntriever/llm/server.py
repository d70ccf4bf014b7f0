"""A teacher behind OpenAI's HTTP API: OpenAI itself, Azure, vLLM, Ollama, llama.cpp and their kin."""

import asyncio
import itertools
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.llm import address, refusals, replies
from syntriever.llm.ledger import Request
from syntriever.llm.pace import Pace
from syntriever.llm.refusals import Refusal
from syntriever.llm.replies import Reply
from syntriever.run import terminal

# Seconds of being told to wait (429) after which a request, or the whole run, gives up.
RATE_LIMIT_PATIENCE = 900.0
# Refusals in the same words, one after the other, after which no other request is tried.
ALIKE = 20
# Tokens whose probabilities are asked for: the most that OpenAI and vLLM give.
TOP_LOGPROBS = 20
# What is said of a setting that the server refuses.
WITHOUT = {
    "response_format": "takes no JSON schema; replies are read from plain text",
    "logprobs": "gives no log-probabilities",
    "temperature": "takes no temperature; its default is used",
    "temperature 0": "takes no temperature of 0; its default is used for verdicts",
    "max_tokens": "takes max_completion_tokens instead of max_tokens",
    "max_completion_tokens": "takes max_tokens instead of max_completion_tokens",
}


class OpenAITeacher:
    """Asks through the official client. The key comes from the environment.

    The first request goes alone: a wrong key, model or address costs one request. 429 pauses all
    workers and does not count as an attempt. What ends the run is raised once and stops the rest.
    A setting that the server refuses is done without, after one line that says so.
    """

    live = True

    def __init__(self, model: str, at: address.Address, concurrency: int, attempts: int, timeout: float) -> None:
        import httpx2
        import openai

        self._address = at
        # Retries are ours: one pause for all workers, and every attempt counted. A connection for each
        # worker stays open, where the client's default keeps 100; a client looks through all of its own at
        # every request, so that several with few each take a fraction of the time of one with many.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
        patience = httpx2.Timeout(timeout, connect=min(timeout, 15.0))
        how: dict[str, Any] = {"limits": limits, "timeout": patience, "trust_env": not at.here}
        self.azure, self.options = self._address.azure, {**self._address.options, "max_retries": 0, "timeout": patience}
        client: Any = openai.AsyncAzureOpenAI if self.azure else openai.AsyncOpenAI
        try:
            self._clients = [
                client(**self.options, http_client=openai.DefaultAsyncHttpxClient(**how))
                for _ in range(math.ceil(concurrency / 64))
            ]
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise address.wrong_proxy(error) from None
        self._turns, self._response = itertools.cycle(self._clients), httpx2.Response
        self._keys = [key for key in map(self.options.get, ("api_key", "azure_ad_token")) if key and key != address.NO_KEY]
        self.model, self.concurrency, self._attempts = model, concurrency, attempts
        self._limit_name = "max_tokens" if self._address.given else "max_completion_tokens"
        self._without: frozenset[str] = frozenset()  # settings that the server has refused
        self._said: set[str] = set()
        self._slots = asyncio.Semaphore(concurrency)
        self._pace = Pace(concurrency)
        self._probe = asyncio.Lock()
        self.proven = False
        self._stopped: BadInput | Failed | None = None
        self._paused_until = 0.0
        self._lost = 0  # requests in a row that got no answer at all
        self._alike, self._refused = 0, ""  # refusals in a row in the same words, and these

    async def answer(self, request: Request) -> Reply:
        if not self.proven:
            async with self._probe:
                if not self.proven:
                    reply = await self._answer(request)
                    if not reply.finish_reason:
                        raise self._stop(Failed(f"{self.where} does not answer ({_why(reply)})"))
                    self.proven = True
                    return reply
        async with self._slots:
            return await self._answer(request)

    async def _answer(self, request: Request) -> Reply:
        reply = await self._try_often(request)
        self._lost = 0 if reply.finish_reason else self._lost + 1
        if self._lost > max(20, self.concurrency):
            raise self._stop(Failed(f"{self._lost} requests in a row got no answer ({_why(reply)}); run again to go on"))
        if hopeless := self.hopeless(reply, first=not self.proven):
            raise self._stop(hopeless)
        return reply

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    @property
    def base_url(self) -> Any:
        return self._clients[0].base_url

    @property
    def where(self) -> str:
        """The server as messages name it, with the proxy on the way."""
        return f"the server at {address.shown(self.base_url)}" + (f", asked through {self.proxy}," if self.proxy else "")

    @property
    def proxy(self) -> str:
        return "" if self._address.here else address.proxy_of(self.base_url)

    def _stop(self, error: BadInput | Failed) -> BadInput | Failed:
        self._stopped = error
        return error

    def body(self, request: Request, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The request as JSON, with the settings that this server has not refused."""
        without |= self._without
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": request.prompt}]}
        limit = self._limit_name
        body[refusals.LIMITS[limit] if limit in without else limit] = request.max_tokens
        if "temperature" not in without and (request.temperature or "temperature 0" not in without):
            body["temperature"] = request.temperature
        if request.logprobs and "logprobs" not in without:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if (properties := request.properties) and "response_format" not in without:
            schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
            named = {"name": "grades" if request.fields else "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    async def _send(self, body: dict[str, Any]) -> Any:
        """One HTTP exchange. The client's typed models are passed by: they double its work."""
        return await next(self._turns).post("/chat/completions", body=body, cast_to=self._response)

    async def _try_often(self, request: Request) -> Reply:
        import openai

        attempt, since, without = 1, time.monotonic(), frozenset[str]()
        while True:
            await self._pace.turn()
            while (wait := self._paused_until - time.monotonic()) > 0:
                # Workers wake spread out, or they would run into the same limit together.
                await asyncio.sleep(wait + random.random() * min(1.0, 0.01 * self.concurrency))
            if self._stopped:
                raise self._stopped
            wait = random.uniform(0.5, 1.0) * min(60.0, 2.0 ** (attempt - 1))
            body, response = self.body(request, without), None
            try:
                response = await self._send(body)
                completion = response.json()
                refusal = self.refusal(200, completion)
                if not refusal:
                    reply = replace(self.read(request, completion), attempts=attempt)
                    self._pace.heard(response.headers, reply.prompt_tokens + reply.completion_tokens)
                    self.do_without(without)
                    return reply
            except openai.APIStatusError as error:
                response = error.response
                refusal = self.refusal(response.status_code, refusals.body_of(response))
            except openai.APIConnectionError as error:
                refusal = self._unreached(error)
            except (openai.APIError, ValueError, RecursionError):  # HTML, cut-off JSON, no choices
                page = refusals.read(0, getattr(response, "text", ""), self._keys)
                refusal = Refusal("bad_body", page.words)
            assert refusal
            if refusal.reason == "rate_limited":
                self._pause(_retry_after(response, wait))
                if time.monotonic() - since < RATE_LIMIT_PATIENCE:
                    continue
            if refusal.reason == "not_found" and not self.proven and self.model not in refusal.words and self.add_version():
                continue
            if fatal := self.fatal(refusal):
                raise self._stop(fatal)
            if name := refusal.setting(body, without | self._without):
                without |= {name}
                continue
            if refusal.reason in refusals.OF_A_REQUEST:
                return Reply(reason=refusal.reason, finish_reason="error", attempts=attempt, message=refusal.words)
            if attempt >= self._attempts:
                return Reply(reason=refusal.reason, attempts=attempt, message=refusal.words)
            attempt += 1
            await asyncio.sleep(min(60.0, _retry_after(response, wait)) if refusal.reason != "rate_limited" else wait)

    def _pause(self, seconds: float) -> None:
        """Hold all workers for as long as the server asked."""
        if seconds > RATE_LIMIT_PATIENCE:
            raise self._stop(Failed(f"{self.model}: the server asks to wait {seconds:,.0f} s; run again later"))
        if seconds > 5 and time.monotonic() + seconds > self._paused_until + 1:
            terminal.say(f"note:  the server asks to wait {seconds:.0f} s")
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def refusal(self, status: int, body: Any) -> Refusal | None:
        """What the server refuses; None where it answers."""
        return refusals.inside(body, self._keys) if status == 200 else refusals.read(status, body, self._keys)

    def _unreached(self, error: Any) -> Refusal:
        """What an error of the connection means; one that a proxy makes of the first request ends the run."""
        import httpx2
        import openai

        cause = error.__cause__
        words = refusals.spoken(str(cause or error) or type(cause).__name__, self._keys)
        if self.proxy and not self.proven and isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            how = "correct it, unset it, or name the server in NO_PROXY"
            raise self._stop(BadInput(f"{self.proxy} does not answer, or lets nothing through ({words}): {how}"))
        return Refusal("timeout" if isinstance(error, openai.APITimeoutError) else "connection", words)

    def fatal(self, refusal: Refusal) -> BadInput | Failed | None:
        """The error of a refusal after which no other request can succeed."""
        said = f": {refusal.words}" if refusal.words else ""
        if refusal.reason == "no_credit":
            return Failed(
                f"{self.model}: the account's quota or credit is used up, or it is closed; add credit and run again{said}"
            )
        if refusal.reason == "proxy":
            return BadInput(f"{self.proxy or 'the proxy'} wants a name and a password{said}")
        if refusal.reason == "no_access":
            name = self._address.key_name
            key = f"refused the key in {name}, or what it may do" if self._keys else f"wants the key of an account, in {name}"
            return BadInput(f"--llm {self.model}: {self.where} {key}{said}")
        if refusal.reason == "not_found":
            return BadInput(f"--llm {self.model}: {self.where} has no such model (or no such path){said}")
        return None

    def hopeless(self, reply: Reply, first: bool) -> BadInput | None:
        """The error of a refused request where others will fare no better: it was the first, or the last of many that
        were refused in the same words. What is about the text of one request does not count."""
        if reply.reason != "bad_request":
            if reply.finish_reason and reply.reason not in refusals.OF_A_TEXT:
                self._alike = 0
            return None
        words = re.sub(r"\w*\d\w*", "", reply.message)
        self._alike, self._refused = self._alike + 1 if words == self._refused else 1, words
        if first:
            return BadInput(f"--llm {self.model}: {self.where} refused the first request: {reply.message}")
        if self._alike < ALIKE:
            return None
        again = "Once that is mended, --retry-failed asks them again"
        return BadInput(f"--llm {self.model}: {self.where} refused {ALIKE} requests in a row: {reply.message}. {again}")

    def do_without(self, names: frozenset[str]) -> None:
        """Leave these settings out from now on."""
        for name in names - self._without:
            self._once(name, WITHOUT[name])
        self._without |= names

    def add_version(self) -> bool:
        """Go on at /v1 of an address that names no version; False where there is nothing to add."""
        if self.azure or re.search(r"/v\d", str(self.base_url.path)):
            return False
        terminal.say(f"note:  {self.where} has no such path; trying {address.shown(self.base_url)}/v1")
        for client in self._clients:
            client.base_url = f"{str(client.base_url).rstrip('/')}/v1"
        return True

    def _once(self, what: str, said: str) -> None:
        if what not in self._said:
            self._said.add(what)
            terminal.say(f"note:  {self.model} {said}")

    def read(self, request: Request, completion: Any) -> Reply:
        """Reply of a chat completion, not yet judged; `ValueError` where the JSON is not one."""
        reply = replies.read(completion, request.prompt)
        if request.logprobs and reply.text and not completion["choices"][0].get("logprobs"):  # before it gets into a ledger
            raise self._stop(Failed(f"{self.where} gives no log-probabilities for {self.model}: leave out --pointwise"))
        if not completion.get("usage"):
            self._once("usage", "reports no usage; tokens and cost are estimates (four bytes a token)")
        return reply


def _why(reply: Reply) -> str:
    return f"{reply.reason}: {reply.message}" if reply.message else reply.reason


def _retry_after(response: Any, default: float) -> float:
    """Seconds to wait that the server asked for: `retry-after-ms`, seconds, or an HTTP date."""
    headers: Mapping[str, str] = response.headers if response is not None else {}
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        value = headers.get("retry-after", "")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return default
