"""Reciprocal rank fusion of the encoder, the LLM's texts and bm25: `retrieval.py --fuse`."""

import json
import random
from fractions import Fraction

import numpy as np
import pytest
from conftest import library, load_script, write_jsonl
from llm_lab import rows

from syntriever.data import training
from syntriever.data.corpus import Corpus
from syntriever.encode import bm25, models
from syntriever.encode.fusion import ranks_of, reciprocal_rank_fusion
from syntriever.files import paths
from syntriever.report.sources import Contribution

FUSE = ("--fuse", "--device", "cpu", "--backend", "torch")


def by_fractions(runs, weights, constant):
    """The definition, without rounding: passages, best first, and their scores."""
    scores = {p: sum(Fraction(w) / (constant + run.index(p) + 1) for run, w in zip(runs, weights, strict=True) if p in run)
              for p in {p for run in runs for p in run}}  # fmt: skip
    return sorted(scores, key=lambda p: (-scores[p], p)), scores


@pytest.mark.parametrize("seed", range(20))
def test_fusion_equals_its_definition(seed):
    rng = random.Random(seed)
    names = [f"p{n}" for n in range(rng.randrange(1, 30))]
    runs = [rng.sample(names, rng.randrange(len(names) + 1)) for _ in range(3)]
    runs.append(runs[0][::-1])  # many equal scores
    weights, k = [rng.choice((1.0, 1.0, 0.5, 2.0)) for _ in runs], rng.randrange(1, 12)
    ranked = [{p: rank for rank, p in enumerate(run, 1)} for run in runs]
    order, scores = by_fractions(runs, weights, 60)
    found = reciprocal_rank_fusion(ranked, k, 60, weights)
    assert [p for p, _ in found] == order[:k]
    assert [score for _, score in found] == pytest.approx([float(scores[p]) for p in order[:k]], rel=1e-15)
    assert reciprocal_rank_fusion(ranked[::-1], k, 60, weights[::-1]) == found
    assert reciprocal_rank_fusion(ranked, k) == reciprocal_rank_fusion(ranked, k, 60, [1.0] * 4)


def test_equal_texts_are_one_candidate_with_the_best_of_their_places(home):
    texts = ["same", "other", " same ", "third"]
    write_jsonl(home / "datasets" / "twins" / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(texts)])
    hits = [("p2", 0.9), ("p0", 0.8), ("p3", 0.7), ("p1", 0.6)]
    assert ranks_of(hits, Corpus("twins")) == {"p0": 1, "p3": 2, "p1": 3}


# --- the script


def fused(run_script, model, *options, ds="tiny"):
    """The rows that `retrieval.py --fuse` wrote, by query, and what it said."""
    code, out, err = run_script("retrieval.py", model, ds, *FUSE, *options)
    assert code == 0, err
    return {row["query_id"]: row for row in rows(paths.top("e5-small-tiny", ds, 8))}, out


def ranking(corpus, scores):
    """Ids of the distinct texts among the 8 best, best first."""
    best = sorted(range(len(corpus)), key=lambda n: (scores[n], corpus.id(n)), reverse=True)[:8]
    return list(dict.fromkeys(corpus.first_id(corpus.id(n)) for n in best))


@pytest.mark.parametrize("written", [True, False])
def test_candidates_are_the_fusion_of_all_sources(home, tiny_encoder, docstrings, run_script, written):
    with paths.corpus("tiny").open("a") as file:  # three passages again, under ids that sort before the first ones
        for n, (_, _, passage) in enumerate(docstrings[:3]):
            file.write(json.dumps({"_id": f"!{n}", "text": f" {passage}  "}) + "\n")
    if not written:
        paths.synthetic("tiny").unlink()
    made, out = fused(run_script, tiny_encoder, "--top-k", 8)
    corpus, train = Corpus("tiny"), training.load("tiny", None)
    assert list(made) == list(train.queries)
    model = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    passages = library(model, corpus.texts(), "document")
    told = {row["query_id"]: row for row in rows(paths.synthetic("tiny"))} if written else {}
    lexical = {query: [p for p, _ in hits] for query, hits in bm25.run(corpus, train.queries, 8)}
    rejected = 0
    for query, text in train.queries.items():
        runs = {"encoder": ranking(corpus, passages @ library(model, [text], "query")[0])}
        if row := told.get(query):
            texts = [row["cot"], row["positive"]] if row["verified"] else [row["cot"]]
            rejected += not row["verified"]
            view = np.vstack([library(model, [text], "query"), library(model, texts, "document")]).mean(0)
            runs["texts"] = ranking(corpus, passages @ view)
        runs["bm25"] = list(dict.fromkeys(map(corpus.first_id, lexical[query])))
        order, scores = by_fractions(list(runs.values()), [2 if name == "texts" else 1 for name in runs], 60)
        found = made[query]["passages"]
        assert made[query]["query"] == text
        assert [p["id"] for p in found] == order[:8]
        assert [p["score"] for p in found] == [round(float(scores[p]), 6) for p in order[:8]]
        for p in found:
            where = {name: runs[name].index(p["id"]) + 1 if p["id"] in runs.get(name, []) else None for name in p["ranks"]}
            assert p["ranks"] == where
            assert list(where) == ["encoder", "texts", "bm25"]
    assert bool(rejected) == written
    assert ("texts  " in out) == written
    record = json.loads(paths.run_json(paths.top("e5-small-tiny", "tiny", 8)).read_text())
    assert ("datasets/tiny_synthetic.jsonl" in record["inputs"]) == written
    assert out.rstrip().endswith(f"parse_comparison.py tiny --graded --model {tiny_encoder} --top-k 8")


@pytest.fixture
def documents(home):
    """A dataset of passages alone, and queries that an LLM wrote from them: one far from its passage in every source."""
    texts = ["red apples", "green pears", "blue sea", "yellow sun", "black night", "red  apples", "white snow", "grey stone",
             "brown bread", "pink rose"]  # fmt: skip
    write_jsonl(home / "datasets" / "fruit" / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(texts)])
    written = [
        ("g0", "apples that are red", "p5"),
        ("g1", "sea of blue and pears of green", "p9"),
        ("g2", "night so black", "p4"),
    ]
    rows = [{"query_id": query, "query": text, "kind": "question", "passage_id": passage} for query, text, passage in written]
    write_jsonl(paths.generated("fruit"), rows)
    return rows


def test_the_passage_a_query_was_written_from_is_always_a_candidate(documents, tiny_encoder, run_script, monkeypatch):
    monkeypatch.setattr(training, "TEST", 10)  # no query is kept as a test set
    for k in (1, 2, 3):
        code, out, err = run_script("retrieval.py", tiny_encoder, "fruit", *FUSE, "--top-k", k, "--queries", "generated")
        assert code == 0, err
        made = {row["query_id"]: row["passages"] for row in rows(paths.top("e5-small-tiny", "fruit", k))}
        assert "p0" in [p["id"] for p in made["g0"]]  # equal texts: the first stands for all
        assert "p5" not in [p["id"] for p in made["g0"]]
        assert [p["id"] for p in made["g1"]].count("p9") == 1
        assert len(made["g1"]) == k
        if k < 3:
            last = made["g1"][-1]
            assert last == {"id": "p9", "score": 0.0, "ranks": {"encoder": None, "texts": None, "bm25": None}}
    assert "by the source passages of 3 queries" in out
    assert out.rstrip().endswith(f"fruit --graded --model {tiny_encoder} --top-k 3 --queries generated")
    code, _, err = run_script("retrieval.py", tiny_encoder, "fruit", "--device", "cpu", "--top-k", 1)
    assert code == 0, err
    plain = {row["query_id"]: row["passages"] for row in rows(paths.top("e5-small-tiny", "fruit", 1))}
    assert all(list(p) == ["id", "score"] for p in plain["g1"])  # without --fuse as before


def test_what_each_source_contributes_by_hand():
    """Two queries; the fused top 10 are 10 and 2 passages long."""
    one = [f"a{n}" for n in range(12)]
    made = Contribution(["encoder", "texts", "bm25"])
    ranks = {"encoder": one, "texts": [*one[5:], "x"], "bm25": ["y", "a9"]}
    fused = ["a9", *one[:8], "y", "a8"]
    made.add(
        {name: {p: r for r, p in enumerate(run, 1)} for name, run in ranks.items()}, fused, {"gold judgements": {"y": 1, "z": 1}}
    )
    made.add({"encoder": {"b": 1}, "bm25": {"b": 1, "c": 2}}, ["b", "c"], {"gold judgements": {"b": 1}})
    shares = made.results()["sources"]
    # Of the fused 10: encoder has a9, a0..a7; texts a9, a5, a6, a7; bm25 a9, y.
    assert shares["encoder"] == {"queries": 2, "in_its_top": pytest.approx(10 / 12), "in_no_other_top": pytest.approx(5 / 12)}
    assert shares["texts"] == {"queries": 1, "in_its_top": 0.4, "in_no_other_top": 0.0}
    assert shares["bm25"] == {"queries": 2, "in_its_top": pytest.approx(4 / 12), "in_no_other_top": pytest.approx(2 / 12)}
    # The second query has no texts, so it is not measured. Of y and z, y is found: first by bm25, tenth by the fusion.
    ideal = 1 + 1 / np.log2(3)
    means = made.results()["measures"]["gold judgements"]
    assert means["queries"] == 1
    for source, ndcg, recall in (
        ("encoder", 0, 0),
        ("texts", 0, 0),
        ("bm25", 1 / ideal, 0.5),
        ("fusion", 1 / np.log2(11) / ideal, 0.5),
    ):
        assert means[f"{source} nDCG@10"] == pytest.approx(ndcg)
        assert means[f"{source} Recall@10"] == recall
    lines = list(made.lines())
    assert "bm25              2   0.3333   0.1667" in lines
    assert f"bm25         {1 / ideal:.4f}   0.5000" in lines


def test_what_cannot_be_fused_is_refused_first(documents, tiny_encoder, run_script, monkeypatch):
    monkeypatch.setattr(load_script("retrieval.py"), "searcher", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(training, "TEST", 10)
    command = ("retrieval.py", tiny_encoder, "fruit", *FUSE)
    for options, message in (
        (["--query", "apples"], "--fuse ranks for the training queries"),
        (["--language", "klingon"], "--language klingon"),
        (["--top-k", "11"], "has 10 passages"),
    ):
        code, _, err = run_script(*command, *options)
        assert (code, message in err) == (2, True), err
    write_jsonl(paths.synthetic("fruit"), [{"query_id": "g0", "cot": "a", "positive": "b", "verified": "yes"}])
    code, _, err = run_script(*command, "--top-k", 2)
    assert code == 2
    assert "datasets/fruit_synthetic.jsonl:1: field 'verified'" in err
    paths.synthetic("fruit").unlink()
    write_jsonl(paths.generated("fruit"), [{**documents[0], "passage_id": "gone"}])
    code, _, err = run_script(*command, "--top-k", 2)
    assert code == 2
    assert "datasets/fruit_generated.jsonl: 'g0' was written from passage 'gone'" in err
