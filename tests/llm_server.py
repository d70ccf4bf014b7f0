"""Loopback server that speaks OpenAI's HTTP API, fails by script and keeps a ledger, for tests and benchmarks.

In a test      with LLMServer(reply=lambda body: "yes", faults={"429": 0.3}) as server: ... server.url ...
As a process   python tests/llm_server.py --port-file FILE --ledger FILE [--latency 0.2] [--faults 429=0.3,reset=0.1]
Ledger rows    {"t", "event": "received" | "answered", "key", "status", "fault"}; `key` is `request_key(body)` of a chat
               request, also of one inside a batch, and "METHOD /path" of anything else; `fault` is "rpm" above that
               limit. "answered": the kernel has taken the whole answer, and the client had not hung up before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

Body = dict[str, Any]

# What a fault changes in an answer that is otherwise good.
SHAPES: dict[str, Body] = {
    "empty": {"content": ""},
    "null": {"content": None},
    "length": {"finish_reason": "length"},
    "content_filter": {"content": "", "finish_reason": "content_filter"},
    "refusal": {"content": None, "refusal": "I'm sorry, but I can't help with that."},
}
ERRORS = {"429", "429-date", "429-ms", "insufficient_quota", "500", "context"}
FAULTS = {*SHAPES, *ERRORS, "502-html", "bad-json", "cut-json", "timeout", "reset", "truncated", "slow"}
BATCH_FAULTS = {*SHAPES, *ERRORS, "expired", "missing"}
WORDS = "amber basin cedar delta ember fjord grove harbor island jetty kelp lagoon meadow north orchard prairie".split()  # noqa: SIM905


class Answer(NamedTuple):
    """A dict is sent as JSON, bytes as HTML unless the headers say otherwise."""

    status: int
    body: Body | bytes
    headers: Mapping[str, str] = {}


def request_key(body: Any) -> str:
    """sha256 of all that was asked for: model, messages and settings, in whatever order."""
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def default_verdict(prompt: str, digest: bytes) -> str | None:
    """The toss of a coin where the prompt asks for a verdict, else None."""
    if re.search(r"\byes\W+or\W+no\b", prompt, re.I):
        return ("yes", "no")[digest[0] % 2]
    if re.search(r"\b1\W+(or\W+)?2\W+(or\W+)?tie\b", prompt, re.I):
        return ("1", "2", "tie")[digest[0] % 3]
    return None


def default_reply(body: Body, verdict: Callable[[str, bytes], str | None] = default_verdict) -> str:
    """A verdict, the lines that a prompt ends in (`label: ...`) filled in, a grade a line, or a passage of 34 words; always
    the same for the same messages."""
    digest = bytes.fromhex(request_key(body["messages"]))
    prompts = [str(message.get("content")) for message in body["messages"] if message.get("role") == "user"]
    passage = f"Passage {digest.hex()[:8]}: {' '.join(WORDS[byte % len(WORDS)] for byte in digest)}."
    labels = re.findall(r"^(\w+): \.\.\.$", prompts[-1], re.M) if prompts else []
    lines = (f"{label}: {WORDS[digest[n] % len(WORDS)]} {digest.hex()[:8]} {n}" for n, label in enumerate(labels))
    graded = re.search(r"one line for each of the (\d+) passages", prompts[-1]) if prompts else None
    grades = (f"{n}: {digest[n % 32] % 4}" for n in range(1, int(graded[1]) + 1 if graded else 0))
    return "\n".join((*lines, *grades)) or (verdict(prompts[-1], digest) if prompts else None) or passage


def failure(status: int, message: str, code: str | None, headers: Mapping[str, str] = {}) -> Answer:
    """OpenAI's error JSON."""
    kind = "server_error" if status >= 500 else code if status == 429 else "invalid_request_error"
    return Answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers)


def completion(body: Body, reply: str | Body, fault: str | None, retry_after: float) -> Answer:
    """The chat completion that says `reply`, or what `fault` makes of it."""
    prompt_tokens = sum(len(str(message.get("content")).split()) for message in body["messages"])
    match fault:
        case "429":
            return failure(429, "Rate limit reached.", "rate_limit_exceeded", {"retry-after": f"{retry_after:g}"})
        case "429-date":
            date = formatdate(math.ceil(time.time() + retry_after), usegmt=True)
            return failure(429, "Rate limit reached.", "rate_limit_exceeded", {"retry-after": date})
        case "429-ms":
            return failure(429, "Rate limit reached.", "rate_limit_exceeded", {"retry-after-ms": f"{retry_after * 1000:.0f}"})
        case "insufficient_quota":
            return failure(429, "You exceeded your current quota, please check your plan.", "insufficient_quota")
        case "500":
            return failure(500, "The server had an error while processing your request.", None)
        case "context":
            excess = f"This model's maximum context length is 8 tokens. However, your messages have {prompt_tokens} tokens."
            return failure(400, excess, "context_length_exceeded")
        case "502-html" | "bad-json":
            return Answer(502 if fault == "502-html" else 200, b"<html><body><h1>Bad gateway</h1></body></html>")
        case "cut-json":
            return Answer(200, b'{"id": "chatcmpl-1", "choices": [{"mess', {"content-type": "application/json"})
    made: Body = {"content": "", "finish_reason": "stop", "refusal": None}
    made |= (reply if isinstance(reply, dict) else {"content": reply}) | SHAPES.get(fault or "", {})
    message = {"role": "assistant", "content": made["content"], "refusal": made["refusal"]}
    tokens = len((made["content"] or "").split())
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": made["finish_reason"]}]
    facts = {"id": f"chatcmpl-{request_key(body)[:24]}", "object": "chat.completion", "created": int(time.time())}
    return Answer(200, {**facts, "model": body["model"], "choices": choices, "usage": usage})


def said(content: Any, finish: Any = "stop", **fields: Any) -> Answer:
    """A completion with this content and finish reason, whatever they are; `fields` stand beside the content."""
    message = {"role": "assistant", "content": content, **fields}
    usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
    return Answer(200, {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage})


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """The next request of a connection: "METHOD /path?query", headers (names in lower case) and body."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")[:-4].split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first.rpartition(" ")[0], headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def client_leaves(reader: asyncio.StreamReader, seconds: float | None) -> bool:
    """Wait so long; True, at once, when the client hangs up. None waits for just that."""
    if seconds == 0:
        return reader.at_eof()
    try:
        async with asyncio.timeout(seconds):
            await reader.read(1)  # clients send nothing more before the answer, so this is the end
            return True
    except TimeoutError:
        return False


def uploaded(content_type: str, raw: bytes) -> tuple[str, bytes]:
    """Name and content of the file in a multipart form."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    for part in (b"\r\n" + raw).split(b"\r\n--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        if name := re.search(rb'filename="([^"]*)"', head):
            return name[1].decode(), content
    raise ValueError("the form has no file")


def check_names(names: Iterable[str], known: set[str]) -> None:
    """Raise ValueError where a fault's name is not a known one."""
    if unknown := set(names) - known:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")


@dataclass(eq=False)
class LLMServer:
    """OpenAI-compatible server on 127.0.0.1, in a thread of its own while a `with` block lasts.

    `url`, `port`, `rows` (the ledger), `requests` (bodies), `headers_seen`, `targets` ("METHOD /path?query"), `batches`,
    `in_flight` and `in_flight_peak` may be read at any time, the counts also after the block.
    """

    reply: Callable[[Body], str | Body] = default_reply  # content; or a dict of content, finish_reason, refusal
    fault: Callable[[Body, int], str | None] | None = None  # of FAULTS, by body and attempt (1, 2, ...) at that body
    faults: Mapping[str, float] = field(default_factory=dict)  # name: share, drawn by hash(seed, key, attempt)
    # An answer of its own to a body and attempt, in place of a completion, also inside a batch; None leaves it at that.
    says: Callable[[Body, int], Answer | None] = lambda body, attempt: None
    root: str = "/v1"  # or "/openai", with the paths of Azure
    seed: int = 0
    latency: float | Callable[[Body], float] = 0.0  # seconds
    retry_after: float = 1.0  # seconds that the 429 faults ask for
    api_key: str | None = None  # anything else gets 401
    models: list[str] | None = None  # anything else gets 404
    rpm: int | None = None  # requests a minute, enforced second by second as OpenAI does
    tpm: int = 2_000_000  # tokens a minute: announced along with rpm, not enforced
    ledger: Path | str | None = None  # file to append `rows` to
    fsync: bool = True  # of that file, after each row
    # "reset" or "truncated", by "METHOD /path" of what is no chat: the server has acted, and its answer is lost.
    other_fault: Callable[[str], str | None] = lambda what: None
    batch_polls: int = 1  # polls that find a batch unfinished
    # Of BATCH_FAULTS, by custom_id and body. An expired line stands in the error file, a missing one nowhere.
    batch_fault: Callable[[str, Body], str | None] = lambda custom_id, body: None

    def __post_init__(self) -> None:
        check_names(self.faults, FAULTS)
        self.requests: list[Body] = []
        self.headers_seen: list[dict[str, str]] = []
        self.targets: list[str] = []
        self.batches: dict[str, Body] = {}
        self.in_flight = self.in_flight_peak = 0
        self._rows: list[Body] = []
        self._attempts: Counter[str] = Counter()
        self._files: dict[str, bytes] = {}
        self._lines: dict[str, list[Body]] = {}
        self._slots, self._refilled = math.inf, 0.0
        self._error: Exception | None = None

    # ---- life

    def __enter__(self) -> LLMServer:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(self.ledger, flags, 0o644) if self.ledger else None
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()
        if self._file is not None:
            os.close(self._file)
        if self._error and kind is None:  # a broken script of the test must not pass for a 500
            raise self._error

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, sock=self._socket, backlog=2048)
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    @property
    def rows(self) -> list[Body]:
        """The ledger so far. Asked for through the loop, so that the answers the caller already has are in it."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result()
        return list(self._rows)

    def _note(self, event: str, key: str, status: int | None, fault: str | None) -> None:
        self._rows.append({"t": time.time(), "event": event, "key": key, "status": status, "fault": fault})
        if self._file is not None:
            os.write(self._file, json.dumps(self._rows[-1]).encode() + b"\n")

    async def _sync(self) -> None:
        if self._file is not None and self.fsync:
            await asyncio.to_thread(os.fsync, self._file)

    # ---- connections

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # drain() then waits for the last byte
        try:
            while await self._exchange(*await read_request(reader), reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the server stops: Python 3.11 logs a cancelled handler as an error
        finally:
            writer.transport.abort()

    async def _exchange(
        self, what: str, headers: dict[str, str], raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request. False ends the connection."""
        self.headers_seen.append(headers)
        self.targets.append(what)
        what = re.sub(rf" {self.root}(/deployments/[^/]+)?/", " /v1/", what.partition("?")[0])
        self.in_flight += 1
        self.in_flight_peak = max(self.in_flight_peak, self.in_flight)
        try:
            key, fault, wait, answer = self._decide(what, headers, raw)
            self._note("received", key, None, fault)
            await self._sync()
            if await client_leaves(reader, None if fault == "timeout" else wait):
                return False
            if fault == "reset":  # lingering for 0 s makes the coming abort() a RST
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            writer.write(self._head(answer, len(body)) + (body[: len(body) // 2] if fault == "truncated" else body))
            await writer.drain()
            if fault == "truncated":
                return False
            self._note("answered", key, answer.status, fault)
        finally:
            self.in_flight -= 1
        await self._sync()
        return headers.get("connection", "").lower() != "close"

    def _head(self, answer: Answer, length: int) -> bytes:
        kind = "text/html" if isinstance(answer.body, bytes) else "application/json"
        fields = {"content-type": kind, "content-length": length, "x-request-id": f"req_{len(self._rows)}", **answer.headers}
        if self.rpm:
            fields |= {"x-ratelimit-limit-requests": self.rpm, "x-ratelimit-remaining-requests": int(self._slots)}
            fields |= {"x-ratelimit-limit-tokens": self.tpm}
        phrase = HTTPStatus(answer.status).phrase if answer.status in set(HTTPStatus) else "Unknown"
        first = f"HTTP/1.1 {answer.status} {phrase}\r\n"
        return (first + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n").encode()

    # ---- answers

    def _decide(self, what: str, headers: Mapping[str, str], raw: bytes) -> tuple[str, str | None, float, Answer]:
        """Key, fault, seconds to wait and answer of a request."""
        given = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        refused = None
        if self.api_key not in (None, given):  # unlike OpenAI, shows the whole key: a client must not pass that on
            refused = failure(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        try:
            if what == "POST /v1/chat/completions":
                return self._chat(json.loads(raw), refused)
            return what, self.other_fault(what), 0.0, refused or self._other(what, headers, raw)
        except Exception as error:
            self._error = self._error or error
            return what, None, 0.0, failure(500, f"bug in the test server or in its script: {error!r}", None)

    def _chat(self, body: Body, refused: Answer | None) -> tuple[str, str | None, float, Answer]:
        self.requests.append(body)
        key = request_key(body)
        if problem := refused or self._problem(body):
            return key, None, 0.0, problem
        if seconds := self._seconds_to_slot():
            wait = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
            return key, "rpm", 0.0, failure(429, "Rate limit reached.", "rate_limit_exceeded", wait)
        self._attempts[key] += 1
        fault = self.fault(body, self._attempts[key]) if self.fault else self._draw(key, self._attempts[key])
        check_names([fault] if fault else [], FAULTS)
        latency = self.latency(body) if callable(self.latency) else self.latency
        answer = self.says(body, self._attempts[key]) or completion(body, self.reply(body), fault, self.retry_after)
        return key, fault, latency * (10 if fault == "slow" else 1), answer

    def _problem(self, body: Body) -> Answer | None:
        for name in ("model", "messages"):
            if not body.get(name):
                return failure(400, f"Missing required parameter: '{name}'.", "missing_required_parameter")
        if self.models is not None and body["model"] not in self.models:
            return failure(404, f"The model `{body['model']}` does not exist or you do not have access to it.", "model_not_found")
        return None

    def _seconds_to_slot(self) -> float:
        """0 takes a slot. They come back at `rpm` a minute; what comes in a second is the most that is kept."""
        if not self.rpm:
            return 0.0
        now, rate = time.monotonic(), self.rpm / 60
        self._slots = min(max(1.0, rate), self._slots + (now - self._refilled) * rate)
        self._refilled = now
        if self._slots < 1:
            return (1 - self._slots) / rate
        self._slots -= 1
        return 0.0

    def _draw(self, key: str, attempt: int) -> str | None:
        point = int(sha256(f"{self.seed} {key} {attempt}".encode()).hexdigest()[:12], 16) / 16**12
        for name, share in self.faults.items():
            point -= share
            if point < 0:
                return name
        return None

    def _other(self, what: str, headers: Mapping[str, str], raw: bytes) -> Answer:
        """Models, files and batches."""
        match what.replace(" /v1/", "/").split("/"):
            case "GET", "models":
                rows = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.models or ["test"]]
                return Answer(200, {"object": "list", "data": rows})
            case "POST", "files":
                return Answer(200, self._store(*uploaded(headers["content-type"], raw)))
            case "GET", "files", name, "content" if name in self._files:
                return Answer(200, self._files[name])
            case "POST", "batches":
                return Answer(200, self._new_batch(json.loads(raw)))
            case "GET", "batches":
                return Answer(200, {"object": "list", "data": list(self.batches.values()), "has_more": False})
            case "GET", "batches", name if name in self.batches:
                return Answer(200, self._poll(self.batches[name]))
            case "POST", "batches", name, "cancel" if name in self.batches:
                if self.batches[name]["status"] in ("validating", "in_progress"):
                    self.batches[name]["status"] = "cancelling"
                return Answer(200, self.batches[name])
        return failure(404, f"Invalid URL ({what})", "unknown_url")

    # ---- files and batches

    def _store(self, name: str, content: bytes) -> Body:
        self._files[file_id := f"file-{len(self._files) + 1}"] = content
        facts = {"filename": name, "bytes": len(content), "created_at": int(time.time())}
        return {"id": file_id, "object": "file", "purpose": "batch", "status": "processed", **facts}

    def _new_batch(self, asked: Body) -> Body:
        batch: Body = {"id": f"batch_{len(self.batches) + 1}", "object": "batch", "status": "validating", **asked}
        batch |= {"created_at": int(time.time()), "output_file_id": None, "error_file_id": None, "errors": None, "polls": 0}
        lines = [json.loads(line) for line in self._files[asked["input_file_id"]].split(b"\n") if line.strip()]
        ids = {line["custom_id"] for line in lines}
        if len(ids) != len(lines) or max(map(len, ids), default=65) > 64 or len({line["body"]["model"] for line in lines}) > 1:
            error = {"code": "invalid_file", "message": "no line, an id twice or above 64 characters, or two models"}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        self.batches[batch["id"]], self._lines[batch["id"]] = batch, lines
        for line in lines if batch["status"] != "failed" else ():
            self.requests.append(line["body"])
            self._note("received", request_key(line["body"]), None, None)
        return batch

    def _poll(self, batch: Body) -> Body:
        lines = self._lines[batch["id"]]
        if batch["status"] == "cancelling":
            self._finish(batch, "cancelled", lines[: len(lines) // 2])
        elif batch["status"] in ("validating", "in_progress"):
            batch |= {"status": "in_progress", "polls": batch["polls"] + 1}
            if batch["polls"] > self.batch_polls:
                self._finish(batch, "completed", lines)
        return batch

    def _finish(self, batch: Body, status: str, lines: list[Body]) -> None:
        """Answer `lines` into an output and an error file, shuffled. A file without lines does not exist."""
        files: dict[str, list[Body]] = {"output": [], "error": []}
        for line in random.Random(f"{self.seed} {batch['id']}").sample(lines, len(lines)):
            body, fault = line["body"], self.batch_fault(line["custom_id"], line["body"])
            check_names([fault] if fault else [], BATCH_FAULTS)
            status = "expired" if fault in ("expired", "missing") else status
            row: Body = {"id": f"batch_req_{len(self._rows)}", "custom_id": line["custom_id"], "response": None, "error": None}
            if fault == "expired":
                row["error"] = {"code": "batch_expired", "message": "The window ended before this request could be executed."}
                files["error"].append(row)
            elif fault != "missing":
                answer = self._problem(body) or self.says(body, 1) or completion(body, self.reply(body), fault, self.retry_after)
                row["response"] = {"status_code": answer.status, "request_id": row["id"], "body": answer.body}
                if isinstance(answer.body, bytes):
                    row["response"]["body"] = answer.body.decode()
                files["output" if answer.status == 200 else "error"].append(row)
                self._note("answered", request_key(body), answer.status, fault)
        for name, rows in files.items():
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            batch[f"{name}_file_id"] = self._store(f"{name}.jsonl", content)["id"] if rows else None
        batch |= {"status": status, f"{status}_at": int(time.time())}
        batch["request_counts"] |= {"completed": len(files["output"]), "failed": len(files["error"])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port-file", type=Path, required=True, help="gets the port, in one piece, once the server listens")
    parser.add_argument("--ledger", type=Path, help="file to append the ledger to")
    parser.add_argument("--no-fsync", action="store_true", help="do not sync the ledger: for benchmarks")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per answer (default: %(default)s)")
    parser.add_argument("--faults", default="", metavar="NAME=SHARE,...", help=f"any of {', '.join(sorted(FAULTS))}")
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds that a 429 asks for (default: %(default)s)")
    parser.add_argument("--rpm", type=int, help="requests a minute (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="exit after this long (default: %(default)s)")
    args = parser.parse_args(argv)
    faults = {name: float(share) for name, _, share in (item.partition("=") for item in args.faults.split(",") if item)}
    script = {"seed": args.seed, "latency": args.latency, "retry_after": args.retry_after, "rpm": args.rpm, "faults": faults}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with LLMServer(**script, ledger=args.ledger, fsync=not args.no_fsync) as server:
        temporary = args.port_file.with_name(args.port_file.name + ".tmp")
        temporary.write_text(str(server.port))
        os.replace(temporary, args.port_file)
        time.sleep(args.max_seconds)


if __name__ == "__main__":
    main()
