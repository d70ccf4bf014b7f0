"""Split dev judgements off the training queries of a dataset that has none, to tune on.

Reads    datasets/<dataset>/, datasets/<dataset>_synthetic.jsonl (where it is there)
Writes   datasets/<dataset>-dev/   corpus and queries linked; judgements of 80% of the training queries as train, of
                                   20% as dev, and those of test
         datasets/<dataset>-dev_synthetic.jsonl   linked
Run      python datasets/split_dev.py scifact
"""

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from syntriever.data import dataset
from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.run import cli, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    dataset.add_argument(parser)
    cli.number(parser, "--share", float, 0.2, "share of the training queries")
    cli.number(parser, "--seed", int, 42, "which queries")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if not 0 < args.share < 1:
        raise BadInput(f"--share {args.share:g} is a share between 0 and 1")
    dataset.ensure(args.dataset)
    if paths.qrels(args.dataset, "dev").is_file():
        raise BadInput(f"{args.dataset} has a dev split: {paths.shown(paths.qrels(args.dataset, 'dev'))}")
    made = f"{args.dataset}-dev"
    qrels = dataset.load_qrels(args.dataset, "train")
    queries = sorted(qrels)
    chosen = set(random.Random(args.seed).sample(queries, max(1, round(len(queries) * args.share))))
    first = dataset.first_queries(dataset.load_queries(args.dataset))
    texts = {first[query] for query in chosen if query in first}
    chosen |= {query for query in first if first[query] in texts}  # no text is on both sides
    splits = {split: {q: qrels[q] for q in qrels if (q in chosen) == (split == "dev")} for split in ("train", "dev")}
    for split, of_split in splits.items():
        dataset.write_qrels(paths.qrels(made, split), of_split)
    for place in (paths.corpus, paths.queries, lambda ds: paths.qrels(ds, "test"), paths.synthetic):
        old, new = place(args.dataset), place(made)
        if old.is_file():
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(old.resolve(), new.parent.resolve()))
    terminal.say(
        f"wrote  {paths.shown(paths.dataset(made))}/: {len(splits['train'])} training and {len(splits['dev'])} dev queries"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
