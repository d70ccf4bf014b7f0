"""Retrieval datasets of the Hugging Face Hub, in the two layouts that MTEB and BeIR publish there."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl

SPLITS = {"validation": "dev", "valid": "dev", "val": "dev"}  # other names stay as they are


class _Missing(BadInput):
    """There is no such repository, or none that this user may see."""


class _Repository(NamedTuple):
    name: str  # as it was typed
    path: str  # as the loader takes it
    commit: str | None  # all of it is read at this one
    configs: list[str]


def fetch(repository: str, folder: Path) -> None:
    """Write `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` of `owner/name` to `folder`, row by row.

    `mteb/<name>` has configs `corpus`, `queries` and `default` or `qrels`; `BeIR/<name>` has its judgements in a
    repository of their own, `BeIR/<name>-qrels`. A dataset may lack queries or judgements. `repository` may be an
    absolute path to a folder in these layouts. Raises `BadInput` where there is no such repository, or one of another
    layout or with bad rows; `Failed` where the Hub does not answer. What was written until then stays in `folder`.
    """
    import datasets
    import huggingface_hub.utils

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    source = _find(repository)
    if "corpus" not in source.configs:
        raise BadInput(f"hf:{repository} has no config 'corpus', only {', '.join(source.configs)}: not a retrieval dataset")
    _write(folder / "corpus.jsonl", source, "corpus")
    if "queries" in source.configs:
        _write(folder / "queries.jsonl", source, "queries")
    own = [config for config in ("qrels", "default") if config in source.configs]
    try:
        judged = source if own else _find(f"{repository}-qrels")
    except _Missing:
        return
    _write_qrels(folder / "qrels", judged, (own or judged.configs)[0])


def _find(name: str) -> _Repository:
    import datasets
    import huggingface_hub

    path, commit = name, None
    with _errors(name):
        if not Path(name).is_absolute():
            # `hf://`, because the loader takes a bare owner/name for a folder where there is one. One plain request
            # first, because the loader tries an unreachable Hub for half a minute.
            path = f"hf://datasets/{name}"
            try:
                commit = huggingface_hub.dataset_info(name, timeout=30).sha
            except json.JSONDecodeError:
                raise Failed(f"hf:{name}: what answers is not the Hub; is there a proxy, or HF_ENDPOINT set?") from None
        elif not Path(name).is_dir():
            raise _Missing(f"hf:{name}: no such folder")
        return _Repository(name, path, commit, datasets.get_dataset_config_names(path, revision=commit))


def _rows(source: _Repository, config: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(split, where it stands, row) of all splits, streamed."""
    import datasets

    with _errors(source.name):
        for split, rows in datasets.load_dataset(source.path, config, revision=source.commit, streaming=True).items():
            for number, row in enumerate(rows, 1):
                yield split, f"hf:{source.name}, {config}/{split}, row {number}", row


def _write(path: Path, source: _Repository, config: str) -> None:
    with jsonl.atomic(path) as file:
        for _, where, row in _rows(source, config):
            try:
                made = {"_id": _text(row["_id"] if row.get("_id") is not None else row.get("id"))}
                if config == "corpus":
                    made["title"] = _text("" if row.get("title") is None else row["title"])
                file.write(jsonl.dumps(made | {"text": _text(row.get("text"))}))
            except TypeError:
                raise BadInput(f"{where}: needs '_id' (or 'id') and 'text', both as text, got {_short(row)}") from None


def _write_qrels(folder: Path, source: _Repository, config: str) -> None:
    for split, rows in itertools.groupby(_rows(source, config), key=lambda row: row[0]):
        path = folder / f"{SPLITS.get(split, split)}.tsv"
        if path.exists():
            raise BadInput(f"hf:{source.name}, {config}: two of its splits are {path.stem}, one of them {split}")
        with jsonl.atomic(path) as file:
            file.write(b"query-id\tcorpus-id\tscore\n")
            for _, where, row in rows:
                try:
                    query, passage, score = _text(row["query-id"]), _text(row["corpus-id"]), float(row["score"])
                    if not query or not passage or {"\t", "\n"} & set(query + passage):
                        raise ValueError
                except (KeyError, TypeError, ValueError):
                    what = "query-id and corpus-id (not empty, no tab, no line break) and a number as score"
                    raise BadInput(f"{where}: expected {what}, got {_short(row)}") from None
                if not score.is_integer():
                    what = "grades are 0, 1, 2, ...: round them in a copy of it, datasets/<name>/ in BEIR layout"
                    raise BadInput(f"{where}: score {score:g} is no whole number; {what}")
                file.write(f"{query}\t{passage}\t{int(score)}\n".encode())


def _text(value: object) -> str:
    """Text, or a whole number as text. Of an id that the loader took for a float or a date, the text is lost."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _short(what: object) -> str:
    return " ".join(str(what).split())[:300] or repr(what)


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Errors of the libraries in words of this project, or of the server. The causes decide: the loader hides what
    the network did behind errors about files and splits."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except (BadInput, Failed, MemoryError):
        raise
    except Exception as error:  # of Arrow, YAML, gzip, ...: a repository may hold anything
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        network = [cause for cause in chain if isinstance(cause, httpx2.HTTPError | ConnectionError | TimeoutError)]
        answer = next((cause for cause in network if isinstance(cause, HfHubHTTPError)), None)
        if not network and isinstance(error, OSError) and error.errno:
            raise  # a full disk, a cache that may not be written
        if not network:
            raise BadInput(f"hf:{name} cannot be read: {_short(error)}") from None
        words = _short((answer and answer.server_message) or answer or network[-1])
        if answer and (answer.response.status_code == 404 or type(answer) is RepositoryNotFoundError):
            raise _Missing(f"hf:{name}: no such dataset, or a private one ({words})") from None
        if answer and answer.response.status_code < 500 and answer.response.status_code not in (408, 429):
            raise BadInput(f"hf:{name}: the Hub refuses it ({words})") from None
        raise Failed(f"hf:{name}: the Hub cannot be reached ({words})") from error
