"""Datasets in BEIR layout: download, checks, and access that never holds a corpus in memory."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import stat
import tempfile
import urllib.request
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from syntriever import jsonl, parallel, paths
from syntriever.errors import BadInput, Failed

URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{}.zip"

# MD5 of each archive, as published by BEIR.
ARCHIVES = {
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "quora": "18fb154900ba42a600f84b839c173167",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
}

# CQADupStack is twelve datasets in one archive; its score is the mean of theirs.
FORUMS = [f"cqadupstack-{forum}" for forum in (
    "android", "english", "gaming", "gis", "mathematica", "physics",
    "programmers", "stats", "tex", "unix", "webmasters", "wordpress",
)]  # fmt: skip

# Queries of these two are themselves passages of the corpus; BEIR drops a query's own passage.
SELF_RETRIEVAL = {"arguana", "quora"}

# A zip whose contents are this many times its own size is a bomb, not text.
MAX_EXPANSION = 100

Qrels = dict[str, dict[str, int]]


def is_dataset(name: str) -> bool:
    """True for a BEIR name, `pydocs`, or a folder `datasets/<name>/` with a corpus."""
    return name in ARCHIVES or name in FORUMS or name == "pydocs" or paths.corpus(name).is_file()


def parts(ds: str) -> list[str]:
    """The datasets that a name stands for: the forums of `cqadupstack`, else itself."""
    return FORUMS if ds == "cqadupstack" else [ds]


def files(ds: str, *splits: str) -> list[Path]:
    """What a stage reads of a dataset: corpus, queries, and the judgements of the splits that are there."""
    return [paths.corpus(ds), paths.queries(ds), *(path for split in splits if (path := paths.qrels(ds, split)).is_file())]


def ensure(ds: str, fetch: bool = True) -> None:
    """Make sure that `datasets/<ds>/` is there; a BEIR dataset is downloaded on first use, unless
    `fetch` is off: then only its name is checked."""
    folder = paths.dataset(ds)
    if folder.is_dir():
        for needed in (paths.corpus(ds), paths.queries(ds)):
            if not needed.is_file():
                raise BadInput(f"{paths.shown(needed)} is missing; a dataset folder holds corpus.jsonl, queries.jsonl, qrels/")
    elif ds == "pydocs":
        raise BadInput("datasets/pydocs is not built yet. Run: python datasets/build_pydocs.py")
    elif ds == "cqadupstack":
        raise BadInput(f"cqadupstack is twelve datasets: {', '.join(FORUMS)}; only evaluate.py takes them together")
    elif ds in ARCHIVES or ds in FORUMS:
        if fetch and parallel.world() > 1:
            raise BadInput(f"datasets/{ds} is not here yet: run any stage of it once without torchrun, which downloads it")
        if fetch:
            archive = ds.split("-")[0] if ds in FORUMS else ds
            download(archive, URL.format(archive), ARCHIVES[archive])
    else:
        raise BadInput(
            f"unknown dataset {ds!r}: no folder {paths.shown(folder)}, and not one of pydocs, {', '.join(sorted(ARCHIVES))}"
        )


def download(ds: str, url: str, md5: str) -> None:
    """Fetch, verify and unpack one archive; `datasets/<ds>/` appears only when all of it is good (of
    `cqadupstack` a folder for each forum).

    Raises `Failed` on a network error, a short body or a wrong checksum.
    """
    from tqdm import tqdm

    target = paths.dataset(ds)
    target.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.lock(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{ds}.") as folder:
        archive = Path(folder) / "archive.zip"
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, archive.open("wb") as file:
                size = int(reply.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"download {ds}") as bar:
                    while block := reply.read(1 << 20):
                        digest.update(block)
                        file.write(block)
                        bar.update(len(block))
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"cannot download {url}: {error}. Put the unpacked dataset at {paths.shown(target)}/") from error
        if size and archive.stat().st_size != size:
            raise Failed(f"{url}: got {archive.stat().st_size} of {size} bytes; run again")
        if digest.hexdigest() != md5:
            raise Failed(f"{url}: MD5 is {digest.hexdigest()}, BEIR publishes {md5}; nothing was kept")
        try:
            unpack(archive, Path(folder) / "unpacked")
            for name in parts(ds):
                if not paths.dataset(name).is_dir():
                    (Path(folder) / "unpacked" / name.replace("cqadupstack-", "cqadupstack/")).rename(paths.dataset(name))
        except (OSError, zipfile.BadZipFile) as error:
            raise Failed(f"cannot unpack {url} to {paths.shown(target)}/: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip of plain files. A path that leaves the folder, a link or a bomb is refused
    before anything is written (`BadInput`)."""
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            parts = Path(member.filename).parts
            if member.filename.startswith(("/", "\\")) or ".." in parts or "\\" in member.filename or ":" in member.filename:
                raise BadInput(f"{archive.name}: member {member.filename!r} leads out of its folder; nothing was unpacked")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise BadInput(f"{archive.name}: member {member.filename!r} is a link; nothing was unpacked")
        if sum(member.file_size for member in members) > MAX_EXPANSION * archive.stat().st_size:
            raise BadInput(f"{archive.name}: unpacks to over {MAX_EXPANSION} times its size; nothing was unpacked")
        for member in members:
            if member.is_dir():
                continue
            path = folder / member.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


class Corpus:
    """Passages of `corpus.jsonl` by position or id, read from disk as they are asked for.

    Memory is the ids plus 32 bytes a passage (about 350 MB for MS MARCO's 8.8M passages).
    Raises `BadInput` with `file:line` on a malformed or repeated passage.
    """

    def __init__(self, ds: str) -> None:
        self.path = paths.corpus(ds)
        from tqdm import tqdm

        ids, starts, ends = bytearray(), array("q"), array("q", [0])
        self.empty = 0  # passages without title and text
        fields: dict[str, type | tuple[type, ...]] = {"_id": str, "text": str}
        for line, offset, row in tqdm(jsonl.read_with_offsets(self.path, fields), desc=f"scan {ds}", unit="passage", delay=2):
            if not isinstance(row.get("title"), str | None):
                raise BadInput(f"{paths.shown(self.path)}:{line}: field 'title' has type {type(row['title']).__name__}")
            ids += row["_id"].encode()
            starts.append(offset)
            ends.append(len(ids))
            self.empty += not self._text(row)
        if not starts:
            raise BadInput(f"{paths.shown(self.path)} is empty")
        if self.empty:
            print(f"note:  {paths.shown(self.path)} has {self.empty} passages without any text", flush=True)
        self._ids, self._ends, self._starts = bytes(ids), np.array(ends, np.int64), np.array(starts, np.int64)
        hashes = np.fromiter((jsonl.hash64(self.id(i)) for i in range(len(self))), np.uint64, len(self))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._file = self.path.open("rb")
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1:
            second = int(self._order[at])
            first = self.position(self.id(second))
            if first is not None and first != second:
                where = f"{paths.shown(self.path)}:{self._line(second)}"
                raise BadInput(f"{where}: passage id {self.id(second)!r} was already used on line {self._line(first)}")

    @staticmethod
    def _text(row: jsonl.Row) -> str:
        """What the encoder and the teacher see: title and text, as BEIR joins them."""
        return f"{row.get('title') or ''} {row['text']}".strip()

    def _line(self, position: int) -> int:
        """Number of the line that a passage stands on, for messages."""
        self._file.seek(0)
        return self._file.read(int(self._starts[position])).count(b"\n") + 1

    def __len__(self) -> int:
        return len(self._starts)

    def id(self, position: int) -> str:
        return self._ids[self._ends[position] : self._ends[position + 1]].decode()

    def position(self, passage_id: str) -> int | None:
        """Row number of a passage, or None where the corpus has no such id."""
        wanted = np.uint64(jsonl.hash64(passage_id))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self) and self._hashes[at] == wanted:
            if self.id(int(self._order[at])) == passage_id:
                return int(self._order[at])
            at += 1
        return None

    def text(self, position: int) -> str:
        self._file.seek(int(self._starts[position]))
        return self._text(jsonl.parse(self._file.readline(), self.path, position + 1, {"text": str}))

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Texts of the rows [start, stop), in order."""
        for position in range(start, len(self) if stop is None else stop):
            yield self.text(position)

    def by_id(self, passage_id: str) -> str:
        """Text of a passage; `BadInput` where the corpus has no such id."""
        position = self.position(passage_id)
        if position is None:
            raise BadInput(f"{paths.shown(self.path)} has no passage {passage_id!r}")
        return self.text(position)


def load_qrels(ds: str, split: str) -> Qrels:
    """{query id: {passage id: grade}} of one split."""
    path = paths.qrels(ds, split)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise BadInput(f"{paths.shown(path)}: no such split; this dataset has: {', '.join(there) or 'no qrels at all'}")
    qrels: Qrels = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                fields = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
                if fields == [""] or (number == 1 and fields[-1] == "score"):
                    continue
                query_id, passage_id, grade = fields[0], fields[1], int(fields[2])
                if len(fields) != 3 or not query_id or not passage_id:
                    raise ValueError
            except (ValueError, IndexError):
                message = "expected query-id, corpus-id, whole-number score, separated by tabs"
                raise BadInput(f"{paths.shown(path)}:{number}: {message}") from None
            if qrels.setdefault(query_id, {}).setdefault(passage_id, grade) != grade:
                raise BadInput(f"{paths.shown(path)}:{number}: {query_id!r}, {passage_id!r} was already judged otherwise")
    if not qrels:
        raise BadInput(f"{paths.shown(path)} has no judgement")
    return qrels


def load_queries(ds: str) -> dict[str, str]:
    """{query id: text}; a repeated id or an empty text is `BadInput`."""
    queries: dict[str, str] = {}
    path = paths.queries(ds)
    for number, _, row in jsonl.read_with_offsets(path, {"_id": str, "text": str}):
        if row["_id"] in queries:
            raise BadInput(f"{paths.shown(path)}:{number}: query id {row['_id']!r} was already used")
        if not row["text"].strip():
            raise BadInput(f"{paths.shown(path)}:{number}: the query's text is empty")
        queries[row["_id"]] = row["text"]
    if not queries:
        raise BadInput(f"{paths.shown(path)} is empty")
    return queries


def load_split(ds: str, split: str, corpus: Corpus | None = None, strict: bool = False) -> tuple[dict[str, str], Qrels]:
    """Queries and judgements of one split. Judgements of unknown queries are dropped; those of
    unknown passages stay (no system can find them, as in trec_eval) and are looked for where a
    corpus is given. Both are counted and named; with `strict` they are `BadInput`."""
    ensure(ds)
    qrels, texts = load_qrels(ds, split), load_queries(ds)
    where = paths.shown(paths.qrels(ds, split))
    known: Qrels = {q: d for q, d in qrels.items() if q in texts}
    _report_unknown(where, "queries", [q for q in qrels if q not in texts], strict)
    if corpus is not None:
        _report_unknown(where, "passages", [p for d in known.values() for p in d if corpus.position(p) is None], strict)
    if not known:
        raise BadInput(f"{where}: no judged query is in {paths.shown(paths.queries(ds))}")
    return {q: texts[q] for q in known}, known


def _report_unknown(where: str, what: str, ids: list[str], strict: bool) -> None:
    if ids:
        unique = list(dict.fromkeys(ids))
        message = f"{where}: {len(unique)} judged {what} are not in the dataset, e.g. {', '.join(map(repr, unique[:3]))}"
        if strict:
            raise BadInput(message)
        print(f"warning: {message}", flush=True)
