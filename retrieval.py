"""Retrieve the top passages of every training query: the candidates that the LLM compares in stage 2.

Reads    output/<model>-<dataset>/ (or any model), datasets/<dataset>/
Writes   stage2/<model>_<dataset>_top<K>.jsonl                   best first, ids and scores
         output/<model>-<dataset>/embeddings/<dataset>/          corpus embeddings, reused
Run      python retrieval.py e5-sft scifact
         python retrieval.py e5-final scifact --query "Does vitamin D prevent colds?"      prints, writes no file of stage 2
         torchrun --nproc_per_node=8 retrieval.py e5-sft msmarco
"""

import argparse
import sys
import textwrap
from collections.abc import Iterable

from syntriever.data import dataset, download, training
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import cli, lineage, options, processes, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", help=f"X-sft, X-final, {', '.join(models.ALIASES)}, a Hub id or a folder")
    dataset.add_argument(parser)
    training.add_option(parser)
    parser.add_argument("--top-k", type=int, help="passages per query (default: 100, with --query 5)")
    parser.add_argument("--query", metavar="TEXT", help="print the top passages of this query instead")
    parser.add_argument(
        "--index", help="FAISS index-factory string for large corpora, e.g. IVF4096,SQfp16 (default: exact search)"
    )
    parser.add_argument(
        "--recall", type=float, default=0.95, help="share of the exact top that --index has to find (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the sample that trains --index (default: %(default)s)")
    options.add_encoding_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    options.check_encoding_options(args)
    cli.check_positive(args, "recall")
    if args.recall > 1:
        raise BadInput(f"--recall {args.recall:g} is a share, at most 1")
    ref = models.resolve(args.model, args.dataset, args.name, args.query_prefix, args.passage_prefix)
    models.check_backend(ref, args.backend)
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
    queries = train.queries
    record = lineage.Record(args, forced)
    record.reads(corpus.path, *train.files, *ref.weights)
    terminal.say(f"read   {len(corpus):,} passages and {len(queries):,} training queries of {args.dataset}")

    output = paths.top(ref.name, args.dataset, typed or default)
    with processes.lock(output):
        found = search(args, ref, corpus, queries)
        if processes.rank():
            return
        with jsonl.atomic(output) as file:
            for query, hits in found:
                passages = [{"id": passage, "score": round(score, 6)} for passage, score in hits]
                file.write(jsonl.dumps({"query_id": query, "query": queries[query], "passages": passages}))
        record.write(output, queries=len(queries), model=ref.where)
    terminal.say(f"wrote  {paths.shown(output)}: top {args.top_k} of {len(queries):,} queries")
    ds = download.as_typed(args.dataset)
    terminal.next_command("stage2/parse_comparison.py", ds, model=args.model, name=args.name, top_k=typed)


def search(
    args: argparse.Namespace, ref: models.ModelRef, corpus: Corpus, queries: dict[str, str]
) -> Iterable[tuple[str, list[tuple[str, float]]]]:
    device = processes.start(args.device)
    from syntriever.encode import search
    from syntriever.encode.encoder import Encoder

    encoder = Encoder(models.load(ref, device, args.max_length), args.backend, args.batch_tokens)
    folder = ref.embeddings(args.dataset)
    return search.top_k(encoder, corpus, folder, queries, args.top_k, args.dtype, args.index, args.recall, args.seed)


def show(args: argparse.Namespace, ref: models.ModelRef, corpus: Corpus) -> None:
    """Print the top passages of `--query`."""
    if not args.query.strip():
        raise BadInput("--query is empty")
    for _, hits in search(args, ref, corpus, {"query": args.query}):
        for rank, (passage, score) in enumerate(hits, 1):
            text = textwrap.fill(corpus.by_id(passage), 100, initial_indent="    ", subsequent_indent="    ", max_lines=5)
            terminal.say(f"\n{rank}.  {score:.4f}  {passage}\n{text}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
