"""OpenAI's Batch API: half the price, replies within a day. Submit, exit, run again to collect."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed, Waiting
from syntriever.files import jsonl, paths
from syntriever.llm.cost import Meter
from syntriever.llm.ledger import Ledger, Reply, Request
from syntriever.llm.server import OpenAITeacher, refusal, used_up
from syntriever.llm.verdicts import checked
from syntriever.run import terminal

# OpenAI's limits on one input file.
MAX_REQUESTS = 50_000

MAX_BYTES = 200_000_000

# A server may have other names for the states before these.
ENDED = ("completed", "failed", "expired", "cancelled")

Entry = dict[str, Any]


class BatchTeacher:
    """Spools requests into input files, submits these, and in a later run puts what came back into
    the ledger, where the stage finds it. What did not come back is then asked for anew.

    The state file lists every batch that is not collected yet: the number of its input file here,
    that file's id at the server, the batch's id. Each is saved before the next step, so a kill loses
    none and submits none twice. Replies are joined on `custom_id` (step and ledger key) only.
    """

    live, concurrency = True, 64

    def __init__(self, teacher: OpenAITeacher, output: Path) -> None:
        import openai

        self.model = teacher.model
        self._teacher, self._client = teacher, openai.OpenAI(**{**teacher.options, "max_retries": 5})
        self._output, self._state = output, paths.batches(output)
        self._batches: list[Entry] = []
        self._spool: jsonl.Appender | None = None
        self._spooled: set[str] = set()
        self._room = 0  # requests that the open input file still takes
        self._probe = asyncio.Lock()
        self._fatal: BadInput | Failed | None = None

    async def close(self) -> None:
        await self._teacher.close()

    def _input(self, entry: Entry) -> Path:
        return self._output.with_name(f"{self._output.stem}.batch-{entry['number']}.jsonl")

    def _save(self) -> None:
        jsonl.write_json(self._state, {"batches": self._batches})

    # ---- asking

    async def answer(self, request: Request) -> Reply:
        """`pending`, once the request is in an input file. The first of a run is answered at once: a
        day of waiting should not end in a setting that the model refuses."""
        async with self._probe:
            if not self._teacher.proven:
                return await self._teacher.answer(request)
        custom_id = f"{request.step}-{request.key(self.model)}"
        if custom_id not in self._spooled:
            body = self._teacher.body(request)
            row = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            if not self._spool or not self._room or self._spool.size + len(jsonl.dumps(row)) > MAX_BYTES:
                self._spool = self._next_file()
            self._spool.add(row)
            self._spooled.add(custom_id)
            self._room -= 1
        return Reply(reason="pending")

    def _next_file(self) -> jsonl.Appender:
        if self._spool:
            self._spool.close()
        self._batches.append({"number": len(self._batches) + 1, "input_file_id": None, "id": None})
        self._room = MAX_REQUESTS
        return jsonl.Appender(self._input(self._batches[-1]))

    def submit(self) -> None:
        """Submit what was spooled. Raises `Waiting` where that was anything."""
        if self._spool:
            self._spool.close()
            self._save()
            for entry in self._batches:
                self._start(entry)
            raise Waiting(f"{len(self._spooled):,} requests are with the Batch API; run the same command again to collect them")

    def _start(self, entry: Entry) -> None:
        """Bring one batch from where the state file has it to the server."""
        if entry["id"]:
            return
        path, batch = self._input(entry), None
        with self._errors():
            if entry["input_file_id"]:  # a kill or an error came before the id of the batch was noted
                batch = next((b for b in self._client.batches.list() if b.input_file_id == entry["input_file_id"]), None)
            else:
                entry["input_file_id"] = self._client.files.create(file=path, purpose="batch").id
                self._save()
            # The client retries blindly: where only the answer was lost, that would submit, and cost, twice.
            once = self._client.with_options(max_retries=0)
            batch = batch or once.batches.create(
                input_file_id=entry["input_file_id"], endpoint="/v1/chat/completions", completion_window="24h"
            )
        entry["id"] = batch.id
        self._save()
        terminal.say(f"batch  {batch.id}: {paths.shown(path)} is submitted")

    # ---- collecting

    def collect(self, ledger: Ledger, meter: Meter) -> None:
        """Put the replies of every finished batch into the ledger. Raises `Waiting` while one runs."""
        if self._state.is_file():
            self._batches = self._load()
        known = set(map(self._input, self._batches))
        for left in self._output.parent.glob(f"{self._output.stem}.batch-*.jsonl"):
            if left not in known:  # an interrupted run had not submitted it
                left.unlink()
        running = 0
        for entry in list(self._batches):
            self._start(entry)
            with self._errors():
                batch = self._client.batches.retrieve(entry["id"])
            count = batch.request_counts
            progress = f", {count.completed + count.failed:,} of {count.total:,} requests done" if count else ""
            terminal.say(f"batch  {batch.id}: {batch.status}{progress}")
            if batch.status not in ENDED:
                running += 1
                continue
            self._take(batch, self._input(entry), ledger, meter)
            self._batches.remove(entry)
            self._save()
            self._input(entry).unlink(missing_ok=True)
            if self._fatal:
                raise self._fatal
        if running:
            raise Waiting(f"{running} of the batches still run; run the same command again to collect")
        self._state.unlink(missing_ok=True)

    def _load(self) -> list[Entry]:
        try:
            entries = json.loads(self._state.read_bytes())["batches"]
            types = [[type(entry[name]) for name in ("number", "input_file_id", "id")] for entry in entries]
            if all(number is int and {file_id, batch_id} <= {str, type(None)} for number, file_id, batch_id in types):
                return entries
        except (ValueError, KeyError, TypeError):
            pass
        raise BadInput(f"{paths.shown(self._state)}: not the state of batches; restore it, or remove it to ask anew")

    def _take(self, batch: Any, path: Path, ledger: Ledger, meter: Meter) -> None:
        """Account for every request of one batch: in the ledger, or left to be asked again."""
        asked, done = jsonl.Table(path, "custom_id", {"body": dict}), set()
        outcomes: Counter[str] = Counter()
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in self._results(file_id, path.with_suffix(".results")):
                custom_id = str(line.get("custom_id"))
                sent = asked.get(custom_id) if custom_id not in done else None
                if not sent:
                    outcomes["unreadable, of unknown id, or a second time"] += 1
                    continue
                done.add(custom_id)
                request, key = _request(custom_id, sent["body"]), custom_id.rpartition("-")[2]
                reply = self._reply(line, request, sent["body"])
                outcomes["to ask again" if not reply.finish_reason else reply.reason or "answered"] += 1
                known = ledger.get(key, request.max_tokens)
                # Equal to the known one: a run that was killed had put it there.
                if reply.finish_reason and (not known or (known.reason and known != reply)):
                    ledger.add(key, request, sent["body"]["model"], reply)
                    meter.add(request.step, reply)
        ledger.sync()
        outcomes["not in the results, to ask again"] = len(asked) - len(done)
        terminal.say("       " + ", ".join(f"{number:,} {name}" for name, number in outcomes.items() if number))
        if batch.status == "failed":
            problems = "; ".join(str(e.message) for e in (batch.errors.data or [])) if batch.errors else "no reason given"
            self._fatal = Failed(f"{batch.id} was refused: {problems}. Run again to submit anew (--max-requests: fewer at once)")

    def _results(self, file_id: str, path: Path) -> Iterator[dict[str, Any]]:
        """Rows of one result file, by way of the disk: it may have hundreds of megabytes. An empty row
        for a line that is none."""
        with self._errors(), self._client.files.with_streaming_response.content(file_id) as response:
            response.stream_to_file(path)
        with path.open("rb") as file:
            path.unlink()
            for line in filter(bytes.strip, file):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else {}

    def _reply(self, line: dict[str, Any], request: Request, sent: dict[str, Any]) -> Reply:
        """Reply of one result line, without a `finish_reason` where it is to be asked for again. Notes
        what should end the run."""
        response = _object(line.get("response"))
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            with suppress(ValueError):
                return checked(request, self._teacher.read(request, body))
            return Reply()
        problem = _object(_object(body).get("error"))
        code, message = problem.get("code"), str(problem.get("message"))
        if code == "insufficient_quota":
            self._fatal = Failed(used_up(self.model))
        elif not isinstance(status, int) or status >= 500 or status in (408, 409, 429):
            pass
        elif sent["model"] != self.model:
            pass  # --llm was changed: what the former model refuses says nothing about this one
        elif fatal := self._teacher.fatal(status):
            self._fatal = fatal
        elif not self._teacher.adapt(status, message, sent):
            return Reply(reason=refusal(code, message), finish_reason="error")
        return Reply()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client, in the words of this project."""
        import httpx2
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            if error.status_code == 404:
                message = f"the server at {self._client.base_url} has no Batch API, or not what {paths.shown(self._state)} names"
                raise Failed(f"{message}. Go on without --batch, or remove that file to ask anew") from None
            if error.code == "insufficient_quota":
                raise Failed(used_up(self.model)) from None
            problem = f"the Batch API answered {error.status_code} ({error.code}); nothing is lost, run again"
            raise self._teacher.fatal(error.status_code) or Failed(problem) from None
        except (openai.APIError, httpx2.HTTPError) as error:  # the latter from the middle of a download
            raise Failed(f"the Batch API cannot be reached ({type(error).__name__}); nothing is lost, run again") from None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _request(custom_id: str, body: dict[str, Any]) -> Request:
    """What the ledger notes of a request, from its line in the input file."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    choices = tuple(schema.get("properties", {}).get("verdict", {}).get("enum", ()))
    return Request(custom_id.rpartition("-")[0], (), body["messages"][0]["content"], body.get("temperature", 0.0), limit, choices)
