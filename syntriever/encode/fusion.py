"""Reciprocal rank fusion: one ranking out of several."""

import math
from collections.abc import Mapping, Sequence

from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits

Ranks = Mapping[str, int]  # passage id -> rank, from 1


def ranks_of(hits: Hits, corpus: Corpus) -> dict[str, int]:
    """Rank of each passage, equal texts once: the id of the first stands for all, and the best of their places counts."""
    distinct = dict.fromkeys(corpus.first_id(passage) for passage, _ in hits)
    return {passage: rank for rank, passage in enumerate(distinct, 1)}


def reciprocal_rank_fusion(runs: Sequence[Ranks], k: int, constant: float = 60, weights: Sequence[float] | None = None) -> Hits:
    """Top `k` of several rankings of one query (Cormack et al. 2009): a passage scores the sum of weight / (constant + rank)
    over the runs that have it. Equal scores go by id."""
    parts: dict[str, list[float]] = {}
    for run, weight in zip(runs, weights or [1.0] * len(runs), strict=True):
        for passage, rank in run.items():
            parts.setdefault(passage, []).append(weight / (constant + rank))
    # Summed exactly: scores that are equal stay equal in whatever order the runs come.
    scores = {passage: math.fsum(of_passage) for passage, of_passage in parts.items()}
    return sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))[:k]
