"""From texts to vectors: batches under a token budget, and the embeddings of a corpus in shards on disk.

A shard is one window of the corpus: its texts are sorted by length and go through the encoder together.
It is one `.npy` file of unit rows that appears under its name only when complete. The folder is named by
the hash of what made it, which its sidecar spells out and which is checked before any shard is read. Of a
late-interaction encoder the rows are the tokens of one passage after the other, and a second file has the
number of tokens of each.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from syntriever.data.corpus import Corpus
from syntriever.encode.encoder import Encoder
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import lineage, processes, terminal

SHARD = 4_096  # passages of one shard: what a kill may cost


def prefix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """(N, dim) unit vectors of the first entries of (N, D) ones; these themselves where nothing is cut off."""
    if dim == vectors.shape[1]:
        return vectors
    cut: np.ndarray = vectors[:, :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


class Embeddings:
    """The shards of a corpus in a folder, D entries a vector; `dim` may be set to fewer, and the vectors are then read as
    their prefixes. Raises `BadInput` where one is not what the sidecar says."""

    def __init__(self, folder: Path, count: int, dim: int, dtype: str, late: bool) -> None:
        self.folder, self.count, self.dim, self.dtype, self.late = folder, count, dim, np.dtype(dtype), late
        self.width = dim  # D, on disk
        self.sidecar = folder / "embeddings.json"
        self.starts = range(0, count, SHARD)

    def path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.npy"

    def lengths(self, start: int) -> Path:
        return self.folder / f"{start:012d}.tokens.npy"

    def shard(self, start: int) -> np.ndarray:
        """Memory-mapped (passages, D) array of the passages from `start`, or (tokens, D)."""
        path, rows = self.path(start), min(SHARD, self.count - start)
        try:
            made: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            if self.late:
                ends = np.load(self.lengths(start), allow_pickle=False)
                rows = int(ends.sum()) if len(ends) == rows else -1
        except (ValueError, EOFError) as error:
            raise BadInput(f"{paths.shown(path)}: not a shard ({error}); delete it and run again") from None
        if made.shape != (rows, self.width) or made.dtype != self.dtype:
            raise BadInput(
                f"{paths.shown(path)}: {made.shape} {made.dtype} is not what its sidecar says; delete it and run again"
            )
        return made

    def block(self, starts: Sequence[int]) -> np.ndarray:
        """(passages, dim) float32 array of several shards, one after the other."""
        return prefix(np.concatenate([self.shard(start) for start in starts]).astype(np.float32, copy=False), self.dim)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """(len(positions), dim) float32 array of passages at ascending positions."""
        made = np.empty((len(positions), self.width), np.float32)
        for start in np.unique(positions // SHARD * SHARD):
            first, last = np.searchsorted(positions, (start, start + SHARD))
            made[first:last] = self.shard(int(start))[positions[first:last] - start]
        return prefix(made, self.dim)

    def passages(self, start: int) -> list[np.ndarray]:
        """(tokens, D) float32 arrays of a shard of a late-interaction encoder."""
        ends = np.cumsum(np.load(self.lengths(start), allow_pickle=False))
        return np.split(self.shard(start).astype(np.float32, copy=False), ends[:-1])


def embed(encoder: Encoder, corpus: Corpus, base: Path, dtype: str = "float32") -> Embeddings:
    """Embeddings of a corpus in a folder of `base`: those that are there are reused, missing shards are
    encoded, by all processes of a run together. Memory is two shards."""
    plan: tuple[Path, list[int]] | None = None
    if processes.rank() == 0:  # only one looks: a network file system may show the others less
        about = {"corpus": lineage.sha256(corpus.path), "count": len(corpus), "dtype": dtype, "shard": SHARD}
        wanted = encoder.settings() | about
        folder = base / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
        made = Embeddings(folder, len(corpus), encoder.dim, dtype, encoder.late)
        if load_sidecar(made.sidecar) != wanted:
            if folder.is_dir():
                with processes.lock(folder):
                    terminal.say(f"note:  {paths.shown(folder)} is not what its name says; encoding anew")
                    shutil.rmtree(folder)
            jsonl.write_json(made.sidecar, wanted)
        missing = [start for start in made.starts if not made.path(start).is_file()]
        for other in base.glob("*/embeddings.json") if missing else ():
            found = load_sidecar(other)
            changed = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            if changed:
                terminal.say(f"note:  {paths.shown(other.parent)} stays; it was made with another {changed}")
        plan = folder, missing
    folder, missing = processes.from_first(plan)
    made = Embeddings(folder, len(corpus), encoder.dim, dtype, encoder.late)
    if not missing:
        terminal.say(f"read   {paths.shown(folder)}: {len(corpus):,} embeddings, made before")
        return made

    def window(start: int) -> tuple[int, list[str], Any]:
        texts = list(corpus.texts(start, min(start + SHARD, len(corpus))))
        return start, texts, encoder.tokenize(texts, "document")

    own = missing[processes.rank() :: processes.world()]
    todo = sum(min(SHARD, len(corpus) - start) for start in missing)
    encoder.expect(todo)
    with (
        processes.lock(folder),
        terminal.progress(total=todo, unit="passage", desc="encode") as bar,
        ThreadPoolExecutor(1) as pool,  # reads and tokenizes the next window
    ):
        ahead = (pool.submit(window, start) for start in own)
        waiting = next(ahead, None)
        while waiting:
            start, texts, ids = waiting.result()
            waiting = next(ahead, None)
            vectors = encoder(texts, "document", ids)
            if encoder.late:
                with jsonl.atomic(made.lengths(start)) as file:
                    np.save(file, np.array([len(tokens) for tokens in vectors]), allow_pickle=False)
                vectors = np.concatenate(vectors)
            with jsonl.atomic(made.path(start)) as file:
                np.save(file, vectors.astype(dtype, copy=False), allow_pickle=False)
            bar.update(min(len(texts) * processes.world(), todo - bar.n))
        processes.wait()
    terminal.say(f"wrote  {paths.shown(folder)}: {len(corpus):,} embeddings of {encoder.dim} dimensions")
    return made


def load_sidecar(path: Path) -> dict[str, Any]:
    """What made the files beside it; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}  # none, or a torn one: whatever lies beside it is not to be trusted
    return found if isinstance(found, dict) else {}
