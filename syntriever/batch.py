"""OpenAI's Batch API: half the price, replies within a day. Submit, exit, run again to collect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syntriever import jsonl, paths, stage
from syntriever.cost import Meter
from syntriever.errors import BadInput, Failed, Waiting
from syntriever.ledger import Ledger, Reply, Request
from syntriever.llm import checked
from syntriever.openai_teacher import OpenAITeacher, refusal, used_up

# OpenAI's limits on one input file.
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


class BatchTeacher:
    """Spools requests into input files, submits these, and in a later run puts what came back into
    the ledger, where the stage finds it. What did not come back is then asked for anew.

    The state file lists every batch that is not collected yet: its input file here, the file's id
    at the server, the batch's id. Each is saved before the next step, so a kill loses none and
    submits none twice. Replies are joined on `custom_id` (step and ledger key) only.
    """

    live, concurrency = True, 64

    def __init__(self, teacher: OpenAITeacher, output: Path) -> None:
        import openai

        self.model = teacher.model
        self._teacher, self._client = teacher, openai.OpenAI(**{**teacher.options, "max_retries": 5})
        self._output, self._state = output, paths.batches(output)
        self._batches: list[dict[str, Any]] = []
        self._spool: jsonl.Appender | None = None
        self._spooled: set[str] = set()
        self._room = 0

    # ---- asking

    async def answer(self, request: Request) -> Reply:
        """`pending`, once the request is in an input file. The first of a run is answered at once: a
        day of waiting should not end in a setting that the model refuses."""
        if not self._teacher.proven:
            return await self._teacher.answer(request)
        custom_id = f"{request.step}-{request.key(self.model)}"
        if custom_id not in self._spooled:
            self._spooled.add(custom_id)
            row = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": self._teacher.body(request)}
            size = len(jsonl.dumps(row))
            if self._spool is None or not self._room or self._spool.size + size > MAX_BYTES:
                self._close_spool()
                number = 1 + max((entry["number"] for entry in self._batches), default=0)
                self._spool, self._room = jsonl.Appender(self._input(number)), MAX_REQUESTS
            self._spool.add(row)
            self._room -= 1
        return Reply(reason="pending")

    async def close(self) -> None:
        await self._teacher.close()

    def _input(self, number: int) -> Path:
        return self._output.with_name(f"{self._output.stem}.batch-{number}.jsonl")

    def _close_spool(self) -> None:
        """Note the finished input file in memory; only `submit` makes it count."""
        if self._spool:
            number = int(self._spool.path.stem.rpartition("-")[2])
            self._batches.append({"number": number, "input_file_id": None, "id": None})
            self._spool.close()
            self._spool = None

    def submit(self) -> None:
        """Submit what was spooled. Raises `Waiting` where that was anything."""
        self._close_spool()
        if self._batches:
            self._save()
            for entry in self._batches:
                self._start(entry)
            raise Waiting(f"{len(self._spooled):,} requests are with the Batch API; run the same command again to collect them")

    def _save(self) -> None:
        jsonl.write_json(self._state, {"batches": self._batches})

    def _start(self, entry: dict[str, Any]) -> None:
        """Bring one batch from where the state file has it to the server."""
        if entry["id"]:
            return
        path, batch = self._input(entry["number"]), None
        with self._errors():
            if entry["input_file_id"]:  # a kill came before the id of the batch was noted, or before there was one
                batch = next((b for b in self._client.batches.list() if b.input_file_id == entry["input_file_id"]), None)
            else:
                entry["input_file_id"] = self._client.files.create(file=path, purpose="batch").id
                self._save()
            batch = batch or self._client.batches.create(
                input_file_id=entry["input_file_id"], endpoint="/v1/chat/completions", completion_window="24h"
            )
        entry["id"] = batch.id
        self._save()
        stage.say(f"batch  {batch.id}: {paths.shown(path)} is submitted")

    # ---- collecting

    def collect(self, ledger: Ledger, meter: Meter) -> None:
        """Put the replies of every finished batch into the ledger. Raises `Waiting` while one runs."""
        if self._state.is_file():
            try:
                self._batches = json.loads(self._state.read_bytes())["batches"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{paths.shown(self._state)}: not the state of batches; restore it or remove it") from None
        known = {self._input(entry["number"]) for entry in self._batches}
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
            stage.say(f"batch  {batch.id}: {batch.status}{progress}")
            if batch.status in RUNNING:
                running += 1
                continue
            error = self._take(batch, self._input(entry["number"]), ledger, meter)
            ledger.sync()
            self._batches.remove(entry)
            self._save()
            self._input(entry["number"]).unlink(missing_ok=True)
            if error:
                raise error
        if running:
            raise Waiting(f"{running} of the batches still run; run the same command again to collect")
        self._state.unlink(missing_ok=True)

    def _take(self, batch: Any, path: Path, ledger: Ledger, meter: Meter) -> BadInput | Failed | None:
        """Account for every request of one batch: in the ledger, or left to be asked again. Returns the
        error after which the run should end."""
        asked = {row["custom_id"]: row["body"] for row in jsonl.read(path, {"custom_id": str, "body": dict})}
        left = set(asked)
        error: BadInput | Failed | None = None
        outcomes: Counter[str] = Counter()
        for file_id in (batch.output_file_id, batch.error_file_id):
            for line in self._results(file_id, path.with_suffix(".results")):
                custom_id = str(line.get("custom_id"))
                if custom_id not in left:
                    outcomes["of unknown id, or a second time"] += 1
                    continue
                left.remove(custom_id)
                request, key = _request(custom_id, asked[custom_id]), custom_id.rpartition("-")[2]
                reply, fatal = self._outcome(line, request, asked[custom_id])
                error = error or fatal
                outcomes["answered" if not reply.reason else reply.reason if reply.finish_reason else "to ask again"] += 1
                # A kill while the results were taken in has left some of them in the ledger.
                if reply.finish_reason and not ledger.get(key, request.max_tokens):
                    ledger.add(key, request, self.model, reply)
                    meter.add(request.step, reply)
        if left:
            outcomes["not in the results, to ask again"] += len(left)
        stage.say("       " + ", ".join(f"{number:,} {name}" for name, number in outcomes.items()))
        if batch.status == "failed":
            problems = "; ".join(str(e.message) for e in (batch.errors.data or [])) if batch.errors else "no reason given"
            return Failed(f"{batch.id} was refused: {problems}. Run again to submit its requests anew")
        return error

    def _results(self, file_id: str | None, path: Path) -> Iterator[dict[str, Any]]:
        """Rows of one result file, by way of the disk: it may have hundreds of megabytes."""
        if not file_id:
            return
        with self._errors(), self._client.files.with_streaming_response.content(file_id) as response:
            response.stream_to_file(path)
        try:
            yield from jsonl.read(path)
        except BadInput as error:
            raise Failed(f"the results {file_id} cannot be read ({error}); run again") from None
        finally:
            path.unlink()

    def _outcome(self, line: dict[str, Any], request: Request, sent: dict[str, Any]) -> tuple[Reply, BadInput | Failed | None]:
        """(reply, the error that ends the run or None) of one result line."""
        response = line.get("response") or {}
        status, body = response.get("status_code"), response.get("body") or {}
        if status == 200:
            try:
                return checked(request, self._teacher.read(request, body)), None
            except ValueError:
                return Reply(reason="bad_body"), None
        problem = body.get("error") if isinstance(body, dict) else None
        problem = problem if isinstance(problem, dict) else {}
        if problem.get("code") == "insufficient_quota":
            return Reply(reason="insufficient_quota"), Failed(used_up(self.model))
        if status is None or status >= 500 or status in (408, 409, 429):
            return Reply(reason="expired"), None
        if fatal := self._teacher.fatal(status):
            return Reply(reason="refused"), fatal
        message = str(problem.get("message"))
        if self._teacher.adapt(status, message, sent):
            return Reply(reason="refused"), None
        return Reply(reason=refusal(problem.get("code"), message), finish_reason="error"), None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client, in the words of this project."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            if error.status_code == 404:
                raise Failed(f"the server at {self._client.base_url} has no Batch API, or no longer this batch") from None
            if error.code == "insufficient_quota":
                raise Failed(used_up(self.model)) from None
            problem = f"the Batch API answered {error.status_code} ({error.code}); nothing is lost, run again"
            raise self._teacher.fatal(error.status_code) or Failed(problem) from None
        except openai.APIError as error:
            raise Failed(f"the Batch API cannot be reached ({type(error).__name__}); nothing is lost, run again") from None


def _request(custom_id: str, body: dict[str, Any]) -> Request:
    """What the ledger notes of a request, from its line in the input file."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    choices = tuple(schema.get("properties", {}).get("verdict", {}).get("enum", ()))
    return Request(custom_id.rpartition("-")[0], (), body["messages"][0]["content"], body.get("temperature", 0.0), limit, choices)
