"""The work of the graded judge on a file of candidates: which passages of a query are graded, and which were before, under the
same settings: these are not asked about again."""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

from syntriever.data import training
from syntriever.data.corpus import Corpus, normal
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm import asking, grading
from syntriever.llm.replay import ReplayTeacher
from syntriever.run import lineage, terminal

Item = tuple[str, list[str]]  # a query id and the passages that are to have a grade


def prepare(teacher: asking.Teacher, corpus: Corpus, pointwise: bool) -> bool:
    """Whether recorded answers grade; these know passages by their texts then."""
    if not isinstance(teacher, ReplayTeacher):
        return False
    if pointwise:
        raise BadInput("--pointwise needs a model that is asked: recorded answers have no probabilities")
    teacher.by_text(corpus.first_id)
    return True


class Graded:
    """Grades all candidates of a query at once: one row a query."""

    unit, units, made = "query", "queries", "graded queries"

    def __init__(self, args: argparse.Namespace, corpus: Corpus, train: training.Training, teacher: asking.Teacher) -> None:
        self._args, self._corpus, self._sources = args, corpus, train.sources
        self.settings = {"llm": teacher.model, "k": args.k, "seed": args.seed}
        self.settings |= grading.settings(args.both_orders, args.pointwise)
        self.inputs = list(train.files)
        if prepare(teacher, corpus, args.pointwise):
            self.inputs += [path for path in paths.recordings(paths.recorded(args.dataset))[1:] if path.is_file()]

    def begin(self, settings: dict[str, Any], leave_out: Path | None) -> None:
        """Look for what was graded before, once the `settings` of the run are complete with the hashes of its inputs."""
        recorded = paths.recordings(paths.recorded(self._args.dataset))[1]
        same = {"llm", *grading.settings(False, False), paths.shown(self._corpus.path), paths.shown(recorded)}
        decisive = {name: value for name, value in settings.items() if name in same}
        self._before = Carried(self._args.dataset, decisive, leave_out)
        for path in self._before.files:
            terminal.say(f"note:  what {paths.shown(path)} has is not asked again: the same judge, asked in the same way")

    def items(self, row: jsonl.Row) -> list[Item]:
        source = self._sources.get(row["query_id"])
        if source and self._corpus.position(source) is None:
            generated = paths.shown(paths.generated(self._args.dataset))
            raise BadInput(f"{generated}: {row['query_id']!r} is of passage {source!r}, which the corpus lacks")
        found = candidates_of(row, self._corpus, self._args.k, source)
        return [(row["query_id"], found)] if found else []

    def key(self, item: Item) -> str:
        return item[0]

    def key_of(self, row: jsonl.Row) -> str:
        return str(row["query_id"])

    async def judge(self, asker: asking.Asker, item: Item, query: str) -> jsonl.Row:
        """{"query_id", "query", "grades", ...}, or a "reason" why there is no grade."""
        args, old, (query_id, candidates) = self._args, self._before.of(query), item
        texts = {passage: self._corpus.by_id(passage) for passage in candidates if passage not in old["grades"]}
        row: jsonl.Row = {"grades": {}, "shown": []}
        if texts:
            row = await grading.grade(asker, query, texts, args.seed, args.verdict_max_tokens, args.both_orders, args.pointwise)
        return {"query_id": query_id, "query": query, **joined(row, old, candidates)}


def candidates_of(row: jsonl.Row, corpus: Corpus, k: int, source: str | None = None) -> list[str]:
    """The passages of one query that are graded, each by the id of the first with its text: its top ones, and the one that it
    was written from, in place of the last where it is none of them."""
    found = list(itertools.islice(map(corpus.first_id, corpus.distinct(p["id"] for p in row["passages"])), k))
    if source and (first := corpus.first_id(source)) not in found:
        found[k - 1 :] = [first]
    return found


class Carried:
    """Grades of earlier files for the same dataset: those for the candidates of other models, and those that `--force` set
    aside. Only files count whose record has the same `settings`, the corpus among them. Queries go by their text; passages have
    the id of the first with their text in every such file.

    Memory does not grow with the grades.
    """

    def __init__(self, ds: str, settings: dict[str, Any], leave_out: Path | None) -> None:
        self.files = [path for path in _judgements(ds) if path != leave_out and _made_with(path, ds, settings)]
        self._grades = jsonl.scratch("grade (query TEXT, passage TEXT, grade REAL, odds REAL, PRIMARY KEY (query, passage))")
        for path in self.files:
            for row in jsonl.read(path, {"query": str, "grades": dict}, torn=True):  # another run may be at work
                odds = row.get("log_odds") or {}
                found = ((normal(row["query"]), p, grade, odds.get(p)) for p, grade in row["grades"].items())
                self._grades.executemany("INSERT OR IGNORE INTO grade VALUES (?, ?, ?, ?)", found)

    def of(self, query: str) -> dict[str, dict[str, float]]:
        """{"grades": {passage id: grade}, "log_odds": ...} of a query."""
        rows = self._grades.execute("SELECT passage, grade, odds FROM grade WHERE query = ?", [normal(query)]).fetchall()
        odds = {passage: value for passage, _, value in rows if value is not None}
        return {"grades": {passage: grade for passage, grade, _ in rows}, "log_odds": odds}


def joined(made: dict[str, Any], old: dict[str, dict[str, float]], candidates: list[str]) -> dict[str, Any]:
    """A new row with the grades of earlier ones: first the candidates, in their order, then the passages that were candidates
    before. A failed row stays as it is."""
    if "reason" in made:
        return made
    for name, before in old.items():
        every = {**before, **made.get(name, {})}
        if every:
            made = {**made, name: {p: every[p] for p in [*candidates, *(before.keys() - set(candidates))] if p in every}}
    return {**made, "carried": len(old["grades"])}


def _judgements(ds: str) -> list[Path]:
    named = re.compile(rf".+_{re.escape(ds)}_judgements\.jsonl(?:\.old\d*)?")
    return [path for path in sorted((paths.home() / "stage2").glob("*_judgements.jsonl*")) if named.fullmatch(path.name)]


def _made_with(path: Path, ds: str, settings: dict[str, Any]) -> bool:
    record = lineage.load_record(path)
    same = record and all(record["settings"].get(name) == value for name, value in settings.items())
    return bool(same and record and record["options"].get("dataset") == ds)
