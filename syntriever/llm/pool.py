"""A test set that an LLM judges: the top passages of several models, pooled and graded (`evaluate.py --split judged`)."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syntriever.data import dataset, download, training
from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits, Qrels
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm import asking, grading, judging, teachers
from syntriever.llm.rows import append_rows, check_failures
from syntriever.run import lineage, processes, terminal

SPLIT = training.JUDGED

DEPTH = 10  # passages of each model that go into the pool

PER_REQUEST = 8  # passages that a request shows at most

MAX_TOKENS = 32  # of a reply, beside those of its grades

# Grade -> what the file says. MAP, Recall and MRR count all from 1 on as relevant, and a grade of 1 is related, no answer.
IN_FILE = {0: 0, 1: 0, 2: 1, 3: 2}

Runs = dict[str, dict[str, Hits]]  # by the name of a model, then by query


@dataclass
class Judgements:
    """What an LLM said about a pool, as `qrels/judged.tsv` has it."""

    llm: str
    pointwise: bool
    qrels: Qrels

    @property
    def line(self) -> str:
        """Who judged: no figure is shown without it."""
        graded = "3 times the probability of its yes, rounded" if self.pointwise else "its grades 0 to 3"
        grades = f"of {graded}, 2 and 3 count as relevant, as 1 and 2"
        who = "recorded answers" if self.llm == "replay" else self.llm
        return f"judged by an LLM ({who}), not by a person; {grades}"

    def unjudged(self, hits: dict[str, Hits]) -> float:
        """Share of the top `DEPTH` of a model that has no judgement."""
        top = [passage in grades for query, grades in self.qrels.items() for passage, _ in hits.get(query, [])[:DEPTH]]
        return 1 - sum(top) / len(top) if top else 0.0


def pooled(runs: Iterable[dict[str, Hits]], corpus: Corpus) -> dict[str, list[str]]:
    """The passages of each query that any model has among its first `DEPTH`, equal texts once, in order of their ids."""
    pool: dict[str, set[str]] = {}
    for run in runs:
        for query, hits in run.items():
            pool.setdefault(query, set()).update(corpus.first_id(passage) for passage, _ in hits[:DEPTH])
    return {query: sorted(passages) for query, passages in pool.items()}


def portions(
    pool: dict[str, list[str]], known: dict[str, dict[str, float]], most: int = PER_REQUEST
) -> Iterator[tuple[str, list[str]]]:
    """(query, at most `most` passages of one request) for all passages of the pool without a grade. All portions but the last
    of a query are full, so that those which a killed run left are asked for as they were, and come from the ledger if they
    arrived."""
    for query, passages in pool.items():
        new = [passage for passage in passages if passage not in known.get(query, {})]
        for start in range(0, len(new), most):
            yield query, new[start : start + most]


def grades_of(rows: Iterable[jsonl.Row]) -> dict[str, dict[str, float]]:
    """{query: {passage: grade}}."""
    known: dict[str, dict[str, float]] = {}
    for row in rows:
        known.setdefault(row["query_id"], {}).update(row["grades"])
    return known


class Pool:
    """The queries of a test set, and what an LLM says about the passages that models find for them."""

    def __init__(self, ds: str, corpus: Corpus, args: argparse.Namespace) -> None:
        """Find the queries: those of the test split, else those that are kept from training. Raises `BadInput`."""
        if len(args.datasets) > 1 and (args.max_cost is not None or args.max_requests is not None):
            raise BadInput("--max-cost and --max-requests are limits for one dataset; name one at a time")
        args = argparse.Namespace(**vars(args))  # who judges this dataset is noted there, and says nothing of another
        self.ds, self.corpus, self.args = ds, corpus, args
        self.output, self.qrels = paths.judged(ds), paths.qrels(ds, SPLIT)
        if self.qrels.exists() and not lineage.load_record(self.qrels):
            raise BadInput(f"{paths.shown(self.qrels)} is your own file, which would be overwritten; give it another name")
        if paths.qrels(ds, "test").is_file():
            self.queries, _ = dataset.load_split(ds, "test", strict=args.strict)
            self.files = [paths.queries(ds), paths.qrels(ds, "test")]
        else:
            self.queries = training.reserved(ds)
            self.files = list(filter(Path.is_file, (paths.queries(ds), paths.generated(ds))))
        if not self.queries:
            command = terminal.command("datasets/generate_queries.py", download.as_typed(ds))
            kept = "the tenth of the queries without judgements that is kept from training is empty"
            lacks = f"{ds} has no {paths.shown(paths.qrels(ds, 'test'))}, and {kept}"
            raise BadInput(f"--split {SPLIT}: {lacks}. To have queries of more passages written, run: {command}")
        begun = self.output.is_file() and self.output.stat().st_size > 0
        was = lineage.load_record(self.output) if begun and not args.llm else None
        self._teacher: asking.Teacher | None = None
        if was:  # the same judge goes on, and needs its key only where there is something to judge
            args.llm, self.llm = was["options"]["llm"], was["settings"]["llm"]
            args.pointwise = args.pointwise or was["settings"]["pointwise"]
        else:
            self._teacher = self._make_teacher()  # what it lacks shows before the encoding
            self.llm = self._teacher.model
        recorded = list(filter(Path.is_file, paths.recordings(paths.recorded(ds))[1:])) if self.llm == "replay" else []
        self._record = lineage.Record(args, lineage.check_fresh(self.files, args.force))
        self._record.reads(corpus.path, *recorded)
        self._settings = {"llm": self.llm, "seed": args.seed, **grading.settings(False, args.pointwise)}
        if (changed := self._record.differs(self.output, self._settings)) and not (args.force or args.dry_run):
            raise BadInput(f"{changed}.\nPass --force to start anew; replies that are in the ledger are not paid again")
        self.files += recorded

    def _make_teacher(self) -> asking.Teacher:
        teacher = teachers.make_teacher(self.ds, self.output, self.args)
        judging.prepare(teacher, self.corpus, self.args.pointwise)
        return teacher

    def judge(self, runs: Runs) -> Judgements | None:
        """Have graded what has no grade yet, and write `qrels/judged.tsv`. None with `--dry-run`."""
        args, corpus, pool = self.args, self.corpus, pooled(runs.values(), self.corpus)
        ledger = args.ledger or paths.judged_ledger(self.ds)
        with processes.lock(self.output, args.dry_run), processes.lock(ledger, args.dry_run):
            record = self._record
            resumed = record.resumes(self.output, self._settings, args.force, args.dry_run)
            record.reads(*self.files)
            before = list(self._rows()) if resumed else []
            known = grades_of(before)
            todo, results = list(portions(pool, known, 1 if args.pointwise else PER_REQUEST)), dict[str, Any]()
            size, new = sum(map(len, pool.values())), sum(len(passages) for _, passages in todo)
            terminal.say(
                f"pool   top {DEPTH} of {', '.join(runs)} for {len(pool):,} queries: {size:,} passages, {new:,} to judge"
            )
            if todo:
                teacher = self._teacher or self._make_teacher()
                if teacher.model != self.llm:
                    was = f"{paths.shown(self.output)} was judged by {self.llm}, which is not what {args.llm} is now"
                    raise BadInput(f"{was}; name the judge (--llm)")

                async def work(asker: asking.Asker, item: tuple[str, list[str]]) -> jsonl.Row:
                    query, passages = item
                    texts = {passage: corpus.by_id(passage) for passage in passages}
                    limit, pointwise = args.verdict_max_tokens, args.pointwise
                    row = await grading.grade(asker, self.queries[query], texts, args.seed, limit, pointwise=pointwise)
                    return {"query_id": query, "query": self.queries[query], **row, "llm": self.llm}

                counts, used = append_rows(self.output, ledger, todo, len(todo), work, teacher, args, unit="request")
                results = {**counts, **used}
                if counts["not_recorded"]:
                    terminal.say(f"       {counts['not_recorded']:,} requests have no recorded answer")
                check_failures(counts, len(before), self.output, args.max_failure_rate)
            if args.dry_run:
                return None
            record.write(self.output, **results)
            return self._write(grades_of(self._rows()) if todo else known, runs)

    def _rows(self) -> Iterator[jsonl.Row]:
        """One of every request, of the queries as they are now."""
        rows = jsonl.read(self.output, {"query_id": str, "query": str, "grades": dict}, torn=self.args.dry_run)
        return (row for row in rows if self.queries.get(row["query_id"]) == row["query"])

    def _write(self, known: dict[str, dict[str, float]], runs: Runs) -> Judgements:
        """Write the judgements and their record. All passages with one text have the grade of the first."""
        qrels: Qrels = {}
        for query in filter(known.__contains__, self.queries):
            grades = {passage: IN_FILE[round(grade)] for passage, grade in sorted(known[query].items())}
            qrels[query] = {same: grade for passage, grade in grades.items() for same in self.corpus.same_text(passage)}
        if not qrels:
            raise BadInput(
                f"--split {SPLIT}: {self.llm} has judged no passage of any of the {len(self.queries):,} queries of {self.ds}"
            )
        before = (lineage.load_record(self.qrels) or {}).get("results", {}).get("pool", {}).get("models", [])
        record = lineage.Record(self.args)
        record.reads(self.output)
        dataset.write_qrels(self.qrels, qrels)
        pool = {"models": list(dict.fromkeys([*before, *runs])), "depth": DEPTH, "queries": len(qrels)}
        pool["passages"] = sum(map(len, qrels.values()))
        made = Judgements(self.llm, self.args.pointwise, qrels)
        record.write(self.qrels, judged_by=made.line, pool=pool, grade_in_file={str(k): v for k, v in IN_FILE.items()})
        terminal.say(f"wrote  {paths.shown(self.qrels)}: {pool['passages']:,} judgements of {len(qrels):,} queries, {made.line}")
        if left := len(self.queries) - len(qrels):
            terminal.say(f"note:  {left:,} of {len(self.queries):,} queries have no judgement; they are left out")
        if empty := sum(not any(judged.values()) for judged in qrels.values()):
            terminal.say(f"note:  {empty:,} queries have nothing relevant in the pool, and count 0 for every model")
        return made
