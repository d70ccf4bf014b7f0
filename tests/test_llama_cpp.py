"""Both LLM stages against a server that nobody here wrote: llama.cpp's own, with the model of the demo."""

import json

import pytest
from llama_server import llama_server, smollm2

from syntriever.files import jsonl, paths

GIVEN = ["--llm", "smollm2-135m", "--concurrency", "2", "--max-failure-rate", "1"]  # the model is too small to be good


@pytest.fixture(scope="module")
def url():
    with llama_server(smollm2(), slots=2) as address:
        yield address


def ledger(path):
    return list(jsonl.read(path)) if path.is_file() else []


def test_synthesis_and_comparison_and_nothing_is_asked_twice(home, url, docstrings, run_script, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    command = ["datasets/parse_synthetic.py", "tiny", *GIVEN, "--base-url", url, "--limit", "1", "--max-tokens", "60"]
    code, out, err = run_script(*command)
    assert code == 0, err
    made, failed = (ledger(path) for path in (paths.synthetic("tiny"), paths.failed(paths.synthetic("tiny"))))
    assert len(made) + len(failed) == 1
    assert all(row["cot"] and row["positive"] and row["finish_reasons"]["verify"] == "stop" for row in made)
    assert {row["reason"] for row in failed} <= {"length", "unparsable"}
    asked = ledger(paths.synthesis_ledger("tiny"))
    assert {row["step"] for row in asked} >= {"cot", "positive", "negative"}
    assert all(row["prompt_tokens"] > 20 and 0 < row["completion_tokens"] <= 60 for row in asked)

    top = [{"id": i, "score": 1.0} for i, *_ in docstrings[:3]]
    source = paths.top("minilm", "tiny")
    source.parent.mkdir(parents=True)
    source.write_bytes(jsonl.dumps({"query_id": f"q-{docstrings[0][0]}", "query": docstrings[0][1], "passages": top}))
    compare = ["stage2/parse_comparison.py", "tiny", "--model", "minilm", "--k", "3", *GIVEN, "--base-url", url]
    code, out, err = run_script(*compare)
    assert code == 0, err
    report = json.loads(paths.report(paths.preferences("minilm", "tiny"), ".json").read_text())
    # The schema holds the model to a verdict: none is unparsable.
    assert sum(report["outcomes"].get(name, 0) for name in ("decided", "tie")) == 3

    for again in (command, compare):
        code, out, err = run_script(*again)
        assert code == 0, err
    assert ledger(paths.synthesis_ledger("tiny")) == asked
    assert len(ledger(paths.comparison_ledger("tiny"))) == 3


def test_grades_by_schema_and_log_odds(home, url, docstrings, run_script, monkeypatch):
    """The schema holds the model to a grade for each passage; its first word has probabilities."""
    monkeypatch.setenv("no_proxy", "*")
    source, ids = paths.top("minilm", "tiny"), [i for i, *_ in docstrings[:2]]
    source.parent.mkdir(parents=True)
    top = [{"id": i, "score": 1.0} for i in ids]
    source.write_bytes(jsonl.dumps({"query_id": f"q-{docstrings[0][0]}", "query": docstrings[0][1], "passages": top}))
    command = ["stage2/parse_comparison.py", "tiny", "--model", "minilm", "--graded", "--k", "2", *GIVEN, "--base-url", url]
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


def test_what_the_server_says_of_a_prompt_that_is_too_long(home, url, docstrings, run_script, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    (home / "prompts.json").write_text(json.dumps({"negative": "word " * 3000 + "{query}"}))
    command = ["datasets/parse_synthetic.py", "tiny", *GIVEN, "--base-url", url, "--limit", "1", "--max-tokens", "20"]
    code, _, err = run_script(*command, "--prompts", home / "prompts.json")
    assert code == 0, err
    refused = [row["reason"] for row in ledger(paths.synthesis_ledger("tiny")) if row["step"] == "negative"]
    assert refused == ["context_length"]
