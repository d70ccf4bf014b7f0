"""One text is one candidate, under however many ids, spaces and spellings it stands in the dataset."""

import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import FAST, SFT, digest, load_script, log_of, make_dataset, write_jsonl
from llm_lab import COMPARISON, asked, retrieve, rows, shown
from llm_server import LLMServer

from syntriever.data import dataset
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.files import jsonl, paths
from syntriever.train import bank, batching, journal, loop

train_stage1, train_stage2 = load_script("train_stage1.py"), load_script("train_stage2.py")


def other_spelling(text):
    """The same text to a reader: other white space, and letters with their accents apart."""
    return f"\n {unicodedata.normalize('NFD', text)}\u00a0".replace(" ", "  ", 1)


def normal(text):
    return " ".join(unicodedata.normalize("NFC", text).split())


def judge_anew(folder, name):
    """Every second judgement goes to `name` of its passage, some to both."""
    for path in (folder / "qrels").glob("*.tsv"):
        header, *judged = path.read_text().splitlines()
        for number, line in enumerate(judged):
            query, passage, grade = line.split("\t")
            judged[number] = [line, f"{query}\t{name(passage)}\t{grade}", f"{line}\n{query}\t{name(passage)}\t1"][number % 3]
        path.write_text("\n".join([header, *judged, ""]))


@pytest.fixture
def homes(home, tmp_path_factory, docstrings):
    """The data folder, and another one in which every passage stands twice more."""
    other = tmp_path_factory.mktemp("twice")
    shutil.copytree(home, other, dirs_exist_ok=True)
    folder = other / "datasets" / "tiny"
    passages = rows(folder / "corpus.jsonl")
    again = [
        {"_id": f"again-{row['_id']}", **dict(zip(("title", "text"), row["text"].split(" ", 1), strict=True))} for row in passages
    ]
    third = [{"_id": f"third-{row['_id']}", "text": other_spelling(row["text"])} for row in passages]
    write_jsonl(folder / "corpus.jsonl", [*passages, *again, *third])
    judge_anew(folder, lambda passage: f"again-{passage}")
    return home, other


@pytest.mark.parametrize("hashes", [1, 5, 2**64])
def test_the_first_passage_of_a_text_stands_for_the_others(home, monkeypatch, hashes):
    whole, rng = jsonl.hash64, random.Random(2)
    monkeypatch.setattr(jsonl, "hash64", lambda text: whole(text) % hashes)
    texts = [
        rng.choice(["", "a b", "a  b ", "\ta\u2003b", "A b", "ab", "caf\u00e9", "cafe\u0301", f"text {n}"]) for n in range(200)
    ]
    write_jsonl(home / "datasets" / "x" / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    corpus, keys = Corpus("x"), list(map(normal, texts))
    firsts = [keys.index(key) for key in keys]
    assert [corpus.twin(position) for position in range(200)] == firsts
    assert corpus.twins(np.arange(200).reshape(4, 50)).flatten().tolist() == firsts
    assert corpus.repeats == 200 - len(set(keys)) > 90
    assert corpus.first_id("d199") == f"d{firsts[199]}"
    assert corpus.first_id("no such id") == "no such id"
    assert list(corpus.distinct(f"d{n}" for n in range(199, -1, -1))) == [
        f"d{n}" for n in range(199, -1, -1) if keys[n] not in keys[n + 1 :]
    ]


def test_what_twins_cost_is_by_the_repeat(home):
    write_jsonl(home / "datasets" / "x" / "corpus.jsonl", [{"_id": f"d{n}", "text": f"t {n // 2}"} for n in range(2_000)])
    corpus = Corpus("x")
    assert corpus.repeats == 1_000
    assert corpus._repeats.nbytes + corpus._firsts.nbytes == 16 * corpus.repeats


ALL = ["--candidates", "999", "--dev-pool", "999", "--epochs", "2"]


@pytest.mark.parametrize("loss", ["distill", "snn"])
def test_stage1_on_a_corpus_in_which_every_text_stands_three_times(homes, tiny_encoder, run_script, monkeypatch, loss):
    """The same weights, dev scores and log, bit for bit, as on the corpus in which it stands once."""
    found = []
    for home in homes:
        monkeypatch.setenv("SYNTRIEVER_HOME", str(home))
        code, _, err = run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", loss, *ALL, *FAST)
        assert code == 0, err
        output = home / "output" / f"{SFT}-tiny"
        found.append((digest(output / "model.safetensors"), [row | {"seconds": 0} for row in log_of(output)]))
    assert found[0] == found[1]


def test_a_passage_under_two_ids_is_not_its_own_negative_in_the_corpus(home, tiny_encoder, run_script):
    """Beside its twin its loss would be log 2, whatever is learned."""
    folder = home / "datasets" / "one"
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "text": "how a list is sorted"} for i in ("a", "b")])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "sort a list"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("q\tb\t1\n")
    code, _, err = run_script("train_stage1.py", tiny_encoder, "one", "--loss", "distill", "--no-synthetic", *FAST)
    assert code == 0, err
    assert [row["corpus"] for row in log_of(home / "output" / f"{SFT}-one")] == [0, 0, 0]


def test_the_bank_looks_at_each_text_once(home, tiny_encoder, tmp_path, capsys):
    folder = home / "datasets" / "tiny"
    passages = rows(folder / "corpus.jsonl")
    write_jsonl(folder / "corpus.jsonl", [*passages, *({**row, "_id": f"again-{row['_id']}"} for row in passages)])
    corpus, model = Corpus("tiny"), models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    made = bank.build(model, corpus, home / "b", tmp_path, [(passages[3]["text"], ["a text"])], [{3}], 10, None)
    candidates, gold, relevant, _, _ = made.batch(np.array([0]), np.array([3]))
    assert len(np.unique(candidates.round(6), axis=0)) == len(candidates) >= 5
    assert relevant[0].nonzero()[0].tolist() == gold.tolist()
    # The query is the passage: it comes first, and is found first whatever the twins do.
    top = np.array([[3, 3, 5, 5, 7], [5, 5, 3, 3, 7]])
    assert bank.ndcg(top, [{3}, {3}]) == pytest.approx((1 + 1 / np.log2(3)) / 2)


# --- queries


@pytest.fixture
def captured(monkeypatch):
    """What stage 1 or 2 gives to the training loop, by name; nothing is trained."""
    given = {}

    def train(model, loss, sample, batches, names, dev, *rest):
        given.update(model=model, loss=loss, sample=sample, batches=batches, names=names, dev=dev)

    monkeypatch.setattr(loop, "train", train)
    return given


def same_queries(home):
    """The training queries 0 and 1, 2 and 3, ... get the text of the first in another spelling."""
    path = home / "datasets" / "tiny" / "queries.jsonl"
    queries = rows(path)
    for first, second in zip(queries[0:36:2], queries[1:36:2], strict=True):
        second["text"] = other_spelling(first["text"])
    write_jsonl(path, queries)
    return queries


def test_equal_queries_share_their_passages_and_no_batch(home, tiny_encoder, run_script, captured):
    same_queries(home)
    paper = ["--loss", "infonce", "--no-mask-known-positives", "--batch-size", 6]
    code, _, err = run_script("train_stage1.py", tiny_encoder, "tiny", *paper)
    assert code == 0, err
    for epoch in range(4):
        for batch in captured["batches"](epoch):
            assert len({row // 2 for row in batch}) == len(batch)

    code, _, err = run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", "infonce", "--temperature", 1)
    assert code == 0, err
    model = captured["model"].eval()
    (made,) = [captured["batches"](0)[0]]
    batch = batching.Collator(model, captured["sample"], None)(made)
    found, _ = loop.backward(model, batch, captured["loss"], 0)
    # The plain loop: of each other query's passages those are candidates that no equal query has as relevant.
    texts = [captured["sample"](row)[0][:2] for row in made]
    assert len({query for query, _ in texts}) == len({row // 2 for row in made})
    queries, passages = (
        torch.tensor(model.encode([text for _, text in column], prompt=model.prompts[column[0][0]], normalize_embeddings=True))
        for column in zip(*texts, strict=True)
    )
    expected = 0.0
    for i, row in enumerate(made):
        scores = [queries[i] @ passages[j] for j, other in enumerate(made) if i == j or row // 2 != other // 2]
        expected += float(torch.stack(scores).logsumexp(0) - queries[i] @ passages[i]) / len(made)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_equal_queries_are_one_question_to_the_bank(home, tiny_encoder, run_script, captured, monkeypatch):
    """Texts that were written for the second id alone serve both."""
    queries, seen = same_queries(home), []
    source = home / "datasets" / "tiny_synthetic.jsonl"
    write_jsonl(source, [row for row in rows(source) if row["query_id"] != queries[0]["_id"]])
    monkeypatch.setattr(bank, "build", lambda *given: seen.append(given))
    assert run_script("train_stage1.py", tiny_encoder, "tiny")[0] == 0
    asked, relevant = seen[0][4:6]
    assert len(asked) == len(relevant) == 18
    assert relevant[0] == {0, 1}
    assert asked[0][1][0] == next(row["cot"] for row in rows(source) if row["query_id"] == queries[1]["_id"])


# --- dev


def test_dev_of_repeated_texts_is_dev_of_the_texts(homes, tiny_encoder, monkeypatch):
    model, found = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu"), []
    for home in homes:
        monkeypatch.setenv("SYNTRIEVER_HOME", str(home))
        args = load_script("train_stage1.py").parse_args(["e5", "tiny", "--max-length", "32", "--dev-pool", "999"])
        dev = journal.dev_score("tiny", Corpus("tiny"), args)
        assert len(set(map(normal, dev.texts))) == len(dev.texts) == 60
        found.append(dev(model))
    assert found[0] == found[1]


def test_judgements_by_text(home):
    folder = home / "datasets" / "tiny"
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "text": t} for i, t in (("a", "x y"), ("b", "z"), ("c", "x  y"))])
    qrels = {"q": {"c": 2, "gone": 1}, "r": {"a": 0, "b": -1}, "s": {"c": 1, "a": 0}}
    queries = {"q": "One?", "r": "two?", "s": " One?"}
    shared = {"a": 2, "gone": 1}
    assert dataset.by_text(queries, qrels, Corpus("tiny")) == {"q": shared, "r": {"a": 0, "b": -1}, "s": shared}


def test_a_dev_split_has_no_text_of_a_training_query(home, run_script):
    (home / "datasets" / "tiny" / "qrels" / "dev.tsv").unlink()
    same_queries(home)
    code, _, err = run_script("datasets/split_dev.py", "tiny", "--share", "0.3")
    assert code == 0, err
    texts = {split: set(map(normal, dataset.load_split("tiny-dev", split)[0].values())) for split in ("train", "dev")}
    assert texts["train"]
    assert texts["dev"]
    assert not texts["train"] & texts["dev"]


# --- comparison and stage 2


def test_no_two_passages_of_a_pair_have_the_same_text(lab, run):
    """The top K counts texts; a passage with the text of a relevant one counts as relevant."""
    path = paths.corpus("tiny")
    passages = rows(path)
    for n in range(0, 20, 2):
        passages[n + 1]["text"] = other_spelling(passages[n]["text"])
    write_jsonl(path, passages)
    retrieve()
    top = {row["query_id"]: [p["id"] for p in row["passages"]] for row in rows(paths.top("e5", "tiny"))}
    text = {row["_id"]: normal(row["text"]) for row in passages}
    with LLMServer(reply=lambda body: "1") as server:
        out = run(server, COMPARISON, "--k", 4)
        for body in server.requests:
            assert len(set(map(normal, shown(body["messages"][0]["content"])[1:]))) == 2
        expected = sum(
            len(chosen) * (len(chosen) - 1) // 2 for chosen in (list({text[i] for i in ids})[:4] for ids in top.values())
        )
        assert asked(server).total() == expected
    for row in rows(paths.preferences("e5", "tiny")):
        firsts = [p for n, p in enumerate(top[row["query_id"]]) if text[p] not in [text[q] for q in top[row["query_id"]][:n]]]
        assert set(row["shown"]) <= set(firsts[:4])
    gold = {query: text[query.removeprefix("q-")] for query in top}
    pairs = [
        (text[row["preferred_id"]], text[row["rejected_id"]], gold[row["query_id"]])
        for row in rows(paths.preferences("e5", "tiny"))
    ]
    report = json.loads(paths.report(paths.preferences("e5", "tiny"), ".json").read_text())["gold"]
    assert (report["count"], report["of"]) == (sum(a == g for a, _, g in pairs), sum(g in (a, b) for a, b, g in pairs))
    assert report["of"] > 0
    assert "fewer than 4 different texts" not in out


def test_queries_with_too_few_different_texts_are_counted(lab, run):
    path = paths.corpus("tiny")
    write_jsonl(path, [{**row, "text": "the same"} if row["_id"] != "p05" else row for row in rows(path)])
    retrieve()
    with_p05 = sum("p05" in [p["id"] for p in row["passages"]] for row in rows(paths.top("e5", "tiny")))
    with LLMServer(reply=lambda body: "1") as server:
        out = run(server, COMPARISON)
        assert asked(server).total() == with_p05 > 0
    assert f"note:  {120 - with_p05} pairs fewer: of some queries fewer than 5 different texts were retrieved" in out
    write_jsonl(path, [{**row, "text": "the same"} for row in rows(path)])
    with LLMServer() as server:
        assert "no query has two passages with different texts" in run(server, COMPARISON, "--force", code=2)
        assert not server.requests


@pytest.fixture
def preferences(stage1, home):
    _, qrels = dataset.load_split("tiny", "train")
    gold = [next(iter(judged)) for judged in qrels.values()]
    made = [
        {"query_id": query, "preferred_id": gold[n], "rejected_id": gold[(n + step) % len(gold)]}
        for n, query in enumerate(qrels)
        for step in (1, 2)
    ]
    write_jsonl(home / "stage2" / f"{SFT}_tiny_preferences.jsonl", made)
    return made


@pytest.mark.parametrize("options", [[], ["--loss", "partial-plackett-luce", "--batching", "lists"]], ids=["default", "lists"])
def test_stage2_on_repeated_texts(stage1, home, preferences, run_script, options):
    """The weights are those of the texts, whichever id a preference names; one between equal texts is left out, aloud."""
    found, source = [], home / "stage2" / f"{SFT}_tiny_preferences.jsonl"
    path = home / "datasets" / "tiny" / "corpus.jsonl"
    for twice in (False, True):
        if twice:
            passages = rows(path)
            write_jsonl(path, [*passages, *({"_id": f"2-{r['_id']}", "text": other_spelling(r["text"])} for r in passages)])
            for number, row in enumerate(preferences):
                for name in ("preferred_id", "rejected_id")[: number % 3]:
                    row[name] = f"2-{row[name]}"
            same = {
                "query_id": preferences[0]["query_id"],
                "preferred_id": "2-" + passages[4]["_id"],
                "rejected_id": passages[4]["_id"],
            }
            write_jsonl(source, [same, *preferences, same])
        code, out, err = run_script("train_stage2.py", SFT, "tiny", "--force", "--dev-pool", "999", *options, *FAST)
        assert code == 0, err
        assert ("note:  2 preferences in" in out) == twice
        found.append(digest(home / "output" / "e5-small-tiny-final-tiny" / "model.safetensors"))
    assert found[0] == found[1]
    write_jsonl(source, [same])
    code, _, err = run_script("train_stage2.py", SFT, "tiny", "--force", *FAST)
    assert (code, "has no preference to train on" in err) == (2, True)


def test_equal_queries_share_no_batch_of_pairs(stage1, home, preferences, run_script, captured):
    same_queries(home)
    code, _, err = run_script("train_stage2.py", SFT, "tiny", "--batch-size", 4, "--beta", 0, "--force")
    assert code == 0, err
    for batch in captured["batches"](0):
        queries = [captured["sample"](row)[0][0] for row in batch]
        assert len(set(queries)) == len(queries)
    assert len({captured["sample"](row)[0][0] for row in range(72)}) == 18


def test_a_passage_of_two_pairs_is_one_candidate_of_plackett_luce():
    args = train_stage2.parse_args(["e5-sft", "tiny", "--paper", "--beta", "0"])
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1).requires_grad_()
    # Three queries (0, 1, 2) and passages 3, 4, 5; passage 3 is in every pair.
    labels = torch.tensor([[0, 3, 4, 0, 3, 4], [1, 3, 5, 1, 3, 5], [2, 4, 3, 2, 4, 3]])
    found, _ = train_stage2.make_loss(args, None)(texts, labels)
    score, expected = (texts[:3] @ texts[3:].T / 0.05).detach(), 0.0
    for query, better, worse in ((0, 0, 1), (1, 0, 2), (2, 1, 0)):
        others = torch.stack([score[query, p] for p in range(3) if p != better])
        expected += float(score[query].logsumexp(0) - score[query, better] + others.logsumexp(0) - score[query, worse]) / 3
    assert found.item() == pytest.approx(expected, abs=1e-4)


# --- evaluation


def test_measures_stay_by_id_and_the_repeats_are_counted(home, run_script):
    folder = home / "datasets" / "same"
    make_dataset(
        folder, [("a", "red apples", "apples are red"), ("b", "green pears", "pears are green"), ("c", "blue", "the sea")]
    )
    code, out, _ = run_script("evaluate.py", "bm25", "same", "--ks", "1,3")
    assert (code, "repeat the text" in out) == (0, False)
    write_jsonl(folder / "corpus.jsonl", [*rows(folder / "corpus.jsonl"), {"_id": "d", "text": "the  sea"}])
    (folder / "qrels" / "test.tsv").write_text("q-c\tc\t1\n")
    write_jsonl(folder / "queries.jsonl", [{"_id": "q-c", "text": "the sea"}])
    code, out, err = run_script("evaluate.py", "bm25", "same", "--ks", "1,3")
    assert code == 0, err
    assert out.count("note:  1 passages repeat the text of another; measures count ids, as published") == 1
    made = json.loads((home / "results" / "bm25_same_test.json").read_text())["measures"]
    assert made["nDCG@1"] in (0, 1)
    assert made["MRR@3"] == 0.5 if made["nDCG@1"] == 0 else 1
