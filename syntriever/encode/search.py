"""Top-k search over the embeddings of a corpus: exact, by MaxSim, or through a FAISS index."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits
from syntriever.encode import shards
from syntriever.encode.encoder import Encoder
from syntriever.encode.shards import Embeddings
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import processes, terminal

BLOCK = 16  # shards that are searched at a time

TRAINING_SAMPLE = 200_000  # passages that train an approximate index, or 40 for each cell of an inverted file

JUDGED = 200  # queries on which its recall is measured

Found = tuple[np.ndarray, np.ndarray]  # (Q, k) scores, best first, and positions of the passages; -1 where there is none


def similarity(queries: Any, passages: Any) -> np.ndarray:
    """(Q, P) inner products of what an `Encoder` returned, or MaxSim over the number of query tokens."""
    if isinstance(passages, np.ndarray):
        product: np.ndarray = queries @ passages.T
        return product
    starts = np.cumsum([0, *map(len, passages[:-1])])
    flat = np.concatenate(passages)
    return np.stack([np.maximum.reduceat(flat @ query.T, starts, axis=0).mean(1) for query in queries])


def exact(embeddings: Embeddings, queries: Any, k: int, device: str = "cpu") -> Found:
    """The best passages by inner product, or by MaxSim of a late-interaction encoder. Each process of a
    run searches its share of the shards; the first one has the result. Which of several passages whose
    score equals the k-th is among the k is not defined."""
    best = _scan(embeddings, embeddings.starts[processes.rank() :: processes.world()], queries, k, device)
    for scores, positions in processes.collect([best.D, best.I]):
        best.add_result(scores, positions)
    best.finalize()
    return best.D, best.I


def _scan(embeddings: Embeddings, own: Sequence[int], queries: Any, k: int, device: str = "cpu") -> Any:
    """`faiss.ResultHeap` of the best passages of the shards `own`. Memory is one block of them, on `device`."""
    import faiss

    best, size = faiss.ResultHeap(len(queries), k, keep_max=True), 1 if embeddings.late else BLOCK
    with terminal.progress(total=len(own) * shards.SHARD, unit="passage", desc="search") as bar:
        for starts in (own[at : at + size] for at in range(0, len(own), size)):
            if embeddings.late:
                scores = similarity(queries, embeddings.passages(starts[0]))
                rows = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
            else:
                scores, rows = _best_of_block(queries, embeddings.block(starts), k, device)
            # Rows of the block to positions in the corpus: the shards of a block need not be neighbours.
            positions = np.asarray(starts)[rows // shards.SHARD] + rows % shards.SHARD
            best.add_result(scores, positions)
            del scores, rows, positions  # as large as what is kept
            bar.update(len(starts) * shards.SHARD)
    return best


def _best_of_block(queries: np.ndarray, block: np.ndarray, k: int, device: str) -> Found:
    k = min(k, len(block))
    if device.startswith("cuda"):
        return _on_device(queries, block, k, device)
    import faiss

    scores, rows = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def _on_device(queries: np.ndarray, block: np.ndarray, k: int, device: str, at_a_time: int = 4_096) -> Found:
    """The same in torch: FAISS from PyPI has no GPU."""
    import torch

    passages = torch.from_numpy(block).to(device).T
    parts = [
        torch.topk(torch.from_numpy(part).to(device) @ passages, k)
        for part in np.split(queries, range(at_a_time, len(queries), at_a_time))
    ]
    return tuple(np.concatenate([made.cpu().numpy() for made in column]) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def approximate(embeddings: Embeddings, queries: np.ndarray, k: int, factory: str, seed: int, recall: float) -> Found:
    """The same through a FAISS index-factory string, trained on a sample. What an inverted file or a
    graph looks at (`nprobe`, `efSearch`) is doubled until `recall` of the exact top k is found; prints both.

    The index is kept beside the embeddings and used again.
    """
    import faiss

    index = _index(embeddings, factory, seed)
    some = queries[np.random.default_rng(seed).permutation(len(queries))[:JUDGED]]
    truth = _scan(embeddings, embeddings.starts, some, k).I
    parameters = faiss.ParameterSpace()
    inner = faiss.try_extract_index_ivf(index)
    name, effort, most = ("nprobe", 1, inner.nlist) if inner else ("efSearch", 16, 4_096)
    tunable = inner is not None or "HNSW" in factory
    while True:
        if tunable:
            parameters.set_index_parameter(index, name, effort)
        found = index.search(some, k)[1]
        reached = float(np.mean([len({*a} & {*b}) / k for a, b in zip(truth.tolist(), found.tolist(), strict=True)]))
        if not tunable or reached >= recall or effort >= most:
            break
        effort = min(2 * effort, most)
    how = f" with {name} {effort}" if tunable else ""
    terminal.say(f"note:  --index {factory}{how} finds {reached:.4f} of the exact top {k} ({len(some)} queries)")
    if reached < recall:
        terminal.say(f"warning: that is less than --recall {recall:g}; this index loses too much, or looks at too little")
    windows = terminal.progress(range(0, len(queries), shards.SHARD), desc="search")
    parts = [index.search(queries[at : at + shards.SHARD], k) for at in windows]
    scores, positions = (np.concatenate(column) for column in zip(*parts, strict=True))
    return scores, positions


def _empty_index(factory: str, dim: int) -> Any:
    import faiss

    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise BadInput(f"--index {factory!r} is not a FAISS index-factory string for {dim} dimensions") from None


def _index(embeddings: Embeddings, factory: str, seed: int) -> Any:
    """The filled index: from its file, where the sidecar says that it is of these embeddings."""
    import faiss

    path, sidecar = embeddings.folder / "index.faiss", embeddings.folder / "index.json"
    wanted = {
        "factory": factory,
        "seed": seed,
        "faiss": faiss.__version__,
        "embeddings": shards.load_sidecar(embeddings.sidecar) | {"dim": embeddings.dim},
    }
    if path.is_file() and shards.load_sidecar(sidecar) == wanted | {"bytes": path.stat().st_size}:
        terminal.say(f"read   {paths.shown(path)}, made before")
        return faiss.read_index(str(path))
    index = _empty_index(factory, embeddings.dim)
    if not index.is_trained:
        inner = faiss.try_extract_index_ivf(index)
        size = min(embeddings.count, max(TRAINING_SAMPLE, 40 * inner.nlist if inner else 0))
        chosen = np.sort(np.random.default_rng(seed).choice(embeddings.count, size, replace=False))
        try:
            index.train(embeddings.rows(chosen))
        except RuntimeError as error:
            message = str(error).splitlines()[-1]
            raise BadInput(f"--index {factory!r} cannot be trained on {embeddings.count:,} passages: {message}") from None
    with terminal.progress(total=embeddings.count, unit="passage", desc="index") as bar:
        for at in range(0, len(embeddings.starts), BLOCK):
            block = embeddings.block(embeddings.starts[at : at + BLOCK])
            index.add(block)
            bar.update(len(block))
    sidecar.unlink(missing_ok=True)  # it is not to vouch for the next file
    with jsonl.atomic(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    jsonl.write_json(sidecar, wanted | {"bytes": path.stat().st_size})
    return index


def directions(encoder: Encoder, asked: Sequence[tuple[str, list[str]]]) -> np.ndarray:
    """(Q, D) unit vectors: the mean of the embeddings of a query and of its texts."""
    made: np.ndarray = encoder([query for query, _ in asked], "query")
    owners = [number for number, (_, texts) in enumerate(asked) for _ in texts]
    if owners:
        np.add.at(made, owners, encoder([text for _, texts in asked for text in texts], "document"))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def top_k(
    encoder: Encoder,
    corpus: Corpus,
    folder: Path,
    queries: dict[str, str],
    k: int,
    dtype: str = "float32",
    dim: int | None = None,
    factory: str | None = None,
    recall: float = 0.95,
    seed: int = 42,
    written: Callable[[str], list[str]] | None = None,
) -> Iterator[tuple[str, Hits]]:
    """(query id, [(passage id, score), ...]) of every query over the whole corpus: best first, and among
    equal scores as trec_eval orders them. Of several processes the first gets it, the others nothing.
    The search is over when this returns; only the naming of the passages goes query by query.

    `dim`: search by the first entries of the vectors, scaled to unit length.
    `written`: the texts of a query id; then the mean direction of the query and these is searched for."""
    if factory:
        _empty_index(factory, dim or encoder.dim)  # a mistake shows now, not after the encoding
    embeddings = shards.embed(encoder, corpus, folder, dtype)
    names, size = list(queries), shards.SHARD
    windows = terminal.progress(range(0, len(names), size), desc="queries")
    vectors: Any = [None] * len(names) if encoder.late else np.empty((len(names), encoder.dim), np.float32)
    for at in windows:
        some = names[at : at + size]
        told = [(queries[query], written(query)) for query in some] if written else None
        vectors[at : at + size] = directions(encoder, told) if told else encoder([queries[query] for query in some], "query")
    if dim:
        embeddings.dim, vectors = dim, shards.prefix(vectors, dim)
    if not factory:
        found = exact(embeddings, vectors, k, str(encoder.model.device))
    elif processes.rank() == 0:
        found = approximate(embeddings, vectors, k, factory, seed, recall)
    if processes.rank():
        return iter(())

    def hits(scores: np.ndarray, positions: np.ndarray) -> Hits:
        named = [(corpus.id(p), float(s)) for s, p in zip(scores, positions, strict=True) if p >= 0]
        return sorted(named, key=lambda hit: hit[::-1], reverse=True)

    return ((query, hits(*of_query)) for query, *of_query in zip(queries, *found, strict=True))
