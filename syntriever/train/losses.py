"""Losses that are not the paper's: a contrast with the corpus, and judgements of real passages as a teacher.

Scores are cos / temperature. Pure functions; `train_stage1.py` and `train_stage2.py` hold the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from syntriever.encode import models
from syntriever.train.candidates import ABSENT

if TYPE_CHECKING:
    from torch import Tensor

    from syntriever.train.loop import LossFunction


def at_prefixes(function: LossFunction, dims: Sequence[int]) -> LossFunction:
    """Matryoshka (Kusupati et al. 2022): the mean over d in `dims` of the loss of the first d entries of the embeddings,
    scaled to unit length.

    Frozen vectors of the corpus that are compared with them are cut to d as well, by `models.similarity`: a search at d
    compares such prefixes. What only teaches keeps its full length: the views of the LLM's texts, the starting encoder's
    scores, the reference of the KL. So every length has one and the same teacher, the best there is.

    The parts that are logged are those of the longest, and the loss of each as `loss_<d>`.
    """
    import torch
    from torch.nn.functional import normalize

    def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = {dim: function(normalize(embeddings[:, :dim], dim=1), labels) for dim in dims}
        parts = found[max(dims)][1]  # this very object: the backward pass may add to it
        parts.update({f"loss_{dim}": value for dim, (value, _) in found.items()})
        return torch.stack([value for value, _ in found.values()]).mean(), parts

    return loss


def corpus_contrast(query: Tensor, candidates: Tensor, gold: Tensor, relevant: Tensor, temperature: float = 0.05) -> Tensor:
    """InfoNCE against the corpus instead of the batch (not in the paper): mean over rows of -log softmax of
    s(query, gold) over the gold passage and all `candidates` that are not relevant, s = cos / temperature.

    Args:
        query: (B, D) embeddings.
        candidates: (M, D) embeddings of passages by the encoder that training starts from.
        gold: (B,) int, the gold passage of each row among them.
        relevant: (B, M) bool, all known relevant ones.
    Returns:
        Scalar.
    """
    import torch

    scores = models.similarity(query, candidates) / temperature
    others = relevant.scatter(1, gold[:, None], False)
    return torch.nn.functional.cross_entropy(scores.masked_fill(others, ABSENT), gold)


def view_distillation(query: Tensor, candidates: Tensor, views: Tensor, told: Tensor, temperature: float = 0.05) -> Tensor:
    """The query is to find what the LLM's texts find (not in the paper): mean over rows of the
    cross-entropy of softmax s(query, .) to softmax s(view, .) over passages of the corpus, 0 where the
    LLM wrote nothing, s = cos / temperature.

    No text of the LLM is a candidate, so none is the easiest positive: it says which real passages are
    near to an answer (HyDE, Gao et al. 2023, as a teacher).

    Args:
        query: (B, D) embeddings.
        candidates: (M, D) embeddings of passages by the encoder that training starts from.
        views: (B, D) mean directions of the query and the LLM's texts, by the same encoder.
        told: (B,) bool, whether there are such texts.
    Returns:
        Scalar.
    """
    scores = models.similarity(query, candidates) / temperature
    target = (models.similarity(views, candidates) / temperature).softmax(1)
    return -(target * scores.log_softmax(1)).sum(1).masked_fill(~told, 0.0).mean()


# ---- graded judgements


def listwise_cross_entropy(scores: Tensor, teacher: Tensor, judged: Tensor) -> Tensor:
    """The order of the judged passages of a query, as the teacher sees it: cross-entropy of softmax(scores) to
    softmax(teacher) over them (ListNet, Cao et al. 2007). Mean over the queries of which the teacher tells passages apart.

    Args:
        scores: (Q, K) of each query and its own candidates.
        teacher: (Q, K) logits, as grades / temperature.
        judged: (Q, K) bool; what is not judged is no candidate.
    Returns:
        Scalar, 0 where no query counts.
    """
    target = teacher.masked_fill(~judged, ABSENT).softmax(1)
    costs = -(target * scores.masked_fill(~judged, ABSENT).log_softmax(1)).sum(1)
    high, low = teacher.masked_fill(~judged, ABSENT).amax(1), teacher.masked_fill(~judged, -ABSENT).amin(1)
    return mean_of(costs, high > low)


def plackett_luce_groups(scores: Tensor, grades: Tensor, judged: Tensor) -> Tensor:
    """Plackett-Luce over groups of equal grades: each passage is drawn before all that have a lower grade, and nothing is
    said within a group. Mean of logsumexp(own score and all lower ones) - own score over the passages with lower ones
    of a query, and over the queries. Arguments as in `listwise_cross_entropy`."""
    lower = judged[:, None, :] & judged[:, :, None] & (grades[:, None, :] < grades[:, :, None])  # (Q, K, K)
    rivals = scores[:, None, :].masked_fill(~lower, ABSENT).logsumexp(2)
    counts = lower.any(2)
    costs = (rivals.logaddexp(scores) - scores).masked_fill(~counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
    return mean_of(costs, counts.any(1))


def graded_contrast(scores: Tensor, relevant: Tensor, ignored: Tensor) -> Tensor:
    """InfoNCE of queries with several relevant passages, or none: mean over the relevant ones of a query, and over the
    queries with any, of -log softmax of the score over that passage and all that are neither relevant nor ignored.

    Args:
        scores: (Q, M) of each query and all candidates of the batch.
        relevant, ignored: (Q, M) bool.
    Returns:
        Scalar, 0 where no query has a relevant passage.
    """
    rivals = scores.masked_fill(relevant | ignored, ABSENT).logsumexp(1, keepdim=True)
    costs = (rivals.logaddexp(scores) - scores).masked_fill(~relevant, 0.0).sum(1) / relevant.sum(1).clamp(min=1)
    return mean_of(costs, relevant.any(1))


def near_positives(cosines: Tensor, relevant: Tensor, judged: Tensor, share: float = 0.95) -> Tensor:
    """(Q, M) bool: passages that nobody judged and that are too near to be negatives: their cosine is at least `share` of that
    of the nearest relevant passage (the positive-aware mining of NV-Retriever, Moreira et al. 2024)."""
    nearest = cosines.masked_fill(~relevant, -1.0).amax(1, keepdim=True)
    return ~judged & relevant.any(1, keepdim=True) & (cosines >= share * nearest)


def mean_of(costs: Tensor, used: Tensor) -> Tensor:
    """Mean of the used ones of (Q,) costs; 0 where none is."""
    return costs.masked_fill(~used, 0.0).sum() / used.sum().clamp(min=1)


# `--loss` on grades -> what the order of the judged passages costs: of (Q, K) scores, teacher's logits, grades and which are
# there.
ORDERS: dict[str, Callable[..., Tensor]] = {
    "listwise": lambda scores, teacher, grades, there: listwise_cross_entropy(scores, teacher, there),
    "plackett-luce": lambda scores, teacher, grades, there: plackett_luce_groups(scores, grades, there),
}
