"""Evaluate models on BEIR datasets: nDCG@K, MAP, Recall, Precision and MRR, side by side.

Reads    output/<model>-<dataset>/ (or any model, or bm25), datasets/<dataset>/
         datasets/<dataset>_generated.jsonl       with --split judged, where there is no test split
Writes   results/<model>_<dataset>_<split>.json   measures, the query count, per-query values
         results/<model>_<dataset>_<split>.trec   the run, for trec_eval
         results/<model>_<dataset>_<split>.png    the model beside those named before it
         results/report.html                      all of this run in one page
         output/<model>-<dataset>/README.md       the scores, in the model card
         datasets/<dataset>/qrels/judged.tsv      with --split judged: what an LLM says about the top of all models, from
         datasets/<dataset>_judged.jsonl          its grades, one row per request, appended (and .failed, .ledger, .batches)
Run      python evaluate.py e5-final scifact
         python evaluate.py bm25 e5 e5-sft e5-final scifact
         python evaluate.py minilm minilm-sft mydocs --split judged               a test set that an LLM judges
         python evaluate.py e5-final scifact cqadupstack --trained-on msmarco       zero-shot
         python evaluate.py e5-final scifact --push-to-hub owner/name
"""

import argparse
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syntriever.data import dataset, download
from syntriever.data.corpus import UNFIT, Corpus
from syntriever.data.dataset import Hits
from syntriever.encode import bm25, models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm import pool, teachers
from syntriever.report import hub, metrics, page, pictures, tables
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
    what = f"which judgements; {pool.SPLIT}: an LLM's, of the top {pool.DEPTH} of all models, made here (default: %(default)s)"
    parser.add_argument("--split", default="test", help=what)
    parser.add_argument("--ks", type=cli.numbers, help=f"cut-offs of the measures (default: {','.join(map(str, metrics.KS))})")
    parser.add_argument("--trained-on", metavar="DATASET", help="evaluate X-sft and X-final trained on this dataset (zero-shot)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the one checkpoint, with its scores, to the Hub")
    what = "search by this many first entries of the vectors, and each model once for each of them (default: all entries)"
    parser.add_argument("--dim", type=cli.numbers, metavar="N,N", help=what)
    bm25.add_language(parser)
    options.add_encoding_options(parser)
    what = f"with --split {pool.SPLIT}: a request a passage, yes or no, for a small judge (needs logprobs)"
    parser.add_argument("--pointwise", action="store_true", help=what)
    teachers.add_options(parser, pool.MAX_TOKENS, f"the judge of --split {pool.SPLIT}")
    args = parser.parse_intermixed_args(argv)
    names = list(dict.fromkeys(map(download.named, args.names)))
    args.datasets = [name for name in names if name not in models.ALIASES and "/" not in name and dataset.is_dataset(name)]
    args.models = [name for name in names if name not in args.datasets]
    if not args.datasets or not args.models:
        what = "a dataset" if args.models else "a model"
        parser.error(f"name at least one model and one dataset; {what} is missing among: {' '.join(args.names)}")
    return args


@dataclass
class Inputs:
    """One dataset, loaded."""

    name: str
    corpus: Corpus
    queries: dict[str, str]
    qrels: dataset.Qrels
    pooled: pool.Pool | None = None  # of a test set that an LLM judges
    judgements: pool.Judgements | None = None  # what it said
    notes: list[str] = field(default_factory=list)  # what is shown with every figure
    sizes: list[list[Any]] = field(default_factory=list)  # header, then dimensions, size and worth of each prefix (`--dim`)

    @classmethod
    def load(cls, ds: str, args: argparse.Namespace) -> "Inputs":
        corpus = Corpus(ds)
        if args.split == pool.SPLIT:
            judged = pool.Pool(ds, corpus, args)
            return cls(ds, corpus, judged.queries, {}, judged)
        return cls(ds, corpus, *dataset.load_split(ds, args.split, corpus, args.strict))

    def files(self, split: str) -> list[Path]:
        """What is read of the dataset, as far as it is there."""
        return list(dict.fromkeys([*dataset.files(self.name, split), *(self.pooled.files if self.pooled else [])]))

    def unfit(self) -> str | None:
        """An id that no TREC file can hold."""
        return self.corpus.unfit or next(filter(UNFIT.search, self.queries), None)


def main(args: argparse.Namespace) -> None:
    options.check_encoding_options(args)
    bm25.check_language(args.language)
    teachers.check_options(args)
    if args.split != pool.SPLIT and (args.llm or args.batch or args.dry_run or args.pointwise):
        raise BadInput(
            f"--llm, --batch, --dry-run and --pointwise are for --split {pool.SPLIT}; no LLM judges the {args.split} split"
        )
    wanted = args.ks or metrics.KS
    datasets = [part for name in args.datasets for part in download.parts(name)]
    refs: dict[tuple[str, str], models.ModelRef] = {}
    forced: dict[tuple[str, str], list[str]] = {}
    for ds in datasets:  # everything is found and checked before anything is loaded
        dataset.ensure(ds)
        for model in args.models:
            if model != "bm25":
                name = args.name if len(args.models) == 1 else None
                refs[model, ds] = models.resolve(model, args.trained_on or ds, name, args.query_prefix, args.passage_prefix)
                models.check_late(refs[model, ds], args.dim, args.backend)
                forced[model, ds] = lineage.check_fresh(refs[model, ds].weights, args.force)
        if args.split != pool.SPLIT:
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
    inputs = [Inputs.load(ds, args) for ds in datasets]
    smallest = min((data.corpus for data in inputs), key=len)
    most = cli.at_most("--ks", max(wanted) if args.ks else None, max(wanted), len(smallest), paths.shown(smallest.path))
    ks = tuple(sorted({min(k, most) for k in wanted}))
    if checkpoint and processes.rank() == 0 and not args.dry_run:
        hub.create(args.push_to_hub)
    device = processes.start(args.device)
    different = {ref.where: ref for ref in refs.values()}
    for ref in different.values():  # what is wrong with one is said before another has embedded anything
        if len(different) > 1 and (args.dim or args.max_length or not ref.folder):
            models.load(ref, "cpu", args.max_length, args.dim)
    cuts = args.dim[::-1] if args.dim else [None]
    entries = [(model, dim) for model in args.models for dim in (cuts if model != "bm25" else [None])]
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
        runs = {}
        for model, dim in entries:
            ref = refs.get((model, data.name))
            record = lineage.Record(args, forced.get((model, data.name), []))
            record.reads(*data.files(args.split), *(ref.weights if ref else []))
            runs[model, dim] = record, ref, *retrieve(args, ref, data, max(ks), device, dim)
        if data.pooled:
            judge(args, data, {shown(args, ref, *entry): hits for entry, (_, ref, hits, _) in runs.items()}, device)
        if processes.rank() == 0 and data.qrels:
            for (model, dim), (record, ref, hits, encoder) in runs.items():
                made, against = measure(args, record, model, ref, data, hits, encoder, ks, table[data.name])
                row = cut_to(dim, model)
                table[data.name][row] = made
                tests += [(row, other, test) for other, test in against.items()]
                tops[row] = {query: found[: page.SHOWN] for query, found in hits.items()}
            encoders = {cut_to(dim, model): encoder for (model, dim), (*_, encoder) in runs.items()}
            data.sizes = tables.sizes(len(data.corpus), encoders, table[data.name], ks)
            tables.print_table(data, args.split, table[data.name], ks, tests)
            curves = {model: refs[model, data.name].folder for model in args.models if (model, data.name) in refs}
            sections.append(
                page.section(data, args.split, table[data.name], tables.columns(ks), tables.main_of(ks), tests, tops, curves)
            )
    if processes.rank() or args.dry_run:
        return
    shown_rows = [cut_to(dim, model) for model, dim in entries]
    summary = tables.summary(shown_rows, args.datasets, table, ks) if len(datasets) > 1 else []
    tables.print_summary(summary, f"{tables.main_of(ks)} by dataset")
    page.write(sections, summary, tables.main_of(ks))
    terminal.say(f"wrote  {paths.shown(paths.report_html())}")
    if checkpoint:
        hub.push(checkpoint, args.push_to_hub)


@functools.lru_cache(1)
def load(
    ref: models.ModelRef, device: str | None, max_length: int | None, dims: tuple[int, ...], backend: str, tokens: int | None
) -> Any:
    """An encoder, kept for its next length and, where it is the only one, for the next dataset."""
    from syntriever.encode.encoder import Encoder

    return Encoder(models.load(ref, device, max_length, dims), backend, tokens)


def retrieve(
    args: argparse.Namespace, ref: models.ModelRef | None, data: Inputs, k: int, device: str | None, dim: int | None = None
) -> tuple[dict[str, Hits], dict[str, Any]]:
    """Top `k` of every query, by the first `dim` entries of the vectors, its own passage left out where the dataset asks for it;
    and what decides an embedding."""
    drop_self = data.name in dataset.SELF_RETRIEVAL
    depth = max(k, pool.DEPTH) if data.pooled else k
    wanted = min(depth + drop_self, len(data.corpus))
    found: Iterable[tuple[str, Hits]]
    settings: dict[str, Any] = {}
    if ref:
        from syntriever.encode import search

        encoder = load(ref, device, args.max_length, tuple(args.dim or ()), args.backend, args.batch_tokens)
        settings = encoder.settings() | {"dtype": args.dtype, "cut_to": dim}
        found = search.top_k(encoder, data.corpus, ref.embeddings(data.name), data.queries, wanted, args.dtype, dim)
    else:
        found = bm25.run(data.corpus, data.queries, wanted, args.language) if processes.rank() == 0 else []
    if drop_self:
        terminal.say(f"note:  a query of {data.name} is itself a passage; it is left out of its own results, as BEIR does")
        found = ((query, [hit for hit in hits if hit[0] != query][:depth]) for query, hits in found)
    return dict(found), settings


def cut_to(dim: int | None, name: str) -> str:
    """The name of a model that is searched by the first `dim` entries of its vectors."""
    return f"{name}-{dim}d" if dim else name


def shown(args: argparse.Namespace, ref: models.ModelRef | None, model: str, dim: int | None) -> str:
    """The name of a model in files and figures."""
    own = args.trained_on and models.is_own(model)
    return cut_to(dim, f"{model}-{args.trained_on}" if own else ref.name if ref else model)


def judge(args: argparse.Namespace, data: Inputs, runs: dict[str, dict[str, Hits]], device: str | None) -> None:
    """Have the pool of the models and of bm25 judged, whether that is named or not."""
    runs = {"bm25": runs.get("bm25") or retrieve(args, None, data, pool.DEPTH, device)[0], **runs}
    if processes.rank() == 0 and (found := data.pooled.judge(runs)):
        data.judgements, data.qrels = found, found.qrels
        unjudged = ", ".join(f"{name} {found.unjudged(hits):.4f}" for name, hits in runs.items())
        data.notes += [found.line, f"share of the top {pool.DEPTH} that is not judged: {unjudged}"]


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
    dim = encoder.get("cut_to")
    name, judges = shown(args, ref, model, dim), data.judgements
    if silent := sum(not hits.get(query) for query in qrels):
        terminal.say(f"note:  {silent:,} of {len(qrels):,} queries have no result by {name} and count 0")
    main = tables.main_of(ks)
    tests = {other: metrics.paired_test(measures[main], values[main]) for other, values in before.items()}
    result: dict[str, Any] = {
        "model": name,
        "checkpoint": ref.where if ref else f"bm25s, k1 0.9, b 0.4, {args.language}",
        "encoder": encoder,
        "dataset": ds,
        "split": args.split,
        "queries": len(qrels),
        "queries_without_results": silent,
        "passages": len(data.corpus),
        "own_passage_left_out": ds in dataset.SELF_RETRIEVAL,
        "measures": means,
        "tests": tests,
        "per_query": {query: {measure: measures[measure][query] for measure in measures} for query in qrels},
    }
    if judges:
        record.reads(paths.qrels(ds, args.split))
        result |= {"judged_by": judges.line, "unjudged": judges.unjudged(hits)}
    target = {suffix: paths.result(name, ds, args.split, suffix) for suffix in (".json", ".trec", ".png")}
    spelt = metrics.trec_id if data.unfit() else str
    with jsonl.atomic(target[".trec"]) as file:
        for query in filter(hits.__contains__, qrels):
            for rank, (passage, score) in enumerate(hits[query], 1):
                # Nine digits keep a 32-bit float, so that trec_eval sees the ties and the order that were measured.
                file.write(f"{spelt(query)} Q0 {spelt(passage)} {rank} {score:.9g} {name}\n".encode())
    jsonl.write_json(target[".json"], result)
    title = f"{ds}, {args.split} split, {len(qrels)} queries" + (f", judged by {judges.llm}" if judges else "")
    pictures.compare({**before, cut_to(dim, model): measures}, ks, main, target[".png"], title)
    record.write(target[".json"], **means)
    terminal.say(f"wrote  {paths.shown(target['.json'])}, .trec, .png")
    if ref and ref.folder and models.is_own(model):
        more = (f", {dim} dimensions" if dim else "") + (f", judged by {judges.llm}, an LLM" if judges else "")
        how = f"{encoder['max_length']} tokens, {encoder['backend']}, {encoder['dtype']}{more}"
        hub.add_scores(ref.folder, ds, args.split, how, {column: means[column] for column in tables.columns(ks)})
    return measures, tests


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
