"""Datasets of the Hugging Face Hub: local folders that `datasets.load_dataset` reads as it reads the Hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, write_jsonl

from syntriever.data import dataset, download, hub_dataset
from syntriever.errors import BadInput, Failed

TEXT = 'a \u2028 line of 日本 "text"'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path / "home"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "TORCH_AVAILABLE", False)  # it would import torch for seconds, only to stream
    return tmp_path / "home"


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [rows[0], *(row.values() for row in rows)]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), "utf-8")


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "tsv": write_tsv}


def repository(folder, configs, kind="jsonl"):
    """A folder as the Hub shows a dataset: {config: {split: rows}}, declared in the head of its README."""
    head = ["---", "configs:"]
    for config, splits in configs.items():
        head += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            head += [f"  - split: {split}", f"    path: {config}/{split}.{kind}"]
            WRITERS[kind](folder / config / f"{split}.{kind}", rows)
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return str(folder)


def qrels(*rows, score=1):
    return [{"query-id": q, "corpus-id": p, "score": score} for q, p in rows]


PASSAGES = [{"_id": "d1", "title": "T", "text": TEXT}, {"_id": "d2", "title": None, "text": "second"}]
QUERIES = [{"_id": "q1", "text": "one?"}, {"_id": "q2", "text": "two?"}]


def read(folder):
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


def kept(cache):
    return {path.suffix for path in cache.rglob("*") if path.is_file()}


def as_beir(qrels):
    return {
        "corpus.jsonl": json.dumps({"_id": "d1", "title": "T", "text": TEXT}, ensure_ascii=False)
        + '\n{"_id": "d2", "title": "", "text": "second"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "one?"}\n{"_id": "q2", "text": "two?"}\n',
    } | {f"qrels/{split}.tsv": "query-id\tcorpus-id\tscore\n" + rows for split, rows in qrels.items()}


def renamed(rows):
    return [{"id" if name == "_id" else name: value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("qrels_config", "key"), [("default", "_id"), ("qrels", "id")])
def test_the_layout_of_mteb(home, tmp_path, qrels_config, key, kind):
    passages, queries = (PASSAGES, QUERIES) if key == "_id" else (renamed(PASSAGES), renamed(QUERIES))
    judged = {"train": qrels(("q1", "d1"), score=1.0), "test": qrels(("q2", "d2"), score=2.0)}
    configs = {"corpus": {"corpus": passages}, "queries": {"queries": queries}, qrels_config: judged}
    source = repository(tmp_path / "m", configs, kind)
    hub_dataset.fetch(source, tmp_path / "made")
    assert read(tmp_path / "made") == as_beir({"train": "q1\td1\t1\n", "test": "q2\td2\t2\n"})
    assert kept(tmp_path / "cache") == {".lock"}  # streamed


def test_the_layout_of_beir(home, tmp_path):
    source = repository(tmp_path / "b", {"corpus": {"corpus": PASSAGES}, "queries": {"queries": QUERIES}})
    repository(
        tmp_path / "b-qrels", {"default": {"train": qrels(("q1", "d1")), "validation": qrels(("q2", "d1"), ("q2", "d2"))}}, "tsv"
    )
    hub_dataset.fetch(source, tmp_path / "made")
    assert read(tmp_path / "made") == as_beir({"train": "q1\td1\t1\n", "dev": "q2\td1\t1\nq2\td2\t1\n"})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_integers_as_ids_queries_in_splits_and_what_may_be_missing(home, tmp_path, kind):
    passages = [{"_id": n, "text": f"passage {n}"} for n in (7, 8)]
    source = repository(tmp_path / "i", {
        "corpus": {"train": passages},
        "queries": {"train": [{"_id": 1, "text": "a"}], "test": [{"_id": 2, "text": "b"}]},
        "default": {"test": qrels((2, 8))},
    }, kind)  # fmt: skip
    hub_dataset.fetch(source, tmp_path / "made")
    made = read(tmp_path / "made")
    assert made["corpus.jsonl"].startswith('{"_id": "7", "title": "", "text": "passage 7"}\n')
    assert made["queries.jsonl"] == '{"_id": "1", "text": "a"}\n{"_id": "2", "text": "b"}\n'
    assert made["qrels/test.tsv"] == "query-id\tcorpus-id\tscore\n2\t8\t1\n"
    configs = {"corpus": {"corpus": PASSAGES}}
    hub_dataset.fetch(repository(tmp_path / "c", configs, kind), tmp_path / "alone")
    assert list(read(tmp_path / "alone")) == ["corpus.jsonl"]
    hub_dataset.fetch(repository(tmp_path / "q", configs | {"queries": {"test": QUERIES}}, kind), tmp_path / "unjudged")
    assert read(tmp_path / "unjudged") == as_beir({})


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"en-corpus": {"test": PASSAGES}, "en-queries": {"test": QUERIES}}, "no config 'corpus', only en-corpus, en-queries"),
        ({"corpus": {"c": [{"name": "d1", "text": "t"}]}}, r"corpus/c, row 1: needs '_id' \(or 'id'\) and 'text'.* got {'name"),
        ({"corpus": {"c": [{"_id": "d1", "text": ["a", "list"]}]}}, r"corpus/c, row 1: needs '_id'"),
        ({"corpus": {"c": [{"_id": "2020-01-01 10:00:00", "text": "t"}]}}, r"row 1: needs '_id'.* datetime"),
        (
            {"corpus": {"c": PASSAGES}, "default": {"test": [*qrels(("q", "d")), *qrels(("q", "e"), score=0.5)]}},
            r"default/test, row 2: score 0.5 is no whole number; .*round them in a copy of it, datasets/<name>/",
        ),
        ({"corpus": {"c": PASSAGES}, "default": {"test": qrels(("q", "d"), score="much")}}, "a number as score, got"),
        ({"corpus": {"c": PASSAGES}, "default": {"test": qrels(("q", "d"), score="inf")}}, "score inf is no whole number"),
        ({"corpus": {"c": PASSAGES}, "default": {"test": qrels(("q", None))}}, "row 1: expected query-id and corpus-id"),
        ({"corpus": {"c": PASSAGES}, "default": {"test": qrels(("q", "d\t1"))}}, "row 1: expected .* no tab"),
        (
            {"corpus": {"c": PASSAGES}, "default": {"dev": qrels(("q", "d")), "validation": qrels(("q", "e"))}},
            "default: two of its splits are dev, one of them validation",
        ),
        ({"corpus": {"c": PASSAGES}, "default": {"test": [{"q": "1", "d": "2"}]}}, "expected query-id and corpus-id"),
    ],
)  # fmt: skip
def test_another_layout_is_named(home, tmp_path, configs, message):
    with pytest.raises(BadInput, match=message):
        hub_dataset.fetch(repository(tmp_path / "r", configs), tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", b"---\nconfigs: [\n---\n"),
        ("corpus/c.jsonl", b'{"_id": "d1", "text": "t"}\n{"_id": \n'),
        ("corpus/c.jsonl", b"\xff\xfe\n"),
        ("corpus/c.jsonl", None),
        ("r.py", b"raise SystemExit"),
    ],
    ids=["yaml", "json", "utf-8", "no file", "script"],
)
def test_what_the_loader_cannot_read_is_named(home, tmp_path, name, content):
    source = tmp_path / "r"
    repository(source, {"corpus": {"c": PASSAGES}})
    (source / name).write_bytes(content) if content else (source / name).unlink()
    with pytest.raises(BadInput, match=rf"^hf:{source} cannot be read: \S.*$"):
        hub_dataset.fetch(str(source), tmp_path / "made")
    assert not list((tmp_path).glob("made/*"))
    with pytest.raises(BadInput, match="no such folder"):
        hub_dataset.fetch(str(tmp_path / "nowhere"), tmp_path / "made")


def test_a_typed_name_becomes_a_dataset(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "NAMED", {})
    for bad in ("hf:x", "hf:../x", "hf:a/b/c", "hf:a/ b", "hf:/tmp/x"):
        with pytest.raises(BadInput, match=r"expected hf:owner/name"):
            download.named(bad)
    assert download.named("hf:own/Tiny") == "Tiny"
    assert download.NAMED == {"Tiny": "own/Tiny"}
    source = repository(
        tmp_path / "r", {"corpus": {"c": PASSAGES}, "queries": {"q": QUERIES}, "qrels": {"test": qrels(("q1", "d1"))}}
    )
    monkeypatch.setitem(download.NAMED, "Tiny", source)
    assert dataset.is_dataset("Tiny")
    dataset.ensure("Tiny", fetch=False)
    assert not (home / "datasets").exists()
    dataset.ensure("Tiny")
    assert "wrote  datasets/Tiny/" in capsys.readouterr().out
    assert dataset.load_split("Tiny", "test") == ({"q1": "one?"}, {"q1": {"d1": 1}})
    # It is known by its name from now on; under that name of another owner it is not taken for the same.
    monkeypatch.setattr(download, "NAMED", {})
    dataset.ensure("Tiny")
    with pytest.raises(BadInput, match=r"datasets/Tiny/ is there and did not come from it"):
        download.named("hf:other/Tiny")


def test_a_bad_row_leaves_nothing_behind(home, tmp_path, monkeypatch):
    source = repository(tmp_path / "r", {"corpus": {"c": PASSAGES}, "queries": {"q": [{"_id": "q", "text": None}]}})
    with pytest.raises(BadInput, match="queries/q, row 1"):
        download.fetch_hub("tiny", source)
    assert list((home / "datasets").iterdir()) == []


def test_beir_falls_back_to_its_copy(home, tmp_path, monkeypatch, capsys):
    source = repository(tmp_path / "r", {"corpus": {"c": PASSAGES}, "queries": {"q": QUERIES}})
    monkeypatch.setattr(download, "URL", "http://127.0.0.1:9/{}.zip")
    monkeypatch.setitem(download.COPIES, "scifact", source)
    dataset.ensure("scifact")
    assert "cannot download http://127.0.0.1:9/scifact.zip" in (said := capsys.readouterr().out)
    assert "its copy on the Hub" in said
    assert (home / "datasets" / "scifact" / "corpus.jsonl").is_file()


def test_offline_is_said_at_once(home, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Failed, match=r"^hf:own/tiny: the Hub cannot be reached \(.*HF_HUB_OFFLINE.*\)$"):
        hub_dataset.fetch("own/tiny", tmp_path / "made")


def test_an_unreachable_hub_ends_a_stage_at_once(home):
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    command = [sys.executable, ROOT / "retrieval.py", "minilm", "hf:own/tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1, "failed: hf:own/tiny: the Hub cannot be reached ([Errno 111] Connection refused)\n",
    )  # fmt: skip
    assert not list(home.glob("datasets/*"))


# --- a Hub on loopback

COMMIT, KEY = "0123456789abcdef0123456789abcdef01234567", "hf_key"
REFUSALS = {  # of a repository: status, code and words of the Hub; kind and words of our error
    "own/hidden": (401, "RepoNotFound", "Not for you", "BadInput", "no such dataset, or a private one (Not for you)"),
    "own/mirror": (404, "", "Not mirrored", "BadInput", "no such dataset, or a private one (Not mirrored)"),
    "own/key": (401, "", "Invalid credentials in Authorization header", "BadInput", "the Hub refuses it (Invalid credentials"),
    "own/gated": (403, "GatedRepo", "It is restricted", "BadInput", "the Hub refuses it (It is restricted)"),
    "own/busy": (429, "", "Too many", "Failed", "the Hub cannot be reached (Too many)"),
    "own/broken": (503, "", "Maintenance", "Failed", "the Hub cannot be reached (Maintenance)"),
}


class Hub(BaseHTTPRequestHandler):
    """The addresses of the Hub that the loader asks for, over the folders `root`/owner/name."""

    def answer(self):
        parts = self.path.split("?")[0].strip("/").removeprefix("api/").split("/")  # datasets/owner/name/tree/commit/folder
        (_, owner, name, what), file = [*parts, "", "", ""][:4], "/".join(parts[5:])
        folder = self.server.root / owner / name
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.reply(401, code="RepoNotFound", words="came without the key")
        elif refusal := REFUSALS.get(f"{owner}/{name}"):
            self.reply(refusal[0], code=refusal[1], words=refusal[2])
        elif name == "portal":
            self.reply(200, b"<html>Log in to this network</html>")
        elif not folder.is_dir():
            self.reply(404, code="RepoNotFound", words="Repository not found")
        elif what == "tree":
            files = [path for path in (folder / file).iterdir() if path.is_file()]
            entries = [{"path": f"{file}/{path.name}", "size": path.stat().st_size} for path in files]
            self.reply(200, json.dumps([entry | {"type": "file", "oid": COMMIT} for entry in entries]).encode())
        elif what != "resolve":
            self.reply(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}).encode())
        elif name == "closed" and file.endswith(".jsonl"):
            self.reply(403, code="GatedRepo", words="Its files are restricted")
        elif not (folder / file).is_file():
            self.reply(404, code="EntryNotFound", words="Entry not found")
        elif part := self.headers["Range"]:
            start, stop = part.removeprefix("bytes=").split("-")
            self.reply(206, (folder / file).read_bytes()[int(start) : int(stop) + 1])
        else:
            self.reply(200, (folder / file).read_bytes())

    def reply(self, status, body=b"", code="", words=""):
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", words), ("ETag", f'"{COMMIT}"')):
            if value:
                self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


FETCH = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from syntriever.data import hub_dataset
for name in sys.argv[2:]:
    kind, words = "", ""
    try:
        hub_dataset.fetch(name, Path("made", name))
    except Exception as error:
        kind, words = " ".join(base.__name__ for base in type(error).__mro__), str(error)
    print(json.dumps([name, kind, words]))
"""


def test_repositories_of_a_hub(tmp_path):
    root, work = tmp_path / "root", tmp_path / "work"
    texts = {"corpus": {"corpus": PASSAGES}, "queries": {"queries": QUERIES}}
    judged = {"default": {"test": qrels(("q2", "d2"))}}
    repository(root / "own" / "whole", texts | judged, "parquet")
    repository(root / "own" / "two", texts)
    repository(root / "own" / "two-qrels", judged, "tsv")
    repository(root / "own" / "unjudged", texts)
    repository(root / "own" / "closed", texts)
    repository(root / "own" / "script", texts)
    (root / "own" / "script" / "script.py").write_text("raise SystemExit")
    repository(work / "own" / "whole", {"corpus": {"c": [{"_id": "local", "text": "not what was asked for"}]}})
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.root = root
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": KEY, "no_proxy": "*",
            "HF_HOME": str(tmp_path / "cache"), "USE_TORCH": "0",  # streams without torch, whose import takes seconds
        }  # fmt: skip
        names = [
            "own/whole",
            "own/two",
            "own/unjudged",
            "own/closed",
            "own/script",
            "own/portal",
            "own/none",
            "a--b/c",
            *REFUSALS,
        ]
        command = [sys.executable, "-c", FETCH, ROOT, *names]
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert (done.returncode, done.stderr) == (0, "")
    said = {name: (kind, words) for name, kind, words in map(json.loads, done.stdout.splitlines())}
    assert list(said) == names
    for name, judgements in (("whole", {"test": "q2\td2\t1\n"}), ("two", {"test": "q2\td2\t1\n"}), ("unjudged", {})):
        assert said[f"own/{name}"] == ("", "")
        assert read(work / "made" / "own" / name) == as_beir(judgements)
    expected = {name: refusal[3:] for name, refusal in REFUSALS.items()} | {
        "own/closed": ("BadInput", "the Hub refuses it (Its files are restricted)"),
        "own/script": ("BadInput", "cannot be read: Dataset scripts are no longer supported"),
        "own/portal": ("Failed", "what answers is not the Hub"),
        "own/none": ("BadInput", "no such dataset, or a private one (Repository not found)"),
        "a--b/c": ("BadInput", "a--b/c"),
    }
    for name, (kind, words) in expected.items():
        assert kind in said[name][0].split(), said[name]
        assert said[name][1].startswith(f"hf:{name}"), said[name]
        assert words in said[name][1], said[name]
    assert kept(tmp_path / "cache" / "datasets") == {".lock"}
