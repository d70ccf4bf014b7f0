"""Datasets as people have them: ids that are numbers or hold blanks, TREC files, odd grades, missing files, few passages."""

import json
import pathlib
import urllib.parse

import pytest
import pytrec_eval
from conftest import SFT, make_dataset, write_jsonl
from llm_lab import COMPARISON, SYNTHESIS, asked, rows
from llm_server import LLMServer

from syntriever.data import dataset
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.report import metrics

PAIRS = [
    ("a", "red apples", "apples are red"),
    ("b", "green pears", "pears are green"),
    ("c", "blue sea", "the sea is blue"),
    ("d", "yellow sun", "the sun is yellow"),
    ("e", "black night", "at night it is black"),
]


@pytest.fixture
def fruit(home):
    make_dataset(home / "datasets" / "fruit", PAIRS)
    return home / "datasets" / "fruit"


# --- ids


def spelt(path, change):
    """Rewrite the ids of a dataset."""
    for name in ("corpus.jsonl", "queries.jsonl"):
        write_jsonl(path / name, [{**row, "_id": change(row["_id"])} for row in rows(path / name)])
    for qrels in (path / "qrels").glob("*.tsv"):
        header, *judged = [line.split("\t") for line in qrels.read_text().splitlines()]
        lines = [header, *([change(query), change(passage), grade] for query, passage, grade in judged)]
        qrels.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))


@pytest.mark.parametrize("blank", [" ", "  x\u00a0", "\u2028", "\u3000", "%20 "])
def test_a_run_with_blanks_in_its_ids_is_six_columns_that_lead_back(fruit, run_script, blank):
    spelt(fruit, lambda name: f"{blank}100%{blank}{name}")
    code, out, err = run_script("evaluate.py", "bm25", "fruit", "--split", "train", "--ks", "1,5")
    assert code == 0, err
    text = paths.result("bm25", "fruit", "train", ".trec").read_text("utf-8")
    lines = [line.split() for line in text.split("\n")[:-1]]
    assert lines
    assert {len(line) for line in lines} == {6}
    run = {}
    for query, _, passage, _, score, _ in lines:
        run.setdefault(urllib.parse.unquote(query), {})[urllib.parse.unquote(passage)] = float(score)
    qrels = dataset.load_qrels("fruit", "train")
    assert run.keys() <= qrels.keys()
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.5"}).evaluate(run)
    made = json.loads(paths.result("bm25", "fruit", "train", ".json").read_text())
    assert 0 < made["measures"]["nDCG@5"] == pytest.approx(sum(value["ndcg_cut_5"] for value in found.values()) / len(qrels))
    example = f"{blank}100%{blank}a"
    assert out.count("in the .trec files") == 1
    assert f"{example!r} is {metrics.trec_id(example)} in the .trec files" in out


def test_a_run_without_blanks_is_as_it_was(fruit, run_script):
    spelt(fruit, lambda name: f"50%20{name}")
    code, out, _ = run_script("evaluate.py", "bm25", "fruit", "--split", "train", "--ks", "1,5")
    assert (code, ".trec files" in out) == (0, False)
    assert "50%20q-a Q0 50%20a 1 " in paths.result("bm25", "fruit", "train", ".trec").read_text()


def test_whole_numbers_are_read_as_text_and_said_once(fruit, run_script, capsys):
    number = {name: n for n, (i, _, _) in enumerate(PAIRS, 1) for name in (i, f"q-{i}")}
    spelt(fruit, number.__getitem__)
    assert isinstance(rows(fruit / "queries.jsonl")[0]["_id"], int)
    code, out, err = run_script("evaluate.py", "bm25", "fruit", "--split", "train", "--ks", "1,5")
    assert code == 0, err
    for name in ("corpus", "queries"):
        assert out.count(f"note:  datasets/fruit/{name}.jsonl has whole numbers as ids; they are read as text") == 1
    assert json.loads(paths.result("bm25", "fruit", "train", ".json").read_text())["measures"]["nDCG@1"] == 1
    corpus = Corpus("fruit")
    assert (corpus.id(0), corpus.position("1"), corpus.by_id("2")) == ("1", 0, "pears are green")


def test_numbers_name_queries_and_passages_in_the_files_of_the_stages(fruit, tiny_encoder, run_script):
    spelt(fruit, {name: n for n, (i, _, _) in enumerate(PAIRS, 1) for name in (i, f"q-{i}")}.__getitem__)
    text = {"cot": "a", "positive": "b", "negative": "c", "verified": True}
    write_jsonl(paths.synthetic("fruit"), [{"query_id": n, "query": "q", **text} for n in (1, 2, 3)])
    code, out, err = run_script("train_stage1.py", tiny_encoder, "fruit", "--name", "mini", "--epochs", 1)
    assert code == 0, err
    assert "3 training rows of fruit, 3 of them with synthetic texts" in out
    preferences = [{"query_id": n, "preferred_id": n, "rejected_id": n + 1} for n in (1, 2, 3)]
    write_jsonl(paths.preferences("mini-sft", "fruit"), preferences)
    code, out, err = run_script("train_stage2.py", "mini-sft", "fruit", "--epochs", 1)
    assert code == 0, err
    assert "3 preferences for 3 queries" in out


@pytest.mark.parametrize("bad", ["7.5", "true", "null", '""', "[7]"])
@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_what_is_no_id_is_named(fruit, name, bad):
    with (fruit / f"{name}.jsonl").open("a") as file:
        file.write(f'{{"_id": {bad}, "text": "t"}}\n')
    with pytest.raises(BadInput, match=rf"^datasets/fruit/{name}\.jsonl:6: field '_id'"):
        Corpus("fruit") if name == "corpus" else dataset.load_queries("fruit")


# --- judgements


def judged(fruit, content):
    (fruit / "qrels" / "test.tsv").write_bytes(content.encode())
    return dataset.load_qrels("fruit", "test")


@pytest.mark.parametrize(
    "header", ["", "query-id\tcorpus-id\tscore\n", "qid 0 docid rel\n", "topic\titeration\tdocument\tlabel\n"]
)
@pytest.mark.parametrize("line", ["q 0 d x", "q Q0 d x", "q  0   d x", "q\t0\td\tx", "q\td\tx"])
@pytest.mark.parametrize(("score", "grade"), [("1", 1), ("2.0", 2), ("0", 0), ("-1", -1), ("1e0", 1), ("100", 100), ("+1", 1)])
def test_judgements_of_beir_and_trec(fruit, header, line, score, grade):
    assert judged(fruit, header + line.replace("x", score) + "\nq 0 e 0\n") == {"q": {"d": grade, "e": 0}}


@pytest.mark.parametrize(
    "score", ["0.5", "101", "-2", "1732700000", "1e300", "nan", "inf", "1_0", "", "one", "-1.5", "99999999999999999999"]
)
@pytest.mark.parametrize("line", ["q\td\t", "q 0 d ", "q\t0\td\t"])
def test_a_grade_that_is_none_is_named_with_the_limits(fruit, line, score):
    with pytest.raises(BadInput, match=r"^datasets/fruit/qrels/test\.tsv:2: .* whole number from -1 to 100"):
        judged(fruit, f"q\tc\t1\n{line}{score}\n")
    if not (line + score).split()[-1].isalpha() or ("\t" in line and not score):  # a word ends a header
        with pytest.raises(BadInput, match=r"^datasets/fruit/qrels/test\.tsv:1: .* whole number from -1 to 100"):
            judged(fruit, f"{line}{score}\nq\tc\t1\n")


@pytest.mark.parametrize("line", ["q d 1", "q x d 1", "q\tx\td\t1", "q 0 d 1 5", "q d\t1", "q 0\td 1", "1"])
def test_other_columns_are_named(fruit, line):
    with pytest.raises(BadInput, match=r"^datasets/fruit/qrels/test\.tsv:2: expected query-id"):
        judged(fruit, f"q\tc\t1\n{line}\n")


def test_grades_below_0_are_judged_and_not_relevant():
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}, "r": {"a": 1.0}}
    expected = metrics.evaluate({"q": {"a": 0, "b": 1, "c": 2}, "r": {"a": 0}}, run, (1, 3))
    for grade in (-1, -2, -100):
        assert metrics.evaluate({"q": {"a": grade, "b": 1, "c": 2}, "r": {"a": grade}}, run, (1, 3)) == expected


# --- files


@pytest.fixture
def no_permission(monkeypatch):
    """no_permission(path): reading it fails, as it does for another user."""
    locked, real = set(), pathlib.Path.open

    def opened(path, *given, **options):
        if path in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given, **options)

    monkeypatch.setattr(pathlib.Path, "open", opened)
    return locked.add


COMMANDS = [
    ["evaluate.py", "bm25", "tiny", "--split", "train", "--ks", "1"],
    ["evaluate.py", SFT, "tiny", "--split", "train", "--ks", "1"],
    ["retrieval.py", SFT, "tiny"],
    ["train_stage1.py", "minilm", "tiny"],
    ["train_stage2.py", SFT, "tiny"],
    [SYNTHESIS, "tiny", "--llm", "judge"],
    [COMPARISON, "tiny", "--model", SFT, "--llm", "judge"],
    ["datasets/split_dev.py", "tiny"],
]


@pytest.mark.parametrize("fault", ["missing", "folder", "no permission", "dangling"])
@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels"])
def test_a_file_that_cannot_be_read_is_named_by_every_script(stage1, home, run_script, monkeypatch, no_permission, name, fault):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(models, "load", lambda *given, **options: pytest.fail("a model was loaded"))
    write_jsonl(paths.top(SFT, "tiny"), [{"query_id": "q", "query": "q", "passages": []}])
    write_jsonl(paths.preferences(SFT, "tiny"), [])
    path = home / "datasets" / "tiny" / name
    (home / "datasets" / "tiny" / "qrels" / "dev.tsv").unlink()
    if name == "qrels":
        path.rename(home / "elsewhere")
        if fault == "folder":  # the other way round
            path.write_text("a file")
        else:
            pytest.skip("no judgements at all: the queries are a log")
    elif (name, fault) == ("qrels/train.tsv", "missing"):
        pytest.skip("the same")
    elif fault == "no permission":
        no_permission(path)
    else:
        path.rename(home / "elsewhere")
        if fault == "folder":
            path.mkdir()
        elif fault == "dangling":
            path.symlink_to(home / "nowhere")
    for command in COMMANDS:
        code, _, err = run_script(*command)
        assert (code, err.splitlines()[0].partition(f"datasets/tiny/{name}")[1] != "") == (2, True), (command, err)


@pytest.mark.parametrize("fault", ["folder", "no permission"])
def test_dev_judgements_that_cannot_be_read_are_named_before_training(home, run_script, monkeypatch, no_permission, fault):
    monkeypatch.setattr(models, "load", lambda *given, **options: pytest.fail("a model was loaded"))
    path = home / "datasets" / "tiny" / "qrels" / "dev.tsv"
    if fault == "folder":
        path.unlink()
        path.mkdir()
    else:
        no_permission(path)
    code, _, err = run_script("train_stage1.py", "minilm", "tiny", "--no-synthetic")
    assert (code, "datasets/tiny/qrels/dev.tsv: " in err) == (2, True), err


# --- few passages


def test_defaults_are_cut_to_a_small_corpus_and_what_was_typed_is_refused(fruit, home, tiny_encoder, run_script, monkeypatch):
    code, out, err = run_script("evaluate.py", "bm25", "fruit")
    assert code == 0, err
    assert out.count("note:  --ks is 5 instead of 100: datasets/fruit/corpus.jsonl has no more passages") == 1
    assert {"nDCG@1", "nDCG@5", "Recall@5"} <= json.loads(paths.result("bm25", "fruit", "test", ".json").read_text())[
        "measures"
    ].keys()
    code, out, err = run_script("evaluate.py", "bm25", "fruit", "tiny")  # the table needs the same cut-offs
    assert (code, "note:  --ks is 5" in out) == (0, True), err
    for given in ("1,3,5,10,100", "6"):
        code, _, err = run_script("evaluate.py", "bm25", "fruit", "--ks", given)
        assert (code, "datasets/fruit/corpus.jsonl has 5 passages" in err) == (2, True)

    code, out, err = run_script("retrieval.py", tiny_encoder, "fruit", "--name", "mini")
    assert code == 0, err
    assert out.count("note:  --top-k is 5 instead of 100: datasets/fruit/corpus.jsonl has no more passages") == 1
    top = rows(home / "stage2" / "mini_fruit_top100.jsonl")
    assert [len(row["passages"]) for row in top] == [5, 5, 5]
    code, _, err = run_script("retrieval.py", tiny_encoder, "fruit", "--name", "mini", "--top-k", "100")
    assert (code, "--top-k 100: datasets/fruit/corpus.jsonl has 5 passages" in err) == (2, True)

    path = home / "stage2" / "mini_fruit_top100.jsonl"
    write_jsonl(path, [{**row, "passages": row["passages"][:3]} for row in top])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    given = [COMPARISON, "fruit", "--model", tiny_encoder, "--name", "mini"]
    with LLMServer(reply=lambda body: "1") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, out, err = run_script(*given)
        assert code == 0, err
        assert out.count("note:  21 pairs fewer: of some queries fewer than 5 different texts were retrieved") == 1
        assert asked(server).total() == 9
        code, _, err = run_script(*given, "--k", "5")
        assert (code, "--k 5 but only 3 passages were retrieved" in err) == (2, True)


def test_a_query_in_the_shell_has_at_most_all_passages(fruit, home, tiny_encoder, run_script):
    write_jsonl(fruit / "corpus.jsonl", rows(fruit / "corpus.jsonl")[:2])
    code, out, err = run_script("retrieval.py", tiny_encoder, "fruit", "--query", "red")
    assert code == 0, err
    assert "note:  --top-k is 2 instead of 5" in out
    assert run_script("retrieval.py", tiny_encoder, "fruit", "--query", "red", "--top-k", "0")[0] == 2


def test_queries_without_results_are_counted_aloud(fruit, run_script):
    write_jsonl(
        fruit / "queries.jsonl",
        [{**row, "text": "it is the"} if row["_id"] == "q-b" else row for row in rows(fruit / "queries.jsonl")],
    )
    code, out, err = run_script("evaluate.py", "bm25", "fruit", "--split", "train")
    assert code == 0, err
    assert out.count("note:  1 of 3 queries have no result by bm25 and count 0") == 1
    assert json.loads(paths.result("bm25", "fruit", "train", ".json").read_text())["queries_without_results"] == 1
    assert "have no result" not in run_script("evaluate.py", "bm25", "fruit", "--split", "test")[1]
