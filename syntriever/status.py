"""Where the pipeline of a dataset stands: each output fresh, stale or missing, why, and the next command.

Run      python -m syntriever.status scifact
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from syntriever.data import dataset, download, training
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.run import cli, lineage, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    dataset.add_argument(parser)
    return parser.parse_args(argv)


Steps = Iterator[tuple[Path, str]]  # outputs in the order of the stages, each with the command that makes it


def before_gold(ds: str) -> Steps:
    """What all encoders share, where there are gold judgements."""
    synthesis = terminal.command("datasets/parse_synthetic.py", download.as_typed(ds))
    yield paths.dataset(ds), terminal.command("datasets/build_pydocs.py") if ds == "pydocs" else synthesis
    yield paths.synthetic(ds), synthesis


def by_gold(ds: str, base: str) -> Steps:
    """The outputs of the encoder `base`, trained with gold judgements."""
    sft, final, command = f"{base}-sft", f"{base}-final", terminal.command
    checkpoint, typed = paths.model_output(f"{sft}-{ds}"), download.as_typed(ds)
    model = lineage.started_from(checkpoint) or base
    if checkpoint.exists() or not paths.model_output(f"{final}-{ds}").exists():  # else `--name` of stage 2: from another name
        yield checkpoint, command("train_stage1.py", model, typed, name=None if model == base else base)
        yield paths.top(sft, ds), command("retrieval.py", sft, typed)
        yield paths.preferences(sft, ds), command("stage2/parse_comparison.py", typed, model=sft)
    yield paths.model_output(f"{final}-{ds}"), command("train_stage2.py", sft, typed)
    yield (
        paths.result(final, ds, "test", ".json"),
        command("evaluate.py", "bm25", *models.comparable([model], ds), sft, final, typed),
    )


def before_llm(ds: str) -> Steps:
    """What all encoders share, where an LLM judges: queries of its own where there is no log; its texts are a help."""
    typed = download.as_typed(ds)
    yield paths.dataset(ds), ""
    try:
        training.load(ds, "log", say=False)
    except BadInput:  # no log
        yield paths.generated(ds), terminal.command("datasets/generate_queries.py", typed)
    if paths.synthetic(ds).exists():
        yield paths.synthetic(ds), terminal.command("datasets/parse_synthetic.py", typed)


def by_llm(ds: str, base: str) -> Steps:
    """The outputs of the encoder `base`, trained with an LLM's judgements."""
    sft, typed, command = f"{base}-sft", download.as_typed(ds), terminal.command
    checkpoint, top = paths.model_output(f"{sft}-{ds}"), paths.top(base, ds)
    model = lineage.started_from(checkpoint) or lineage.started_from(top) or base
    name, split = None if model == base else base, training.test_split(ds)
    yield top, command("retrieval.py", model, typed, "--fuse", name=name)
    yield paths.judgements(base, ds), command("stage2/parse_comparison.py", typed, "--graded", model=model, name=name)
    yield checkpoint, command("train_stage1.py", model, typed, judgements="llm", name=name)
    names = "bm25", *models.comparable([model], ds), sft, typed
    yield paths.result(sft, ds, split or "test", ".json"), command("evaluate.py", *names, split=split)


def bases(ds: str, by_who: str) -> list[str]:
    """Short names of the encoders that were trained for `ds`, an interrupted run included, or whose candidates the LLM
    is to judge; the README's where there is none."""
    trained = re.compile(rf"\.?(.+)-(?:sft|final)-{re.escape(ds)}(?:\.tmp)?")
    found = {match[1] for path in (paths.home() / "output").glob("*") if (match := trained.fullmatch(path.name))}
    retrieved = (path.name.removesuffix(f"_{ds}_top100.jsonl") for path in (paths.home() / "stage2").glob(f"*_{ds}_top100.jsonl"))
    found |= {name for name in retrieved if by_who == "llm" and not models.is_own(name)}
    return sorted(found) or ["minilm" if ds == "pydocs" else "e5"]


def state_of(output: Path, stale: dict[str, str]) -> tuple[str, str, str]:
    """(state, why, command that made it) of an output; `stale`: the outputs before it that are not fresh."""
    if not output.exists():
        begun = output.with_name(f".{output.name}.tmp").is_dir()
        return "missing", "begun: --resume goes on with it" if begun else "", ""
    record = lineage.load_record(output)
    if record is None:
        return "fresh", "your own file: not made by a stage", ""
    command = lineage.remedy(record)
    problems = lineage.problems_of(output, record)
    if problems:
        return "stale", problems[0].removeprefix(f"{paths.shown(output)} is stale: "), command
    for name in record["inputs"]:
        before = str(Path(name).parent) if name.endswith(".safetensors") else name
        if before in stale:
            return "stale", f"{before} is {stale[before]}", command
    overridden = f"made with --force: {record['forced'][0]}" if record.get("forced") else ""
    return "fresh", overridden, command


def main(args: argparse.Namespace) -> None:
    ds = args.dataset
    by_who = "gold" if paths.qrels(ds, "train").is_file() or not paths.corpus(ds).is_file() else "llm"
    shared, own = (before_gold, by_gold) if by_who == "gold" else (before_llm, by_llm)
    stale: dict[str, str] = {}

    def show(steps: Iterable[tuple[Path, str]]) -> str:
        """Print the state of each output; the command for the first that is not fresh."""
        todo = ""
        for output, command in steps:
            state, why, made_by = "fresh" if paths.corpus(ds).is_file() else "missing", "", ""
            if output != paths.dataset(ds):
                state, why, made_by = state_of(output, stale)
            if state != "fresh":
                stale[paths.shown(output)] = state
                todo = todo or made_by or command
            terminal.say(f"{state:8} {paths.shown(output)}{'/' if output.is_dir() else ''}{f'   ({why})' if why else ''}")
        return todo

    before = show(shared(ds))
    for base in bases(ds, by_who):
        after = show(own(ds, base))
        todo = before or after
        terminal.say(f"next:    {todo}\n" if todo else f"{base} is complete\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
