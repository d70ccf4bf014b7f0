"""The corpus as the starting encoder embeds it: candidates of every training step that cost no encoding.

The embeddings are those that retrieval makes (`shards.embed`), so memory is what one batch looks at.
What the LLM wrote for a query is embedded once, too, and never trained on as a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syntriever.data.corpus import Corpus
from syntriever.encode import models, search, shards
from syntriever.encode.encoder import Encoder
from syntriever.encode.shards import Embeddings
from syntriever.report import metrics
from syntriever.run import processes, terminal


@dataclass
class Bank:
    """What each of Q training queries looks at. Passages with the same text go by the position of the first."""

    embeddings: Embeddings
    relevant: Sequence[set[int]]  # positions of the known relevant passages of each
    views: np.ndarray  # (Q, D) float32 unit vectors: the mean direction of the query and the texts written for it
    told: np.ndarray  # (Q,) bool, whether there are such texts
    top: np.ndarray  # (Q, K) int64 positions of the passages nearest to the view; a repeated text repeats its position

    def batch(self, numbers: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, ...]:
        """For B queries with gold passages at the positions `gold`: (M, D) embeddings of all passages that
        any of them looks at or has as relevant; (B,) columns of the gold passages and (B, M) bool of all
        relevant ones among them; (B, D) views; (B,) told."""
        known = [np.fromiter(self.relevant[number], np.int64) for number in numbers]
        positions = np.unique(np.concatenate([self.top[numbers].ravel(), *known]))
        relevant = np.stack([np.isin(positions, some) for some in known])
        columns = np.searchsorted(positions, gold)
        return self.embeddings.rows(positions), columns, relevant, np.asarray(self.views[numbers]), self.told[numbers]


def build(
    model: Any,
    corpus: Corpus,
    base: Path,
    folder: Path,
    asked: Sequence[tuple[str, list[str]]],
    relevant: Sequence[set[int]],
    k: int,
    max_length: int | None,
) -> Bank:
    """`asked`: the queries, each with the texts of the LLM that may be trusted. The corpus is embedded
    below `base`, what only this run needs in `folder`; of several processes the first does the latter, and
    says what the texts are worth as a teacher."""
    told = np.array([bool(texts) for _, texts in asked])
    sample = np.flatnonzero(told)[:1_000]
    with models.at_length(model, max_length):
        encoder = Encoder(model)
        embeddings = shards.embed(encoder, corpus, base)
        if processes.rank() == 0:
            wanted = [*asked, *((asked[number][0], []) for number in sample)]  # the latter: the query alone
            views = np.empty((len(wanted), encoder.dim), np.float32)
            for start in range(0, len(wanted), shards.SHARD):
                views[start : start + shards.SHARD] = search.directions(encoder, wanted[start : start + shards.SHARD])
            np.save(folder / "views.npy", views, allow_pickle=False)
        processes.wait()
        views = np.load(folder / "views.npy", mmap_mode="r", allow_pickle=False)
        top = corpus.twins(search.exact(embeddings, np.asarray(views), min(k, len(corpus)), str(model.device))[1])
        if processes.rank() == 0:
            np.save(folder / "top.npy", top, allow_pickle=False)
            if len(sample):
                known = [relevant[number] for number in sample]
                alone, taught = ndcg(top[len(asked) :], known), ndcg(top[sample], known)
                note = f"gold passages of {len(sample):,} training queries at nDCG@10 {alone:.4f} by the query"
                terminal.say(f"       {note}, {taught:.4f} by the query and the LLM's texts, the teacher")
        processes.wait()
    return Bank(embeddings, relevant, views, told, np.load(folder / "top.npy", mmap_mode="r", allow_pickle=False))


def ndcg(top: np.ndarray, relevant: Sequence[set[int]]) -> float:
    """nDCG@10 of (Q, K) positions, best first."""
    qrels = {str(query): {str(position): 1 for position in some} for query, some in enumerate(relevant)}
    run = {str(q): {str(p): -float(rank) for rank, p in enumerate(dict.fromkeys(row))} for q, row in enumerate(top.tolist())}
    return metrics.mean(metrics.evaluate(qrels, run, (10,))["nDCG@10"])
