"""Stage 1: distil the LLM's texts or grades into an encoder (paper, section 3.3, with `--paper`).

Reads    datasets/<dataset>/, datasets/<dataset>_synthetic.jsonl
         stage2/<model>_<dataset>_judgements.jsonl               with --judgements llm or both
Writes   output/<model>-sft-<dataset>/   checkpoint, run.json, log.jsonl, loss.png
Run      python train_stage1.py e5 scifact
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from syntriever.data import dataset, download, training
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import cli, lineage, options, processes, terminal
from syntriever.train import checkpoint
from syntriever.train.candidates import ignored_candidates, known_in_batch, score_candidates, share_of_gold
from syntriever.train.losses import ORDERS, corpus_contrast, view_distillation
from syntriever.train.study_losses import authors_of, cluster_loss

if TYPE_CHECKING:
    from torch import Tensor

    from syntriever.train.bank import Bank
    from syntriever.train.batching import Row
    from syntriever.train.loop import LossFunction

# ------------------------------------------------------------------- edit here: the losses
# They take (B, D) embeddings of query, gold passage, positive, cot and negative, a (B,) bool
# `verified`, and a (B, 3) bool `present` for positive, cot, negative. Scores are cos / temperature;
# of (B, T, D) token embeddings, mean MaxSim / temperature (`models.similarity`). Training calls what
# `LOSSES` names, on scores.


def soft_nearest_neighbor_loss(
    query: Tensor,
    passage: Tensor,
    positive: Tensor,
    cot: Tensor,
    negative: Tensor,
    verified: Tensor,
    temperature: float = 0.05,
    present: Tensor | None = None,
) -> Tensor:
    """Mean over rows of logsumexp(all candidates) - logsumexp(own positives) (paper, section 3.3).

    Candidates of a row are all gold passages, positives, cots and negatives of the batch; its own
    positives are its gold passage, its cot and, where `verified`, its positive. A rejected positive
    stays a candidate and so becomes a negative. What is not `present` is neither.

    Args:
        query, passage, positive, cot, negative: (B, D) float embeddings of any length.
        verified: (B,) bool, the LLM's verdict on its own positive.
        temperature: tau of the scores cos / tau.
        present: (B, 3) bool for positive, cot, negative; None means all are there.
    Returns:
        Scalar.
    """
    return snn_of(*score_candidates(query, passage, positive, cot, negative, verified, temperature, present))


def snn_of(scores: Tensor, own: Tensor) -> Tensor:
    """`soft_nearest_neighbor_loss` of the scores that `score_candidates` returns."""
    return (scores.flatten(1).logsumexp(1) - own.logsumexp(1)).mean()


def info_nce_of(scores: Tensor, own: Tensor) -> Tensor:
    """Gold passages alone (the first row of the paper's Table 3)."""
    return (scores[:, 0].logsumexp(1) - own[:, 0]).mean()


# Name -> function of what `score_candidates` returns, or None: `make_loss` has a branch for it.
LOSSES = {"snn": snn_of, "infonce": info_nce_of, "authors": authors_of, "cluster": None, "distill": None}
WITHOUT_TEXTS = {"infonce"}

# -----------------------------------------------------------------------------------------------

# Rows of one query that share a batch, and so the encodings of its other texts. More would leave too
# few queries in a batch where a query has dozens of relevant passages.
GOLDS_TOGETHER = 4

# Weight of the LLM's texts in the losses that have one.
VIEW_WEIGHT = {"distill": 1.0, "cluster": 0.3}

# Batch and learning rate are the authors'; they train 10 epochs on small sets, 3 on FiQA, 1 on HotpotQA.
PAPER = {"loss": "snn", "batch_size": 60, "lr": 2e-5, "no_mask_known_positives": True}

SYNTHETIC = {"cot": str, "positive": str, "negative": str, "verified": bool}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", help=f"{', '.join(models.ALIASES)}, a Hub id or a folder")
    dataset.add_argument(parser)
    training.add_option(parser)
    parser.add_argument(
        "--loss",
        choices=(*LOSSES, *ORDERS),
        help="snn: the paper's; infonce: gold passages only; cluster: all views drawn to the gold passage; "
        "authors: what the authors' code computes; distill: gold passages against the batch and the corpus, and the LLM's "
        "texts teach the query which passages of the corpus are near (default: distill, of a late-interaction encoder cluster). "
        "On judgements of an LLM: listwise (their default): softmax of the grades; plackett-luce: groups of equal grades",
    )
    parser.add_argument("--view-weight", type=float, help="weight of the LLM's texts (default: 1 with distill, 0.3 with cluster)")
    parser.add_argument(
        "--no-mask-known-positives",
        action="store_true",
        help="the paper's batches: no query twice, every other text a negative, also a known relevant passage of the query",
    )
    parser.add_argument("--no-cot", action="store_true", help="ablation: leave out the chains of thought")
    parser.add_argument("--no-positive", action="store_true", help="ablation: leave out the written relevant passages")
    parser.add_argument("--no-negative", action="store_true", help="ablation: leave out the written irrelevant passages")
    parser.add_argument("--no-synthetic", action="store_true", help="ablation: leave out all synthetic text")
    parser.add_argument("--no-relabel", action="store_true", help="ablation: trust every positive, verified or not")
    options.add_judgement_options(parser, "gold", "gold where qrels/train.tsv is there and --queries names no others, else llm")
    options.add_training_options(parser, epochs=3, batch_size=32, lr="1e-4 on gold judgements, 5e-5 on those of an LLM")
    return cli.parse(parser, argv, **PAPER)


def make_loss(args: argparse.Namespace, relevant: Sequence[set[int]], bank: Bank | None = None) -> LossFunction:
    """Loss of (texts, D) embeddings and (B, 8) labels: places of query, passage, positive, cot and
    negative among the texts (-1: absent), `verified`, number of the query, position of the passage.

    `relevant`: positions of the known relevant passages by number of the query. `bank`: of `--loss distill`.
    """
    import torch

    from syntriever.train import loop

    def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        places, verified = labels[:, :5], labels[:, 5].bool()
        texts = query, passage, *_ = embeddings[places.clamp(min=0)].unbind(1)
        ignore = None if args.no_mask_known_positives else ignored_candidates(places[:, 1:], known_in_batch(labels, relevant))
        given = verified, args.temperature, places[:, 2:] >= 0, ignore
        scores, own = score_candidates(*texts, *given)
        hits = scores[:, 0].argmax(1) == torch.arange(len(labels), device=scores.device)
        parts = {"gold_accuracy": hits.float().mean(), **loop.spread(embeddings, query, passage)}
        # Its value is there after the backward pass, and no step is logged before that.
        embeddings.register_hook(lambda gradient: parts.update(gold_share=share_of_gold(gradient, places)))
        if args.loss == "snn":
            parts |= {"numerator": own.logsumexp(1).mean(), "denominator": scores.flatten(1).logsumexp(1).mean()}
        if bank:
            looked_at = bank.batch(*labels[:, 6:].cpu().numpy().T)
            candidates, *known, views, told = (torch.from_numpy(array).to(query.device) for array in looked_at)
            parts["gold"] = info_nce_of(scores, own)
            parts["corpus"] = corpus_contrast(query, candidates, *known, args.temperature)
            parts["views"] = view_distillation(query, candidates, views, told, args.temperature)
            return parts["gold"] + args.corpus_weight * parts["corpus"] + args.view_weight * parts["views"], parts
        if args.loss == "cluster":
            return cluster_loss(*texts, *given, view_weight=args.view_weight), parts
        return LOSSES[args.loss](scores, own), parts

    return loss


def training_rows(qrels: dataset.Qrels, corpus: Corpus) -> list[tuple[str, int]]:
    """(query id, position of a relevant passage) of every judgement of at least 1; of passages with the same text, the first."""
    found = ((query, grade, corpus.position(passage)) for query, judged in qrels.items() for passage, grade in judged.items())
    known = ((query, corpus.twin(position)) for query, grade, position in found if grade >= 1 and position is not None)
    return list(dict.fromkeys(known))


def synthetic_texts(row: jsonl.Row | None, args: argparse.Namespace) -> tuple[list[str | None], int]:
    """([positive, cot, negative] with None where absent or left out, verified as 0 or 1) of a query."""
    if row is None:
        return [None, None, None], 0
    left_out = args.no_positive, args.no_cot, args.no_negative
    texts = [None if out else row[kind] for out, kind in zip(left_out, ("positive", "cot", "negative"), strict=True)]
    return texts, int(row["verified"] or args.no_relabel)


def main(args: argparse.Namespace) -> None:
    options.check_training_options(args)
    ref = models.resolve(args.model, args.dataset, args.name, args.query_prefix, args.passage_prefix)
    models.check_late(ref, args.dims)
    dataset.ensure(args.dataset, fetch=False)
    args.judgements = args.judgements or training.default_judgements(args.dataset, args.queries)
    on_gold = args.judgements == "gold"
    args.lr = args.lr or (options.LORA_LR if args.lora else 1e-4 if on_gold else 5e-5)
    args.loss = args.loss or ("listwise" if not on_gold else "cluster" if ref.late else "distill")
    if (args.loss in ORDERS) == on_gold:
        raise BadInput(f"--loss {args.loss} does not go with --judgements {args.judgements}; see --help")
    models.check_late(ref, graded=not on_gold)
    if ref.late and args.loss == "distill":
        raise BadInput("--loss distill needs one vector a text; a late-interaction encoder trains with --loss snn or cluster")
    if args.view_weight is None:
        args.view_weight = VIEW_WEIGHT.get(args.loss)
    typed, source, used = download.as_typed(args.dataset), paths.synthetic(args.dataset), False
    if not on_gold:
        source = training.judgements(args.dataset, ref.name, args.model, args.name, args.queries)
    else:
        used = not (args.no_synthetic or args.loss in WITHOUT_TEXTS)
        if used and not (source.is_file() and source.stat().st_size):
            command = terminal.command("datasets/parse_synthetic.py", typed)
            raise BadInput(f"{paths.shown(source)} is not there or is empty. Run: {command}   (or pass --no-synthetic)")
    dataset.ensure(args.dataset)
    output = paths.model_output(f"{ref.name}-sft-{args.dataset}")
    with processes.lock(output):
        if on_gold:
            train(args, ref, source if used else None, output)
        else:
            from syntriever.train import graded

            graded.train(args, ref, source, output)
    if on_gold or paths.qrels(args.dataset, "train").is_file():
        terminal.next_command("retrieval.py", f"{ref.name}-sft", typed)
    else:
        before = models.comparable([args.model], args.dataset)
        terminal.next_command("evaluate.py", "bm25", *before, f"{ref.name}-sft", typed, split=training.test_split(args.dataset))


def train(args: argparse.Namespace, ref: models.ModelRef, source: Path | None, output: Path) -> None:
    """Train `ref` on the dataset and the synthetic texts of `source` (None: gold passages alone)."""
    record = lineage.Record(args, lineage.check_fresh([source] if source else [], args.force))
    corpus = Corpus(args.dataset)
    queries, qrels = dataset.load_split(args.dataset, "train", corpus, args.strict)
    rows = training_rows(qrels, corpus)
    if not rows:
        raise BadInput(f"{paths.shown(paths.qrels(args.dataset, 'train'))}: no judgement of at least 1 to train on")
    synthetic = jsonl.Table(source, "query_id", SYNTHETIC) if source else None
    record.reads(*dataset.files(args.dataset, "train", "dev"), *([source] if source else []), *ref.weights)
    complete = sum(query in synthetic for query, _ in rows) if synthetic else 0
    beside = f"{complete} of them with synthetic texts beside the gold passage"
    terminal.say(f"read   {len(rows)} training rows of {args.dataset}, {beside}")
    resume = checkpoint.find(output, record, args)
    from syntriever.train import bank, batching, frozen, journal, loop

    model = models.load(ref, processes.start(args.device), dims=args.dims)
    first = dataset.first_queries(queries)  # queries with the same text are one
    names = [first[query] for query, _ in rows]
    numbers = {query: number for number, query in enumerate(dict.fromkeys(names))}
    relevant: list[set[int]] = [set() for _ in numbers]
    for query, position in rows:
        relevant[numbers[first[query]]].add(position)

    def written(query: str) -> tuple[list[str | None], int]:
        return synthetic_texts(synthetic.get(query) if synthetic else None, args)

    def sample(number: int) -> Row:
        query, position = rows[number]
        texts, verified = ([None] * 3, 0) if args.loss == "distill" else written(query)
        passages = [("document", text) if text is not None else None for text in (corpus.text(position), *texts)]
        return [("query", queries[first[query]]), *passages], [verified, numbers[first[query]], position]

    def batches(epoch: int) -> list[list[int]]:
        together = 1 if args.no_mask_known_positives else GOLDS_TOGETHER
        return batching.deal(names, args.batch_size, args.seed, epoch, together)

    dev = journal.dev_score(args.dataset, corpus, args)
    title = f"{ref.name}-sft-{args.dataset}: stage 1, --loss {args.loss}"

    def views(query: str) -> list[str]:
        (positive, cot, _), verified = written(query)
        return [text for text, used in ((cot, True), (positive, verified)) if used and text is not None]

    with frozen.folder(output) as folder:
        looks_at = None
        if args.loss == "distill":  # the model is still the one that training starts from
            told: dict[str, list[str]] = {}
            for query, _ in rows:  # of the first of several with the same text that something was written for
                told[first[query]] = told.get(first[query]) or views(query)
            asked, base = [(queries[query], texts) for query, texts in told.items()], ref.embeddings(args.dataset)
            looks_at = bank.build(model, corpus, base, folder, asked, relevant, args.candidates, args.max_length)
        loss = make_loss(args, relevant, looks_at)
        loop.train(model, loss, sample, batches, names, dev, args, output, record, resume, title)


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
