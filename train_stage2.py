"""Stage 2: align the stage-1 encoder with the LLM's preferences by partial Plackett-Luce ranking,
held near stage 1 by a KL term (paper, section 4).

Reads    output/<model>-<dataset>/ (the stage-1 checkpoint, also the frozen reference),
         stage2/<model>_<dataset>_preferences.jsonl, datasets/<dataset>/
Writes   output/<base>-final-<dataset>/   checkpoint, run.json, log.jsonl, loss.png
Run      python train_stage2.py e5-sft scifact
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from syntriever import beir, jsonl, models, paths, stage
from syntriever.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from syntriever.training import LossFunction, Sample

# ------------------------------------------------------------------- edit here: the losses


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

    scores, better, worse = _pair_scores(query, preferred, rejected, temperature)
    own = torch.eye(len(query), 2 * len(query), dtype=torch.bool, device=query.device)
    first = scores.logsumexp(1) - better
    second = scores.masked_fill(own, -torch.inf).logsumexp(1) - worse
    return (first + second).mean()


def bradley_terry_loss(query: Tensor, preferred: Tensor, rejected: Tensor, temperature: float = 0.05) -> Tensor:
    """-log sigmoid(s(q, c+) - s(q, c-)), the paper's comparison: no other passage of the batch counts."""
    from torch.nn.functional import softplus

    _, better, worse = _pair_scores(query, preferred, rejected, temperature)
    return softplus(worse - better).mean()


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
    from torch.nn.functional import normalize

    ours = (normalize(query, dim=1) @ normalize(candidates, dim=1).T / temperature).log_softmax(1)
    reference = (normalize(ref_query, dim=1) @ normalize(ref_candidates, dim=1).T / temperature).log_softmax(1).detach()
    return (ours.exp() * (ours - reference)).sum(1).mean()


def _pair_scores(query: Tensor, preferred: Tensor, rejected: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 2B) scores with all preferred and rejected, (B,) with the own preferred, (B,) with the own rejected."""
    import torch
    from torch.nn.functional import normalize

    scores = normalize(query, dim=1) @ normalize(torch.cat([preferred, rejected]), dim=1).T / temperature
    return scores, scores.diagonal(), scores.diagonal(len(query))


LOSSES = {"partial-plackett-luce": partial_plackett_luce_loss, "bradley-terry": bradley_terry_loss}

# -----------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = stage.parser(__doc__)
    parser.add_argument("model", help="a stage-1 checkpoint of this project, e.g. e5-sft")
    parser.add_argument("dataset", help="BEIR name, pydocs, or a folder datasets/<dataset>/")
    parser.add_argument(
        "--loss", choices=tuple(LOSSES), default="partial-plackett-luce", help="preference loss (default: %(default)s)"
    )
    parser.add_argument(
        "--beta", type=float, default=0.1, help="weight of the KL to stage 1; 0 switches it off (default: %(default)s)"
    )
    stage.add_training_options(parser, epochs=1, batch_size=100, lr=2e-5)
    return parser.parse_args(argv)


def make_loss(args: argparse.Namespace, ref_queries: Tensor, ref_passages: Tensor) -> LossFunction:
    """Loss of (texts, D) embeddings and (B, 6) labels: places of query, preferred and rejected among
    the texts, and their rows among the reference embeddings."""
    import torch

    def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        query, preferred, rejected = embeddings[labels[:, :3]].unbind(1)
        at = labels[:, 3:].cpu()
        reference = ref_queries[at[:, 0]].to(query.device), ref_passages[at[:, 1:].T.flatten()].to(query.device)
        preference = LOSSES[args.loss](query, preferred, rejected, args.temperature)
        kl = kl_to_reference(query, torch.cat([preferred, rejected]), *reference, args.temperature)
        _, better, worse = _pair_scores(query, preferred, rejected, args.temperature)
        parts = {"preference": preference, "kl": kl, "preference_accuracy": (better > worse).float().mean()}
        return preference + args.beta * kl if args.beta else preference, parts

    return loss


def load_pairs(ds: str, source: Path, queries: dict[str, str], corpus: beir.Corpus) -> list[tuple[str, int, int]]:
    """(query id, position of the preferred, position of the rejected passage) of every preference."""
    pairs = []
    for number, _, row in jsonl.read_with_offsets(source, {"query_id": str, "preferred_id": str, "rejected_id": str}):
        where = f"{paths.shown(source)}:{number}"
        better, worse = corpus.position(row["preferred_id"]), corpus.position(row["rejected_id"])
        if row["query_id"] not in queries:
            raise BadInput(f"{where}: query {row['query_id']!r} is not a training query of {ds}")
        if better is None or worse is None or better == worse:
            raise BadInput(f"{where}: preferred_id and rejected_id must be two different passages of {paths.shown(corpus.path)}")
        pairs.append((row["query_id"], better, worse))
    if not pairs:
        raise BadInput(f"{paths.shown(source)} has no preference to train on")
    return pairs


def main(args: argparse.Namespace) -> None:
    stage.check_training_options(args)
    if args.beta < 0:
        raise BadInput(f"--beta must not be negative, got {args.beta}")
    ref = models.resolve(args.model, args.dataset, args.name)
    source = paths.preferences(ref.name, args.dataset)
    if not source.is_file():
        raise BadInput(
            f"{paths.shown(source)} is not there. Run: python stage2/parse_comparison.py {args.dataset} --model {ref.name}"
        )
    beir.ensure(args.dataset)
    stage.check_fresh([source, *ref.weights], args.force)
    corpus = beir.Corpus(args.dataset)
    queries, _ = beir.load_split(args.dataset, "train", corpus, args.strict)
    pairs = load_pairs(args.dataset, source, queries, corpus)
    record = stage.Record(args)
    record.reads(corpus.path, paths.queries(args.dataset), paths.qrels(args.dataset, "train"), source, *ref.weights)
    query_ids = list(dict.fromkeys(query for query, _, _ in pairs))
    positions = list(dict.fromkeys(position for _, *both in pairs for position in both))
    stage.say(
        f"read   {len(pairs):,} preferences for {len(query_ids):,} queries, over {len(positions):,} passages of {args.dataset}"
    )

    output = paths.model_output(f"{ref.name.removesuffix('-sft')}-final-{args.dataset}")
    with jsonl.lock(output):
        from syntriever import journal, training

        model = models.load(ref, args.device)
        prefix_query, prefix_passage = model.prompts["query"], model.prompts["document"]
        with training.reference(output) as folder:
            # The model is still the stage-1 model here: its embeddings are all the KL term needs of it.
            ref_queries = training.embed(model, [queries[q] for q in query_ids], "query", args.max_length, folder / "queries.npy")
            ref_passages = training.embed(
                model, map(corpus.text, positions), "document", args.max_length, folder / "passages.npy"
            )
            query_row, passage_row = ({key: row for row, key in enumerate(keys)} for keys in (query_ids, positions))

            def sample(number: int) -> Sample:
                query, better, worse = pairs[number]
                texts = [(prefix_query, queries[query]), *((prefix_passage, corpus.text(p)) for p in (better, worse))]
                return texts, [query_row[query], passage_row[better], passage_row[worse]]

            dev = journal.dev_score(args.dataset, corpus, args)
            title = f"{output.name}: stage 2, --loss {args.loss}, --beta {args.beta:g}"
            loss = make_loss(args, ref_queries, ref_passages)
            training.train(model, loss, sample, [query for query, _, _ in pairs], dev, args, output, record, title)
    base = ref.name.removesuffix("-sft")
    stage.next_command(f"python evaluate.py bm25 {base} {ref.name} {base}-final {args.dataset}")


if __name__ == "__main__":
    sys.exit(stage.run(main, parse_args))
