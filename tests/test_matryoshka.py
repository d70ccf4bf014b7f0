"""Prefixes of vectors: the loss at several lengths, search at one of them, and what each is worth."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import FAST, SFT, load_script, log_of, write_jsonl

from syntriever.data.corpus import Corpus
from syntriever.encode import models, search, shards
from syntriever.encode.encoder import Encoder
from syntriever.train import losses

train_stage1, train_stage2 = load_script("train_stage1.py"), load_script("train_stage2.py")
TAU, DIMS = 0.05, [8, 4, 2]


def unit(*shape, seed):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made / made.norm(dim=-1, keepdim=True)


def prefix(vectors, d):
    return vectors[:, :d] / vectors[:, :d].norm(dim=1, keepdim=True)


def soft(scores):
    return (scores / TAU).softmax(1)


# Rows of query, gold passage, positive, cot and negative, `verified`, number of the query, gold passage in the corpus.
LABELS = torch.tensor([[0, 3, 4, 5, 6, 1, 0, 2], [1, 7, 8, -1, 9, 0, 1, 4], [2, 10, -1, 11, 3, 1, 2, 0]])
RELEVANT = [{2}, {4, 1}, {0}]


class FakeBank:
    """Every query looks at the whole corpus of six passages."""

    corpus, views = unit(6, 8, seed=1).numpy(), unit(3, 8, seed=2).numpy()

    def batch(self, numbers, gold):
        known = np.array([[p in RELEVANT[n] for p in range(6)] for n in numbers])
        return self.corpus, gold, known, self.views[numbers], np.array([True, False, True])


def loss_of(loss, dims=None):
    args = train_stage1.parse_args(["x", "tiny", "--loss", loss, "--view-weight", "0.6"])
    function = train_stage1.make_loss(args, RELEVANT, FakeBank() if loss == "distill" else None)
    return losses.at_prefixes(function, dims) if dims else function


@pytest.mark.parametrize("loss", ["snn", "infonce", "cluster", "authors", "distill"])
def test_the_loss_of_stage1_is_the_mean_over_the_prefixes(loss):
    embeddings, found = unit(12, 8, seed=0).requires_grad_(), []
    bank = FakeBank()
    for d in DIMS:
        if loss != "distill":
            found.append(loss_of(loss)(prefix(embeddings, d), LABELS)[0])
            continue
        # The corpus is compared at d, by the query; at full length, by the teacher.
        query, corpus, views = prefix(embeddings[:3], d), *map(torch.from_numpy, (bank.corpus, bank.views))
        ours = soft(query @ prefix(corpus, d).T)
        told, target = [0, 2], soft(views @ corpus.T)
        cost = loss_of("infonce")(prefix(embeddings, d), LABELS)[0] - 0.6 * (target * ours.log())[told].sum() / 3
        for i, gold in enumerate((2, 4, 0)):
            others = [p for p in range(6) if p == gold or p not in RELEVANT[i]]
            cost = cost - 0.3 * (ours[i, gold] / ours[i, others].sum()).log() / 3
        found.append(cost)
    total, parts = loss_of(loss, DIMS)(embeddings, LABELS)
    assert total.item() == pytest.approx(sum(value.item() for value in found) / 3, abs=1e-9)
    assert [parts[f"loss_{d}"].item() for d in DIMS] == pytest.approx([value.item() for value in found], abs=1e-9)
    total.backward()
    assert 0 < parts["gold_share"] <= 1  # of the longest; known after the backward pass


@pytest.mark.parametrize("loss", ["bradley-terry", "partial-plackett-luce"])
def test_the_loss_of_stage2_is_the_mean_over_the_prefixes(loss):
    embeddings, queries, passages = unit(9, 8, seed=3), unit(3, 8, seed=4), unit(6, 8, seed=5)
    labels = torch.tensor([[n, 3 + 2 * n, 4 + 2 * n, n, n, 3 + n] for n in range(3)])
    args = train_stage2.parse_args(["x-sft", "tiny", "--loss", loss, "--beta", "0.3"])
    total, _ = losses.at_prefixes(train_stage2.make_loss(args, (queries, passages)), DIMS)(embeddings, labels)
    expected = 0.0
    for d in DIMS:
        query, better, worse = (prefix(embeddings[labels[:, column]], d) for column in range(3))
        ours, theirs = soft(query @ torch.cat([better, worse]).T), soft(queries @ passages.T)  # the reference: all entries
        kl = (ours * (ours / theirs).log()).sum(1).mean()
        if loss == "bradley-terry":
            preference = -((query * (better - worse)).sum(1) / TAU).sigmoid().log().mean()
        else:
            preference = train_stage2.partial_plackett_luce_loss(query, better, worse, TAU)
        expected += float(preference + 0.3 * kl) / 3
    assert total.item() == pytest.approx(expected, abs=1e-9)


def test_the_gradient_reaches_the_prefix_more_and_nothing_beyond_the_longest():
    def gradient(dims):
        embeddings = unit(12, 8, seed=0).requires_grad_()
        loss_of("snn", dims)(embeddings, LABELS)[0].backward()
        return embeddings.grad.square().sum(0)

    alone, both, short = gradient([8]), gradient([8, 2]), gradient([4, 2])
    assert both[:2].sum() / both.sum() > 1.5 * alone[:2].sum() / alone.sum()
    assert (short[:4] > 0).all()
    assert (short[4:] == 0).all()


# --- the real commands


def test_dims_go_through_both_stages(stage1, home, docstrings, run_script):
    from sentence_transformers import SentenceTransformer

    ids = [name for name, _, _ in docstrings[:36]]
    rows = [{"query_id": f"q-{name}", "preferred_id": name, "rejected_id": ids[n - 1]} for n, name in enumerate(ids)]
    write_jsonl(home / "stage2" / f"{SFT}_tiny_preferences.jsonl", rows)
    for stage, start in (("train_stage1.py", stage1), ("train_stage2.py", SFT)):
        more = ["--candidates", "8", "--name", "mine"] if stage == "train_stage1.py" else []
        code, _, err = run_script(stage, start, "tiny", "--dims", "8,32", "--epochs", "1", *more, *FAST)
        assert code == 0, err
        (output,) = (home / "output").glob("mine-sft-tiny" if more else "*-final-tiny")
        steps = [row for row in log_of(output) if "loss" in row]
        assert all(row["loss"] == pytest.approx((row["loss_8"] + row["loss_32"]) / 2, rel=1e-5) for row in steps)
        assert json.loads((output / "run.json").read_text())["options"]["dims"] == [8, 32]
        assert SentenceTransformer(str(output), device="cpu").get_embedding_dimension() == 32  # all, unless it is asked for less
    code, _, err = run_script("train_stage1.py", stage1, "tiny", "--dims", "33,8", "--loss", "snn", *FAST)
    assert (code, "--dim, --dims: 33 is more than the 32 dimensions of" in err) == (2, True), err
    code, _, err = run_script("train_stage1.py", stage1, "tiny", "--dims", "8,0", "--loss", "snn")
    assert (code, "argument --dims: 8,0: expected whole numbers from 1" in err) == (2, True), err


def test_search_by_a_prefix_equals_cutting_by_hand(stage1, home, run_script, monkeypatch):
    """As sentence-transformers cuts vectors; what is on disk is whole, encoded once, and serves every length."""
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(shards, "SHARD", 7)
    corpus, library = Corpus("tiny"), SentenceTransformer(str(stage1), device="cpu", truncate_dim=8)
    passages = library.encode_document(list(corpus.texts()), normalize_embeddings=True)
    options = ["retrieval.py", SFT, "tiny", "--top-k", "60", "--device", "cpu"]
    scores, said = {}, []
    for dim in (None, 8, 32):
        code, out, err = run_script(*options, *(["--dim", dim] if dim else []))
        assert code == 0, err
        rows = [json.loads(line) for line in (home / "stage2" / f"{SFT}_tiny_top60.jsonl").read_text().splitlines()]
        scores[dim] = {(row["query_id"], p["id"]): p["score"] for row in rows for p in row["passages"]}
        said.append("made before" in out)
        assert json.loads((home / "stage2" / f"{SFT}_tiny_top60.jsonl.run.json").read_text())["options"]["dim"] == dim
    assert said == [False, True, True]
    queries = library.encode_query([row["query"] for row in rows], normalize_embeddings=True)
    by_hand = {
        (row["query_id"], corpus.id(p)): float(q @ passages[p]) for row, q in zip(rows, queries, strict=True) for p in range(60)
    }
    assert scores[8] == pytest.approx(by_hand, abs=2e-6)
    assert scores[32] == scores[None]
    assert scores[8] != pytest.approx(scores[32], abs=1e-2)
    code, out, err = run_script(*options, "--dim", "8", "--index", "Flat")
    assert "finds 1.0000 of the exact top 60" in out, err
    encoder, found = Encoder(models.load(models.resolve(SFT, "tiny"), "cpu")), {}
    for dtype in ("float32", "float16"):
        found[dtype] = dict(search.top_k(encoder, corpus, home / dtype, {"q": "a list"}, 60, dtype, dim=8))["q"]
    assert dict(found["float16"]) == pytest.approx(dict(found["float32"]), abs=2e-3)


def test_the_report_has_size_and_worth_of_each_length(stage1, home, run_script):
    code, out, err = run_script("evaluate.py", "bm25", SFT, "tiny", "--dim", "8,32", "--ks", "10", "--device", "cpu")
    assert code == 0, err
    worth = {}
    for dim in (32, 8):
        result = json.loads((home / "results" / f"{SFT}-{dim}d_tiny_test.json").read_text())
        assert (result["encoder"]["dim"], result["encoder"]["cut_to"]) == (32, dim)
        worth[dim] = f"{result['measures']['nDCG@10']:.4f}"
    rows = [line.split() for line in out.partition("index size by dimension")[2].splitlines()]
    assert ["dimensions", "index,", "MB", "nDCG@10"] in rows
    # 60 passages of four bytes an entry
    assert [row for row in rows if row and row[0].startswith(SFT)] == [
        [f"{SFT}-32d", "32", "0.01", worth[32]], [f"{SFT}-8d", "8", "0.00", worth[8]]
    ]  # fmt: skip
    page = (home / "results" / "report.html").read_text()
    assert "<th>dimensions</th><th>index, MB</th><th>nDCG@10</th>" in page
    assert re.search(rf"<td>{SFT}-8d</td><td>8</td><td>0.00</td><td>(<b>)?{worth[8]}", page)
    assert f"{SFT}-8d against {SFT}-32d" in page
    card = (stage1 / "README.md").read_text()
    assert "8 dimensions" in card
    assert not (home / "results" / f"{SFT}_tiny_test.json").exists()


def test_a_length_that_the_second_encoder_lacks_is_said_before_the_first_one_embeds(stage1, tiny_encoder, tmp_path, run_script):
    from transformers import AutoConfig, AutoModel

    narrow = shutil.copytree(tiny_encoder, tmp_path / "narrow")
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_encoder, hidden_size=8)).save_pretrained(narrow)
    code, out, err = run_script("evaluate.py", SFT, narrow, "tiny", "--dim", "32,4", "--device", "cpu")
    assert (code, "--dim, --dims: 32 is more than the 8 dimensions of narrow" in err) == (2, True), err
    assert "embed" not in out
