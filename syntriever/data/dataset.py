"""Datasets in BEIR layout: download, checks, and access that never holds a corpus in memory."""

import argparse
import re
from pathlib import Path

from syntriever.data import download
from syntriever.data.corpus import Corpus, normal, rows_with_id
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import processes, terminal

# Queries of these two are themselves passages of the corpus; BEIR drops a query's own passage.
SELF_RETRIEVAL = {"arguana", "quora"}

# A judgement takes 8 bytes of pytrec_eval for each unit of the highest grade: a time stamp as a grade fills any memory.
GRADES = range(-1, 101)

Qrels = dict[str, dict[str, int]]
Hits = list[tuple[str, float]]  # (passage id, score), best first


def is_dataset(name: str) -> bool:
    """True for a name of BEIR or the Hub, `pydocs`, or a folder `datasets/<name>/`."""
    return name in download.NAMED or name in download.COPIES or name == "pydocs" or paths.dataset(name).is_dir()


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The dataset on a command line."""
    what = "BEIR name, pydocs, hf:owner/name (a dataset of the Hugging Face Hub), or a folder datasets/<dataset>/"
    parser.add_argument("dataset", type=download.named, help=what)


def files(ds: str, *splits: str) -> list[Path]:
    """What a stage reads of a dataset: corpus, and what is there of queries and judgements of the splits.
    Raises `BadInput` where one cannot be read."""
    also = [paths.queries(ds), *(paths.qrels(ds, split) for split in splits)]
    found = [paths.corpus(ds), *(path for path in also if path.exists())]
    for path in found:
        jsonl.opened(path).close()
    return found


def ensure(ds: str, fetch: bool = True) -> None:
    """Make sure that `datasets/<ds>/` is there; a BEIR dataset is downloaded on first use, unless
    `fetch` is off: then only its name is checked."""
    folder = paths.dataset(ds)
    if folder.is_dir():
        if not paths.corpus(ds).exists():
            raise BadInput(
                f"{paths.shown(paths.corpus(ds))} is missing; a dataset folder holds at least its passages, corpus.jsonl"
            )
        jsonl.opened(paths.corpus(ds)).close()
    elif ds == "pydocs":
        raise BadInput(f"datasets/pydocs is not built yet. Run: {terminal.command('datasets/build_pydocs.py')}")
    elif ds == "cqadupstack":
        raise BadInput(f"cqadupstack is twelve datasets: {', '.join(download.FORUMS)}; only evaluate.py takes them together")
    elif ds in download.NAMED or ds in download.COPIES:
        if fetch and processes.world() > 1:
            raise BadInput(f"datasets/{ds} is not here yet: run any stage of it once without torchrun, which downloads it")
        if fetch:
            download.fetch(ds)
    else:
        known = ", ".join(["pydocs", *sorted(download.ARCHIVES)])
        raise BadInput(f"unknown dataset {ds!r}: no folder {paths.shown(folder)}, not hf:owner/name, not one of {known}")


def load_qrels(ds: str, split: str) -> Qrels:
    """{query id: {passage id: grade}} of one split, in BEIR's three columns or the four of TREC, with or without a
    header. Raises `BadInput` with `file:line` on anything else, and on a grade outside `GRADES`."""
    path = paths.qrels(ds, split)
    if not path.exists() and not path.parent.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise BadInput(f"{paths.shown(path)}: no such split; this dataset has: {', '.join(there) or 'no qrels at all'}")
    qrels: Qrels = {}
    with jsonl.opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                fields = line.split("\t" if "\t" in line else None)
                if not fields or (number == 1 and re.fullmatch(r"[^\W\d]\D*", fields[-1])):  # a blank line, a header
                    continue
                if len(fields) == 4 and re.fullmatch(r"Q?\d+", fields[1]):
                    del fields[1]  # the iteration of a TREC file
                elif "\t" not in line:
                    raise ValueError
                query_id, passage_id, score = fields
                grade = float(score.replace("_", "x"))  # Python reads 1_0 as ten
                if not (query_id and passage_id and grade.is_integer() and GRADES[0] <= grade <= GRADES[-1]):
                    raise ValueError
            except ValueError:
                columns = "expected query-id, corpus-id and score, separated by tabs, or the four columns of TREC"
                message = f"{columns}; a score is a whole number from {GRADES[0]} to {GRADES[-1]}, below 1 not relevant"
                raise BadInput(f"{paths.shown(path)}:{number}: {message}") from None
            if qrels.setdefault(query_id, {}).setdefault(passage_id, int(grade)) != grade:
                raise BadInput(f"{paths.shown(path)}:{number}: {query_id!r}, {passage_id!r} was already judged otherwise")
    if not qrels:
        raise BadInput(f"{paths.shown(path)} has no judgement")
    return qrels


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write judgements in BEIR's three columns."""
    with jsonl.atomic(path) as file:
        file.write(b"query-id\tcorpus-id\tscore\n")
        for query, judged in qrels.items():
            file.writelines(f"{query}\t{passage}\t{grade}\n".encode() for passage, grade in judged.items())


def load_queries(ds: str) -> dict[str, str]:
    """{query id: text}; a repeated id or an empty text is `BadInput`."""
    queries: dict[str, str] = {}
    path = paths.queries(ds)
    for number, _, row in rows_with_id(path):
        if row["_id"] in queries:
            raise BadInput(f"{paths.shown(path)}:{number}: query id {row['_id']!r} was already used")
        if not row["text"].strip():
            raise BadInput(f"{paths.shown(path)}:{number}: the query's text is empty")
        queries[row["_id"]] = row["text"]
    if not queries:
        raise BadInput(f"{paths.shown(path)} is empty")
    return queries


def load_split(ds: str, split: str, corpus: Corpus | None = None, strict: bool = False) -> tuple[dict[str, str], Qrels]:
    """Queries and judgements of one split. Judgements of unknown queries are dropped; those of
    unknown passages stay (no system can find them, as in trec_eval) and are looked for where a
    corpus is given. Both are counted and named; with `strict` they are `BadInput`."""
    ensure(ds)
    qrels, texts = load_qrels(ds, split), load_queries(ds)
    where = paths.shown(paths.qrels(ds, split))
    known: Qrels = {q: d for q, d in qrels.items() if q in texts}
    _report_unknown(where, "queries", [q for q in qrels if q not in texts], strict)
    if corpus is not None:
        _report_unknown(where, "passages", [p for d in known.values() for p in d if corpus.position(p) is None], strict)
    if not known:
        raise BadInput(f"{where}: no judged query is in {paths.shown(paths.queries(ds))}")
    return {q: texts[q] for q in known}, known


def first_queries(queries: dict[str, str]) -> dict[str, str]:
    """{query id: id of the first query with the same text}: its own where none stands before it."""
    firsts: dict[str, str] = {}
    return {query: firsts.setdefault(normal(text), query) for query, text in queries.items()}


def by_text(queries: dict[str, str], qrels: Qrels, corpus: Corpus) -> Qrels:
    """The judgements where equal texts are one: equal queries share theirs, and a passage goes by the id of the first with
    its text and has the best of their grades."""
    firsts = first_queries(queries)
    shared: Qrels = {first: {} for first in firsts.values()}
    for query, judged in qrels.items():
        grades = shared[firsts[query]]
        for passage, grade in judged.items():
            first = corpus.first_id(passage)
            grades[first] = max(grade, grades.get(first, grade))
    return {query: shared[firsts[query]] for query in qrels}


def _report_unknown(where: str, what: str, ids: list[str], strict: bool) -> None:
    if ids:
        unique = list(dict.fromkeys(ids))
        message = f"{where}: {len(unique)} judged {what} are not in the dataset, e.g. {', '.join(map(repr, unique[:3]))}"
        if strict:
            raise BadInput(message)
        terminal.say(f"warning: {message}")
