"""Losses of stage 1 that lost the study (docs/study.md) and are kept to repeat it. A late-interaction
encoder, which cannot be trained by the default, trains with `cluster_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syntriever.encode import models
from syntriever.train.candidates import ABSENT

if TYPE_CHECKING:
    from torch import Tensor


def authors_of(scores: Tensor, own: Tensor) -> Tensor:
    """What the authors' code computes, for the record: cross-entropy of the gold passage against all
    candidates, the row's own cot and positive among the negatives."""
    return (scores.flatten(1).logsumexp(1) - own[:, 0]).mean()


def cluster_loss(
    query: Tensor,
    passage: Tensor,
    positive: Tensor,
    cot: Tensor,
    negative: Tensor,
    verified: Tensor,
    temperature: float = 0.05,
    present: Tensor | None = None,
    ignore: Tensor | None = None,
    view_weight: float = 0.3,
) -> Tensor:
    """Every view of a row is drawn to its gold passage, and the query to every view (not in the paper).

    Per row: the mean over anchors a in {query, cot, positive if verified} of -log softmax of
    s(a, gold) over {golds, negatives of the batch}, plus `view_weight` times the mean over views v
    in {cot, positive if verified} of -log softmax of s(query, v) over {texts of v's kind, negatives
    of the batch}. Arguments as in `score_candidates`.
    """
    import torch

    there = torch.ones_like(verified)[:, None].expand(-1, 3).bool() if present is None else present.bool()
    always, has_positive, has_cot, has_negative = torch.ones_like(there[:, 0]), *there.T

    def cost(anchor: Tensor, target: Tensor, has_target: Tensor, kind: int) -> Tensor:
        """(B,) of -log softmax of s(anchor_i, target_i) over {targets, negatives}."""
        scores = models.similarity(anchor, torch.cat([target, negative])) / temperature
        own = scores.diagonal()
        scores = scores.masked_fill(~torch.cat([has_target, has_negative]), ABSENT)
        if ignore is not None:
            scores = scores.masked_fill(ignore[:, [kind, 3]].flatten(1), ABSENT)
        return scores.logsumexp(1) - own

    def mean_of(costs: list[Tensor], used: list[Tensor]) -> Tensor:
        """(B,) mean of the used costs of each row, 0 where none is."""
        weights = torch.stack(used).to(query.dtype)
        return (torch.stack(costs) * weights).sum(0) / weights.sum(0).clamp(min=1)

    good_positive = has_positive & verified.bool()
    to_gold = [cost(anchor, passage, always, 0) for anchor in (query, cot, positive)]
    to_view = [cost(query, cot, has_cot, 2), cost(query, positive, has_positive, 1)]
    loss = mean_of(to_gold, [always, has_cot, good_positive]) + view_weight * mean_of(to_view, [has_cot, good_positive])
    return loss.mean()
