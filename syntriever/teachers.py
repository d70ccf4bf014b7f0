"""Which teacher answers: recorded answers, a ledger, any OpenAI-compatible server, or a model in
this process; and the options of both LLM stages."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from syntriever import cost, jsonl, paths, stage
from syntriever.errors import BadInput
from syntriever.ledger import Ledger, Reply, Request
from syntriever.llm import Teacher


class ReplayTeacher:
    """Recorded answers of `datasets/recorded/<dataset>/`, looked up by the query's text.

    `synthesis.jsonl` holds cot, positive, negative and verdict; `preferences.jsonl` a ranking with
    ties, from which pairwise verdicts follow. What was not recorded has the reason `not_recorded`.
    """

    model, live, concurrency = "replay", False, 64

    def __init__(self, ds: str) -> None:
        folder = paths.recorded(ds)
        if not folder.is_dir():
            raise BadInput(
                f"--llm replay: no recorded answers ship for {ds}. Name a ledger (--ledger FILE), set OPENAI_API_KEY, "
                "or try --llm smollm2"
            )
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


class LedgerTeacher:
    """The replies of a ledger (`--llm replay --ledger FILE`). What it lacks is `not_recorded`."""

    live, concurrency = False, 64

    def __init__(self, path: Path, model: str) -> None:
        if not path.is_file():
            raise BadInput(f"--ledger {path}: no such file")
        self._ledger = Ledger(path, read_only=True)
        models = self._ledger.models
        if not model and len(models) > 1:
            raise BadInput(f"--ledger {path} holds replies of {', '.join(models)}: name one, as in --llm replay:{models[0]}")
        if model and model not in models:
            raise BadInput(f"--ledger {path} holds no reply of {model}, only of {', '.join(models) or 'none'}")
        self.model = model or (models[0] if models else "replay")

    async def answer(self, request: Request) -> Reply:
        return self._ledger.get(request.key(self.model), request.max_tokens) or Reply(reason="not_recorded")

    async def close(self) -> None:
        self._ledger.close()


def default_llm(ds: str, wanted: str | None, base_url: str | None = None) -> str:
    """The teacher's name: as asked for, else gpt-4o, else the recorded answers where no key or
    server is given."""
    if wanted:
        return wanted
    if base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY") or not paths.recorded(ds).is_dir():
        return "gpt-4o"
    stage.say(f"note:  OPENAI_API_KEY is not set; using the recorded answers that ship for {ds} (--llm replay)")
    return "replay"


def make_teacher(name: str, ds: str, output: Path, args: argparse.Namespace) -> Teacher:
    """Teacher by name: `replay`, a local model (`smollm2`, a path, `hf:<Hub id>`), else an API model."""
    replay, _, model = name.partition(":")
    if replay == "replay":
        if args.batch:
            raise BadInput("--batch is for a model behind an API, not for --llm replay")
        if args.ledger:
            return LedgerTeacher(args.ledger, model)
        if model:
            raise BadInput(f"--llm {name}: name the ledger that holds the replies of {model} (--ledger FILE)")
        return ReplayTeacher(ds)
    if args.max_cost is not None and not cost.price_of(name, args.batch):
        raise BadInput(f"--max-cost: {cost.PRICES.name} lists no price for {name}; add it there ({cost.PRICES})")
    if name == "smollm2" or name.startswith("hf:") or os.path.isdir(name):
        from syntriever.local_llm import LocalTeacher

        if args.batch:
            raise BadInput(f"--batch is for a model behind an API; {name} runs in this process, in batches anyway")
        return LocalTeacher(name, batch_size=args.local_batch_size, seed=args.seed)
    from syntriever.openai_teacher import OpenAITeacher

    teacher = OpenAITeacher(name, args.base_url, args.concurrency, args.attempts, args.timeout)
    if args.batch:
        from syntriever.batch import BatchTeacher

        return BatchTeacher(teacher, output)
    return teacher


def add_options(parser: argparse.ArgumentParser, verdict_max_tokens: int) -> None:
    """Options of both LLM stages."""
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--llm",
        help="gpt-4o or any model of the server; replay (recorded answers); smollm2, hf:<Hub id> or a folder (runs here). "
        "Default: gpt-4o, or replay where recorded answers ship with the dataset and OPENAI_API_KEY is not set",
    )
    group.add_argument("--base-url", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: OPENAI_BASE_URL)")
    group.add_argument(
        "--ledger",
        type=Path,
        help="file that keeps every reply (default: one per dataset and stage); with --llm replay, the file that answers",
    )
    group.add_argument(
        "--batch", action="store_true", help="use the server's Batch API: submit and exit (75); run again to collect"
    )
    group.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and cost, and write nothing")
    group.add_argument("--max-requests", type=int, help="stop after this many requests (default: no limit)")
    group.add_argument("--max-cost", type=float, help="stop before this many USD, by syntriever/prices.json (default: no limit)")
    group.add_argument("--concurrency", type=int, default=64, help="requests in flight at once (default: %(default)s)")
    group.add_argument("--attempts", type=int, default=6, help="tries per request on 5xx and timeouts (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=120, help="seconds to wait for one reply (default: %(default)s)")
    group.add_argument(
        "--verdict-max-tokens",
        type=int,
        default=verdict_max_tokens,
        help="tokens per verdict; models that reason first need hundreds (default: %(default)s)",
    )
    group.add_argument("--retry-failed", action="store_true", help="ask again what was refused, truncated or unparsable before")
    group.add_argument(
        "--max-failure-rate", type=float, default=0.1, help="exit 1 when a larger share of rows failed (default: %(default)s)"
    )
    group.add_argument(
        "--local-batch-size", type=int, default=32, help="prompts per batch of a local model (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=42, help="seed of shuffles and sampling (default: %(default)s)")


def check_options(args: argparse.Namespace) -> None:
    for name in ("concurrency", "attempts", "timeout", "local_batch_size", "verdict_max_tokens", "max_cost", "max_requests"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} must be positive")
    if not 0 <= args.max_failure_rate <= 1:
        raise BadInput("--max-failure-rate is a share between 0 and 1")
