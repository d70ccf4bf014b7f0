"""Datasets of the Hugging Face Hub: local folders that `datasets.load_dataset` reads as it reads the Hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, write_jsonl

from syntriever.data import dataset, download, hub_dataset
from syntriever.errors import BadInput

TEXT = 'a \u2028 line of 日本 "text"'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "home"


def repository(folder, configs):
    """A folder as the Hub shows a dataset: {config: {split: rows}}, declared in the head of its README."""
    head = ["---", "configs:"]
    for config, splits in configs.items():
        head += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            head += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            write_jsonl(folder / config / f"{split}.jsonl", rows)
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return str(folder)


def qrels(*rows, score=1):
    return [{"query-id": q, "corpus-id": p, "score": score} for q, p in rows]


PASSAGES = [{"_id": "d1", "title": "T", "text": TEXT}, {"_id": "d2", "title": None, "text": "second"}]
QUERIES = [{"_id": "q1", "text": "one?"}, {"_id": "q2", "text": "two?"}]


def read(folder):
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


def as_beir(qrels):
    return {
        "corpus.jsonl": json.dumps({"_id": "d1", "title": "T", "text": TEXT}, ensure_ascii=False)
        + '\n{"_id": "d2", "title": "", "text": "second"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "one?"}\n{"_id": "q2", "text": "two?"}\n',
    } | {f"qrels/{split}.tsv": "query-id\tcorpus-id\tscore\n" + rows for split, rows in qrels.items()}


def renamed(rows):
    return [{"id" if name == "_id" else name: value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("qrels_config", ["default", "qrels"])
@pytest.mark.parametrize("key", ["_id", "id"])
def test_the_layout_of_mteb(home, tmp_path, qrels_config, key):
    passages, queries = (PASSAGES, QUERIES) if key == "_id" else (renamed(PASSAGES), renamed(QUERIES))
    judged = {"train": qrels(("q1", "d1"), score=1.0), "test": qrels(("q2", "d2"), score=2.0)}
    source = repository(tmp_path / "m", {"corpus": {"corpus": passages}, "queries": {"queries": queries}, qrels_config: judged})
    hub_dataset.fetch(source, tmp_path / "made")
    assert read(tmp_path / "made") == as_beir({"train": "q1\td1\t1\n", "test": "q2\td2\t2\n"})
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # streamed


def test_the_layout_of_beir(home, tmp_path):
    source = repository(tmp_path / "b", {"corpus": {"corpus": PASSAGES}, "queries": {"queries": QUERIES}})
    repository(tmp_path / "b-qrels", {"default": {"train": qrels(("q1", "d1")), "validation": qrels(("q2", "d1"), ("q2", "d2"))}})
    hub_dataset.fetch(source, tmp_path / "made")
    assert read(tmp_path / "made") == as_beir({"train": "q1\td1\t1\n", "dev": "q2\td1\t1\nq2\td2\t1\n"})


def test_integers_as_ids_queries_in_splits_and_what_may_be_missing(home, tmp_path):
    passages = [{"_id": n, "text": f"passage {n}"} for n in (7, 8)]
    source = repository(tmp_path / "i", {
        "corpus": {"train": passages},
        "queries": {"train": [{"_id": 1, "text": "a"}], "test": [{"_id": 2, "text": "b"}]},
        "default": {"test": qrels((2, 8))},
    })  # fmt: skip
    hub_dataset.fetch(source, tmp_path / "made")
    made = read(tmp_path / "made")
    assert made["corpus.jsonl"].startswith('{"_id": "7", "title": "", "text": "passage 7"}\n')
    assert made["queries.jsonl"] == '{"_id": "1", "text": "a"}\n{"_id": "2", "text": "b"}\n'
    assert made["qrels/test.tsv"] == "query-id\tcorpus-id\tscore\n2\t8\t1\n"
    hub_dataset.fetch(repository(tmp_path / "c", {"corpus": {"corpus": PASSAGES}}), tmp_path / "alone")
    assert list(read(tmp_path / "alone")) == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"en-corpus": {"test": PASSAGES}, "en-queries": {"test": QUERIES}}, "no config 'corpus', only en-corpus, en-queries"),
        ({"corpus": {"c": [{"name": "d1", "text": "t"}]}}, r"corpus/c, row 1: needs '_id' \(or 'id'\) and 'text', has name"),
        (
            {"corpus": {"c": PASSAGES}, "default": {"test": [*qrels(("q", "d")), *qrels(("q", "e"), score=0.5)]}},
            r"default/test, row 2: score 0.5 is no whole number",
        ),
        ({"corpus": {"c": PASSAGES}, "default": {"test": [{"q": "1", "d": "2"}]}}, "expected query-id, corpus-id"),
    ],
)  # fmt: skip
def test_another_layout_is_named(home, tmp_path, configs, message):
    with pytest.raises(BadInput, match=message):
        hub_dataset.fetch(repository(tmp_path / "r", configs), tmp_path / "made")


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


def ask_hub(home, endpoint, offline="0"):
    """(exit code, stderr) of a stage that is asked for a dataset of the Hub at this address."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "no_proxy": "*"}
    command = [sys.executable, ROOT / "retrieval.py", "minilm", "hf:own/tiny"]
    done = subprocess.run(command, env=env, cwd=home.parent, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert not list(home.glob("datasets/*"))
    return done.returncode, done.stderr


def test_no_hub_and_no_such_repository(home):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Error-Message", "Repository not found")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        code, err = ask_hub(home, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert code == 2
    assert "hf:own/tiny: Dataset 'own/tiny' doesn't exist on the Hub or cannot be accessed" in err
    code, err = ask_hub(home, "http://127.0.0.1:9", offline="1")
    assert code == 1
    assert "hf:own/tiny: the Hub cannot be reached" in err
