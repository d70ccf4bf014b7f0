"""Embeddings of a frozen model that a run needs: made once before training, mapped from disk after that."""

import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syntriever.encode import models, shards
from syntriever.encode.encoder import Encoder
from syntriever.run import processes, terminal


@contextmanager
def folder(output: Path) -> Iterator[Path]:
    """Folder beside `output` for the reference embeddings of a run; removed at its end."""
    folder = output.with_name(f".{output.name}.reference")
    if processes.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if processes.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def embed(model: Any, texts: Iterable[str], count: int, kind: str, max_length: int | None, path: Path) -> Tensor:
    """(count, D) unit embeddings at the length used in training, or (count, tokens, D), 0 where a text
    has no token; kept on disk and mapped into memory."""
    shape = [count, model.get_embedding_dimension()]
    with models.at_length(model, max_length):
        if models.is_late(model):
            shape.insert(1, models.longest(model, kind))
        if processes.rank() == 0:
            array = np.lib.format.open_memmap(path, "w+", np.float32, tuple(shape))
            encode, rest = Encoder(model), iter(texts)
            windows = iter(lambda: list(itertools.islice(rest, shards.SHARD)), [])
            made = (vectors for window in windows for vectors in encode(window, kind))
            for row, vectors in enumerate(terminal.progress(made, total=count, desc=f"reference {kind}")):
                array[row][: len(vectors)] = vectors  # the first tokens, or all of one vector
            array.flush()
    processes.wait()
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
