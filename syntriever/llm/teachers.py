"""Which teacher answers: recorded answers, a ledger, any OpenAI-compatible server, or one that this process starts; and the
options of the LLM stages."""

import argparse
import os
from pathlib import Path

from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.llm import address, cost, llama
from syntriever.llm.asking import Teacher
from syntriever.llm.batch_api import BatchTeacher
from syntriever.llm.replay import LedgerTeacher, ReplayTeacher
from syntriever.llm.server import OpenAITeacher
from syntriever.run import cli, terminal

CONCURRENCY = 64  # requests in flight at a server elsewhere


def default_llm(ds: str, base_url: str | None = None) -> str:
    """gpt-4o, or the recorded answers where no key or server is given."""
    places = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT")
    if base_url or any(map(os.environ.get, places)) or not paths.recorded(ds).is_dir():
        return "gpt-4o"
    terminal.say(f"note:  OPENAI_API_KEY is not set; using the recorded answers for {ds} (--llm replay)")
    return "replay"


def make_teacher(ds: str, output: Path, args: argparse.Namespace) -> Teacher:
    """Teacher by the name in `args.llm`: `replay`, a model that runs here (`gguf:FILE`, a folder, an alias), else an API model.
    Where none was named, the default's name is put there. What it is called in rows and records is its `model`."""
    name = args.llm = args.llm or default_llm(ds, args.base_url)
    kind, _, model = name.partition(":")
    if kind == "replay":
        if args.batch:
            raise BadInput("--batch is for a model behind an API, not for --llm replay")
        if args.ledger:
            return LedgerTeacher(args.ledger, model)
        if model:
            raise BadInput(f"--llm {name}: name the ledger that holds the replies of {model} (--ledger FILE)")
        terminal.say("note:  recorded answers do not depend on the prompts")
        return ReplayTeacher(ds)
    named = args.base_url or (os.environ.get("OPENAI_BASE_URL", "").strip() and os.path.isdir(name))
    if not named and (name in llama.NAMES or kind in ("gguf", "hf") or os.path.isdir(name)):
        if args.batch:
            raise BadInput(f"--batch is for a model behind an API; {name} runs here, several requests at once anyway")
        if args.max_cost is not None:
            raise BadInput(f"--max-cost: {name} runs here and costs nothing; --max-requests limits it")
        return llama.LlamaTeacher(name, args.concurrency or llama.SLOTS, args.attempts)
    if args.max_cost is not None and not cost.price_of(name, args.batch):
        raise BadInput(f"--max-cost: {cost.PRICES.name} lists no price for {name}; add it there ({cost.PRICES})")
    teacher = OpenAITeacher(
        name, address.of(name, args.base_url, not args.dry_run), args.concurrency or CONCURRENCY, args.attempts, args.timeout
    )
    return BatchTeacher(teacher, output) if args.batch else teacher


def add_options(parser: argparse.ArgumentParser, verdict_max_tokens: int | None, title: str = "teacher") -> None:
    """Options of the LLM stages, and of an evaluation that an LLM judges; None where a stage asks for no verdict."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--llm",
        help=f"gpt-4o or any model of the server; replay (recorded answers); gguf:FILE, {' or '.join(llama.NAMES)} (run here). "
        "Default: gpt-4o, or replay where there are recorded answers for the dataset and OPENAI_API_KEY is not set",
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
    what = f"requests in flight at once (default: {CONCURRENCY}, or {llama.SLOTS} of a model that runs here)"
    group.add_argument("--concurrency", type=int, help=what)
    cli.number(group, "--attempts", int, 6, "tries per request on 5xx and timeouts")
    cli.number(group, "--timeout", float, 120, "seconds to wait for one reply")
    if verdict_max_tokens:
        what = "tokens per verdict; models that reason first need hundreds"
        cli.number(group, "--verdict-max-tokens", int, verdict_max_tokens, what)
    group.add_argument("--retry-failed", action="store_true", help="ask again what was refused, truncated or unparsable before")
    cli.number(group, "--max-failure-rate", float, 0.1, "exit 1 when a larger share of rows failed")
    cli.number(group, "--seed", int, 42, "seed of what is drawn here")


def check_options(args: argparse.Namespace) -> None:
    names = ("concurrency", "attempts", "timeout", "verdict_max_tokens", "max_tokens", "max_cost", "max_requests")
    cli.check_positive(args, *(name for name in names if name in args))  # not every script has all
    if not 0 <= args.max_failure_rate <= 1:
        raise BadInput("--max-failure-rate is a share between 0 and 1")
