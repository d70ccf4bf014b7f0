"""From texts to vectors: batches under a token budget, and the embeddings of a corpus in shards on disk.

A shard is one window of the corpus: its texts are sorted by length and go through the encoder together.
It is one `.npy` file of unit rows that appears under its name only when complete. The folder is named by
the hash of what made it, which its sidecar spells out and which is checked before any shard is read. Of a
late-interaction encoder the rows are the tokens of one passage after the other, and a second file has the
number of tokens of each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from syntriever import jsonl, models, parallel, paths, stage
from syntriever.beir import Corpus
from syntriever.errors import BadInput, Failed

SHARD = 4_096  # passages of one shard: what a kill may cost
CPU_TOKENS, GPU_TOKENS = 1_024, 32_768  # padded tokens of one forward pass: they fill the device, and little is padded


class Encoder:
    """Unit vectors of texts by `model` on `backend`, with at most `batch_tokens` padded tokens a
    forward pass (None: what suits the device). On a GPU torch computes in bfloat16.

    When a forward pass runs out of memory it is done again in halves, and so are those after it.
    """

    def __init__(self, model: Any, backend: str = "torch", batch_tokens: int | None = None) -> None:
        import torch

        self.model, self.late, self.backend = model, models.is_late(model), backend
        self.dim = int(model.get_embedding_dimension())
        cuda = model.device.type == "cuda"
        self.budget = batch_tokens or (GPU_TOKENS if cuda else CPU_TOKENS)
        self.workers = 1
        self._bf16 = cuda and not self.late and torch.cuda.is_bf16_supported(including_emulation=False)
        self._forward: Callable[[dict[str, Any]], np.ndarray] = self._torch
        model.eval()
        if backend == "compile":
            encoder = model[0].auto_model
            encoder.forward = torch.compile(encoder.forward, dynamic=True)
        elif backend.startswith("onnx"):
            if model.device.type != "cpu":
                raise BadInput(f"--backend {backend} runs on the CPU: add --device cpu")
            from syntriever import onnx_backend

            # One thread for each forward pass: on a CPU two passes side by side beat one in two threads.
            self.workers = torch.get_num_threads()
            self._forward = onnx_backend.session(model, quantize=backend == "onnx-int8")

    def settings(self) -> dict[str, Any]:
        """What decides an embedding of a passage."""
        return {
            "model": models.fingerprint(self.model),
            "prefix": self.model.prompts["document"] or "",
            "max_length": self.model[0].document_length or self.model.max_seq_length,
            "dim": self.dim,
            "backend": self.backend + (" bfloat16" if self._bf16 else ""),
        }

    def __call__(self, texts: Sequence[str], kind: str, ids: list[list[int]] | None = None) -> Any:
        """(len(texts), D) float32 unit vectors, or a list of (tokens, D) arrays by a late-interaction
        encoder. `kind` is "query" or "document" and picks the prefix; `ids` is `tokenize` of the texts."""
        if self.late:
            return self._late(texts, kind)
        ids = ids or self.tokenize(texts, kind)
        made = np.empty((len(ids), self.dim), np.float32)

        def run(batch: np.ndarray) -> None:
            for part in self._within_budget(batch, ids):
                self._run(part, ids, made)

        # The longest first, so that what is too much for the memory shows at once.
        order = np.argsort([-len(tokens) for tokens in ids], kind="stable")
        batches = list(self._within_budget(order, ids))
        if self.workers == 1:
            for batch in batches:
                run(batch)
            return made
        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(run, batches):
                pass
        return made

    def tokenize(self, texts: Sequence[str], kind: str) -> list[list[int]]:
        """Token ids, prefix included; nothing for a late-interaction encoder, which does more than that."""
        return [] if self.late else models.tokenize(self.model, [(kind, text) for text in texts])

    def _within_budget(self, order: np.ndarray, ids: list[list[int]]) -> Iterator[np.ndarray]:
        """Cut text numbers, longest text first, into batches."""
        start = 0
        while start < len(order):
            size = max(1, self.budget // max(1, len(ids[order[start]])))
            yield order[start : start + size]
            start += size

    def _run(self, batch: np.ndarray, ids: list[list[int]], made: np.ndarray) -> None:
        longest = len(ids[batch[0]])
        try:
            made[batch] = self._forward(models.pad(self.model, [("", "")] * len(batch), [ids[text] for text in batch]))
            return
        except Exception as error:
            self._lower_budget(error, len(batch), longest)
        # Here the error and the tensors that it held are gone.
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        for part in self._within_budget(batch, ids):
            self._run(part, ids, made)

    def _lower_budget(self, error: Exception, texts: int, longest: int) -> None:
        """Halve a batch that was too much for the memory; another error is raised again."""
        if not _out_of_memory(error):
            raise error
        if texts == 1:
            raise Failed(f"out of memory for a single text of {longest} tokens; lower --max-length") from error
        smaller = texts // 2 * longest
        if smaller < self.budget:
            self.budget = smaller
            stage.say(f"note:  out of memory; going on with --batch-tokens {smaller}")

    def _torch(self, tokens: dict[str, Any]) -> np.ndarray:
        import torch

        device = self.model.device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            vectors = models.forward(self.model, {name: value.to(device) for name, value in tokens.items()}, "")
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy() if self._bf16 else vectors.cpu().numpy()

    def _late(self, texts: Sequence[str], kind: str) -> list[np.ndarray]:
        longest = models.longest(self.model, kind)
        options = {"convert_to_numpy": True, "show_progress_bar": False, "normalize_embeddings": True}
        while True:
            size = max(1, self.budget // longest)
            try:
                made = self.model.encode(
                    list(texts), prompt=self.model.prompts[kind] or None, task=kind, batch_size=size, **options
                )
                return [np.asarray(vectors, np.float32) for vectors in made]
            except Exception as error:
                self._lower_budget(error, size, longest)


def _out_of_memory(error: Exception) -> bool:
    """Of a GPU, of the CPU's allocator in torch, or of onnxruntime."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "allocate memory", "ALLOC_FAILED")
    )


class Embeddings:
    """The shards of a corpus in a folder. Raises `BadInput` where one is not what the sidecar says."""

    def __init__(self, folder: Path, count: int, dim: int, dtype: str, late: bool) -> None:
        self.folder, self.count, self.dim, self.dtype, self.late = folder, count, dim, np.dtype(dtype), late
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
        if made.shape != (rows, self.dim) or made.dtype != self.dtype:
            raise BadInput(
                f"{paths.shown(path)}: {made.shape} {made.dtype} is not what its sidecar says; delete it and run again"
            )
        return made

    def block(self, starts: Sequence[int]) -> np.ndarray:
        """(passages, D) float32 array of several shards, one after the other."""
        return np.concatenate([self.shard(start) for start in starts]).astype(np.float32, copy=False)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """(len(positions), D) float32 array of passages at ascending positions."""
        made = np.empty((len(positions), self.dim), np.float32)
        for start in np.unique(positions // SHARD * SHARD):
            first, last = np.searchsorted(positions, (start, start + SHARD))
            made[first:last] = self.shard(int(start))[positions[first:last] - start]
        return made

    def passages(self, start: int) -> list[np.ndarray]:
        """(tokens, D) float32 arrays of a shard of a late-interaction encoder."""
        ends = np.cumsum(np.load(self.lengths(start), allow_pickle=False))
        return np.split(self.shard(start).astype(np.float32, copy=False), ends[:-1])


def embed(encoder: Encoder, corpus: Corpus, base: Path, dtype: str = "float32") -> Embeddings:
    """Embeddings of a corpus in a folder of `base`: those that are there are reused, missing shards are
    encoded, by all processes of a run together. Memory is two shards."""
    from tqdm import tqdm

    plan: tuple[Path, list[int]] | None = None
    if parallel.rank() == 0:  # only one looks: a network file system may show the others less
        about = {"corpus": stage.sha256(corpus.path), "count": len(corpus), "dtype": dtype, "shard": SHARD}
        wanted = encoder.settings() | about
        folder = base / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
        made = Embeddings(folder, len(corpus), encoder.dim, dtype, encoder.late)
        if load_sidecar(made.sidecar) != wanted:
            if folder.is_dir():
                with jsonl.lock(folder):
                    stage.say(f"note:  {paths.shown(folder)} is not what its name says; encoding anew")
                    shutil.rmtree(folder)
            jsonl.write_json(made.sidecar, wanted)
        missing = [start for start in made.starts if not made.path(start).is_file()]
        for other in base.glob("*/embeddings.json") if missing else ():
            found = load_sidecar(other)
            changed = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            if changed:
                stage.say(f"note:  {paths.shown(other.parent)} stays; it was made with another {changed}")
        plan = folder, missing
    folder, missing = parallel.from_first(plan)
    made = Embeddings(folder, len(corpus), encoder.dim, dtype, encoder.late)
    if not missing:
        stage.say(f"read   {paths.shown(folder)}: {len(corpus):,} embeddings, made before")
        return made

    def window(start: int) -> tuple[int, list[str], Any]:
        texts = list(corpus.texts(start, min(start + SHARD, len(corpus))))
        return start, texts, encoder.tokenize(texts, "document")

    own = missing[parallel.rank() :: parallel.world()]
    todo = sum(min(SHARD, len(corpus) - start) for start in missing)
    with (
        jsonl.lock(folder),
        tqdm(total=todo, unit="passage", desc="encode", disable=parallel.rank() > 0) as bar,
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
            bar.update(min(len(texts) * parallel.world(), todo - bar.n))
        parallel.wait()
    stage.say(f"wrote  {paths.shown(folder)}: {len(corpus):,} embeddings of {encoder.dim} dimensions")
    return made


def load_sidecar(path: Path) -> dict[str, Any]:
    """What made the files beside it; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}  # none, or a torn one: whatever lies beside it is not to be trusted
    return found if isinstance(found, dict) else {}
