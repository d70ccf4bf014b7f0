"""The corpus as the starting encoder embeds it: candidates of every training step that cost no encoding.

The embeddings are those that retrieval makes (`encoding.embed`), so memory is what one batch looks at.
What the LLM wrote for a query is embedded once, too, and never trained on as a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syntriever import encoding, models, parallel, search
from syntriever.beir import Corpus
from syntriever.encoding import Embeddings


@dataclass
class Bank:
    """Q training queries with what they look at."""

    embeddings: Embeddings
    views: np.ndarray  # (Q, D) float32 unit vectors: the direction of the query and of the texts written for it
    top: np.ndarray  # (Q, K) int64 positions of the passages nearest to it
    relevant: Sequence[set[int]]  # positions of the known relevant passages

    def batch(self, numbers: np.ndarray, golds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For B rows, their queries and gold passages: (M, D) embeddings of all that any of the queries
        looks at, (B,) column of each gold passage, (B, M) bool of the known relevant, (B, D) views."""
        positions = np.unique(np.concatenate([self.top[numbers].ravel(), golds]))
        known = np.stack([np.isin(positions, list(self.relevant[number])) for number in numbers])
        return self.embeddings.rows(positions), np.searchsorted(positions, golds), known, self.views[numbers]


def build(
    model: Any,
    corpus: Corpus,
    base: Path,
    folder: Path,
    queries: Sequence[str],
    written: Callable[[int], list[str]],
    relevant: Sequence[set[int]],
    k: int,
    max_length: int | None,
) -> Bank:
    """`written(number)`: the LLM's texts about a query that may be trusted, none or several. The corpus
    is embedded below `base`; `folder` is for what only this run needs."""
    k = min(k, len(corpus))
    with models.at_length(model, max_length):
        encoder = encoding.Encoder(model)
        embeddings = encoding.embed(encoder, corpus, base)
        if parallel.rank() == 0:
            views = np.lib.format.open_memmap(folder / "views.npy", "w+", np.float32, (len(queries), encoder.dim))
            for start, window in windows(queries):
                views[start : start + len(window)] = mean_directions(encoder, window, lambda n, at=start: written(at + n))  # type: ignore[misc]
            views.flush()
        parallel.wait()
        views = np.load(folder / "views.npy", mmap_mode="r", allow_pickle=False)
        top = search.exact(embeddings, np.asarray(views), k, str(model.device))[1]
        if parallel.rank() == 0:
            np.save(folder / "top.npy", top, allow_pickle=False)
        parallel.wait()
    return Bank(embeddings, views, np.load(folder / "top.npy", mmap_mode="r", allow_pickle=False), relevant)


def windows(queries: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    from tqdm import tqdm

    for start in tqdm(range(0, len(queries), encoding.SHARD), desc="views", delay=2):
        yield start, queries[start : start + encoding.SHARD]


def mean_directions(encoder: Any, queries: Sequence[str], written: Callable[[int], list[str]]) -> np.ndarray:
    """(Q, D) unit vectors: the mean of the query's embedding and those of its texts."""
    made = encoder(queries, "query")
    owners, texts = [], []
    for number in range(len(queries)):
        for text in written(number):
            owners.append(number)
            texts.append(text)
    if texts:
        np.add.at(made, owners, encoder(texts, "document"))
    unit: np.ndarray = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit
