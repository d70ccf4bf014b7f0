"""Stage 0: ask an LLM for a chain of thought, a relevant and an irrelevant passage per training
query, and let it verify its own relevant passage (paper, sections 3.1 and 3.2).

Reads    datasets/<dataset>/ (queries, judgements), datasets/<dataset>_generated.jsonl
Writes   datasets/<dataset>_synthetic.jsonl          complete rows, appended as they finish
         datasets/<dataset>_synthetic.failed.jsonl   rows that have no usable reply, with the reason
         datasets/<dataset>_synthetic.ledger.jsonl   every reply received: nothing is paid twice
         datasets/<dataset>_synthetic.batches.json   with --batch: what is submitted and not collected
Run      python datasets/parse_synthetic.py scifact
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from syntriever.data import dataset, download, training
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm import asking, teachers
from syntriever.llm.ledger import Request
from syntriever.llm.rows import append_rows, check_failures
from syntriever.run import cli, lineage, processes, terminal

# ---------------------------------------------------------------- edit here: prompts and sampling

PROMPTS = {
    "cot": (
        "Search query: {query}\n\n"
        "Think step by step about what somebody who types this query needs to find. Say what the terms mean, "
        "which sub-questions follow, and what facts a helpful document would have to state. "
        "Write your reasoning as one paragraph of at most 100 words. Do not answer with a list."
    ),
    "positive": (
        "You are a subject-matter expert. Write one passage of about 100 words, in the style of a reference text, that "
        "elaborates on the question below and would satisfy somebody who asks it. Be accurate and concrete, and leave "
        "out anything you cannot vouch for. Reply with the passage only.\n\nQuestion: {query}"
    ),
    "negative": (
        "Write one passage of about 100 words that a search engine might wrongly return for the query below: it shares "
        "the topic and some of the words and reads plausibly, but it is irrelevant to what is asked and does not help to "
        "answer it. Reply with the passage only.\n\nQuery: {query}"
    ),
    "verify": (
        "Judge whether a passage is relevant to a question and free of errors.\n\nQuestion: {query}\n\n"
        "Passage: {positive}\n\nDoes the passage correctly address the question? Answer with one word, yes or no."
    ),
}
GENERATION_TEMPERATURE = 0.7
VERDICT_TEMPERATURE = 0.0
GENERATION_MAX_TOKENS = 400
VERDICT_MAX_TOKENS = 32  # a verdict as JSON is 21 tokens to a small tokenizer

# -----------------------------------------------------------------------------------------------

GENERATED = ("cot", "positive", "negative")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    dataset.add_argument(parser)
    training.add_option(parser)
    parser.add_argument("--limit", type=int, help="only the first N queries of a seeded shuffle (default: all)")
    parser.add_argument("--prompts", type=Path, help="JSON file {step: prompt} that replaces any of the prompts in this script")
    cli.number(parser, "--max-tokens", int, GENERATION_MAX_TOKENS, "tokens per reply")
    parser.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    parser.add_argument("--force", action="store_true", help="start anew where the output was made with other settings")
    teachers.add_options(parser, VERDICT_MAX_TOKENS)
    return parser.parse_args(argv)


def load_prompts(path: Path | None) -> dict[str, str]:
    """The prompts of this script, with those of a JSON file in their place."""
    prompts = dict(PROMPTS)
    if path:
        if not path.is_file():
            raise BadInput(f"--prompts {path}: no such file")
        try:
            given = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise BadInput(f"--prompts {path}: not JSON ({error})") from None
        if not isinstance(given, dict) or not given:
            raise BadInput(f"--prompts {path}: expected a JSON object of step: prompt")
        prompts |= given
    for step, prompt in prompts.items():
        needed = ["{query}", "{positive}"] if step == "verify" else ["{query}"]
        if step not in PROMPTS or not isinstance(prompt, str) or any(field not in prompt for field in needed):
            raise BadInput(f"--prompts {path}: {step!r} must be one of {', '.join(PROMPTS)}, a text with {' and '.join(needed)}")
    return prompts


async def synthesize(
    asker: asking.Asker, query: str, prompts: dict[str, str], max_tokens: int, verdict_max_tokens: int
) -> dict[str, Any]:
    """The synthetic fields of one row, or {"step", "reason", "attempts", "message"} of the reply that failed."""
    requests = [
        Request(step, (query,), asking.fill(prompts[step], query=query), GENERATION_TEMPERATURE, max_tokens) for step in GENERATED
    ]
    replies = dict(zip(GENERATED, await asker.ask_all(requests), strict=True))
    if not any(reply.reason for reply in replies.values()):
        prompt = asking.fill(prompts["verify"], query=query, positive=replies["positive"].text)
        verify = Request("verify", (query,), prompt, VERDICT_TEMPERATURE, verdict_max_tokens, ("yes", "no"))
        replies["verify"] = await asker.ask_verdict(verify)
    for step, reply in replies.items():
        if reply.reason:
            return {"step": step, **reply.failure()}
    return {
        **{step: replies[step].text for step in GENERATED},
        "verified": replies["verify"].text == "yes",
        "finish_reasons": {step: reply.finish_reason for step, reply in replies.items()},
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies.values()),
        "completion_tokens": sum(reply.completion_tokens for reply in replies.values()),
    }


def main(args: argparse.Namespace) -> None:
    teachers.check_options(args)
    cli.check_positive(args, "limit")
    prompts = load_prompts(args.prompts)
    train = training.load(args.dataset, args.queries, strict=args.strict)
    queries, forced = train.queries, lineage.check_fresh(train.files, args.force)
    wanted = [query for query in queries if query not in train.gold or max(train.gold[query].values()) >= 1]
    random.Random(args.seed).shuffle(wanted)
    wanted = wanted[: args.limit]
    output, ledger = paths.synthetic(args.dataset), args.ledger or paths.synthesis_ledger(args.dataset)
    teacher = teachers.make_teacher(args.dataset, output, args)
    settings: dict[str, Any] = {"llm": teacher.model, "temperatures": [GENERATION_TEMPERATURE, VERDICT_TEMPERATURE]}
    settings |= {f"prompt of {step}": lineage.text_sha256(prompt)[:12] for step, prompt in prompts.items()}

    async def work(asker: asking.Asker, query_id: str) -> jsonl.Row:
        row = await synthesize(asker, queries[query_id], prompts, args.max_tokens, args.verdict_max_tokens)
        return {"query_id": query_id, "query": queries[query_id], **row, "llm": teacher.model}

    with processes.lock(output, args.dry_run), processes.lock(ledger, args.dry_run):
        record = lineage.Record(args, forced)
        record.reads(*train.files)
        done = jsonl.Seen()
        if record.resumes(output, settings, args.force, args.dry_run):
            rows = jsonl.read(output, {"query_id": str, "verified": bool}, torn=args.dry_run)
            done = jsonl.Seen(row["query_id"] for row in rows)
        pending = [query_id for query_id in wanted if query_id not in done]
        done_of = len(wanted) - len(pending)
        terminal.say(f"read   {len(wanted)} training queries of {args.dataset}: {done_of} done, {len(pending)} to ask")
        counts, used = append_rows(output, ledger, pending, len(pending), work, teacher, args, unit="query")
        if args.dry_run:
            return
        rejected = sum(not row["verified"] for row in jsonl.read(output, {"verified": bool}))
        total, where = len(done) + counts["written"], paths.shown(output)
        terminal.say(f"wrote  {where}: {counts['written']} new rows of {total}; {rejected} positives rejected by the LLM itself")
        if counts["not_recorded"]:
            terminal.say(f"       {counts['not_recorded']} queries have no recorded answer; stage 1 trains on them without texts")
        check_failures(counts, len(done), output, args.max_failure_rate)
        record.write(output, **counts, **used)
    terminal.next_command("train_stage1.py", "minilm" if args.dataset == "pydocs" else "e5", download.as_typed(args.dataset))


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
