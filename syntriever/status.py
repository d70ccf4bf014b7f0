"""Where the pipeline of a dataset stands: each output fresh, stale or missing, why, and the next command.

Run      python -m syntriever.status scifact
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from syntriever.data import dataset, download
from syntriever.encode import models
from syntriever.files import paths
from syntriever.run import cli, lineage, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    dataset.add_argument(parser)
    return parser.parse_args(argv)


def chain(ds: str, base: str) -> Iterator[tuple[Path, str]]:
    """The outputs of the encoder `base` in the order of the stages, each with the command that makes it."""
    sft, final, command = f"{base}-sft", f"{base}-final", terminal.command
    checkpoint, typed = paths.model_output(f"{sft}-{ds}"), download.as_typed(ds)
    model = lineage.started_from(checkpoint) or base
    yield checkpoint, command("train_stage1.py", model, typed, name=None if model == base else base)
    yield paths.top(sft, ds), command("retrieval.py", sft, typed)
    yield paths.preferences(sft, ds), command("stage2/parse_comparison.py", typed, model=sft)
    yield paths.model_output(f"{final}-{ds}"), command("train_stage2.py", sft, typed)
    yield (
        paths.result(final, ds, "test", ".json"),
        command("evaluate.py", "bm25", *models.comparable([model], ds), sft, final, typed),
    )


def bases(ds: str) -> list[str]:
    """Short names of the encoders that were trained for `ds`, an interrupted run included; the README's where
    there is none."""
    pattern = re.compile(rf"\.?(.+)-(?:sft|final)-{re.escape(ds)}(?:\.tmp)?")
    found = {match[1] for path in (paths.home() / "output").glob("*") if (match := pattern.fullmatch(path.name))}
    return sorted(found) or ["minilm" if ds == "pydocs" else "e5"]


def state_of(output: Path, stale: dict[str, str]) -> tuple[str, str, str]:
    """(state, why, command that made it) of an output; `stale`: the outputs before it that are not fresh."""
    if not output.exists():
        begun = output.with_name(f".{output.name}.tmp").is_dir()
        return "missing", "begun: --resume goes on with it" if begun else "", ""
    record = lineage.load_record(output)
    if record is None:
        return "fresh", "your own file: not made by a stage", ""
    command = terminal.command(*record["command"])
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
    synthesis = terminal.command("datasets/parse_synthetic.py", download.as_typed(ds))
    first = terminal.command("datasets/build_pydocs.py") if ds == "pydocs" else synthesis
    stale: dict[str, str] = {}

    def show(steps: Iterable[tuple[Path, str]]) -> str:
        """Print the state of each output; the command for the first that is not fresh."""
        todo = ""
        for output, command in steps:
            state, why, made_by = dataset_state(ds) if output == paths.dataset(ds) else state_of(output, stale)
            if state != "fresh":
                stale[paths.shown(output)] = state
                todo = todo or made_by or command
            terminal.say(f"{state:8} {paths.shown(output)}{'/' if output.is_dir() else ''}{f'   ({why})' if why else ''}")
        return todo

    before = show([(paths.dataset(ds), first), (paths.synthetic(ds), synthesis)])
    for base in bases(ds):
        steps = list(chain(ds, base))
        if steps[3][0].exists() and not steps[0][0].exists():
            steps = steps[3:]  # `--name` of stage 2: from the stage 1 of another name
        after = show(steps)
        todo = before or after
        terminal.say(f"next:    {todo}\n" if todo else f"{base} is complete\n")


def dataset_state(ds: str) -> tuple[str, str, str]:
    there = all(path.is_file() for path in (paths.corpus(ds), paths.queries(ds), paths.qrels(ds, "train")))
    return ("fresh" if there else "missing"), "", ""


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
