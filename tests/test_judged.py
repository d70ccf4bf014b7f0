"""A test set of one's own: a pool of several models that an LLM grades; and where the pipeline stands without labels."""

import argparse
import re

import pytest
from conftest import ROOT, write_jsonl

from syntriever.files import paths
from syntriever.run import lineage

STATUS = "syntriever/status.py"
NEXT = re.compile(r"^next: +(python .*)$", re.M)


DOCUMENTS = {  # by what status says is missing: the command that makes it
    "datasets/notes_generated.jsonl": "datasets/generate_queries.py notes",
    "stage2/mine_notes_top100.jsonl": "retrieval.py {model} notes --fuse --name mine",
    "stage2/mine_notes_judgements.jsonl": "stage2/parse_comparison.py notes --graded --model {model} --name mine",
    "output/mine-sft-notes": "train_stage1.py {model} notes --judgements llm --name mine",
    "results/mine-sft_notes_judged.json": "evaluate.py bm25 {model} mine-sft notes --split judged",
}


@pytest.mark.parametrize("log", [False, True])
def test_status_leads_from_documents_to_a_measured_retriever(tmp_path, monkeypatch, run_script, tiny_encoder, log):
    """Each output is made as its stage would make it; then it is stale once the documents change."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    write_jsonl(paths.corpus("notes"), [{"_id": "a", "text": "red apples"}])
    if log:
        write_jsonl(paths.queries("notes"), [{"_id": f"q{n}", "text": f"what is red {n}"} for n in range(9)])
    options = argparse.Namespace(model=str(tiny_encoder))
    before, steps = paths.corpus("notes"), list(DOCUMENTS)[1 if log else 0 :]
    for n, name in enumerate(steps):
        code, out, err = run_script(STATUS, "notes")
        assert code == 0, err
        shown = [line.split()[:2] for line in out.splitlines() if not line.startswith("next")]
        if n > 1 - log:  # before there is anything of an encoder, status names the README's
            states = ["fresh"] * (n + 1) + ["missing"] * (len(steps) - n)
            assert [state for state, *_ in filter(None, shown)] == states
            assert NEXT.findall(out) == [f"python {DOCUMENTS[name].format(model=tiny_encoder)}"]
        elif name.startswith("datasets"):
            assert NEXT.findall(out) == [f"python {DOCUMENTS[name]}"]
        else:
            assert NEXT.findall(out) == ["python retrieval.py e5 notes --fuse"]
        output = tmp_path / name
        output.parent.mkdir(exist_ok=True, parents=True)
        if "output" in name:
            output.mkdir()
        else:
            write_jsonl(output, [{"query_id": "g", "query": "what is red", "kind": "question", "passage_id": "a"}])
        record = lineage.Record(options)
        record.reads(before)
        record.write(output)
        before = paths.run_json(output)
    code, out, _ = run_script(STATUS, "notes")
    assert code == 0
    assert "mine is complete" in out
    write_jsonl(paths.corpus("notes"), [{"_id": "a", "text": "green apples"}])
    code, out, _ = run_script(STATUS, "notes")
    assert f"stale    {steps[0]}" in out
    paths.qrels("notes", "test").parent.mkdir()
    paths.qrels("notes", "test").write_text("q0\ta\t1\n")
    assert "missing  results/mine-sft_notes_test.json" in run_script(STATUS, "notes")[1]
