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
from syntriever.llm import refusals
from syntriever.llm.cost import Meter
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replies import Reply, judged
from syntriever.llm.server import OpenAITeacher
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
        client: Any = openai.AzureOpenAI if teacher.azure else openai.OpenAI
        self._teacher, self._client = teacher, client(**{**teacher.options, "max_retries": 5})
        self._path = "/chat/completions" if teacher.azure else "/v1/chat/completions"
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
                reply = await self._teacher.answer(request)
                self._client.base_url = self._teacher.base_url
                return reply
        custom_id = f"{request.step}-{request.key(self.model)}"
        if custom_id not in self._spooled:
            body = self._teacher.body(request)
            row = {"custom_id": custom_id, "method": "POST", "url": self._path, "body": body}
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
                input_file_id=entry["input_file_id"], endpoint=self._path, completion_window="24h"
            )
        entry["id"] = batch.id
        self._save()
        terminal.say(f"batch  {batch.id}: {paths.shown(path)} is submitted")

    # ---- collecting

    def collect(self, ledger: Ledger, meter: Meter) -> None:
        """Put the replies of every finished batch into the ledger. Raises `Waiting` while one runs."""
        self._batches = entries_of(self._state)
        known = set(map(self._input, self._batches))
        for left in self._output.parent.glob(f"{self._output.stem}.batch-*.jsonl"):
            if left not in known:  # an interrupted run had not submitted it
                left.unlink()
        running = 0
        for entry in list(self._batches):
            self._start(entry)
            batch = self._retrieve(entry["id"])
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

    def _retrieve(self, batch_id: str) -> Any:
        import openai

        with self._errors():
            try:
                return self._client.batches.retrieve(batch_id)
            except openai.NotFoundError:  # --base-url may lack its /v1, which nobody has noticed yet in this run
                if not self._teacher.add_version():
                    raise
                self._client.base_url = self._teacher.base_url
                return self._client.batches.retrieve(batch_id)

    def _take(self, batch: Any, path: Path, ledger: Ledger, meter: Meter) -> None:
        """Account for every request of one batch: in the ledger, or left to be asked again."""
        asked, done = jsonl.Table(path, "custom_id", {"body": dict}), set()
        outcomes: Counter[str] = Counter()
        hopeless: BadInput | None = None
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
                hopeless = self._teacher.hopeless(reply, first=False) or hopeless
                known = ledger.get(key, request.max_tokens)
                # Equal to the known one: a run that was killed had put it there.
                if reply.finish_reason and (not known or (known.reason and known != reply)):
                    ledger.add(key, request, sent["body"]["model"], reply)
                    meter.add(request.step, reply)
        ledger.sync()
        outcomes["not in the results, to ask again"] = len(asked) - len(done)
        terminal.say("       " + ", ".join(f"{number:,} {name}" for name, number in outcomes.items() if number))
        if not outcomes["answered"]:  # refusals come in a file of their own: many in a row there are no sign
            self._fatal = self._fatal or hopeless
        if batch.status == "failed":
            problems = [{"code": e.code, "message": e.message} for e in (batch.errors.data or [])] if batch.errors else []
            refused = self._teacher.refusal(400, problems)
            said = (refused and refused.words) or "no reason given"
            again = Failed(f"{batch.id} was refused: {said}. Run again to submit anew (--max-requests: fewer at once)")
            self._fatal = again if not refused or refused.reason != "no_credit" else self._teacher.fatal(refused)

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
        response = found if isinstance(found := line.get("response"), dict) else {}
        status, body = response.get("status_code"), response.get("body") or line.get("error")
        refusal = self._teacher.refusal(status if isinstance(status, int) else 0, body)
        if not refusal:
            with suppress(ValueError):
                return judged(self._teacher.read(request, body), request.choices)
        elif sent["model"] != self.model:
            pass  # --llm was changed: what the former model refuses says nothing about this one
        elif fatal := self._teacher.fatal(refusal):
            self._fatal = fatal
        elif setting := refusal.setting(sent):
            self._teacher.do_without(frozenset({setting}))
        elif refusal.reason in refusals.OF_A_REQUEST:
            return Reply(reason=refusal.reason, finish_reason="error", message=refusal.words)
        return Reply()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client, in the words of this project."""
        import httpx2
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            status, refusal = error.status_code, self._teacher.refusal(error.status_code, refusals.body_of(error.response))
            words = refusal.words if refusal else ""
            if status == 404:
                message = f"{self._teacher.where} has no Batch API, or not what {paths.shown(self._state)} names ({words})"
                raise Failed(f"{message}. Go on without --batch, or remove that file to ask anew") from None
            problem = Failed(f"the Batch API answered {status} ({words}); nothing is lost, run again")
            raise (refusal and self._teacher.fatal(refusal)) or problem from None
        except (openai.APIError, httpx2.HTTPError) as error:  # the latter from the middle of a download
            where = f"the Batch API of {self._teacher.where} cannot be reached"
            raise Failed(f"{where} ({type(error).__name__}); nothing is lost, run again") from None


def entries_of(state: Path) -> list[Entry]:
    """The batches that are not collected yet, by a state file."""
    if not state.is_file():
        return []
    try:
        entries: list[Entry] = json.loads(state.read_bytes())["batches"]
        types = [[type(entry[name]) for name in ("number", "input_file_id", "id")] for entry in entries]
        if all(number is int and {file_id, batch_id} <= {str, type(None)} for number, file_id, batch_id in types):
            return entries
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput(f"{paths.shown(state)}: not the state of batches; restore it, or remove it to ask anew")


def _request(custom_id: str, body: dict[str, Any]) -> Request:
    """What the ledger notes of a request, from its line in the input file."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    choices = tuple(schema.get("properties", {}).get("verdict", {}).get("enum", ()))
    return Request(custom_id.rpartition("-")[0], (), body["messages"][0]["content"], body.get("temperature", 0.0), limit, choices)
