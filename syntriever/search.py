"""Corpus embeddings in shards on disk, and top-k search over them.

A shard is one `.npy` file (float32, unit rows) that appears under its name only when complete; a
sidecar says which model and corpus made the folder, and is checked before any shard is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from syntriever import jsonl, models, paths, stage
from syntriever.beir import Corpus
from syntriever.errors import BadInput

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD = 50_000
WINDOW = 512  # texts encoded between two steps of the progress bar
TRAINING_SAMPLE = 200_000  # passages that train an approximate index

Hits = list[tuple[str, float]]


def encode(model: SentenceTransformer, texts: Sequence[str], kind: str, batch_size: int = 32) -> np.ndarray:
    """(len(texts), D) float32 unit vectors; `kind` is "query" or "document" and picks the prefix."""
    vectors = model.encode(
        list(texts), prompt=model.prompts[kind] or None, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(vectors, np.float32)


class Embeddings:
    """Embeddings of a corpus by one model: those on disk are reused, missing shards are encoded."""

    def __init__(self, model: Any, corpus: Corpus, folder: Path, batch_size: int = 32) -> None:
        from tqdm import tqdm

        self.folder, self.count = folder, len(corpus)
        sidecar = folder / "embeddings.json"
        dim = model.get_embedding_dimension()
        wanted = {
            "model": models.fingerprint(model),
            "corpus": stage.sha256(corpus.path),
            "count": len(corpus),
            "dim": dim,
            "shard": SHARD,
            "dtype": "float32",
        }
        if folder.is_dir() and _load_sidecar(sidecar) != wanted:
            stage.say(f"note:  {paths.shown(folder)} is of another model or corpus; encoding anew")
            shutil.rmtree(folder)
        if not folder.is_dir():
            jsonl.write_json(sidecar, wanted)
        missing = [start for start in range(0, len(corpus), SHARD) if not self._shard(start).is_file()]
        if not missing:
            stage.say(f"read   {paths.shown(folder)}: {len(corpus):,} embeddings, made before")
            return
        todo = sum(min(SHARD, len(corpus) - start) for start in missing)
        with tqdm(total=todo, unit="passage", desc="encode") as bar:
            for start in missing:
                stop = min(start + SHARD, len(corpus))
                shard = np.empty((stop - start, dim), np.float32)
                for at in range(start, stop, WINDOW):
                    end = min(at + WINDOW, stop)
                    shard[at - start : end - start] = encode(model, list(corpus.texts(at, end)), "document", batch_size)
                    bar.update(end - at)
                with jsonl.atomic(self._shard(start)) as file:
                    np.save(file, shard, allow_pickle=False)
        stage.say(f"wrote  {paths.shown(folder)}: {len(corpus):,} embeddings of {dim} dimensions")

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:012d}.npy"

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """(position of the first row, (n, D) memory-mapped array) of every shard."""
        for start in range(0, self.count, SHARD):
            yield start, np.load(self._shard(start), mmap_mode="r", allow_pickle=False)


def _load_sidecar(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # none, or a torn one: whatever lies beside it is not to be trusted


def exact(embeddings: Embeddings, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) scores and positions of the best passages by inner product; memory is one shard."""
    import faiss

    best_scores = np.empty((len(queries), 0), np.float32)
    best_positions = np.empty((len(queries), 0), np.int64)
    for start, shard in embeddings.shards():
        index = faiss.IndexFlatIP(shard.shape[1])
        index.add(np.ascontiguousarray(shard))
        scores, positions = index.search(queries, min(k, len(shard)))
        scores = np.concatenate([best_scores, scores], axis=1)
        positions = np.concatenate([best_positions, positions + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_scores, best_positions = np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
    return best_scores, best_positions


def approximate(embeddings: Embeddings, queries: np.ndarray, k: int, factory: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same through a FAISS index-factory string, trained on a sample; prints its recall
    against exact search. Positions are -1 where the index returned fewer than k."""
    import faiss

    dim = queries.shape[1]
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise BadInput(f"--index {factory!r} is not a FAISS index-factory string for {dim} dimensions") from None
    if not index.is_trained:
        rng, sample = np.random.default_rng(seed), []
        for _, shard in embeddings.shards():
            share = min(len(shard), round(len(shard) * TRAINING_SAMPLE / embeddings.count) or 1)
            sample.append(shard[np.sort(rng.choice(len(shard), share, replace=False))])
        try:
            index.train(np.concatenate(sample))
        except RuntimeError as error:
            raise BadInput(
                f"--index {factory!r} cannot be trained on {embeddings.count:,} passages: {str(error).splitlines()[-1]}"
            ) from None
    for _, shard in embeddings.shards():
        index.add(np.ascontiguousarray(shard))
    scores, positions = index.search(queries, k)
    some = slice(0, 200)
    truth = exact(embeddings, queries[some], k)[1]
    overlap = [len(set(a) & set(b)) / k for a, b in zip(truth.tolist(), positions[some].tolist(), strict=True)]
    stage.say(f"note:  --index {factory} finds {np.mean(overlap):.4f} of the exact top {k} ({len(overlap)} queries)")
    return scores, positions


def top_k(
    model: SentenceTransformer,
    corpus: Corpus,
    folder: Path,
    queries: dict[str, str],
    k: int,
    factory: str | None = None,
    seed: int = 42,
    batch_size: int = 32,
) -> dict[str, Hits]:
    """{query id: [(passage id, score), ...] best first} over the whole corpus."""
    embeddings = Embeddings(model, corpus, folder, batch_size)
    vectors = encode(model, list(queries.values()), "query", batch_size)
    search = approximate(embeddings, vectors, k, factory, seed) if factory else exact(embeddings, vectors, k)
    return {
        query: [(corpus.id(p), float(s)) for s, p in zip(scores, positions, strict=True) if p >= 0]
        for query, scores, positions in zip(queries, *search, strict=True)
    }
