"""JSONL, BEIR folders and downloads, records of runs, model names, measures, and how each script starts."""

import argparse
import contextlib
import hashlib
import itertools
import os
import platform
import random
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, file_size_limit, load_script, write_jsonl

from syntriever.data import dataset, download
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.report import metrics
from syntriever.run import cli, lineage, processes

# Everything that Python or Unicode takes for the end of a line, and other trouble.
HARD = 'a\u2028b\u2029c\u0085d\x0b\x0c\x1ce\r\nf\tg"\\ é 漢 😀'
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Empty data folder."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, **options)


# --- jsonl


@pytest.mark.parametrize(("start", "ending", "last"), [(b"", b"\n", b"\n"), (BOM, b"\r\n", b""), (BOM, b"\n\n \n", b"\n\n")])
def test_read_gives_back_what_dumps_wrote(data, start, ending, last):
    rows = [{"_id": HARD, "n": 1}, {"_id": "second", "deep": {"list": [HARD * 100, None, 1.5]}}, {"_id": ""}]
    lines = [jsonl.dumps(row)[:-1] for row in rows]
    assert "\u2028".encode() in lines[0]
    (data / "x.jsonl").write_bytes(start + ending.join(lines) + last)
    assert list(jsonl.read(data / "x.jsonl", {"_id": str})) == rows
    table = jsonl.Table(data / "x.jsonl", "_id", {})
    assert [table.get(row["_id"]) for row in reversed(rows)] == rows[::-1]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b'{"a": 1', "not a JSON row"),
        (b'{"a": 1} {"a": 2}', "not a JSON row"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -1e999}', "-1e999 is beyond a float"),
        (b'{"a": 1, "b": [-Infinity]}', "Infinity"),
        (b'{"a": 1, "b": "\xff"}', "UTF-8"),
        (b'{"a": 1, "b": "half a pair \\ud83d"}', ""),  # JSON can spell it, but it can never be written again
        (b"[1]", "list"),
        (b"{}", "'a' is missing"),
        (b'{"a": "1"}', "'a' has type str"),
        (b'{"a": 1, "b": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not a JSON row"),
    ],
    ids=["cut", "two", "nan", "overflow", "infinity", "utf-8", "surrogate", "list", "missing", "type", "deep"],
)
def test_read_names_file_and_line_of_a_bad_row(data, line, hint):
    path = data / "datasets" / "x.jsonl"
    with pytest.raises(BadInput, match=r"^datasets/x\.jsonl: no such file"):
        next(jsonl.read(path))
    path.write_bytes(b'{"a": 1}\r\n\n' + line + b'\n{"a": 2}\n')
    rows = jsonl.read(path, {"a": int})
    assert next(rows) == {"a": 1}
    with pytest.raises(BadInput, match=r"^datasets/x\.jsonl:3: ") as error:
        next(rows)
    assert hint in str(error.value)


def test_table_names_a_repeated_key_and_knows_no_other(data):
    write_jsonl(data / "x.jsonl", rows := [{"query_id": f"q{number}é"} for number in range(9)])
    table = jsonl.Table(data / "x.jsonl", "query_id", {})
    assert (len(table), "q7é" in table, "q7" in table, table.get("q7")) == (9, True, False, None)
    write_jsonl(data / "x.jsonl", [*rows, rows[4]])
    with pytest.raises(BadInput, match=r"^x\.jsonl:10: query_id 'q4é' was already on line 5"):
        jsonl.Table(data / "x.jsonl", "query_id", {})


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("torn", [0, 1, 65_535, 65_536, 200_001])
def test_appender_mends_a_torn_last_line(data, kept, torn):
    path, rows = data / "x.jsonl", [{"text": HARD, "n": n} for n in range(kept)]
    path.write_bytes(b"".join(map(jsonl.dumps, rows)) + ('{"text": "' + "é" * torn).encode()[:torn])
    with jsonl.Appender(path) as file:
        file.add({"new": HARD})
        assert file.size == path.stat().st_size
    assert list(jsonl.read(path)) == [*rows, {"new": HARD}]


def test_appender_on_a_full_disk_keeps_complete_rows_and_goes_on_later(data):
    path, rows = data / "datasets" / "x.jsonl", [{"n": n, "text": HARD * 31} for n in range(200)]
    with jsonl.Appender(path) as file:
        with file_size_limit(100_000), pytest.raises(Failed, match=r"cannot write datasets/x\.jsonl"):
            list(map(file.add, rows))
        written = rows[: path.read_bytes().count(b"\n")]
        assert 10 < len(written) < 200
        assert path.read_bytes() == b"".join(map(jsonl.dumps, written))
        file.add(rows[-1])
    assert list(jsonl.read(path)) == [*written, rows[-1]]


def write_atomically(path, content, error=None):
    with jsonl.atomic(path) as file:
        file.write(content)
        if error:
            raise error


@pytest.mark.parametrize("size", [100, 1_000_000], ids=["while flushing", "while writing"])
def test_atomic_on_a_full_disk_leaves_the_old_file(data, size):
    path = data / "datasets" / "x.json"
    write_atomically(path, b"old")
    with file_size_limit(50), pytest.raises(Failed, match=r"cannot write datasets/x\.json"):
        write_atomically(path, b"n" * size)
    assert (path.read_bytes(), names_in(path.parent)) == (b"old", ["x.json"])
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_atomic_leaves_the_old_file_when_the_block_raises(data, error):
    old, new = data / "datasets" / "old", data / "datasets" / "new"
    write_atomically(old, b"old")
    for path in (old, new):
        with pytest.raises(error):
            write_atomically(path, b"half", error)
    assert (old.read_bytes(), names_in(old.parent)) == (b"old", ["old"])


LOCKER = """
import sys, time
from pathlib import Path
from syntriever.files import jsonl
from syntriever.run import cli, lineage, processes
def main(args):
    with processes.lock(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(60)
sys.exit(cli.run(main, lambda: None))
"""


def test_lock_turns_a_second_writer_away_and_dies_with_its_owner(data):
    command = [sys.executable, "-c", LOCKER, str(data / "datasets" / "out.jsonl")]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == "locked\n"
        started = time.monotonic()
        second = run(*command, cwd=ROOT)
        assert time.monotonic() - started < 2
        assert (second.returncode, second.stdout) == (2, "")
        assert f"datasets/out.jsonl is being written by process {owner.pid};" in second.stderr
        owner.kill()
    for _ in range(2):
        with processes.lock(data / "datasets" / "out.jsonl"), pytest.raises(BadInput, match=f"process {os.getpid()};"):
            processes.lock(data / "datasets" / "out.jsonl").__enter__()


# --- beir


def write_corpus(data, rows, start=b"", ending=b"\n"):
    (data / "datasets" / "x").mkdir(exist_ok=True)
    (data / "datasets" / "x" / "corpus.jsonl").write_bytes(start + b"".join(jsonl.dumps(row)[:-1] + ending for row in rows))


@pytest.mark.parametrize(("start", "ending"), [(b"", b"\n"), (BOM, b"\r\n\n")], ids=["plain", "bom, crlf, blank lines"])
@pytest.mark.parametrize("hashes", [3, 2**64])
def test_corpus_is_a_dict_of_its_file(data, monkeypatch, start, ending, hashes):
    whole, rng = jsonl.hash64, random.Random(1)
    monkeypatch.setattr(jsonl, "hash64", lambda passage_id: whole(passage_id) % hashes)
    titles = [{}, {"title": None}, {"title": ""}, {"title": "Títle"}]
    ids = [rng.choice(["d{}", "é{}", "漢/{} x", "\u2028{}", "😀{}"]).format(n) for n in range(300)]
    rows = [{"_id": i, **rng.choice(titles), "text": rng.choice(["", HARD, f"text of {i}"])} for i in ids]
    write_corpus(data, rows, start, ending)
    naive = {row["_id"]: " ".join(filter(None, [row.get("title"), row["text"]])) for row in rows}
    texts, corpus = list(naive.values()), Corpus("x")
    assert [corpus.id(position) for position in range(len(corpus))] == ids
    assert list(corpus.texts()) == texts
    assert list(corpus.texts(7, 11)) == texts[7:11]
    for number in rng.sample(range(300), 300):
        assert corpus.position(ids[number]) == number
        assert corpus.by_id(ids[number]) == corpus.text(number) == texts[number]
    assert corpus.empty == texts.count("") > 0
    for unknown in ("", "d", ids[0] + " "):
        assert corpus.position(unknown) is None
        with pytest.raises(BadInput, match=r"datasets/x/corpus\.jsonl has no passage"):
            corpus.by_id(unknown)


@pytest.mark.parametrize("hashes", [1, 2**64], ids=["all collide", "none collide"])
def test_a_repeated_passage_id_is_named(data, monkeypatch, hashes):
    whole = jsonl.hash64
    monkeypatch.setattr(jsonl, "hash64", lambda passage_id: whole(passage_id) % hashes)
    write_corpus(data, [{"_id": i, "text": "t"} for i in ("a", "é", "b", "c", "é", "d")])
    with pytest.raises(BadInput, match=r"^datasets/x/corpus\.jsonl:5: passage id 'é' was already used on line 2"):
        Corpus("x")


@pytest.mark.parametrize("bad", [{"_id": 7.5, "text": ""}, {"_id": "b", "text": None}, {"_id": "b", "text": "", "title": ["t"]}])
def test_bad_and_empty_files_are_named(data, bad):
    write_corpus(data, [{"_id": "a", "text": "t"}, bad])
    with pytest.raises(BadInput, match=r"^datasets/x/corpus\.jsonl:2: "):
        Corpus("x")
    write_corpus(data, [], BOM)
    with pytest.raises(BadInput, match=r"^datasets/x/corpus\.jsonl is empty"):
        Corpus("x")
    for second, hint in (({"_id": "a", "text": "t"}, "'a' was already used"), ({"_id": "b", "text": " \n"}, "empty")):
        write_jsonl(data / "datasets" / "x" / "queries.jsonl", [{"_id": "a", "text": "t"}, second])
        with pytest.raises(BadInput, match=rf"^datasets/x/queries\.jsonl:2: .*{hint}"):
            dataset.load_queries("x")


def write_qrels(data, content):
    (data / "datasets" / "x" / "qrels").mkdir(parents=True, exist_ok=True)
    (data / "datasets" / "x" / "qrels" / "test.tsv").write_bytes(content)


@pytest.mark.parametrize("header", [b"query-id\tcorpus-id\tscore\n", b"", BOM, BOM + b"query-id\tcorpus-id\tscore\n"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n"])
def test_qrels_in_every_spelling(data, header, ending):
    judgements = ["q1\td1\t2", "q1\té \u2028d\t0", "score\tscore\t1", "q1\td1\t2", "q2\td1\t-1"]
    write_qrels(data, header.replace(b"\n", ending) + ending.join(line.encode() for line in judgements))
    assert dataset.load_qrels("x", "test") == {"q1": {"d1": 2, "é \u2028d": 0}, "score": {"score": 1}, "q2": {"d1": -1}}


@pytest.mark.parametrize("line", ["q d 1", "q\td", "q\td\t0.5", "q\td\t1\tx", "\td\t1", "q\t\t1", "q\t\udcff\t1", "q1\td1\t2"])
def test_a_bad_or_contradicting_judgement_is_named(data, line):
    write_qrels(data, b"query-id\tcorpus-id\tscore\n\nq1\td1\t1\n" + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(BadInput, match=r"^datasets/x/qrels/test\.tsv:4: "):
        dataset.load_qrels("x", "test")


def test_unknown_ids_are_counted_and_named_or_refused(data, capsys):
    write_corpus(data, [{"_id": "d1", "text": "t"}])
    write_jsonl(data / "datasets" / "x" / "queries.jsonl", [{"_id": "q1", "text": "t"}, {"_id": "q2", "text": "not judged"}])
    corpus, good = Corpus("x"), b"q1\td1\t1\n"
    for more, message in (
        (b"no-q1\td1\t1\nno-q2\td1\t1\n", "2 judged queries are not in the dataset, e.g. 'no-q1', 'no-q2'"),
        (b"q1\tno-d\t1\n", "1 judged passages are not in the dataset, e.g. 'no-d'"),
    ):
        write_qrels(data, good + more)
        queries, qrels = dataset.load_split("x", "test", corpus)
        assert (queries, list(qrels), qrels["q1"]["d1"]) == ({"q1": "t"}, ["q1"], 1)
        assert f"warning: datasets/x/qrels/test.tsv: {message}" in capsys.readouterr().out
        with pytest.raises(BadInput, match=message):
            dataset.load_split("x", "test", corpus, strict=True)
    write_qrels(data, b"no-q1\td1\t1\n")
    with pytest.raises(BadInput, match="no judged query"):
        dataset.load_split("x", "test", corpus)
    with pytest.raises(BadInput, match=r"qrels/dev\.tsv: no such split; this dataset has: test$"):
        dataset.load_split("x", "dev")


@pytest.mark.parametrize("name", ["../x", "/abs", "a\0b", "", ".", "..", ".hidden", "a/b", "a b", "a\n", "é", "-x", "a" * 101])
def test_names_never_lead_out_of_their_folder(data, name):
    for use in (paths.check_name, paths.corpus, dataset.ensure, Corpus, paths.synthetic, paths.model_output):
        with pytest.raises(BadInput, match=r"name .*: use letters"):
            use(name)


def test_unknown_and_incomplete_datasets(data):
    (data / "datasets" / "x" / "corpus.jsonl").unlink(missing_ok=True)
    (data / "datasets" / "x").mkdir(parents=True, exist_ok=True)
    for name, message in (
        ("scifcat", r"unknown dataset 'scifcat'.*pydocs.*msmarco.*scifact"),
        ("pydocs", r"python datasets/build_pydocs\.py"),
        ("x", r"datasets/x/corpus\.jsonl is missing"),
    ):
        with pytest.raises(BadInput, match=message):
            dataset.ensure(name)


# --- beir: download

FILES = [("tiny/corpus.jsonl", jsonl.dumps({"_id": "d", "text": HARD})), ("tiny/qrels/test.tsv", b"q\td\t1\n")]


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path.read_bytes()


@pytest.fixture
def serve(monkeypatch):
    """serve(bytes) -> address of a local server that sends these bytes to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(self.server.reply)

        def log_message(self, *_):
            pass

    def start(reply):
        server.reply = reply
        return f"http://127.0.0.1:{server.server_port}/tiny.zip"

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield start
        server.shutdown()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def test_download_appears_complete(data, serve):
    archive = make_zip(data / "a.zip", [("tiny/", b""), *FILES])
    download.fetch_archive("tiny", serve(OK % len(archive) + archive), hashlib.md5(archive).hexdigest())
    assert names_in(data / "datasets") == ["tiny"]
    found = {str(p.relative_to(data / "datasets")): p.read_bytes() for p in (data / "datasets").rglob("*") if p.is_file()}
    assert found == dict(FILES)


def test_the_forums_of_cqadupstack_become_datasets_of_their_own(data, serve, monkeypatch):
    members = [(f"cqadupstack/{name.removeprefix('cqadupstack-')}/corpus.jsonl", name.encode()) for name in download.FORUMS]
    archive = make_zip(data / "a.zip", members)
    monkeypatch.setattr(download, "URL", serve(OK % len(archive) + archive) + "?{}")
    monkeypatch.setitem(download.ARCHIVES, "cqadupstack", hashlib.md5(archive).hexdigest())
    kept = data / "datasets" / "cqadupstack-unix"
    kept.mkdir(parents=True)  # what is there stays
    dataset.ensure("cqadupstack-tex")
    assert names_in(data / "datasets") == download.FORUMS
    assert not list(kept.iterdir())
    assert (data / "datasets" / "cqadupstack-tex" / "corpus.jsonl").read_text() == "cqadupstack-tex"
    assert download.parts("cqadupstack") == download.FORUMS
    assert all(map(dataset.is_dataset, download.FORUMS))


@pytest.mark.parametrize("fault", ["404", "short body", "short chunk", "wrong md5", "not HTTP", "full disk"])
def test_a_failed_download_leaves_nothing(data, serve, fault):
    archive = make_zip(data / "a.zip", [*FILES, ("tiny/long.txt", random.Random(0).randbytes(1000) * 60)])
    size = len(archive)
    reply = {
        "404": b"HTTP/1.1 404 Not Found\r\n\r\n" + archive,
        "short body": OK % (size + 9) + archive,
        "short chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (size + 9) + archive,
        "not HTTP": b"220 mail.example.org ready\r\n",
    }.get(fault, OK % size + archive)
    md5 = hashlib.md5(b"other" if fault == "wrong md5" else archive).hexdigest()
    # The archive itself still fits on the full disk.
    limit = file_size_limit(50_000) if fault == "full disk" else contextlib.nullcontext()
    with limit, pytest.raises(Failed, match="datasets/tiny" if fault == "full disk" else None):
        download.fetch_archive("tiny", serve(reply), md5)
    assert names_in(data / "datasets") == []


LINK = zipfile.ZipInfo("tiny/link")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
BAD_MEMBERS = ["../evil", "tiny/../../evil", "/evil", "C:\\evil", "tiny\\..\\..\\evil", LINK, "tiny/bomb"]


@pytest.mark.parametrize("member", BAD_MEMBERS, ids=str)
def test_unpack_refuses_before_anything_is_written(tmp_path, member):
    make_zip(tmp_path / "a.zip", [*FILES, (member, b"\0" * 5_000_000 if member == "tiny/bomb" else b"/etc/passwd")])
    hint = "is a link" if member is LINK else "times its size" if member == "tiny/bomb" else "leads out"
    with pytest.raises(BadInput, match=hint):
        download.unpack(tmp_path / "a.zip", tmp_path / "in" / "out")
    assert names_in(tmp_path) == ["a.zip"]


# --- build_pydocs

AS_RECORDED = platform.python_version() == "3.11.7"


def build_pydocs(home):
    done = run(sys.executable, ROOT / "datasets/build_pydocs.py", env={**os.environ, "SYNTRIEVER_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    folder = home / "datasets" / "pydocs"
    return done.stdout, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".tsv")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    home = tmp_path_factory.mktemp("pydocs")
    return home, *build_pydocs(home)


@pytest.fixture
def pydocs(built, monkeypatch):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(built[0]))


def test_pydocs_keeps_its_rule(pydocs, built):
    passages, queries = list(jsonl.read(paths.corpus("pydocs"))), list(jsonl.read(paths.queries("pydocs")))
    ids = [row["_id"] for row in passages]
    assert len(set(ids)) == len(ids) == len({row["text"] for row in queries})
    assert [row["_id"] for row in queries] == [f"q-{i}" for i in ids]
    lengths = [len(row["text"].split()) for row in queries]
    assert (min(lengths), max(lengths) <= 40) == (5, True)
    assert min(len(row["text"].split()) for row in passages) == 20
    assert all(row["title"] == "" for row in passages)
    expected = {"train": [], "dev": [], "test": []}
    for i in ids:
        bucket = int(hashlib.sha256(i.encode()).hexdigest(), 16) % 10
        expected["test" if bucket < 2 else "dev" if bucket == 2 else "train"].append(f"q-{i}\t{i}\t1")
    for split, rows in expected.items():
        assert rows
        assert paths.qrels("pydocs", split).read_bytes().decode().split("\n") == ["query-id\tcorpus-id\tscore", *rows, ""]
    counts = "860 train, 123 dev, 257 test" if AS_RECORDED else ", ".join(f"{len(r)} {s}" for s, r in expected.items())
    assert f"{len(ids)} query-passage pairs ({counts})" in built[1]


def test_pydocs_takes_public_definitions_long_enough_to_split(tmp_path):
    def source(name, query=5, passage=20, kind="def", body="    pass\n"):
        words = " ".join([name, *"w" * (query - 1)]), " ".join("w" * passage)
        return f'{kind} {name}{"()" * (kind != "class")}:\n    r"""{words[0]}\n\n    {words[1]}"""\n{body}'

    inner = "".join(f"    {line}\n" for line in source("method").split("\n")[:-1])
    long_and_short = source("q4", 4) + source("q40", 40) + source("q41", 41) + source("p19", passage=19)
    files = {
        "b/__init__.py": source("Public", kind="class", body=inner) + source("_Private", kind="class", body=inner),
        "a.py": "if True:\n    pass\n" + long_and_short + source("co", kind="async def"),
        "c.py": "not python",
        "d.py": source("co"),  # a query that was there before
        **{f"{part}/x.py": source("hidden") for part in ("test", "tests", "test_a", "_vendor", "a/site-packages", "lib2to3")},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = list(load_script("datasets/build_pydocs.py").pairs(tmp_path))
    assert [i for i, _, _ in found] == ["a.q40", "a.co", "b.Public", "b.Public.method"]
    assert found[1][1:] == ("co w w w w", " ".join("w" * 20))


def test_rebuilding_pydocs_changes_no_byte(built):
    home, _, files = built
    assert len(files) == 5
    assert build_pydocs(home)[1] == files
    assert names_in(home / "datasets") == ["pydocs"]


def test_recorded_answers_are_about_training_queries_of_pydocs(pydocs):
    queries, train, corpus = dataset.load_queries("pydocs"), dataset.load_qrels("pydocs", "train"), Corpus("pydocs")
    known = {queries[query] for query in train}
    for name in ("synthesis.jsonl", "preferences.jsonl"):
        rows = list(jsonl.read(paths.recorded("pydocs") / name, {"query": str}))
        assert len({row["query"] for row in rows}) == len(rows) == 256
        share = sum(row["query"] in known for row in rows) / len(rows)
        assert share == 1 if AS_RECORDED else share > 0.7
        ranked = {i for row in rows for tied in row.get("ranking", []) for i in tied}
        assert not AS_RECORDED or None not in map(corpus.position, ranked)


# --- stage


@pytest.fixture
def make(data, monkeypatch):
    """make(name, *inputs) writes a file and the record of a stage that read the inputs; a -> b -> c are there."""

    def make(name, *inputs, complete=True):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "stage2" / "parse_comparison.py"), f"from-{inputs[0]}", "--k", "5"])
        record = lineage.Record(argparse.Namespace())
        record.reads(*(data / i for i in inputs))
        write_jsonl(data / name, [{"from": inputs}])
        record.write(data / name, complete)

    write_jsonl(data / "a", [{"n": 1}])
    make("b", "a")
    make("c", "b")
    return make


def test_stale_inputs_are_refused_with_the_command_that_mends_them(data, make, capsys):
    os.utime(data / "a", ns=(1, 1))  # touched, but no byte has changed
    lineage.check_fresh([data / "a", data / "b", data / "c", data / "none"], force=False)
    write_jsonl(data / "a", [{"n": 2}])  # as long as it was
    for output in ("b", "c"):  # one and two levels up
        with pytest.raises(BadInput, match=r"^b is stale: a has changed") as error:
            lineage.check_fresh([data / output], force=False)
        command = str(error.value).partition("python ")[2].split()
        assert (ROOT / command[0]).samefile(ROOT / "stage2" / "parse_comparison.py")
        assert command[1:4] == ["from-a", "--k", "5"]
        capsys.readouterr()
        lineage.check_fresh([data / output], force=True)
        assert "warning: b is stale" in capsys.readouterr().out
    make("b", "a")
    lineage.check_fresh([data / "b", data / "c"], force=False)  # b came out the same
    make("b", "a", "a")
    with pytest.raises(BadInput, match=r"^c is stale: b has changed"):
        lineage.check_fresh([data / "c"], force=False)


def test_unfinished_inputs_are_refused(data, make, capsys):
    make("b", "a", complete=False)
    for output in ("b", "c"):
        with pytest.raises(BadInput, match=r"^b is unfinished.*\n.*parse_comparison\.py from-a"):
            lineage.check_fresh([data / output], force=False)
    lineage.check_fresh([data / "c"], force=True)
    assert "warning: b is unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[1]", "7"])
def test_a_broken_record_is_named(data, make, content):
    (data / "b.run.json").write_text(content)
    with pytest.raises(BadInput, match=r"^b\.run\.json"):
        lineage.check_fresh([data / "c"], force=False)


def test_resuming_needs_the_same_settings(data, capsys):
    output, settings = data / "out.jsonl", {"llm": "gpt-4o", "k": 5, "share": 0.7, "limit": None}

    def resumes(force=False, **changes):
        return lineage.Record(argparse.Namespace()).resumes(output, settings | changes, force)

    assert not resumes()
    assert lineage.load_record(output)["complete"] is False
    output.write_text('{"a": "old"}\n')
    assert resumes()
    with pytest.raises(BadInput, match=r"out\.jsonl was made with other settings: llm was 'gpt-4o' and is now 'o3'\.\n.*--force"):
        resumes(llm="o3")
    assert (output.read_text(), lineage.load_record(output)["settings"]) == ('{"a": "old"}\n', settings)
    assert not resumes(llm="o3", force=True)
    assert (output.exists(), (data / "out.jsonl.old").read_text()) == (False, '{"a": "old"}\n')
    assert lineage.load_record(data / "out.jsonl.old")["settings"] == settings
    assert "it is kept as out.jsonl.old" in capsys.readouterr().out
    output.write_text('{"a": "new"}\n')
    assert resumes(llm="o3", force=True)  # nothing has changed, so nothing is set aside
    (data / "out.jsonl.run.json").unlink()
    with pytest.raises(BadInput, match="was not made by this script"):
        resumes()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (BadInput("no x"), 2, "error: no x"),
        (Failed("y"), 1, "failed: y"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, said):
    def main(_):
        if error:
            raise error

    assert cli.run(main, lambda: None) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


# --- models


def checkpoint(folder):
    for name in ("config.json", "model.safetensors", "modules.json"):
        write_jsonl(folder / name, [])
    return folder


def test_models_that_are_not_there(data):
    write_jsonl(data / "pickled" / "config.json", [])
    with pytest.raises(BadInput, match=r"unknown model 'e6'.*e5, .*X-sft"):
        models.resolve("e6", "x")
    for folder in (data / "datasets", data / "pickled"):
        with pytest.raises(BadInput, match=rf"{folder} is not a checkpoint.*safetensors"):
            models.resolve(str(folder), "x")
    write_jsonl(data / "dense" / "2_Dense" / "pytorch_model.bin", [])
    with pytest.raises(BadInput, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        models.resolve(str(checkpoint(data / "dense")), "x")
    for model, command in (("e5-sft", "train_stage1.py e5 x"), ("e5-v2-final", "train_stage2.py e5-v2-sft x")):
        folder = data / "output" / f"{model}-x"
        for prepare in (lambda: None, lambda folder=folder: checkpoint(folder)):  # nothing there, or no record of it
            prepare()
            with pytest.raises(BadInput, match=rf"output/{model}-x/ holds no finished checkpoint\. Run: python {command}$"):
                models.resolve(model, "x")
        write_jsonl(folder / "run.json", [])
        ref = models.resolve(model, "x")
        assert (ref.name, ref.folder, ref.embeddings("y")) == (model, folder, folder / "embeddings" / "y")


def test_hub_ids_and_folders_get_a_short_name(data):
    assert models.resolve("Org/My-Model.v2", "x").name == "my-model.v2"
    ref = models.resolve("Org/My-Model.v2", "x", "mine")
    assert models.resolve("e5", "y", "mine").embeddings("y") == models.resolve("e5", "y").embeddings("y")
    assert (ref.name, ref.where, ref.embeddings("y")) == ("mine", "Org/My-Model.v2", paths.embeddings("mine", "y"))
    folder = checkpoint(data / "elsewhere" / "checkpoint-7")
    ref = models.resolve(str(folder), "x")
    assert (ref.name, ref.folder, ref.weights) == ("checkpoint-7", folder, [folder / "model.safetensors"])
    # Only a bare X-sft is one of ours: other people's models may be called so too.
    assert models.resolve("Org/encoder-sft", "x").where == "Org/encoder-sft"


@pytest.mark.parametrize("model", ["e5", "minilm", "Org/model", "folder"])
def test_a_short_name_is_checked_before_anything_is_loaded(data, model):
    model = str(checkpoint(data / "folder")) if model == "folder" else model
    assert models.resolve(model, "x", "ok").name == "ok"
    for name in ("../x", "a/b", "a b"):
        with pytest.raises(BadInput, match="model name"):
            models.resolve(model, "x", name)


E5_NAMES = dict.fromkeys(["intfloat/e5-large-v2", "intfloat/e5-base", "intfloat/multilingual-e5-small"], models.E5)
OTHER_NAMES = ["intfloat/e5-mistral-7b-instruct", "intfloat/multilingual-e5-large-instruct", "Org/note5-base"]
HUB_IDS = {hub_id: prefixes for alias, (hub_id, prefixes) in models.ALIASES.items() if alias != "minilm"}


@pytest.mark.parametrize(("model", "prefixes"), {**E5_NAMES, **dict.fromkeys(OTHER_NAMES, models.NONE), **HUB_IDS}.items())
def test_models_get_their_prefixes_by_name(model, prefixes):
    assert (models.resolve(model, "x").prefixes or models.NONE) == (prefixes or models.NONE)


# --- metrics


def test_measures_by_hand():
    qrels = {"q": {"a": 3, "b": 1, "c": 2, "z": 0}, "silent": {"a": 1}, "gone": {"a": 1}}
    run = {"q": {"b": 0.9, "x": 0.8, "a": 0.7, "z": 0.1}, "silent": {}, "not judged": {"a": 1.0}}
    found, ideal = metrics.evaluate(qrels, run, (1, 3, 10)), 3 + 2 / np.log2(3) + 1 / 2
    for name, values in {
        "nDCG": (1 / 3, (1 + 3 / 2) / ideal, (1 + 3 / 2) / ideal),
        "MAP": (1 / 3, (1 + 2 / 3) / 3, (1 + 2 / 3) / 3),
        "Recall": (1 / 3, 2 / 3, 2 / 3),
        "P": (1, 2 / 3, 2 / 10),
        "MRR": (1, 1, 1),
    }.items():
        for k, value in zip((1, 3, 10), values, strict=True):
            assert found[f"{name}@{k}"] == {"q": pytest.approx(value, abs=1e-6), "silent": 0, "gone": 0}
            assert metrics.mean(found[f"{name}@{k}"]) == pytest.approx(value / 3, abs=1e-6)
    assert metrics.evaluate(qrels, {}, (5,))["nDCG@5"] == dict.fromkeys(qrels, 0)


def random_run(seed):
    """Grades -1 to 3; scores with many ties, some of which only 32-bit floats have."""
    rng = np.random.default_rng(seed)
    passages = [f"{letter}{n}" for letter in ("d", "D", "é", "漢") for n in range(12)]
    qrels, run = {}, {}
    for q in range(40):
        judged, found = (rng.choice(passages, rng.integers(1, 40), replace=False).tolist() for _ in range(2))
        qrels[f"q{q}"] = {p: int(rng.integers(-1, 4)) for p in judged}
        run[f"q{q}"] = {p: float(rng.integers(0, 6)) / 7 + float(rng.integers(0, 2)) * 1e-12 for p in found}
    return qrels, run


def brute_force(judged, scores, k):
    order = sorted(sorted(scores, key=str.encode, reverse=True), key=lambda p: -np.float32(scores[p]))[:k]
    gains = np.array([max(judged.get(p, 0), 0) for p in order])
    ideal = np.array(sorted((max(grade, 0) for grade in judged.values()), reverse=True)[:k])
    hits, relevant, discounts = gains > 0, max(sum(grade > 0 for grade in judged.values()), 1), np.log2(np.arange(2, k + 2))
    return {
        "nDCG": (gains / discounts[: len(gains)]).sum() / max((ideal / discounts[: len(ideal)]).sum(), 1e-9),
        "MAP": (hits.cumsum() / np.arange(1, len(order) + 1))[hits].sum() / relevant,
        "Recall": hits.sum() / relevant,
        "P": hits.sum() / k,
        "MRR": 1 / (hits.argmax() + 1) if hits.any() else 0,
    }


def test_measures_agree_with_brute_force_and_mrr_with_trec_eval():
    import pytrec_eval

    qrels, run = random_run(0)
    found = metrics.evaluate(qrels, run)
    for query, k in itertools.product(qrels, metrics.KS):
        for name, value in brute_force(qrels[query], run[query], k).items():
            assert found[f"{name}@{k}"][query] == pytest.approx(value, abs=1e-6), (name, k, query)
    for seed in range(5):
        qrels, run = random_run(seed)
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
        ours = metrics.evaluate(qrels, run, (100,))["MRR@100"]
        assert ours == {query: pytest.approx(theirs[query]["recip_rank"], abs=1e-6) for query in qrels}


def test_measures_are_those_of_beir():
    from beir.retrieval.evaluation import EvaluateRetrieval

    for seed in range(5):
        qrels, run = random_run(seed)  # every query has results: BEIR leaves out the others
        ours = metrics.evaluate(qrels, run)
        means = EvaluateRetrieval.evaluate(qrels, run, list(metrics.KS), ignore_identical_ids=False)
        theirs = {name.replace("NDCG", "nDCG"): value for part in means for name, value in part.items()}
        assert len(theirs) == 4 * len(metrics.KS)
        assert {name: round(metrics.mean(ours[name]), 5) for name in theirs} == theirs


def compare(differences, **options):
    base = {f"q{n}": 0.5 for n in range(len(differences))}
    ours = {query: 0.5 + d for query, d in zip(base, differences, strict=True)}
    return metrics.paired_test(ours, base, **options), metrics.paired_test(base, ours, **options)


def test_paired_test_sees_what_is_there_in_both_directions():
    there, back = compare(np.random.default_rng(0).normal(0.1, 0.05, 200))
    assert there["p"] == back["p"] == pytest.approx(1 / 10_001)
    assert there["difference"] == pytest.approx(-back["difference"]) == pytest.approx(0.1, abs=0.02)
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    for end in ("low", "high"):
        assert abs(there[end] - there["difference"]) == pytest.approx(1.96 * 0.05 / np.sqrt(200), rel=0.2)
    assert compare([0.0] * 9)[0] == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_paired_test_of_noise_has_uniform_p():
    rng = np.random.default_rng(1)
    p = np.array([compare(rng.normal(0, 0.1, 40), rounds=500)[0]["p"] for _ in range(200)])
    assert p.mean() == pytest.approx(0.5, abs=0.08)
    assert (p < 0.05).mean() < 0.11


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.08])
def test_paired_test_is_the_exact_one_up_to_its_rounds(shift):
    differences = np.random.default_rng(3).normal(shift, 0.06, 8).round(2)
    flips = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs((flips * differences).mean(1)) >= abs(differences.mean()) - 1e-9).mean()
    assert 0 < exact < 1
    assert compare(differences)[0]["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


# --- how the scripts start

SCRIPTS = {
    "datasets/build_pydocs.py": [],
    "datasets/parse_synthetic.py": ["scifact"],
    "train_stage1.py": ["e5", "scifact"],
    "retrieval.py": ["e5-sft", "scifact"],
    "stage2/parse_comparison.py": ["scifact"],
    "train_stage2.py": ["e5-sft", "scifact"],
    "evaluate.py": ["bm25", "e5-final", "scifact"],
}

# Prints which heavy packages are imported once good arguments are parsed, then runs the script with a bad one.
PROBE = """
import os, runpy, sys
script, *argv = sys.argv[1:]
sys.path[0] = os.path.dirname(script)
runpy.run_path(script)["parse_args"](argv)
print(*{"torch", "transformers", "sentence_transformers", "datasets", "faiss", "openai", "matplotlib"} & set(sys.modules))
sys.argv = [script, *argv, "--no-such-option"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts_light_from_anywhere(script, tmp_path):
    path = ROOT / script
    commands = {(ROOT, script, "--help"), (path.parent, path.name, "--help"), (tmp_path, path, "--help")}
    commands.add((tmp_path, "-c", PROBE, path, *SCRIPTS[script]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for command, process in [(c, subprocess.Popen([sys.executable, *c[1:]], cwd=c[0], **pipes)) for c in commands]:
        out, err = process.communicate(timeout=60)
        if "--help" in command:
            assert (process.returncode, err) == (0, "")
            assert f"usage: {path.name}" in out
        else:
            assert (process.returncode, out) == (2, "\n")
            assert "unrecognized arguments: --no-such-option" in err
    assert names_in(tmp_path) == []


def test_the_folder_datasets_does_not_hide_the_package():
    assert not (ROOT / "datasets" / "__init__.py").exists()
    found = run(sys.executable, "-c", "import importlib.util as u; print(u.find_spec('datasets').origin)", cwd=ROOT)
    assert found.stdout.strip().endswith("site-packages/datasets/__init__.py")
