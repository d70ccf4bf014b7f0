"""Retrieve the top passages of every training query: the candidates that the LLM judges.

Reads    output/<model>-<dataset>/ (or any model), datasets/<dataset>/
         datasets/<dataset>_synthetic.jsonl                      with --fuse, where there is one
Writes   stage2/<model>_<dataset>_top<K>.jsonl                   best first, ids and scores
         output/<model>-<dataset>/embeddings/<dataset>/          corpus embeddings, reused
Run      python retrieval.py e5-sft scifact
         python retrieval.py minilm scifact --fuse               by encoder, the LLM's texts and bm25
         python retrieval.py e5-final scifact --query "Does vitamin D prevent colds?"      prints, writes no file of stage 2
         torchrun --nproc_per_node=8 retrieval.py e5-sft msmarco
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator

from syntriever.data import dataset, download, training
from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits
from syntriever.encode import bm25, models
from syntriever.encode.fusion import ranks_of, reciprocal_rank_fusion
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.report.sources import Contribution
from syntriever.run import cli, lineage, options, processes, terminal

# ------------------------------------------------------------------- edit here: what --fuse ranks by

# Weight of each source: the encoder on the query, the encoder on the query and what the LLM wrote for it, bm25. A passage
# scores the sum of weight / (CONSTANT + rank). Texts count twice: on SciFact and pydocs they find gold passages best.
SOURCES = {"encoder": 1.0, "texts": 2.0, "bm25": 1.0}
CONSTANT = 60

# -----------------------------------------------------------------------------------------------

SYNTHETIC = {"cot": str, "positive": str, "verified": bool}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", help=f"X-sft, X-final, {', '.join(models.ALIASES)}, a Hub id or a folder")
    dataset.add_argument(parser)
    training.add_option(parser)
    parser.add_argument("--top-k", type=int, help="passages per query (default: 100, with --query 5)")
    what = "rank by the encoder, the LLM's texts where there are some, and bm25; a generated query's own passage is always there"
    parser.add_argument("--fuse", action="store_true", help=what)
    parser.add_argument("--query", metavar="TEXT", help="print the top passages of this query instead")
    parser.add_argument(
        "--index", help="FAISS index-factory string for large corpora, e.g. IVF4096,SQfp16 (default: exact search)"
    )
    cli.number(parser, "--recall", float, 0.95, "share of the exact top that --index has to find")
    parser.add_argument("--dim", type=int, help="search by this many first entries of the vectors (default: all)")
    cli.number(parser, "--seed", int, 42, "seed of the sample that trains --index")
    bm25.add_language(parser)
    options.add_encoding_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    options.check_encoding_options(args)
    cli.check_positive(args, "recall", "dim")
    bm25.check_language(args.language)
    if args.fuse and args.query is not None:
        raise BadInput("--fuse ranks for the training queries; leave it out with --query")
    if args.recall > 1:
        raise BadInput(f"--recall {args.recall:g} is a share, at most 1")
    ref = models.resolve(args.model, args.dataset, args.name, args.query_prefix, args.passage_prefix)
    models.check_late(ref, args.dim, args.backend)
    if args.index and ref.late:
        raise BadInput("--index: a late-interaction encoder is searched exactly, by MaxSim")
    dataset.ensure(args.dataset)
    forced = lineage.check_fresh(ref.weights, args.force)
    corpus = Corpus(args.dataset)
    typed, default = args.top_k, 100 if args.query is None else 5
    args.top_k = cli.at_most("--top-k", typed, default, len(corpus), paths.shown(corpus.path))
    if args.query is not None:
        show(args, ref, corpus)
        return
    train = training.load(args.dataset, args.queries, corpus, args.strict)
    synthetic = written_texts(args, ref, train)
    read = [*train.files, *([synthetic.path] if synthetic else [])]
    record = lineage.Record(args, forced + lineage.check_fresh(read, args.force))
    record.reads(corpus.path, *read, *ref.weights)
    terminal.say(f"read   {len(corpus):,} passages and {len(train.queries):,} training queries of {args.dataset}")

    judged = judgements(train, corpus) if args.fuse else {}
    contribution = Contribution([name for name in SOURCES if synthetic or name != "texts"])
    output = paths.top(ref.name, args.dataset, typed or default)
    with processes.lock(output):
        find = searcher(args, ref, corpus)
        if args.fuse:
            found = fuse(args, find, corpus, train, synthetic, judged, contribution)
        else:
            found = ((query, passages_of(hits)) for query, hits in find(train.queries))
        if processes.rank():
            return
        with jsonl.atomic(output) as file:
            for query, passages in found:
                file.write(jsonl.dumps({"query_id": query, "query": train.queries[query], "passages": passages}))
        results = contribution.results() if args.fuse else {}
        record.write(output, queries=len(train.queries), model=ref.where, **results)
    terminal.say(f"wrote  {paths.shown(output)}: top {args.top_k} of {len(train.queries):,} queries")
    for line in contribution.lines() if args.fuse else ():
        terminal.say(f"       {line}")
    ds, kept = [download.as_typed(args.dataset), *(["--graded"] if args.fuse else [])], {"top_k": typed, "queries": args.queries}
    terminal.next_command("stage2/parse_comparison.py", *ds, model=args.model, name=args.name, **kept)


def searcher(args: argparse.Namespace, ref: models.ModelRef, corpus: Corpus) -> Callable[..., Iterator[tuple[str, Hits]]]:
    """Load the encoder. Returns find(queries, written=None): (query id, hits) of every query, `written` as in `search.top_k`."""
    device = processes.start(args.device)
    from syntriever.encode import search
    from syntriever.encode.encoder import Encoder

    model = models.load(ref, device, args.max_length, [args.dim] if args.dim else None)
    encoder = Encoder(model, args.backend, args.batch_tokens)
    how = {"dtype": args.dtype, "dim": args.dim, "factory": args.index, "recall": args.recall, "seed": args.seed}
    return lambda queries, written=None: search.top_k(
        encoder, corpus, ref.embeddings(args.dataset), queries, args.top_k, **how, written=written
    )


def passages_of(hits: Hits) -> list[jsonl.Row]:
    return [{"id": passage, "score": round(score, 6)} for passage, score in hits]


def written_texts(args: argparse.Namespace, ref: models.ModelRef, train: training.Training) -> jsonl.Table | None:
    """What `parse_synthetic.py` wrote, if --fuse can use it for any training query."""
    path = paths.synthetic(args.dataset)
    if not args.fuse or not path.is_file():
        return None
    if ref.late:
        terminal.say("note:  texts of the LLM are no source of a late-interaction encoder: they have no mean direction")
        return None
    table = jsonl.Table(path, "query_id", SYNTHETIC)
    return table if any(query in table for query in train.queries) else None


def judgements(train: training.Training, corpus: Corpus) -> dict[str, dataset.Qrels]:
    """What is known to be relevant, equal texts once, by who says so. A source passage that is gone is `BadInput`."""
    gold = dataset.by_text({query: train.queries[query] for query in train.gold}, train.gold, corpus)
    sources: dict[str, dict[str, int]] = {}
    for query, passage in train.sources.items():
        if query in train.queries:
            if corpus.position(passage) is None:
                where = paths.shown(paths.generated(corpus.path.parent.name))
                raise BadInput(f"{where}: {query!r} was written from passage {passage!r}, which {paths.shown(corpus.path)} lacks")
            sources[query] = {corpus.first_id(passage): 1}
    return {"gold judgements": gold, "source passages": sources}


def fuse(
    args: argparse.Namespace,
    find: Callable[..., Iterator[tuple[str, Hits]]],
    corpus: Corpus,
    train: training.Training,
    synthetic: jsonl.Table | None,
    judged: dict[str, dataset.Qrels],
    contribution: Contribution,
) -> Iterator[tuple[str, list[jsonl.Row]]]:
    """(query id, passages) by reciprocal rank fusion of all `SOURCES`. A query that the LLM wrote nothing for lacks that
    source. The passage that a generated query was written from takes the last place where it is not in the top."""

    def written(query: str) -> list[str]:
        row = synthetic.get(query) if synthetic else None
        return [row["cot"], *([row["positive"]] if row["verified"] else [])] if row else []

    told = {query: text for query, text in train.queries.items() if synthetic and query in synthetic}
    runs = {"encoder": find(train.queries)}
    if told:
        runs["texts"] = find(told, written)

    def fused() -> Iterator[tuple[str, list[jsonl.Row]]]:
        runs["bm25"] = bm25.run(corpus, train.queries, args.top_k, args.language)
        for query in train.queries:
            ranks = {name: ranks_of(next(run)[1], corpus) for name, run in runs.items() if name != "texts" or query in told}
            every = reciprocal_rank_fusion(list(ranks.values()), len(corpus), CONSTANT, [SOURCES[name] for name in ranks])
            known = {by: qrels[query] for by, qrels in judged.items() if query in qrels}
            contribution.add(ranks, [passage for passage, _ in every], known)
            top = every[: args.top_k]
            source = corpus.first_id(train.sources.get(query, ""))
            if source and source not in dict(top):
                top[args.top_k - 1 :] = [(source, dict(every).get(source, 0.0))]
            where = {passage: {name: ranks.get(name, {}).get(passage) for name in SOURCES} for passage, _ in top}
            yield query, [{**row, "ranks": where[row["id"]]} for row in passages_of(top)]

    return fused()


def show(args: argparse.Namespace, ref: models.ModelRef, corpus: Corpus) -> None:
    """Print the top passages of `--query`."""
    if not args.query.strip():
        raise BadInput("--query is empty")
    for _, hits in searcher(args, ref, corpus)({"query": args.query}):
        for rank, (passage, score) in enumerate(hits, 1):
            text = textwrap.fill(corpus.by_id(passage), 100, initial_indent="    ", subsequent_indent="    ", max_lines=5)
            terminal.say(f"\n{rank}.  {score:.4f}  {passage}\n{text}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
