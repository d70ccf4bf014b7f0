"""Training on graded judgements: an LLM's grades of real passages teach the encoder, in both stages, from any encoder.

A row is a query with its judged passages. Three things are learnt at once: their order, as the teacher has it
(`listwise_cross_entropy` or a rival), that the relevant ones come before the other passages of the batch, and before those
of the corpus that are near to the query (`graded_contrast`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from syntriever.data import dataset, training
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm.grading import RELEVANT
from syntriever.run import lineage, processes, terminal
from syntriever.train import bank, batching, checkpoint, frozen, journal, loop, losses
from syntriever.train.candidates import ABSENT

GOLD = 3.0  # grade of a gold passage (`--judgements both`)
MOST = 32  # judged passages of a query that teach an order and are encoded at each step, the best ones

# How much the teacher trusts the judge beside the starting encoder: weights of a grade that are tried.
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

KEEP = 10.0  # measures of the held-out queries take whole numbers: tenths of a grade

Found = dict[str, dict[int, tuple[float, float]]]  # query id -> position of a passage -> its grade and the judge's signal


@dataclass
class Judged:
    """Queries with their judged passages. Queries with the same text are one, and so are passages."""

    texts: list[str]
    names: list[str]  # query ids
    positions: np.ndarray  # (Q, K) int64 of the passages, the best first, -1 where there are fewer
    grades: np.ndarray  # (Q, K) float32
    signal: np.ndarray  # (Q, K) float32: the judge's log-odds where it gave some, else the grades
    known: np.ndarray  # (Q,) int64: the passage that a generated query was written from, -1 where there is none
    doubted: bool = False  # a weak judge's (`trust`): a known passage is relevant for sure, and without gold ones no other
    gold: bool = False  # gold passages are among them, with the highest grade

    @property
    def there(self) -> np.ndarray:
        return np.asarray(self.positions >= 0)

    @property
    def is_known(self) -> np.ndarray:
        return self.there & (self.positions == self.known[:, None])

    @property
    def relevant(self) -> list[set[int]]:
        return self._places(self._is_relevant)

    @property
    def unsure(self) -> list[set[int]]:
        """What only a weak judge calls relevant: neither a positive nor a negative."""
        return self._places((self.grades >= RELEVANT) & ~self._is_relevant)

    @property
    def _is_relevant(self) -> np.ndarray:
        is_known, judged = self.is_known, self.grades >= RELEVANT
        return np.where(is_known.any(1, keepdims=True), is_known, judged & self.gold) if self.doubted else judged

    def _places(self, chosen: np.ndarray) -> list[set[int]]:
        rows = zip(self.positions, chosen & self.there, strict=True)
        return [set(places[which].tolist()) for places, which in rows]


def load(source: Path, train: training.Training, corpus: Corpus, gold: bool, hold_out: bool) -> tuple[Judged, Judged]:
    """(queries that train, held-out ones) of a file of judgements; with `gold`, gold passages have the grade `GOLD`.
    Rows of other queries are counted and left out; passages that the corpus lacks are `BadInput`."""
    first = dataset.first_queries(train.queries)
    found: Found = {}
    others = 0
    for number, _, row in jsonl.read_with_offsets(source, {"query_id": str, "grades": dict}):
        if row["query_id"] not in train.queries:
            others += 1
            continue
        of_query, odds = found.setdefault(first[row["query_id"]], {}), row.get("log_odds") or {}
        for passage, grade in row["grades"].items():
            position, where = corpus.position(passage), f"{paths.shown(source)}:{number}"
            if position is None:
                raise BadInput(f"{where}: {paths.shown(corpus.path)} has no passage {passage!r}")
            if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= GOLD:
                raise BadInput(f"{where}: the grade of {passage!r} is {grade!r}, not a number from 0 to 3")
            twin = corpus.twin(position)
            of_query[twin] = max(of_query.get(twin, (0.0, -np.inf)), (float(grade), float(odds.get(passage, grade))))
    if others:
        terminal.say(f"note:  {others:,} rows of {paths.shown(source)} are of queries that do not train; they are left out")
    for query, judged in train.gold.items() if gold else ():
        of_query = found.setdefault(first[query], {})
        for passage, grade in judged.items():
            if grade >= 1 and (position := corpus.position(passage)) is not None:
                _, most = of_query.get(corpus.twin(position), (0.0, GOLD))
                of_query[corpus.twin(position)] = (GOLD, max(most, GOLD))
    chosen = sorted(query for query, grades in found.items() if grades)
    if not chosen:
        raise BadInput(f"{paths.shown(source)} has no judgement of a training query")
    held = [query for query in chosen if hold_out and train.held_out(query)]
    held = held if len(held) < len(chosen) else []  # of a handful, all may fall on that side
    written_from = {query: corpus.position(corpus.first_id(source)) for query, source in train.sources.items()}
    known = {query: passage for query, passage in written_from.items() if passage is not None}
    return _table(sorted({*chosen} - {*held}), found, train, known, gold), _table(held, found, train, known, gold)


def _table(names: list[str], found: Found, train: training.Training, known: dict[str, int], gold: bool) -> Judged:
    width = max((len(found[query]) for query in names), default=1)
    positions = np.full((len(names), width), -1, np.int64)
    grades, signal = (np.zeros((len(names), width), np.float32) for _ in range(2))
    for row, query in enumerate(names):
        best = sorted(found[query].items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
        for column, (position, judged) in enumerate(best):
            positions[row, column], (grades[row, column], signal[row, column]) = position, judged
    sources = np.array([known.get(query, -1) for query in names], np.int64)
    return Judged([train.queries[query] for query in names], names, positions, grades, signal, sources, gold=gold)


def held_out_score(held: Judged, corpus: Corpus, args: argparse.Namespace) -> journal.DevScore | None:
    """nDCG@10 by the judge's grades, over the held-out queries that have a grade above 0. Of a weak judge, by the known passage
    of those that have one: what such a judge prefers is no measure."""
    by_known = held.is_known.any(1, keepdims=True) & held.doubted
    rows = zip(held.names, held.positions, np.where(by_known, GOLD * held.is_known, held.grades), strict=True)
    qrels = {q: {corpus.id(p): round(KEEP * g) for p, g in zip(*of_query, strict=True) if p >= 0} for q, *of_query in rows}
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        terminal.say("note:  no held-out query has a judged passage; the last epoch is kept")
        return None
    queries = {query: text for query, text in zip(held.names, held.texts, strict=True) if query in qrels}
    by = "the passages they were written from" if by_known.any() else "their grades"
    terminal.say(f"note:  {len(queries):,} held-out queries, by {by}, choose between the epochs and the untrained encoder")
    if len(queries) < 10:  # of fewer than about 100 judged ones
        terminal.say("warning: so few do not tell whether training helps; judge more queries")
    return journal.DevScore(queries, qrels, corpus, args, from_start=True)


def trust(start: np.ndarray, judged: Judged) -> tuple[float | None, bool]:
    """How much of the judge goes into the teacher: the weight w of start / temperature + w * signal by which the known
    passage of each query comes first most (mean reciprocal rank). None, the grades alone, where that is as good. It is said
    what each finds, and warned where the judge adds nothing. And whether the judge is to be doubted: it finds them worse than
    the encoder, which here breaks its ties.

    Where nothing is known, log-odds have the weight 1, and are doubted where they differ less within a query than the
    encoder's scores do, which then decide the order. Grades are the teacher alone. `start`: (Q, K), cos / temperature.
    """
    rows = judged.is_known.any(1)
    if not rows.any():
        if judged.gold or (judged.signal == judged.grades).all():
            return None, False
        sure, encoder = (float(np.nanstd(np.where(judged.there, x, np.nan), axis=1).mean()) for x in (judged.signal, start))
        terminal.say(
            f"judge  no known passage; spread within a query: its log-odds {sure:.2f}, the encoder's scores {encoder:.2f}"
        )
        if sure < encoder:
            terminal.say("warning: this judge is less sure than the encoder: its yes makes no positive")
        return 1.0, sure < encoder
    there, wanted = judged.there[rows], judged.is_known[rows]

    def found(teacher: np.ndarray) -> float:
        scores = np.where(there, teacher[rows], -np.inf)
        own = scores[wanted][:, None]
        return float((1 / (1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2)).mean())  # ties: their mean rank

    tried = {weight: found(start + weight * judged.signal) for weight in WEIGHTS}
    best, alone = max(tried, key=lambda weight: tried[weight]), found(judged.signal)
    ranks = (
        f"{tried[0.0]:.3f} by the encoder, {alone:.3f} by the judge, {tried[best]:.3f} by the encoder + {best:g} times the judge"
    )
    terminal.say(f"judge  {rows.sum():,} queries with a known passage; its mean reciprocal rank is {ranks}")
    if best == 0:
        terminal.say("warning: this judge adds nothing to what the encoder knows; a better one would")
    if alone >= tried[best]:
        return None, False
    lower = (judged.signal[:, :, None] > judged.signal[:, None, :]).sum(2)
    return best, found(lower + start / (2 * np.abs(start).max() + 1)) < tried[0.0]


def make_loss(
    args: argparse.Namespace,
    judged: Judged,
    teacher: np.ndarray,
    looks_at: bank.Bank,
    regulariser: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> loop.LossFunction:
    """Loss of (texts, D) embeddings and (B, 1 + K + 1) labels: places of the query and of its judged passages among the
    texts (-1: absent), and the number of the row.

    `teacher`: (Q, K) logits of the judged passages. `regulariser`: of the (B, M) scores of the batch and those of
    the starting encoder, as the KL of stage 2, with the weight `--beta`.
    """
    relevant, unsure = judged.relevant, judged.unsure

    def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows, device = labels[:, -1].cpu().numpy(), embeddings.device
        query, places, there = embeddings[labels[:, 0]], labels[:, 1:-1], labels[:, 1:-1] >= 0
        texts = places[there].unique()
        columns = torch.searchsorted(texts, places.clamp(min=int(texts[0])))
        positions = np.empty(len(texts), np.int64)
        positions[columns[there].cpu().numpy()] = judged.positions[rows][:, :MOST][there.cpu().numpy()]
        start = torch.from_numpy(np.asarray(looks_at.views[rows])).to(device)

        def compared(positions: np.ndarray) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
            """Of passages at ascending positions: starting embeddings, starting cosines with the queries, and which are
            relevant to these and which are no negatives."""
            passages = torch.from_numpy(looks_at.embeddings.rows(positions)).to(device)
            cosines = models.similarity(start, passages)
            is_relevant, is_unsure, is_judged = (
                torch.from_numpy(np.stack([np.isin(positions, list(of_row[row])) for row in rows])).to(device)
                for of_row in (relevant, unsure, judged.positions)
            )
            near = losses.near_positives(cosines, is_relevant, is_judged)
            return passages, cosines, (is_relevant, near | is_unsure)

        # Of the batch: the trained embeddings of all judged passages.
        order = np.argsort(positions)
        _, cosines, masks = compared(positions[order])
        scores = models.similarity(query, embeddings[texts]) / args.temperature
        by_position = scores[:, torch.from_numpy(order).to(device)]
        own = scores.gather(1, columns)
        given = (torch.from_numpy(table[rows][:, :MOST]).to(device) for table in (teacher, judged.grades))
        parts = {"order": losses.ORDERS[args.loss](own, *given, there)}
        parts["contrast"] = losses.graded_contrast(by_position, *masks)
        # Of the corpus: what is near to a query, as the starting encoder embeds it.
        passages, _, masks = compared(np.unique(np.concatenate([looks_at.top[rows].ravel(), positions])))
        parts["corpus"] = losses.graded_contrast(models.similarity(query, passages) / args.temperature, *masks)
        total = parts["order"] + args.contrast_weight * (parts["contrast"] + args.corpus_weight * parts["corpus"])
        if regulariser:
            parts["kl"] = regulariser(by_position, cosines / args.temperature)
            total = total + args.beta * parts["kl"]
        best = embeddings[texts[columns.gather(1, own.masked_fill(~there, ABSENT).argmax(1, keepdim=True))[:, 0]]]
        return total, {**parts, **loop.spread(embeddings, query, best)}

    return loss


def train(
    args: argparse.Namespace,
    ref: models.ModelRef,
    source: Path,
    output: Path,
    regulariser: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Train `ref` on the judgements of `source`, with `--judgements both` on gold ones too."""
    record = lineage.Record(args, lineage.check_fresh([source, *ref.weights], args.force))
    corpus = Corpus(args.dataset)
    queries = training.load(args.dataset, args.queries, corpus, args.strict)
    gold = args.judgements == "both"
    by_dev = [paths.qrels(args.dataset, "dev")] if gold and paths.qrels(args.dataset, "dev").is_file() else []
    judged, held = load(source, queries, corpus, gold, hold_out=not by_dev)
    record.reads(corpus.path, *queries.files, *by_dev, source, *ref.weights)
    some = sum(map(bool, judged.relevant))
    terminal.say(
        f"read   {len(judged.names):,} training queries with {judged.there.sum():,} judged passages; "
        f"{some:,} have one of grade {RELEVANT} or more"
    )
    resume = checkpoint.find(output, record, args)
    model = models.load(ref, processes.start(args.device), dims=args.dims)
    dev = journal.dev_score(args.dataset, corpus, args) if by_dev else None
    with frozen.folder(output) as folder:
        # The model is still the one that training starts from.
        asked: list[tuple[str, list[str]]] = [(text, []) for text in judged.texts]
        base = ref.embeddings(args.dataset)
        looks_at = bank.build(model, corpus, base, folder, asked, judged.relevant, args.candidates, args.max_length)
        start = start_scores(looks_at, judged) / args.temperature
        weight, judged.doubted = trust(start, judged)
        held.doubted = judged.doubted
        dev = dev or held_out_score(held, corpus, args)
        teacher = judged.grades / args.grade_temperature if weight is None else start + weight * judged.signal

        def sample(number: int) -> batching.Row:
            passages = (("document", corpus.text(p)) if p >= 0 else None for p in judged.positions[number, :MOST].tolist())
            return [("query", judged.texts[number]), *passages], [number]

        def batches(epoch: int) -> list[list[int]]:
            return batching.deal(judged.names, args.batch_size, args.seed, epoch)

        loss = make_loss(args, judged, teacher.astype(np.float32), looks_at, regulariser)
        title = f"{output.name}: --judgements {args.judgements}, --loss {args.loss}"
        loop.train(model, loss, sample, batches, judged.names, dev, args, output, record, resume, title)


def start_scores(looks_at: bank.Bank, judged: Judged) -> np.ndarray:
    """(Q, K) cosines of the queries and their judged passages by the starting encoder; 0 where there is none."""
    made = np.zeros(judged.positions.shape, np.float32)
    for row, positions in enumerate(judged.positions):
        ascending = np.sort(positions[positions >= 0])
        cosines = looks_at.embeddings.rows(ascending) @ looks_at.views[row]
        made[row, positions >= 0] = cosines[np.searchsorted(ascending, positions[positions >= 0])]
    return made
