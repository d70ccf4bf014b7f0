"""Evaluate models on BEIR datasets: nDCG@K, MAP, Recall, Precision and MRR, side by side.

Reads    output/<model>-<dataset>/ (or any model, or bm25), datasets/<dataset>/
Writes   results/<model>_<dataset>_<split>.json   measures, the query count, per-query values
         results/<model>_<dataset>_<split>.trec   the run, for trec_eval
         results/<model>_<dataset>_<split>.png    the model beside those named before it
Run      python evaluate.py e5-final scifact
         python evaluate.py bm25 e5 e5-sft e5-final scifact
         python evaluate.py e5-final scifact fiqa --trained-on msmarco       (zero-shot)
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from syntriever import beir, jsonl, metrics, models, paths, stage
from syntriever.errors import BadInput
from syntriever.metrics import Measures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = stage.parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="name",
        help=f"models (X-sft, X-final, {', '.join(models.ALIASES)}, bm25, Hub id, folder) and datasets",
    )
    parser.add_argument("--split", default="test", help="which judgements (default: %(default)s)")
    parser.add_argument("--ks", default="1,3,5,10,100", help="cut-offs of the measures (default: %(default)s)")
    parser.add_argument("--trained-on", metavar="DATASET", help="evaluate X-sft and X-final trained on this dataset (zero-shot)")
    parser.add_argument("--max-length", type=int, help="tokens kept of each text (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--name", help="short name for file names, where the one model is a folder or a Hub id")
    parser.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    parser.add_argument("--force", action="store_true", help="go on where a checkpoint is stale")
    args = parser.parse_args(argv)
    args.datasets = [name for name in args.names if name not in models.ALIASES and "/" not in name and beir.is_dataset(name)]
    args.models = list(dict.fromkeys(name for name in args.names if name not in args.datasets))
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


def bm25_run(corpus: beir.Corpus, queries: dict[str, str], k: int) -> dict[str, list[tuple[str, float]]]:
    """Top `k` of Lucene's BM25 (k1 0.9, b 0.4 as in Anserini and BEIR), English stop words, stemmed."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    tokenizer = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index(bm25s.tokenize(list(corpus.texts()), **tokenizer), show_progress=True)
    positions, scores = index.retrieve(bm25s.tokenize(list(queries.values()), **tokenizer), k=k, show_progress=True)
    return {
        query: [(corpus.id(int(p)), float(s)) for p, s in zip(row, row_scores, strict=True) if s > 0]
        for query, row, row_scores in zip(queries, positions, scores, strict=True)
    }


def main(args: argparse.Namespace) -> None:
    ks = parse_ks(args.ks)
    refs: dict[tuple[str, str], models.ModelRef] = {}
    inputs = {}  # everything is found and checked before anything is loaded
    for ds in args.datasets:
        beir.ensure(ds)
        for model in args.models:
            if model != "bm25":
                refs[model, ds] = models.resolve(model, args.trained_on or ds, args.name if len(args.models) == 1 else None)
                stage.check_fresh(refs[model, ds].weights, args.force)
        beir.load_qrels(ds, args.split)
    for ds in args.datasets:
        corpus = beir.Corpus(ds)
        if max(ks) > len(corpus):
            raise BadInput(f"--ks {args.ks}: {paths.shown(corpus.path)} has only {len(corpus)} passages")
        inputs[ds] = corpus, *beir.load_split(ds, args.split, corpus, args.strict)
    table: dict[str, dict[str, Measures]] = {}
    for ds, (corpus, queries, qrels) in inputs.items():
        stage.say(f"read   {len(corpus):,} passages, {len(queries):,} {args.split} queries of {ds}")
        table[ds] = {}
        for model in args.models:
            table[ds][model] = evaluate(args, model, refs.get((model, ds)), ds, corpus, queries, qrels, ks, table[ds])
        print_table(ds, args.split, table[ds], ks, len(queries))
    if len(args.datasets) > 1:
        print_summary(table, ks)


def evaluate(
    args: argparse.Namespace,
    model: str,
    ref: models.ModelRef | None,
    ds: str,
    corpus: beir.Corpus,
    queries: dict[str, str],
    qrels: beir.Qrels,
    ks: tuple[int, ...],
    before: dict[str, Measures],
) -> Measures:
    """Retrieve, measure and write the three result files of one model on one dataset."""
    record = stage.Record(args)
    record.reads(corpus.path, paths.queries(ds), paths.qrels(ds, args.split), *(ref.weights if ref else []))
    drop_self = ds in beir.SELF_RETRIEVAL
    k = min(max(ks) + drop_self, len(corpus))
    if ref is None:
        hits = bm25_run(corpus, queries, k)
    else:
        from syntriever import search

        encoder = models.load(ref, args.device, args.max_length)
        hits = search.top_k(encoder, corpus, ref.embeddings(ds), queries, k, batch_size=args.batch_size)
    if drop_self:
        stage.say(f"note:  a query of {ds} is itself a passage; it is left out of its own results, as BEIR does")
        hits = {query: [(p, s) for p, s in found if p != query][: max(ks)] for query, found in hits.items()}
    measures = metrics.evaluate(qrels, {query: dict(found) for query, found in hits.items()}, ks)
    means = {name: metrics.mean(values) for name, values in measures.items()}
    shown = ref.name if ref else model
    if args.trained_on and models.is_own(model):
        shown = f"{model}-{args.trained_on}"
    without = sum(not hits.get(query) for query in qrels)
    result: dict[str, Any] = {
        "model": shown,
        "checkpoint": ref.where if ref else "bm25s, k1 0.9, b 0.4",
        "dataset": ds,
        "split": args.split,
        "queries": len(qrels),
        "queries_without_results": without,
        "passages": len(corpus),
        "own_passage_left_out": drop_self,
        "measures": means,
        "tests": {other: metrics.paired_test(measures[_main(ks)], values[_main(ks)]) for other, values in before.items()},
        "per_query": {query: {name: measures[name][query] for name in measures} for query in qrels},
    }
    target = {suffix: paths.result(shown, ds, args.split, suffix) for suffix in (".json", ".trec", ".png")}
    with jsonl.atomic(target[".trec"]) as file:
        for query, found in hits.items():
            for rank, (passage, score) in enumerate(found, 1):
                file.write(f"{query} Q0 {passage} {rank} {score:.6f} {shown}\n".encode())
    jsonl.write_json(target[".json"], result)
    draw({**before, model: measures}, ks, target[".png"], f"{ds}, {args.split} split, {len(qrels)} queries")
    record.write(target[".json"], **means)
    stage.say(f"wrote  {paths.shown(target['.json'])}, .trec, .png")
    return measures


def _main(ks: tuple[int, ...]) -> str:
    """The measure that tests and pictures are about: nDCG@10, or the nearest cut-off there is."""
    return f"nDCG@{min(ks, key=lambda k: (abs(k - 10), k))}"


def print_table(ds: str, split: str, table: dict[str, Measures], ks: tuple[int, ...], queries: int) -> None:
    columns = [f"nDCG@{k}" for k in ks] + [f"{name}@{max(ks)}" for name in ("MAP", "Recall")] + [f"MRR@{_main(ks).split('@')[1]}"]
    width = max(map(len, table)) + 2
    stage.say(f"\n{ds}, {split} split, mean over {queries} queries (a query without results counts 0)")
    stage.say("".ljust(width) + "".join(column.rjust(11) for column in columns))
    for model, measures in table.items():
        stage.say(model.ljust(width) + "".join(f"{metrics.mean(measures[column]):11.4f}" for column in columns))
    names = list(table)
    if len(names) > 1:
        stage.say(f"\npaired test on {_main(ks)}: difference [95% bootstrap interval], two-sided p of a randomisation test")
    for better, worse in zip(names[1:], names, strict=False):
        test = metrics.paired_test(table[better][_main(ks)], table[worse][_main(ks)])
        stage.say(f"{better} - {worse}: {test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p']:.4f}")
    stage.say()


def print_summary(table: dict[str, dict[str, Measures]], ks: tuple[int, ...]) -> None:
    """One row per model: its main measure on every dataset, and the average."""
    name, first = _main(ks), next(iter(table.values()))
    width = max(map(len, first)) + 2
    stage.say(f"{name} by dataset\n" + "".ljust(width) + "".join(ds.rjust(max(11, len(ds) + 2)) for ds in (*table, "average")))
    for model in first:
        values = [metrics.mean(table[ds][model][name]) for ds in table]
        cells = zip((*table, "average"), (*values, sum(values) / len(values)), strict=True)
        stage.say(model.ljust(width) + "".join(f"{value:{max(11, len(ds) + 2)}.4f}" for ds, value in cells))


def draw(table: dict[str, Measures], ks: tuple[int, ...], path: Any, title: str) -> None:
    """nDCG at every cut-off for each model, and the main measure query by query."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, queries) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for model, measures in table.items():
        curves.plot(range(len(ks)), [metrics.mean(measures[f"nDCG@{k}"]) for k in ks], marker="o", label=model)
        queries.plot(sorted(measures[_main(ks)].values(), reverse=True), label=model)
    curves.set(xticks=range(len(ks)), xticklabels=ks, xlabel="k", title="nDCG@k", ylim=(0, 1))
    queries.set(xlabel="queries, each curve sorted by itself", title=f"{_main(ks)} per query", ylim=(0, 1.02))
    curves.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(stage.run(main, parse_args))
