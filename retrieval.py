"""Retrieve the top passages of every training query: the candidates that the LLM compares in stage 2.

Reads    output/<model>-<dataset>/ (or any model), datasets/<dataset>/
Writes   stage2/<model>_<dataset>_top<K>.jsonl                   best first, ids and scores
         output/<model>-<dataset>/embeddings/<dataset>/          corpus embeddings, reused
Run      python retrieval.py e5-sft scifact
"""

from __future__ import annotations

import argparse
import sys

from syntriever import beir, jsonl, models, paths, stage
from syntriever.errors import BadInput


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = stage.parser(__doc__)
    parser.add_argument("model", help=f"X-sft, X-final, {', '.join(models.ALIASES)}, a Hub id or a folder")
    parser.add_argument("dataset", help="BEIR name, pydocs, or a folder datasets/<dataset>/")
    parser.add_argument("--top-k", type=int, default=100, help="passages per query (default: %(default)s)")
    parser.add_argument(
        "--index", help="FAISS index-factory string for large corpora, e.g. IVF4096,SQfp16 (default: exact search)"
    )
    parser.add_argument("--max-length", type=int, help="tokens kept of each text (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sample that trains --index (default: %(default)s)")
    parser.add_argument("--name", help="short name for file names, where the model is a folder or a Hub id")
    parser.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    parser.add_argument("--force", action="store_true", help="go on where the checkpoint is stale")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    ref = models.resolve(args.model, args.dataset, args.name)
    beir.ensure(args.dataset)
    stage.check_fresh(ref.weights, args.force)
    corpus = beir.Corpus(args.dataset)
    if not 1 <= args.top_k <= len(corpus):
        raise BadInput(f"--top-k {args.top_k}: {paths.shown(corpus.path)} has {len(corpus)} passages")
    queries, _ = beir.load_split(args.dataset, "train", corpus, args.strict)
    record = stage.Record(args)
    record.reads(corpus.path, paths.queries(args.dataset), paths.qrels(args.dataset, "train"), *ref.weights)
    stage.say(f"read   {len(corpus):,} passages and {len(queries):,} training queries of {args.dataset}")

    output = paths.top(ref.name, args.dataset, args.top_k)
    with jsonl.lock(output):
        from syntriever import search

        model = models.load(ref, args.device, args.max_length)
        hits = search.top_k(
            model, corpus, ref.embeddings(args.dataset), queries, args.top_k, args.index, args.seed, args.batch_size
        )
        with jsonl.atomic(output) as file:
            for query, found in hits.items():
                passages = [{"id": passage, "score": round(score, 6)} for passage, score in found]
                file.write(jsonl.dumps({"query_id": query, "query": queries[query], "passages": passages}))
        record.write(output, queries=len(hits), model=ref.where)
    stage.say(f"wrote  {paths.shown(output)}: top {args.top_k} of {len(hits):,} queries")
    stage.next_command(f"python stage2/parse_comparison.py {args.dataset} --model {ref.name}")


if __name__ == "__main__":
    sys.exit(stage.run(main, parse_args))
