"""Scores of a query with all texts of a batch, and which of these texts are candidates of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from syntriever.encode import models

if TYPE_CHECKING:
    from torch import Tensor

# Score of what is absent: exp of it is exactly 0, and unlike -inf it has no NaN gradient.
ABSENT = -1e4


def score_candidates(
    query: Tensor,
    passage: Tensor,
    positive: Tensor,
    cot: Tensor,
    negative: Tensor,
    verified: Tensor,
    temperature: float = 0.05,
    present: Tensor | None = None,
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, 4, B) scores of each query with every gold, positive, cot and negative of the batch, and
    (B, 4) scores with its own; `ABSENT` where a text is missing or, in the latter, no positive.

    `ignore`: (B, 4, B) bool, candidates that are not one for that row (`ignored_candidates`).
    """
    import torch

    scores = models.similarity(query, torch.cat([passage, positive, cot, negative])) / temperature  # (B, 4B)
    scores = scores.view(len(query), 4, len(query))
    if present is not None:
        there = torch.cat([torch.ones_like(verified)[:, None].bool(), present.bool()], dim=1)  # (B, 4)
        scores = scores.masked_fill(~there.T, ABSENT)
    own = scores.diagonal(dim1=0, dim2=2).T  # (B, 4)
    if ignore is not None:
        scores = scores.masked_fill(ignore, ABSENT)
    always = torch.ones_like(verified).bool()
    is_positive = torch.stack([always, verified.bool(), always, ~always], dim=1)
    return scores, own.masked_fill(~is_positive, ABSENT)


def ignored_candidates(places: Tensor, known: Tensor) -> Tensor:
    """(B, 4, B) bool: which candidates a row leaves out, so that each text counts once and no known
    relevant passage serves as a negative.

    Args:
        places: (B, 4) int, which text of the batch each passage, positive, cot and negative is.
        known: (B, B) bool, [i, j] where the gold passage of row j is known to be relevant to query i.
    """
    import torch

    rows, flat = len(places), places.T.flatten()  # candidate k * B + j is text k of row j
    mine = torch.eye(rows, dtype=torch.bool, device=places.device).repeat(1, 4)  # (B, 4B)
    # For its own texts a row keeps its own column, for any other text the first column that has it.
    own_text = (flat[None, :, None] == places[:, None, :]).any(2)
    texts, which = flat.unique(return_inverse=True)
    first = torch.full_like(texts, len(flat)).scatter_reduce(0, which, torch.arange(len(flat), device=flat.device), "amin")
    again = first[which] != torch.arange(len(flat), device=flat.device)
    passages = torch.cat([known, torch.zeros(rows, 3 * rows, dtype=torch.bool, device=known.device)], dim=1)
    return (~mine & (own_text | again | passages)).view(rows, 4, rows)


def known_in_batch(labels: Tensor, relevant: Sequence[set[int]]) -> Tensor:
    """(B, B) bool: passages of the batch that are known to be relevant to the query of a row.

    Args:
        labels: (B, 8) int, the last two columns: number of the query, position of the passage.
        relevant: positions of the relevant passages by number of the query.
    """
    import torch

    found = torch.zeros(len(labels), len(labels), dtype=torch.bool)
    columns: dict[int, list[int]] = {}
    for column, position in enumerate(labels[:, 7].tolist()):
        columns.setdefault(position, []).append(column)
    for row, query in enumerate(labels[:, 6].tolist()):
        found[row, [column for position in relevant[query] for column in columns.get(position, ())]] = True
    return found.to(labels.device)


def share_of_gold(gradient: Tensor, places: Tensor) -> Tensor:
    """Of the gradient that reaches passages and written texts, the share that reaches gold passages:
    of the sum of the norms of the rows of `gradient`, (texts, D) or (texts, tokens, D).

    Args:
        places: (B, 5) int, as in `train_stage1.make_loss`; a passage that is also a written text counts as gold.
    """
    norms = gradient.flatten(1).norm(dim=1)
    gold, written = places[:, 1].unique(), places[:, 2:][places[:, 2:] >= 0].unique()
    others = written[(written[:, None] != gold).all(1)]
    return norms[gold].sum() / (norms[gold].sum() + norms[others].sum()).clamp(min=1e-30)
