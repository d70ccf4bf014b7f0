"""Retrieval datasets of the Hugging Face Hub, in the two layouts that MTEB and BeIR publish there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl

SPLITS = {"validation": "dev", "valid": "dev", "val": "dev"}  # other names stay as they are


def fetch(repository: str, folder: Path) -> None:
    """Write `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` of `owner/name` to `folder`, row by row.

    `mteb/<name>` has configs `corpus`, `queries` and `default` or `qrels`; `BeIR/<name>` has its judgements in a
    repository of their own, `BeIR/<name>-qrels`. A dataset may lack queries or judgements. `repository` may be an
    absolute path to a folder in these layouts. Raises `BadInput` where there is no such repository or another layout,
    `Failed` where the Hub cannot be reached.
    """
    if not Path(repository).is_absolute() and Path(repository).exists():
        raise BadInput(f"hf:{repository} is also a folder here, which would be read instead; run from another directory")
    configs = _configs(repository)
    if "corpus" not in configs:
        raise BadInput(f"hf:{repository} has no config 'corpus', only {', '.join(configs)}: not a retrieval dataset")
    _write(folder / "corpus.jsonl", repository, "corpus", ("title", "text"))
    if "queries" in configs:
        _write(folder / "queries.jsonl", repository, "queries", ("text",))
    own = next((config for config in ("qrels", "default") if config in configs), None)
    if own:
        _write_qrels(folder / "qrels", repository, own)
    elif "queries" in configs and (other := _configs(f"{repository}-qrels", optional=True)):
        _write_qrels(folder / "qrels", f"{repository}-qrels", other[0])


def _write(path: Path, repository: str, config: str, fields: tuple[str, ...]) -> None:
    with jsonl.atomic(path) as file:
        for split in _splits(repository, config):
            for where, row in _rows(repository, config, split):
                key = next((name for name in ("_id", "id") if row.get(name) is not None), None)
                if key is None or row.get("text") is None:
                    raise BadInput(f"{where}: needs '_id' (or 'id') and 'text', has {', '.join(row)}")
                file.write(jsonl.dumps({"_id": str(row[key]), **{name: str(row.get(name) or "") for name in fields}}))


def _write_qrels(folder: Path, repository: str, config: str) -> None:
    for split in _splits(repository, config):
        with jsonl.atomic(folder / f"{SPLITS.get(split, split)}.tsv") as file:
            file.write(b"query-id\tcorpus-id\tscore\n")
            for where, row in _rows(repository, config, split):
                try:
                    score = float(row["score"])
                    line = f"{row['query-id']}\t{row['corpus-id']}\t{int(score)}\n"
                except (KeyError, TypeError, ValueError):
                    raise BadInput(f"{where}: expected query-id, corpus-id and a number as score, got {row}") from None
                if score != int(score):
                    raise BadInput(f"{where}: score {score:g} is no whole number; grades are 0, 1, 2, ...")
                file.write(line.encode())


def _configs(repository: str, optional: bool = False) -> list[str]:
    import datasets

    try:
        with _errors(repository):
            return datasets.get_dataset_config_names(repository)
    except BadInput:
        if optional:
            return []
        raise


def _splits(repository: str, config: str) -> list[str]:
    import datasets

    with _errors(repository):
        return datasets.get_dataset_split_names(repository, config)


def _rows(repository: str, config: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of one split, streamed."""
    import datasets

    with _errors(repository):
        for number, row in enumerate(datasets.load_dataset(repository, config, split=split, streaming=True), 1):
            yield f"hf:{repository}, {config}/{split}, row {number}", row


@contextmanager
def _errors(repository: str) -> Iterator[None]:
    """Errors of the libraries, in the words of this project."""
    import datasets.exceptions
    import httpx2

    try:
        yield
    except (BadInput, Failed):
        raise
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise BadInput(f"hf:{repository}: {_first(error)}") from None
    except (OSError, httpx2.HTTPError) as error:
        raise Failed(f"hf:{repository}: the Hub cannot be reached ({_first(error)})") from error


def _first(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip() or repr(error))[:300]
