"""Corpus embeddings in shards on disk, and top-k search over them.

A shard is one `.npy` file (float32, unit rows) that appears under its name only when complete; a
sidecar says which model and corpus made the folder, and is checked before any shard is read. Of a
late-interaction encoder the rows are the tokens of one passage after the other, and a second file
has the number of tokens of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from syntriever import jsonl, models, paths, stage
from syntriever.beir import Corpus
from syntriever.errors import BadInput

SHARD = 50_000
WINDOW = 512  # texts encoded between two steps of the progress bar
TRAINING_SAMPLE = 200_000  # passages that train an approximate index

Hits = list[tuple[str, float]]


def encode(model: Any, texts: Sequence[str], kind: str, batch_size: int = 32) -> Any:
    """(len(texts), D) float32 unit vectors, or a list of (tokens, D) arrays by a late-interaction
    encoder; `kind` is "query" or "document" and picks the prefix."""
    if models.is_late(model):
        options = {"batch_size": batch_size, "convert_to_numpy": True, "show_progress_bar": False}
        tokens = model.encode(list(texts), prompt=model.prompts[kind] or None, task=kind, normalize_embeddings=True, **options)
        return [np.asarray(vectors, np.float32) for vectors in tokens]
    vectors = model.encode(
        list(texts), prompt=model.prompts[kind] or None, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(vectors, np.float32)


def similarity(queries: Any, passages: Any) -> np.ndarray:
    """(Q, P) inner products of what `encode` returned, or MaxSim over the number of query tokens."""
    if isinstance(passages, np.ndarray):
        product: np.ndarray = queries @ passages.T
        return product
    starts = np.cumsum([0, *map(len, passages[:-1])])
    flat = np.concatenate(passages)
    return np.stack([np.maximum.reduceat(flat @ query.T, starts, axis=0).mean(1) for query in queries])


class Embeddings:
    """Embeddings of a corpus by one model: those on disk are reused, missing shards are encoded."""

    def __init__(self, model: Any, corpus: Corpus, folder: Path, batch_size: int = 32) -> None:
        from tqdm import tqdm

        self.folder, self.count, self.late = folder, len(corpus), models.is_late(model)
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
                parts: list[np.ndarray] = []
                for at in range(start, stop, WINDOW):
                    end = min(at + WINDOW, stop)
                    made = encode(model, list(corpus.texts(at, end)), "document", batch_size)
                    parts += made if self.late else [made]
                    bar.update(end - at)
                if self.late:
                    with jsonl.atomic(self._lengths(start)) as file:
                        np.save(file, np.array([len(tokens) for tokens in parts]), allow_pickle=False)
                with jsonl.atomic(self._shard(start)) as file:
                    np.save(file, np.concatenate(parts), allow_pickle=False)
        stage.say(f"wrote  {paths.shown(folder)}: {len(corpus):,} embeddings of {dim} dimensions")

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:012d}.npy"

    def _lengths(self, start: int) -> Path:
        return self.folder / f"{start:012d}.tokens.npy"

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """(position of the first row, (n, D) memory-mapped array) of every shard."""
        for start in range(0, self.count, SHARD):
            yield start, np.load(self._shard(start), mmap_mode="r", allow_pickle=False)

    def token_blocks(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(position of the first passage, (tokens, D) arrays) of every `WINDOW` passages of a late-interaction encoder."""
        for start, shard in self.shards():
            ends = np.cumsum(np.load(self._lengths(start), allow_pickle=False))
            passages = np.split(shard, ends[:-1])
            for at in range(0, len(passages), WINDOW):
                yield start + at, passages[at : at + WINDOW]


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
        best_scores, best_positions = _best(k, [best_scores, scores], [best_positions, positions + start])
    return best_scores, best_positions


def max_sim(embeddings: Embeddings, queries: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by MaxSim of token embeddings, over every passage."""
    from tqdm import tqdm

    best_scores = np.empty((len(queries), 0), np.float32)
    best_positions = np.empty((len(queries), 0), np.int64)
    with tqdm(total=embeddings.count, unit="passage", desc="MaxSim") as bar:
        for start, passages in embeddings.token_blocks():
            scores = similarity(queries, passages)
            positions = np.broadcast_to(np.arange(start, start + len(passages)), scores.shape)
            best_scores, best_positions = _best(k, [best_scores, scores], [best_positions, positions])
            bar.update(len(passages))
    return best_scores, best_positions


def _best(k: int, scores: list[np.ndarray], positions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The k best of (Q, n) scores and their positions; among equals the earlier."""
    all_scores, all_positions = np.concatenate(scores, axis=1), np.concatenate(positions, axis=1)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_positions, order, 1)


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
    model: Any,
    corpus: Corpus,
    folder: Path,
    queries: dict[str, str],
    k: int,
    factory: str | None = None,
    seed: int = 42,
    batch_size: int = 32,
) -> dict[str, Hits]:
    """{query id: [(passage id, score), ...] best first} over the whole corpus."""
    if factory and models.is_late(model):
        raise BadInput("--index: a late-interaction encoder is searched exactly, by MaxSim")
    embeddings = Embeddings(model, corpus, folder, batch_size)
    vectors = encode(model, list(queries.values()), "query", batch_size)
    if models.is_late(model):
        search = max_sim(embeddings, vectors, k)
    else:
        search = approximate(embeddings, vectors, k, factory, seed) if factory else exact(embeddings, vectors, k)
    return {
        query: [(corpus.id(p), float(s)) for s, p in zip(scores, positions, strict=True) if p >= 0]
        for query, scores, positions in zip(queries, *search, strict=True)
    }
