"""The training queries of a dataset: those with judgements, those of a query log, those that an LLM wrote."""

import argparse
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from syntriever.data import dataset, download
from syntriever.data.corpus import Corpus, normal
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import terminal

KINDS = ("gold", "log", "generated")

JUDGED = "judged"  # the split that an LLM judges

GENERATED = {"query_id": str, "query": str, "kind": str, "passage_id": str}

# Tenths of the queries without judgements: one chooses the best epoch, one is a test set where the dataset has none.
FOLDS, HELD_OUT, TEST = 10, 0, 1


@dataclass
class Training:
    """Training queries of some `kinds`, by id. Those that no split judges have one query a text, and no text of dev or test."""

    kinds: list[str] = field(default_factory=list)
    queries: dict[str, str] = field(default_factory=dict)
    gold: dataset.Qrels = field(default_factory=dict)  # of `qrels/train.tsv`
    sources: dict[str, str] = field(default_factory=dict)  # generated query: the passage that it was written from
    reserved: dict[str, str] = field(default_factory=dict)  # what would train, but is the test set of `--split judged`
    files: list[Path] = field(default_factory=list)  # that were read

    def held_out(self, query: str) -> bool:
        """Whether a query is one of the tenth that chooses the best epoch. All queries of one passage are, or none, and
        so are all of one text: that is what decides, by its hash."""
        return fold(self.sources.get(query) or normal(self.queries[query])) == HELD_OUT


def plain(query: str) -> str:
    """What queries that count as equal have in common."""
    return normal(query).casefold().rstrip(" ?.!")


def is_reserved(ds: str, text: str) -> bool:
    """Whether a query without judgements, by its text or the passage that it was written from, is kept from training."""
    return fold(text) == TEST and not paths.qrels(ds, "test").is_file()


def fold(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % FOLDS


def add_option(parser: argparse.ArgumentParser) -> None:
    """Which queries train; the same for all stages, and the same default."""
    what = "gold: those of qrels/train.tsv; log: those of queries.jsonl that no split judges; generated: those of "
    what += "datasets/generate_queries.py (default: gold where there are some, else log and generated)"
    parser.add_argument("--queries", choices=(*KINDS, "all"), help=what)


def load(ds: str, wanted: str | None, corpus: Corpus | None = None, strict: bool = False, say: bool = True) -> Training:
    """The training queries that `--queries` names, or those that are there, which is said. Raises `BadInput` where there
    are none, and says how to come by some."""
    dataset.ensure(ds)
    made = Training()
    has_gold = os.path.lexists(paths.qrels(ds, "train"))  # one that cannot be read is an error, and not none
    kinds = KINDS if wanted == "all" else (wanted,) if wanted else ("gold",) if has_gold else ("log", "generated")
    if paths.qrels(ds, "train").parent.is_file():
        raise BadInput(f"{paths.shown(paths.qrels(ds, 'train').parent)} is a file; it is to be the folder of the judgements")
    if "gold" in kinds and (has_gold or wanted == "gold"):
        made.queries, made.gold = dataset.load_split(ds, "train", corpus, strict)
        made.files += [paths.queries(ds), paths.qrels(ds, "train")]
        made.kinds.append("gold")
    if kinds != ("gold",):
        _add_unjudged(made, ds, kinds)
    if not made.queries:
        raise BadInput(_nothing_to_train_on(ds, wanted))
    if say and (wanted or made.kinds != ["gold"]):
        kept = f"; {len(made.reserved):,} more are kept for evaluate.py --split judged" if made.reserved else ""
        terminal.say(f"note:  {len(made.queries):,} training queries of {ds}: {' and '.join(made.kinds)} (--queries){kept}")
    return made


def reserved(ds: str) -> dict[str, str]:
    """The queries that never train: the test set of `--split judged` where the dataset has no test split."""
    made = Training()
    _add_unjudged(made, ds, KINDS)
    return made.reserved


def default_judgements(ds: str, queries: str | None) -> str:
    """`gold` where the chosen training queries have gold judgements (or may have: the dataset is not downloaded yet)."""
    train = paths.qrels(ds, "train")
    labels = os.path.lexists(train) or train.parent.is_file() or not paths.dataset(ds).is_dir()  # unreadable is not none
    return "gold" if labels and queries in (None, "gold") else "llm"


def judgements(ds: str, name: str, model: str, given_name: str | None, queries: str | None) -> Path:
    """The LLM's grades of the passages of a model; `BadInput` with the command that makes them where they are not there."""
    path = paths.judgements(name, ds)
    if not path.is_file():
        script, typed = "stage2/parse_comparison.py", download.as_typed(ds)
        command = terminal.command(script, typed, "--graded", model=model, name=given_name, queries=queries)
        raise BadInput(f"{paths.shown(path)} is not there. Run: {command}")
    return path


def test_split(ds: str) -> str | None:
    """What `--split` has to name where a dataset has no test judgements of its own."""
    return None if paths.qrels(ds, "test").is_file() else JUDGED


def gold_splits(ds: str) -> list[Path]:
    """The judgements that came with a dataset, of all splits."""
    return [path for path in sorted(paths.qrels(ds, "train").parent.glob("*.tsv")) if path.stem != JUDGED]


def _add_unjudged(made: Training, ds: str, kinds: tuple[str, ...]) -> None:
    """Add the queries of the log and the generated ones. What is reserved does not depend on the `kinds` that train."""
    texts = dataset.load_queries(ds) if paths.queries(ds).is_file() else {}
    splits = gold_splits(ds)
    judged = {query for path in splits for query in dataset.load_qrels(ds, path.stem)}
    taken = {plain(texts[query]) for query in judged & texts.keys()}
    found: list[tuple[str, Path, Iterable[tuple[str, str, str]]]] = []
    if texts:
        found.append(("log", paths.queries(ds), ((q, text, "") for q, text in texts.items() if q not in judged)))
    generated = paths.generated(ds)
    if generated.is_file():
        rows = jsonl.read(generated, GENERATED)
        found.append(("generated", generated, ((row["query_id"], row["query"], row["passage_id"]) for row in rows)))
    for kind, path, queries in found:
        before = len(made.queries)
        for query, text, source in queries:
            if query in made.queries or query in made.reserved or query in judged:
                raise BadInput(f"{paths.shown(path)}: query id {query!r} is that of another query of {ds}")
            if (same := plain(text)) in taken:
                continue
            taken.add(same)
            test = is_reserved(ds, source or normal(text))
            if test or kind in kinds:
                (made.reserved if test else made.queries)[query] = text
                if source:
                    made.sources[query] = source
        if len(made.queries) > before:
            made.kinds.append(kind)
            made.files += [each for each in (path, *splits) if each not in made.files]


def _nothing_to_train_on(ds: str, wanted: str | None) -> str:
    command = terminal.command("datasets/generate_queries.py", download.as_typed(ds))
    if wanted:
        return f"--queries {wanted}: {ds} has none of these. To have some written from its passages, run: {command}"
    labels, log = paths.shown(paths.qrels(ds, "train")), paths.shown(paths.queries(ds))
    ways = f"judgements in {labels}, a query log in {log}, or queries that an LLM writes from the passages"
    return f"{ds} has no training queries. There are three ways to come by some: {ways}. Run: {command}"
