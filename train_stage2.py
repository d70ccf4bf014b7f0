"""Stage 2: align an encoder with the LLM's preferences or grades, held near its start by a KL term (paper, section 4;
its partial Plackett-Luce ranking with `--paper`).

Reads    output/<model>-<dataset>/ (the stage-1 checkpoint, also the frozen reference), datasets/<dataset>/
         stage2/<model>_<dataset>_preferences.jsonl, or ..._judgements.jsonl with --judgements llm or both
Writes   output/<base>-final-<dataset>/   checkpoint, run.json, log.jsonl, loss.png
Run      python train_stage2.py e5-sft scifact
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from syntriever.data import dataset, download, training
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import cli, lineage, options, processes, terminal
from syntriever.train import checkpoint
from syntriever.train.losses import ORDERS

if TYPE_CHECKING:
    from torch import Tensor

    from syntriever.train.batching import Row
    from syntriever.train.loop import LossFunction

# ------------------------------------------------------------------- edit here: the losses
# Training calls what `LOSSES` names, and `kl_of`, on scores.


def partial_plackett_luce_loss(query: Tensor, preferred: Tensor, rejected: Tensor, temperature: float = 0.05) -> Tensor:
    """Negative log-likelihood that the preferred passage is ranked first and the rejected one second
    among all 2B passages of the batch (paper, section 4.2: Plackett-Luce with the order of the
    others summed out).

    Per row: [logsumexp(all 2B) - s(q, c+)] + [logsumexp(all but c+) - s(q, c-)], s = cos / temperature.

    Args:
        query, preferred, rejected: (B, D) float embeddings of any length; no query twice.
    Returns:
        Scalar, the mean over rows.
    """
    import torch

    rows = torch.arange(len(query), device=query.device)
    pairs = torch.stack([rows, rows, rows + len(query)], dim=1)
    return plackett_luce_of(models.similarity(query, torch.cat([preferred, rejected])) / temperature, pairs)


def plackett_luce_of(scores: Tensor, pairs: Tensor) -> Tensor:
    """`partial_plackett_luce_loss`, the mean over pairs, of the (Q, M) scores of queries and candidates
    and (P, 3) pairs: a query, its preferred and its rejected candidate. All pairs of a query may share
    one encoding of it and of each passage (`--batching lists`); a passage of its other pairs is then no
    candidate of this one, which says nothing of it: ranking it below would contradict them."""
    import torch

    judged = torch.zeros_like(scores, dtype=torch.bool)
    judged[pairs[:, :1], pairs[:, 1:]] = True
    elsewhere = judged[pairs[:, 0]].scatter(1, pairs[:, 1:], False)  # (P, M)
    scores = scores[pairs[:, 0]].masked_fill(elsewhere, float("-inf"))
    better, worse = scores.gather(1, pairs[:, 1:]).unbind(1)
    others = scores.scatter(1, pairs[:, 1:2], float("-inf"))
    return (scores.logsumexp(1) - better + others.logsumexp(1) - worse).mean()


def bradley_terry_of(scores: Tensor, pairs: Tensor) -> Tensor:
    """-log sigmoid(s(q, c+) - s(q, c-)), the paper's comparison: no other passage of the batch counts."""
    from torch.nn.functional import softplus

    return softplus(-margins(scores, pairs)).mean()


def margins(scores: Tensor, pairs: Tensor) -> Tensor:
    """(P,) s(q, c+) - s(q, c-)."""
    query, better, worse = pairs.T
    return scores[query, better] - scores[query, worse]


def kl_to_reference(
    query: Tensor, candidates: Tensor, ref_query: Tensor, ref_candidates: Tensor, temperature: float = 0.05
) -> Tensor:  # fmt: skip
    """Mean over queries of KL(pi || pi_ref), pi = softmax over the candidates of cos(q, c) / temperature
    (paper, section 4.3). The reference gets no gradient.

    Args:
        query, ref_query: (B, D) embeddings by the trained and by the frozen stage-1 model.
        candidates, ref_candidates: (M, D) embeddings of the same M passages by both.
    Returns:
        Scalar, 0 where both models agree.
    """
    reference = models.similarity(ref_query, ref_candidates) / temperature
    return kl_of(models.similarity(query, candidates) / temperature, reference)


def kl_of(scores: Tensor, reference: Tensor) -> Tensor:
    """`kl_to_reference` of the (Q, M) scores of both models."""
    ours, theirs = scores.log_softmax(1), reference.detach().log_softmax(1)
    return (ours.exp() * (ours - theirs)).sum(1).mean()


LOSSES = {"partial-plackett-luce": plackett_luce_of, "bradley-terry": bradley_terry_of}

# -----------------------------------------------------------------------------------------------

# Batch and learning rate are the authors'.
PAPER = {"loss": "partial-plackett-luce", "beta": 0.1, "batching": "pairs", "batch_size": 100, "lr": 2e-5}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", help="X-sft, a stage-1 checkpoint of this project, or any encoder")
    dataset.add_argument(parser)
    training.add_option(parser)
    what = "of preferences: bradley-terry (their default) or the paper's partial-plackett-luce; of grades: listwise (theirs) or "
    parser.add_argument("--loss", choices=(*LOSSES, *ORDERS), help=what + "plackett-luce")
    cli.number(parser, "--beta", float, 0.1, "weight of the KL to stage 1; 0 switches it off")
    parser.add_argument(
        "--batching",
        choices=("pairs", "lists"),
        default="pairs",
        help="pairs: the paper's, no query twice in a batch; lists: all pairs of a query in one batch, each text encoded once, "
        "the passages of other queries as further candidates. --batch-size counts pairs either way (default: %(default)s)",
    )
    parser.add_argument(
        "--preferences", type=Path, help="preferences to train on (default: stage2/<model>_<dataset>_preferences.jsonl)"
    )
    options.add_judgement_options(parser, "preferences", "preferences, or llm where only grades are there")
    options.add_training_options(parser, epochs=1, batch_size=32, lr="2e-5")
    return cli.parse(parser, argv, **PAPER)


def make_loss(args: argparse.Namespace, reference: tuple[Tensor, Tensor] | None) -> LossFunction:
    """Loss of (texts, D) embeddings and (P, 6) labels: places of query, preferred and rejected among
    the texts, and their rows among the `reference` embeddings of queries and passages (None: no KL)."""
    import torch

    from syntriever.train import loop

    def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.arange(len(labels), device=labels.device)
        queries, candidates = labels[:, [0, 3]], torch.cat([labels[:, [1, 4]], labels[:, [2, 5]]])  # place and reference row
        pairs = torch.stack([rows, rows, rows + len(rows)], dim=1)
        if args.batching == "lists" or args.loss == "partial-plackett-luce":  # there a text that came twice was its own rival
            queries, query_row = queries.unique(dim=0, return_inverse=True)
            candidates, candidate_row = candidates.unique(dim=0, return_inverse=True)
            pairs = torch.stack([query_row, *candidate_row.view(2, -1)], dim=1)
        query, passage = embeddings[queries[:, 0]], embeddings[candidates[:, 0]]
        scores = models.similarity(query, passage) / args.temperature
        preference = LOSSES[args.loss](scores, pairs)
        parts = {"preference": preference, "preference_accuracy": (margins(scores, pairs) > 0).float().mean()}
        parts |= loop.spread(embeddings, query[pairs[:, 0]], passage[pairs[:, 1]])
        if reference is None:
            return preference, parts
        known = (ref[at[:, 1].cpu()].to(query.device) for ref, at in zip(reference, (queries, candidates), strict=True))
        kl = kl_of(scores, models.similarity(*known) / args.temperature)
        return preference + args.beta * kl, {**parts, "kl": kl}

    return loss


def load_pairs(ds: str, source: Path, queries: dict[str, str], corpus: Corpus) -> list[tuple[str, int, int]]:
    """(query id, position of the preferred, position of the rejected passage) of every preference, in
    an order that does not depend on that of the file: verdicts arrive in any. Of queries and passages with the same
    text it is the first; a preference between two passages with the same text is left out, which is said."""
    pairs, same, first = [], 0, dataset.first_queries(queries)
    for number, _, row in jsonl.read_with_offsets(source, {"query_id": str, "preferred_id": str, "rejected_id": str}):
        where = f"{paths.shown(source)}:{number}"
        better, worse = corpus.position(row["preferred_id"]), corpus.position(row["rejected_id"])
        if row["query_id"] not in queries:
            raise BadInput(f"{where}: query {row['query_id']!r} is not a training query of {ds}")
        if better is None or worse is None or better == worse:
            raise BadInput(f"{where}: preferred_id and rejected_id must be two different passages of {paths.shown(corpus.path)}")
        better, worse = corpus.twin(better), corpus.twin(worse)
        if better == worse:
            same += 1
        else:
            pairs.append((first[row["query_id"]], better, worse))
    if same:
        terminal.say(f"note:  {same:,} preferences in {paths.shown(source)} are between equal texts; they are left out")
    if not pairs:
        raise BadInput(f"{paths.shown(source)} has no preference to train on")
    return sorted(pairs)


def main(args: argparse.Namespace) -> None:
    options.check_training_options(args)
    args.lr = args.lr or (options.LORA_LR if args.lora else 2e-5)
    if args.beta < 0:
        raise BadInput(f"--beta must not be negative, got {args.beta}")
    ref = models.resolve(args.model, args.dataset, args.name, args.query_prefix, args.passage_prefix)
    models.check_late(ref, args.dims)
    typed = download.as_typed(args.dataset)
    source = args.preferences.resolve() if args.preferences else paths.preferences(ref.name, args.dataset)
    if args.preferences and not source.is_file():
        raise BadInput(f"--preferences: {args.preferences} is not there")
    if args.preferences and args.judgements in ("llm", "both"):
        raise BadInput("--preferences: is for --judgements preferences")
    if not args.judgements:
        args.judgements = "preferences" if source.is_file() or not paths.judgements(ref.name, args.dataset).is_file() else "llm"
    on_grades = args.judgements != "preferences"
    models.check_late(ref, graded=on_grades)
    if on_grades:
        source = training.judgements(args.dataset, ref.name, args.model, args.name, args.queries)
    elif not source.is_file():
        command = terminal.command("stage2/parse_comparison.py", typed, model=args.model, name=args.name)
        raise BadInput(f"{paths.shown(source)} is not there. Run: {command}")
    args.loss = args.loss or ("listwise" if on_grades else "bradley-terry")
    if (args.loss in ORDERS) != on_grades:
        raise BadInput(f"--loss {args.loss} does not go with --judgements {args.judgements}; see --help")
    dataset.ensure(args.dataset)
    final = f"{ref.name.removesuffix('-sft')}-final"
    output = paths.model_output(f"{final}-{args.dataset}")
    with processes.lock(output):
        if on_grades:
            from syntriever.train import graded

            graded.train(args, ref, source, output, kl_of if args.beta else None)
        else:
            train(args, ref, source, output)
    before = models.comparable([ref.folder and lineage.started_from(ref.folder), args.model], args.dataset)
    terminal.next_command("evaluate.py", "bm25", *before, final, typed, split=training.test_split(args.dataset))


def train(args: argparse.Namespace, ref: models.ModelRef, source: Path, output: Path) -> None:
    """Train `ref` on the preferences of `source`."""
    record = lineage.Record(args, lineage.check_fresh([source, *ref.weights], args.force))
    corpus = Corpus(args.dataset)
    queries = training.load(args.dataset, args.queries, corpus, args.strict).queries
    pairs = load_pairs(args.dataset, source, queries, corpus)
    record.reads(*dataset.files(args.dataset, "train", "dev"), source, *ref.weights)
    names = [query for query, _, _ in pairs]
    query_ids = list(dict.fromkeys(names))
    positions = list(dict.fromkeys(position for _, *both in pairs for position in both))
    terminal.say(
        f"read   {len(pairs):,} preferences for {len(query_ids):,} queries, over {len(positions):,} passages of {args.dataset}"
    )

    resume = checkpoint.find(output, record, args)
    from syntriever.train import batching, frozen, journal, loop

    model = models.load(ref, processes.start(args.device), dims=args.dims)
    with frozen.folder(output) as folder:
        reference = None
        if args.beta:
            # The model is still the stage-1 model here: its embeddings are all the KL term needs of it.
            known, texts = (queries[query] for query in query_ids), map(corpus.text, positions)
            reference = (
                frozen.embed(model, known, len(query_ids), "query", args.max_length, folder / "queries.npy"),
                frozen.embed(model, texts, len(positions), "document", args.max_length, folder / "passages.npy"),
            )
        query_row, passage_row = ({key: row for row, key in enumerate(keys)} for keys in (query_ids, positions))

        def sample(number: int) -> Row:
            query, better, worse = pairs[number]
            texts = [("query", queries[query]), *(("document", corpus.text(p)) for p in (better, worse))]
            return texts, [query_row[query], passage_row[better], passage_row[worse]]

        def batches(epoch: int) -> list[list[int]]:
            together = 1 if args.batching == "pairs" else len(pairs)
            return batching.deal(names, args.batch_size, args.seed, epoch, together)

        dev = journal.dev_score(args.dataset, corpus, args)
        title = f"{output.name}: stage 2, --loss {args.loss}, --beta {args.beta:g}"
        loss = make_loss(args, reference)
        loop.train(model, loss, sample, batches, names, dev, args, output, record, resume, title)


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
