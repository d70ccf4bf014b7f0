"""The table of the study: what it says of scores that were written by hand."""

import json

import numpy as np
import pytest
from conftest import load_script

from syntriever.files import paths

VALUES = {  # row -> seed -> nDCG@10 of queries "0".."3"
    "m": [[0.0, 0.2, 0.4, 0.6]],
    "m-gold-sft": [[0.5, 0.5, 0.5, 0.5], [0.7, 0.5, 0.5, 0.3]],
    "m-new-sft": [[1.0, 0.5, 0.5, 0.6], [0.8, 0.7, 0.5, 0.6]],
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    monkeypatch.setattr(paths, "home", lambda: tmp_path)
    folder = tmp_path / "datasets" / "tiny" / "qrels"
    folder.mkdir(parents=True)
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "train.tsv").write_text(header + "a\tp1\t1\nb\tp2\t0\n")
    # Only query 1 has a passage that is relevant to a training query: the one of query 2 was judged not to be.
    (folder / "test.tsv").write_text(header + "0\tp0\t1\n1\tp1\t1\n2\tp2\t1\n3\tp1\t0\n3\tp3\t1\n")
    (tmp_path / "results").mkdir()
    for row, seeds in VALUES.items():
        for number, values in enumerate(seeds, 1):
            name = row if row == "m" else row.replace("-sft", f"-s{number}-sft")
            per_query = {str(query): {"nDCG@10": value} for query, value in enumerate(values)}
            (tmp_path / "results" / f"{name}_tiny_test.json").write_text(json.dumps({"per_query": per_query}))
            log = tmp_path / "output" / f"{name}-tiny" / "log.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text('{"epoch": 1.0, "gold_share": 0.5}\n')
    return tmp_path / "results"


def test_study_table_by_hand(study, run_script):
    code, out, err = run_script("runs/study_table.py", "tiny", "m", "m-gold-sft", "m-new-sft", "--seeds", 1, 2)
    assert code == 0, err
    lines = (study / "study_m_tiny.md").read_text().splitlines()
    assert out.splitlines()[: len(lines)] == lines
    assert lines[0] == "tiny, 4 test queries, 2 seeds; nDCG@10"
    assert "3 unseen | 1 seen" in lines[2]
    assert lines[4] == "| m | 0.3000 | 0.3333 | 0.2000 | | |"
    assert lines[5] == "| m-gold-sft | 0.5000 (0.0000) | 0.5000 | 0.5000 | | |"
    # Means 0.65 and 0.65; of query 1 alone 0.6, of the others (0.9 + 0.5 + 0.6) / 3.
    assert lines[6].startswith("| m-new-sft | 0.6500 (0.0000) | 0.6667 | 0.6000 | +0.1500 (")
    assert lines[6].endswith(") | m-gold-sft |")
    assert (study / "study_m_tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_interval_covers_queries_and_seeds():
    difference = load_script("runs/study_table.py").difference
    rng = np.random.default_rng(3)
    queries = rng.normal(0, 0.3, 400)
    ours, theirs = queries + 0.1 + rng.normal(0, 0.1, (2, 3, 400))
    mean, low, high = difference(ours, theirs - 0.1)
    assert mean == pytest.approx(ours.mean() - theirs.mean() + 0.1)
    # Paired: the 0.3 that the queries differ by does not count; sd of the mean is about 0.1 * sqrt(2 / 3 / 400) or more.
    assert low < mean < high
    assert 0.012 < high - low < 0.04
    shifted = theirs + np.array([[-0.2], [0.0], [0.2]])  # seeds that disagree widen it
    _, low, high = difference(ours, shifted)
    assert high - low > 0.3


def test_study_names_the_missing_result(study, run_script):
    code, _, err = run_script("runs/study_table.py", "tiny", "m", "m-other-sft", "--seeds", 1)
    assert (code, "results/m-other-s1-sft_tiny_test.json is not there" in err) == (2, True), err
