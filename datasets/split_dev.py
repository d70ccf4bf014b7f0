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
from syntriever.files import jsonl, paths
from syntriever.run import cli, terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    dataset.add_argument(parser)
    parser.add_argument("--share", type=float, default=0.2, help="share of the training queries (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="which queries (default: %(default)s)")
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
    first = dataset.first_queries({query: text for query, text in dataset.load_queries(args.dataset).items() if query in qrels})
    texts = {first[query] for query in chosen if query in first}
    chosen |= {query for query in first if first[query] in texts}  # no text is on both sides
    splits = {"train": [q for q in qrels if q not in chosen], "dev": [q for q in qrels if q in chosen]}
    for split, of_split in splits.items():
        with jsonl.atomic(paths.qrels(made, split)) as file:
            file.write(b"query-id\tcorpus-id\tscore\n")
            for query in of_split:
                file.writelines(f"{query}\t{passage}\t{grade}\n".encode() for passage, grade in qrels[query].items())
    for old, new in (
        (paths.corpus(args.dataset), paths.corpus(made)),
        (paths.queries(args.dataset), paths.queries(made)),
        (paths.qrels(args.dataset, "test"), paths.qrels(made, "test")),
        (paths.synthetic(args.dataset), paths.synthetic(made)),
    ):
        if old.is_file():
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(old.resolve(), new.parent.resolve()))
    terminal.say(
        f"wrote  {paths.shown(paths.dataset(made))}/: {len(splits['train'])} training and {len(splits['dev'])} dev queries"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
