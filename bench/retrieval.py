"""Benchmark of retrieval: encoding against sentence-transformers, search against BEIR, peak memory.

Run      python bench/retrieval.py                    all parts, about 12 minutes on two cores
         python bench/retrieval.py encode search      some of: encode, search, memory
Peer     encode: SentenceTransformer.encode in float32 at the best of four batch sizes, same model, texts, length, threads
         search: BEIR's DenseRetrievalExactSearch on the same embeddings, at the better of two chunk sizes
Writes   bench/retrieval.json

Ours and theirs run in turn; the best of the rounds counts. The corpus of encode is pydocs; that of search is random
unit vectors, of which ours are read from shards on disk and theirs lie in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
import common

from syntriever.encode import search, shards
from syntriever.encode.encoder import Encoder
from syntriever.report import metrics

LENGTH, ROUNDS, BATCH_SIZES = 256, 3, (8, 16, 32, 64)
DIM, QUERIES, TOP = 384, 1_000, 100


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = function()
    return time.perf_counter() - started, made


def encode(folder: Path) -> dict[str, Any]:
    """Passages a second; how near the vectors are to the library's, and what they are worth."""
    import torch

    from syntriever.encode import models

    pairs = common.pydocs()
    passages, questions = [passage for _, _, passage in pairs], [query for _, query, _ in pairs][::4]
    model = models.load(models.resolve("minilm", "pydocs"), max_length=LENGTH)
    cuda = model.device.type == "cuda"
    passages *= 16 if cuda else 1  # a GPU is done with one in a moment
    tokens = sum(map(len, models.tokenize(model, [("document", text) for text in passages])))

    def library(texts: list[str], size: int) -> Any:
        return model.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)

    sizes = (64, 256, 1024) if cuda else BATCH_SIZES
    library(passages[:64], 32)
    best = min(sizes, key=lambda size: timed(lambda: library(passages[::3], size))[0])
    backends = ("torch", "compile") if cuda else ("torch", "onnx", "onnx-int8")
    ours = {backend: Encoder(model, backend) for backend in backends}
    runs: dict[str, Callable[[], Any]] = {"sentence-transformers": lambda: library(passages, best)}
    runs |= {backend: lambda encoder=encoder: encoder(passages, "document") for backend, encoder in ours.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    vectors = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            spent, vectors[name] = timed(run)
            seconds[name].append(round(spent, 2))
            print(f"encode: {name} {spent:.2f} s, {tokens / spent:,.0f} tokens/s", flush=True)
    ideal = {f"q{row}": {f"p{4 * row}": 1} for row in range(len(questions))}
    found: dict[str, Any] = {"seconds": seconds, "passages": len(passages), "tokens": tokens, "peer_batch_size": best}
    for name in runs:
        asked = library(questions, best) if name == "sentence-transformers" else ours[name](questions, "query")
        scores = asked @ vectors[name][: len(pairs)].T
        top = np.argsort(-scores, axis=1)[:, :10]
        run_of = {f"q{row}": {f"p{p}": float(scores[row, p]) for p in top[row]} for row in range(len(questions))}
        found[name] = {
            "ratio": min(seconds["sentence-transformers"]) / min(seconds[name]),
            "least_cosine": float((vectors[name] * vectors["sentence-transformers"]).sum(1).min()),
            "ndcg@10": metrics.mean(metrics.evaluate(ideal, run_of, (10,))["nDCG@10"]),
        }
        print(f"encode: {name} {json.dumps(found[name])}", flush=True)
    parameters = sum(parameter.numel() for parameter in model[0].auto_model.encoder.parameters())
    flop = 2 * parameters * tokens / min(seconds["sentence-transformers"])
    size = 2048
    a = torch.randn(size, size, device=model.device)
    peak = max(2 * size**3 / timed(lambda: (a @ a).sum().item())[0] for _ in range(10))
    found["peer_share_of_matmul_peak"] = flop / peak
    print(
        f"encode: sentence-transformers reaches {flop / peak:.0%} of a large float32 matrix product, attention not counted",
        flush=True,
    )
    return found | {"ratio": max(found[backend]["ratio"] for backend in backends[:2])}


def random_shards(folder: Path, count: int) -> shards.Embeddings:
    """Random unit vectors, each shard of its own seed."""
    made = shards.Embeddings(folder / str(count), count, DIM, "float32", late=False)
    made.folder.mkdir(exist_ok=True)
    for start in made.starts:
        rows = np.random.default_rng(start).standard_normal((min(shards.SHARD, count - start), DIM), np.float32)
        np.save(made.path(start), rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return made


def some_queries() -> np.ndarray:
    rows = np.random.default_rng(1 << 40).standard_normal((QUERIES, DIM), np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def find(folder: Path, count: int) -> dict[str, Any]:
    """Ours, in a process of its own; the peer's libraries are loaded before its time begins, so ours are too."""
    import faiss  # noqa: F401
    import tqdm  # noqa: F401

    embeddings = shards.Embeddings(folder / str(count), count, DIM, "float32", late=False)
    queries = some_queries()
    spent, (scores, positions) = timed(lambda: search.exact(embeddings, queries, TOP))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": spent, "peak_mib": peak, "sum": float(scores.sum()), "first": positions[:, 0].tolist()}


def find_with_beir(folder: Path, count: int, chunk: int) -> dict[str, Any]:
    import torch
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    embeddings = shards.Embeddings(folder / str(count), count, DIM, "float32", late=False)
    vectors, queries = map(torch.from_numpy, (embeddings.block(embeddings.starts), some_queries()))

    class Given:
        def encode_queries(self, texts: Any, **_: Any) -> Any:
            return queries

        def encode_corpus(self, texts: Any, **_: Any) -> Any:
            first = int(texts[0]["text"])  # all are of one length, so BEIR keeps their order
            return vectors[first : first + len(texts)]

    corpus = {str(row): {"title": "", "text": f"{row:09d}"} for row in range(count)}
    texts = {f"q{row}": "text" for row in range(QUERIES)}
    peer = DenseRetrievalExactSearch(Given(), corpus_chunk_size=chunk, show_progress_bar=False)
    spent, found = timed(lambda: peer.search(corpus, texts, TOP, "dot"))
    hits = [sorted(of.items(), key=lambda hit: -hit[1])[:TOP] for of in found.values()]
    return {"seconds": spent, "sum": sum(score for of in hits for _, score in of), "first": [int(of[0][0]) for of in hits]}


def child(*argv: Any) -> Any:
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def search_(folder: Path) -> dict[str, Any]:
    """Top 100 of 1,000 queries over 100,000 vectors."""
    random_shards(folder, 100_000)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        mine = child("find", folder, 100_000)
        peers = [child("find_with_beir", folder, 100_000, chunk) for chunk in (50_000, 100_000)]
        for peer in peers:
            assert mine["first"] == peer["first"]
            assert abs(mine["sum"] - peer["sum"]) < 1e-3 * abs(mine["sum"])
        ours.append(mine["seconds"])
        theirs.append(min(peer["seconds"] for peer in peers))
        print(f"search: ours {ours[-1]:.2f} s, BEIR {theirs[-1]:.2f} s", flush=True)
    return {"ours_s": ours, "beir_s": theirs, "ratio": min(theirs) / min(ours)}


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of the search over 100,000 and over 1,000,000 vectors (1.5 GB on disk)."""
    found = {}
    for count in (100_000, 1_000_000):
        random_shards(folder, count)
        run = child("find", folder, count)
        found |= {f"mib_of_{count}": run["peak_mib"], f"seconds_of_{count}": run["seconds"]}
        print(f"memory: {count:,} vectors searched in {run['seconds']:.1f} s, peak {run['peak_mib']:.0f} MiB", flush=True)
    return found | {"ratio": found["mib_of_1000000"] / found["mib_of_100000"]}


def main() -> None:
    parts = {"encode": encode, "search": search_, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*parts, []), help="which (default: all)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, folder, *numbers = args.child
        print(json.dumps({"find": find, "find_with_beir": find_with_beir}[name](Path(folder), *map(int, numbers))))
        return
    common.run(parts, args.parts, ROOT / "bench" / "retrieval.json")


if __name__ == "__main__":
    main()
