"""Evaluate models on BEIR datasets: nDCG@K, MAP, Recall, Precision and MRR, side by side.

Reads    output/<model>-<dataset>/ (or any model, or bm25), datasets/<dataset>/
Writes   results/<model>_<dataset>_<split>.json   measures, the query count, per-query values
         results/<model>_<dataset>_<split>.trec   the run, for trec_eval
         results/<model>_<dataset>_<split>.png    the model beside those named before it
         results/report.html                      all of this run in one page
         output/<model>-<dataset>/README.md       the scores, in the model card
Run      python evaluate.py e5-final scifact
         python evaluate.py bm25 e5 e5-sft e5-final scifact
         python evaluate.py e5-final scifact cqadupstack --trained-on msmarco       zero-shot
         python evaluate.py e5-final scifact --push-to-hub owner/name
"""

import argparse
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from syntriever.data import dataset, download
from syntriever.data.corpus import UNFIT, Corpus
from syntriever.data.dataset import Hits
from syntriever.encode import bm25, models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.report import hub, metrics, page, pictures
from syntriever.report.metrics import Measures
from syntriever.run import cli, lineage, options, processes, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="name",
        help=f"models (X-sft, X-final, {', '.join(models.ALIASES)}, bm25, Hub id, folder) and datasets",
    )
    parser.add_argument("--split", default="test", help="which judgements (default: %(default)s)")
    parser.add_argument("--ks", help=f"cut-offs of the measures (default: {','.join(map(str, metrics.KS))})")
    parser.add_argument("--trained-on", metavar="DATASET", help="evaluate X-sft and X-final trained on this dataset (zero-shot)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the one checkpoint, with its scores, to the Hub")
    options.add_encoding_options(parser)
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(map(download.named, args.names)))
    args.datasets = [name for name in names if name not in models.ALIASES and "/" not in name and dataset.is_dataset(name)]
    args.models = [name for name in names if name not in args.datasets]
    if not args.datasets or not args.models:
        what = "a dataset" if args.models else "a model"
        parser.error(f"name at least one model and one dataset; {what} is missing among: {' '.join(args.names)}")
    return args


def parse_ks(text: str) -> tuple[int, ...]:
    try:
        ks = tuple(sorted({int(k) for k in text.split(",")}))
        if ks[0] < 1:
            raise ValueError
    except ValueError:
        raise BadInput(f"--ks {text}: expected whole numbers from 1, separated by commas") from None
    return ks


@dataclass
class Inputs:
    """One dataset, loaded."""

    name: str
    corpus: Corpus
    queries: dict[str, str]
    qrels: dataset.Qrels

    def unfit(self) -> str | None:
        """An id that no TREC file can hold."""
        return self.corpus.unfit or next(filter(UNFIT.search, self.queries), None)


def main(args: argparse.Namespace) -> None:
    cli.check_positive(args, "max_length", "batch_tokens")
    wanted = parse_ks(args.ks) if args.ks is not None else metrics.KS
    datasets = [part for name in args.datasets for part in download.parts(name)]
    refs: dict[tuple[str, str], models.ModelRef] = {}
    forced: dict[tuple[str, str], list[str]] = {}
    for ds in datasets:  # everything is found and checked before anything is loaded
        dataset.ensure(ds)
        for model in args.models:
            if model != "bm25":
                refs[model, ds] = models.resolve(model, args.trained_on or ds, args.name if len(args.models) == 1 else None)
                models.check_backend(refs[model, ds], args.backend)
                forced[model, ds] = lineage.check_fresh(refs[model, ds].weights, args.force)
        dataset.load_qrels(ds, args.split)
        names = [refs[model, ds].name for model in args.models if model != "bm25"]
        if len(set(names)) < len(names):
            raise BadInput(f"two models have one short name ({', '.join(names)}), and so the same result files; rename a folder")
    checkpoint = None
    if args.push_to_hub:
        folders = {ref.folder for ref in refs.values()}
        if len(args.models) > 1 or None in folders or len(folders) != 1:
            raise BadInput("--push-to-hub takes one model, which is a folder or a checkpoint of this project")
        (checkpoint,) = folders
    inputs = []
    for ds in datasets:
        corpus = Corpus(ds)
        inputs.append(Inputs(ds, corpus, *dataset.load_split(ds, args.split, corpus, args.strict)))
    smallest = min((data.corpus for data in inputs), key=len)
    most = cli.at_most("--ks", max(wanted) if args.ks else None, max(wanted), len(smallest), paths.shown(smallest.path))
    ks = tuple(sorted({min(k, most) for k in wanted}))
    if checkpoint and processes.rank() == 0:
        hub.create(args.push_to_hub)
    device = processes.start(args.device)
    table: dict[str, dict[str, Measures]] = {}
    sections = []
    for data in inputs:
        terminal.say(f"read   {len(data.corpus):,} passages, {len(data.queries):,} {args.split} queries of {data.name}")
        if data.corpus.repeats:
            terminal.say(f"note:  {data.corpus.repeats:,} passages repeat the text of another; measures count ids, as published")
        if unfit := data.unfit():
            terminal.say(f"note:  ids hold white space: {unfit!r} is {metrics.trec_id(unfit)} in the .trec files (% encodes)")
        table[data.name] = {}
        tops: dict[str, dict[str, Hits]] = {}
        tests: list[tuple[str, str, dict[str, float]]] = []
        for model in args.models:
            ref = refs.get((model, data.name))
            record = lineage.Record(args, forced.get((model, data.name), []))
            record.reads(*dataset.files(data.name, args.split), *(ref.weights if ref else []))
            hits, encoder = retrieve(args, ref, data, max(ks), device)
            if processes.rank() == 0:
                made, against = measure(args, record, model, ref, data, hits, encoder, ks, table[data.name])
                table[data.name][model] = made
                tests += [(model, other, test) for other, test in against.items()]
                tops[model] = {query: found[: page.SHOWN] for query, found in hits.items()}
        if processes.rank() == 0:
            print_table(data, args.split, table[data.name], ks, tests)
            curves = {model: refs[model, data.name].folder for model in args.models if (model, data.name) in refs}
            sections.append(page.section(data, args.split, table[data.name], columns(ks), main_of(ks), tests, tops, curves))
    if processes.rank():
        return
    rows = summary(args, table, ks) if len(datasets) > 1 else []
    print_summary(rows, main_of(ks))
    page.write(sections, rows, main_of(ks))
    terminal.say(f"wrote  {paths.shown(paths.report_html())}")
    if checkpoint:
        hub.push(checkpoint, args.push_to_hub)


@functools.lru_cache(1)
def load(ref: models.ModelRef, device: str | None, max_length: int | None, backend: str, batch_tokens: int | None) -> Any:
    """An encoder, kept for the next dataset where it is the only one."""
    from syntriever.encode.encoder import Encoder

    return Encoder(models.load(ref, device, max_length), backend, batch_tokens)


def retrieve(
    args: argparse.Namespace, ref: models.ModelRef | None, data: Inputs, k: int, device: str | None
) -> tuple[dict[str, Hits], dict[str, Any]]:
    """Top `k` of every query, its own passage left out where the dataset asks for it; and what decides
    an embedding."""
    drop_self = data.name in dataset.SELF_RETRIEVAL
    wanted = min(k + drop_self, len(data.corpus))
    found: Iterable[tuple[str, Hits]]
    settings: dict[str, Any] = {}
    if ref:
        from syntriever.encode import search

        encoder = load(ref, device, args.max_length, args.backend, args.batch_tokens)
        settings = encoder.settings() | {"dtype": args.dtype}
        found = search.top_k(encoder, data.corpus, ref.embeddings(data.name), data.queries, wanted, args.dtype)
    else:
        found = bm25.run(data.corpus, data.queries, wanted) if processes.rank() == 0 else []
    if drop_self:
        terminal.say(f"note:  a query of {data.name} is itself a passage; it is left out of its own results, as BEIR does")
        found = ((query, [hit for hit in hits if hit[0] != query][:k]) for query, hits in found)
    return dict(found), settings


def measure(
    args: argparse.Namespace,
    record: lineage.Record,
    model: str,
    ref: models.ModelRef | None,
    data: Inputs,
    hits: dict[str, Hits],
    encoder: dict[str, Any],
    ks: tuple[int, ...],
    before: dict[str, Measures],
) -> tuple[Measures, dict[str, dict[str, float]]]:
    """Measure the run of one model on one dataset and write its result files. Returns the measures and
    the paired tests against the models `before`."""
    ds, qrels = data.name, data.qrels
    measures = metrics.evaluate(qrels, {query: dict(found) for query, found in hits.items()}, ks)
    means = {name: metrics.mean(values) for name, values in measures.items()}
    shown = ref.name if ref else model
    if args.trained_on and models.is_own(model):
        shown = f"{model}-{args.trained_on}"
    silent = sum(not hits.get(query) for query in qrels)
    if silent:
        terminal.say(f"note:  {silent:,} of {len(qrels):,} queries have no result by {shown} and count 0")
    name = main_of(ks)
    tests = {other: metrics.paired_test(measures[name], values[name]) for other, values in before.items()}
    result: dict[str, Any] = {
        "model": shown,
        "checkpoint": ref.where if ref else "bm25s, k1 0.9, b 0.4",
        "encoder": encoder,
        "dataset": ds,
        "split": args.split,
        "queries": len(qrels),
        "queries_without_results": silent,
        "passages": len(data.corpus),
        "own_passage_left_out": ds in dataset.SELF_RETRIEVAL,
        "measures": means,
        "tests": tests,
        "per_query": {query: {name: measures[name][query] for name in measures} for query in qrels},
    }
    target = {suffix: paths.result(shown, ds, args.split, suffix) for suffix in (".json", ".trec", ".png")}
    spelt = metrics.trec_id if data.unfit() else str
    with jsonl.atomic(target[".trec"]) as file:
        for query, found in hits.items():
            for rank, (passage, score) in enumerate(found, 1):
                # Nine digits keep a 32-bit float, so that trec_eval sees the ties and the order that were measured.
                file.write(f"{spelt(query)} Q0 {spelt(passage)} {rank} {score:.9g} {shown}\n".encode())
    jsonl.write_json(target[".json"], result)
    title = f"{ds}, {args.split} split, {len(qrels)} queries"
    pictures.compare({**before, model: measures}, ks, name, target[".png"], title)
    record.write(target[".json"], **means)
    terminal.say(f"wrote  {paths.shown(target['.json'])}, .trec, .png")
    if ref and ref.folder and models.is_own(model):
        how = f"{encoder['max_length']} tokens, {encoder['backend']}, {encoder['dtype']}"
        hub.add_scores(ref.folder, ds, args.split, how, {name: means[name] for name in columns(ks)})
    return measures, tests


def main_of(ks: tuple[int, ...]) -> str:
    """The measure that tests and pictures are about: nDCG@10, or the nearest cut-off there is."""
    return f"nDCG@{min(ks, key=lambda k: (abs(k - 10), k))}"


def columns(ks: tuple[int, ...]) -> list[str]:
    """The measures that are shown; all are in the result files."""
    return [*(f"nDCG@{k}" for k in ks), f"MAP@{max(ks)}", f"Recall@{max(ks)}", f"MRR@{main_of(ks).split('@')[1]}"]


def print_table(
    data: Inputs, split: str, table: dict[str, Measures], ks: tuple[int, ...], tests: list[tuple[str, str, dict[str, float]]]
) -> None:
    width = max(map(len, table)) + 2
    own = "; a query's own passage is left out" if data.name in dataset.SELF_RETRIEVAL else ""
    terminal.say(f"\n{data.name}, {split} split, mean over {len(data.qrels)} queries (a query without results counts 0{own})")
    terminal.say("".ljust(width) + "".join(column.rjust(11) for column in columns(ks)))
    for model, measures in table.items():
        terminal.say(model.ljust(width) + "".join(f"{metrics.mean(measures[column]):11.4f}" for column in columns(ks)))
    if tests:
        terminal.say(f"\npaired test on {main_of(ks)}: difference [95% bootstrap interval], two-sided p of a randomisation test")
    for new, old, test in tests:
        terminal.say(f"{new} - {old}: {test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p']:.4f}")
    terminal.say()


def summary(args: argparse.Namespace, table: dict[str, dict[str, Measures]], ks: tuple[int, ...]) -> list[list[Any]]:
    """Header, then a row per model: its main measure on every dataset that was named, and the average.
    CQADupStack counts once, with the mean of its forums."""
    name = main_of(ks)
    rows: list[list[Any]] = [["", *args.datasets, "average"]]
    for model in args.models:
        of_parts = [[metrics.mean(table[part][model][name]) for part in download.parts(ds)] for ds in args.datasets]
        values = [sum(values) / len(values) for values in of_parts]
        rows.append([model, *values, sum(values) / len(values)])
    return rows


def print_summary(rows: list[list[Any]], name: str) -> None:
    if rows:
        widths = [max(len(str(row[0])) for row in rows) + 2, *(max(11, len(ds) + 2) for ds in rows[0][1:])]
        terminal.say(f"{name} by dataset")
        for row in rows:
            cells = [cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row]
            terminal.say(cells[0].ljust(widths[0]) + "".join(map(str.rjust, cells[1:], widths[1:])))


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
