"""Training, retrieval, stage 2 and evaluation: the real scripts on a tiny real input."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, SFT, digest, library, load_script, log_of, write_jsonl

from syntriever.data import dataset
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.report import metrics
from syntriever.train import batching, journal, loop

# --- batches


@pytest.mark.parametrize(("sizes", "batch"), [([10] * 7, 4), ([1] * 23, 5), ([3, 1, 1, 9, 2], 4), ([1], 8)])
def test_batches_use_every_row_once_and_no_query_twice(sizes, batch):
    query_ids = [f"q{number}" for number, size in enumerate(sizes) for _ in range(size)]
    epochs = [batching.deal(query_ids, batch, 1, epoch) for epoch in (0, 0, 1)]
    for batches in epochs:
        assert sorted(row for rows in batches for row in rows) == list(range(len(query_ids)))
        assert len(batches) == max(-(-len(query_ids) // batch), *sizes)
        lengths = [len(rows) for rows in batches]
        assert max(lengths) <= batch
        assert max(lengths) - min(lengths) <= 1
        assert all(len({query_ids[row] for row in rows}) == len(rows) for rows in batches)
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2] or len(query_ids) == 1


def test_collator_encodes_each_text_once_and_absent_ones_not_at_all(tiny_encoder):
    model = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    query = ("query", "what is a set")
    samples = {
        0: ([query, ("document", "a finite container"), None], [1]),
        1: (
            [query, ("document", "a much longer text about something else altogether"), ("document", "a finite container")],
            [0],
        ),
    }
    batch = batching.Collator(model, samples.__getitem__, 2)([0, 1])
    places, more = batch.labels.split([3, 1], dim=1)
    assert batch.sizes == [2, 1]
    assert more.flatten().tolist() == [1, 0]
    assert places[0, 2] == -1
    assert places[0, 0] == places[1, 0]
    assert places[0, 1] == places[1, 2]

    _, parts = loop.backward(model.eval(), batch, lambda embeddings, labels: (embeddings.sum(), {"all": embeddings}), 0)
    embeddings = parts["all"]
    expected = library(model, ["what is a set"], "query"), library(model, ["a finite container"], "document")
    for place, vector in zip((places[0, 0], places[0, 1]), expected, strict=True):
        np.testing.assert_allclose(embeddings[place].numpy(), vector[0], atol=1e-6)


# --- stage 1


def test_stage1_makes_a_checkpoint_that_the_libraries_load(stage1, tiny_encoder):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    model = SentenceTransformer(str(stage1), device="cpu")
    assert model.prompts["query"] == "query: "
    assert model.prompts["document"] == "passage: "
    ours = model.encode_query("how to sort a list")
    encoder, tokenizer = AutoModel.from_pretrained(stage1), AutoTokenizer.from_pretrained(stage1)
    inputs = tokenizer("query: how to sort a list", return_tensors="pt")
    with torch.no_grad():
        mean = encoder(**inputs).last_hidden_state.mean(1)
    np.testing.assert_allclose(torch.nn.functional.normalize(mean).numpy()[0], ours, atol=1e-5)
    assert not np.allclose(ours, SentenceTransformer(str(tiny_encoder), device="cpu").encode("query: how to sort a list"))
    assert {"run.json", "log.jsonl", "loss.png", "README.md", "model.safetensors", "modules.json"} <= set(os.listdir(stage1))
    assert not [name for name in os.listdir(stage1.parent) if name.endswith((".tmp", ".old"))]


def test_stage1_records_what_it_did(stage1, home):
    record = json.loads((stage1 / "run.json").read_text())
    source = home / "datasets" / "tiny_synthetic.jsonl"
    assert record["inputs"]["datasets/tiny_synthetic.jsonl"]["sha256"] == digest(source)
    assert record["options"]["loss"] == "snn"
    assert record["options"]["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"] == torch.__version__
    assert record["complete"]
    assert record["results"]["steps"] == 6
    steps = [row for row in log_of(stage1) if "loss" in row]
    for row in steps:
        assert row["loss"] == pytest.approx(row["denominator"] - row["numerator"], abs=1e-3)
        assert 0 < row["gold_share"] < 1
        assert 0 <= row["gold_accuracy"] <= 1
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["epoch"] for row in log_of(stage1) if "dev_ndcg@10" in row] == [0, 1, 2]


def test_the_best_epoch_on_dev_is_kept(stage1):
    record = json.loads((stage1 / "run.json").read_text())
    dev = {row["epoch"]: row["dev_ndcg@10"] for row in log_of(stage1) if "dev_ndcg@10" in row}
    del dev[0]
    assert record["results"]["dev_ndcg_at_10"] == max(dev.values())
    assert dev[record["results"]["best_epoch"]] == max(dev.values())
    model = models.load(models.ModelRef("x", str(stage1)), "cpu")
    args = load_script("train_stage1.py").parse_args(["e5", "tiny", "--max-length", "32"])
    assert metrics.mean(journal.dev_score("tiny", Corpus("tiny"), args)(model)) == pytest.approx(max(dev.values()), abs=1e-6)


def test_same_seed_same_weights_and_another_seed_others(stage1, tiny_encoder, run_script):
    first = digest(stage1 / "model.safetensors")
    assert run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", "snn", "--epochs", 2, *FAST)[0] == 0
    assert digest(stage1 / "model.safetensors") == first
    assert run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", "snn", "--epochs", 2, "--seed", 1, *FAST)[0] == 0
    assert digest(stage1 / "model.safetensors") != first


@pytest.mark.parametrize("option", ["infonce", "cluster", "authors"])
def test_every_loss_trains(home, tiny_encoder, run_script, option):
    code, out, err = run_script("train_stage1.py", tiny_encoder, "tiny", "--epochs", 1, "--loss", option, "--name", option, *FAST)
    assert code == 0, err
    assert (home / "output" / f"{option}-sft-tiny" / "model.safetensors").is_file()


def test_ablation_switches_change_the_samples():
    script = load_script("train_stage1.py")
    row = {"positive": "p", "cot": "c", "negative": "n", "verified": False}
    plain = script.parse_args(["e5", "tiny"])
    assert script.synthetic_texts(row, plain) == (["p", "c", "n"], 0)
    assert script.synthetic_texts(None, plain) == ([None] * 3, 0)
    assert script.synthetic_texts(row, script.parse_args(["e5", "tiny", "--no-cot"])) == (["p", None, "n"], 0)
    only_cot = script.parse_args(["e5", "tiny", "--no-positive", "--no-negative"])
    assert script.synthetic_texts(row, only_cot) == ([None, "c", None], 0)
    assert script.synthetic_texts(row, script.parse_args(["e5", "tiny", "--no-relabel"])) == (["p", "c", "n"], 1)
    assert (plain.loss, plain.lr, plain.no_mask_known_positives) == (None, None, False)
    paper = script.parse_args(["e5", "tiny", "--paper", "--lr", "3e-5"])
    assert (paper.loss, paper.batch_size, paper.lr, paper.no_mask_known_positives) == ("snn", 60, 3e-5, True)


def test_no_synthetic_needs_no_synthetic_file(home, tiny_encoder, run_script):
    (home / "datasets" / "tiny_synthetic.jsonl").unlink()
    assert run_script("train_stage1.py", tiny_encoder, "tiny", "--epochs", 1, "--no-synthetic", *FAST)[0] == 0


def test_a_loss_that_is_not_finite_stops_at_once(stage1, home, tiny_encoder, run_script, monkeypatch):
    before = digest(stage1 / "model.safetensors")
    script = load_script("train_stage1.py")
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == 3 else 1.0)

    real = script.snn_of
    monkeypatch.setitem(script.LOSSES, "snn", broken)
    code, out, err = run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", "snn", "--epochs", 2, *FAST)
    assert code == 1
    assert len(calls) == 3
    assert "loss is nan at step 3" in err
    bad = json.loads((home / "output" / f"{SFT}-tiny.bad-batch.json").read_text())
    assert len(bad["query_ids"]) == 12
    assert digest(stage1 / "model.safetensors") == before


# --- stage 2


@pytest.fixture
def preferences(stage1, home):
    """Every training query prefers its own passage to three others."""
    _, qrels = dataset.load_split("tiny", "train")
    gold = [next(iter(judged)) for judged in qrels.values()]
    rows = [
        {"query_id": query, "preferred_id": gold[n], "rejected_id": gold[(n + step) % len(gold)], "shown": [], "verdicts": []}
        for n, query in enumerate(qrels)
        for step in (1, 2, 3)
    ]
    write_jsonl(home / "stage2" / f"{SFT}_tiny_preferences.jsonl", rows)
    return rows


def test_stage2_learns_the_preferences_from_a_zero_kl(stage1, home, preferences, run_script):
    before = digest(stage1 / "model.safetensors")
    code, out, err = run_script("train_stage2.py", SFT, "tiny", "--epochs", 4, *FAST)
    assert code == 0, err
    final = home / "output" / "e5-small-tiny-final-tiny"
    steps = [row for row in log_of(final) if "loss" in row]
    for row in steps:
        assert row["loss"] == pytest.approx(row["preference"] + 0.1 * row["kl"], abs=2e-3)
        assert row["kl"] >= -1e-6
    # Learning rate is still 0 in the first step of the warm-up: the model is the reference.
    first = next(row["kl"] for row in steps if row["step"] == steps[0]["step"])
    assert first < steps[-1]["kl"]
    assert steps[-1]["preference"] < steps[0]["preference"]
    assert digest(stage1 / "model.safetensors") == before
    assert not [path for path in (home / "output").iterdir() if path.name.startswith(".") and path.is_dir()]


def test_stage2_kl_is_zero_before_any_step(stage1, home, preferences, run_script):
    """One step over all queries: the logged KL is that of the untouched model."""
    args = ["--epochs", 1, *FAST, "--batch-size", "500"]
    assert run_script("train_stage2.py", SFT, "tiny", *args)[0] == 0
    first = next(row for row in log_of(home / "output" / "e5-small-tiny-final-tiny") if "kl" in row)
    assert first["step"] == 1
    assert first["kl"] == pytest.approx(0, abs=1e-5)


def test_beta_zero_and_bradley_terry(stage1, home, preferences, run_script):
    args = ["--epochs", 1, "--beta", 0, "--loss", "bradley-terry", *FAST]
    assert run_script("train_stage2.py", SFT, "tiny", *args)[0] == 0
    for row in log_of(home / "output" / "e5-small-tiny-final-tiny"):
        if "loss" in row:
            assert row["loss"] == pytest.approx(row["preference"], abs=1e-3)


# --- bad input: exit 2, a message that names what is wrong, nothing heavy loaded


BAD = [
    (["train_stage1.py", "minilm", "nosuch"], "unknown dataset"),
    (["train_stage1.py", "nosuch", "tiny"], "unknown model"),
    (["train_stage1.py", "minilm", "../tiny"], "dataset name"),
    (["train_stage1.py", "minilm", "tiny", "--epochs", "0"], "--epochs must be positive"),
    (["train_stage1.py", "minilm", "tiny", "--temperature", "nan"], "--temperature must be positive"),
    (["train_stage1.py", "minilm", "tiny", "--bogus"], "unrecognized arguments"),
    (["retrieval.py", "minilm-sft", "tiny"], "python train_stage1.py minilm tiny"),
    (["retrieval.py", "minilm", "tiny", "--top-k", "61"], "has 60 passages"),
    (["stage2/parse_comparison.py", "tiny", "--model", "minilm"], "python retrieval.py minilm tiny"),
    (["stage2/parse_comparison.py", "tiny", "--model", "minilm-sft"], "python train_stage1.py minilm tiny"),
    (["train_stage2.py", "minilm-sft", "tiny"], "python train_stage1.py minilm tiny"),
    (["evaluate.py", "minilm-final", "tiny"], "python train_stage2.py minilm-sft tiny"),
    (["evaluate.py", "minilm"], "at least one model and one dataset"),
    (["evaluate.py", "minilm", "tiny", "--split", "nosuch"], "this dataset has: dev, test, train"),
    (["evaluate.py", "minilm", "tiny", "--ks", "1,61"], "has 60 passages"),
    (["evaluate.py", "minilm", "tiny", "--ks", "ten"], "--ks: ten: expected whole numbers"),
    (["datasets/parse_synthetic.py", "tiny", "--llm", "gpt-4o"], "OPENAI_API_KEY is not set"),
    (["datasets/parse_synthetic.py", "tiny", "--limit", "0"], "--limit must be positive, not 0"),
    (["datasets/parse_synthetic.py", "tiny", "--max-tokens", "-5"], "--max-tokens must be positive, not -5"),
    (
        ["train_stage2.py", "minilm", "tiny", "--judgements", "llm", "--preferences", f"{ROOT}/Makefile"],
        "--preferences: is for --jud",
    ),
    (["datasets/parse_synthetic.py", "pydocs"], "python datasets/build_pydocs.py"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_exits_2_and_says_what_to_do(home, run_script, monkeypatch, command, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    code, out, err = run_script(*command)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("bad", ["", "{not json}\n", '{"query_id": "q"}\n', '{"query_id": "q", "cot": NaN}\n'])
def test_a_bad_synthetic_file_is_named_with_its_line(home, tiny_encoder, run_script, bad):
    path = home / "datasets" / "tiny_synthetic.jsonl"
    path.write_text(path.read_text() + bad if bad else bad)
    code, out, err = run_script("train_stage1.py", tiny_encoder, "tiny", *FAST)
    if bad:
        assert code == 2
        assert "datasets/tiny_synthetic.jsonl:31: " in err
    else:
        assert code == 2
        assert "is empty" in err


def test_a_stale_stage_is_refused(stage1, home, run_script):
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu")
    assert code == 0, err
    path = home / "datasets" / "tiny_synthetic.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:-1]))
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu")
    assert code == 2
    assert "datasets/tiny_synthetic.jsonl has changed" in err
    assert "python train_stage1.py" in err
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu", "--force")
    assert code == 0, err


def test_status_and_refusals_name_the_setting_that_has_changed(stage1, home, tiny_encoder, preferences, run_script):
    def status():
        code, out, err = run_script("syntriever/status.py", "tiny")
        assert code == 0, err
        lines = out.rstrip().splitlines()
        return {line.split()[1]: line for line in lines if line and line.split()[0] in ("fresh", "stale", "missing")}, lines[-1]

    base, top = SFT.removesuffix("-sft"), f"stage2/{SFT}_tiny_top100.jsonl"
    retrieve = ("retrieval.py", SFT, "tiny", "--device", "cpu")
    found, then = status()
    assert [line.split()[0] for line in found.values()] == ["fresh", "fresh", "fresh", "missing", "fresh", "missing", "missing"]
    assert then.endswith(f"python retrieval.py {SFT} tiny")
    (home / "output" / f".{base}-final-tiny.tmp").mkdir()
    assert "--resume" in status()[0][f"output/{base}-final-tiny"]
    (home / "output" / ".begun-sft-tiny.tmp").mkdir()  # an interrupted run is of an encoder, too
    assert "output/begun-sft-tiny" in (both := status()[0])
    assert f"output/{base}-sft-tiny/" in both
    (home / "output" / ".begun-sft-tiny.tmp").rmdir()
    code, _, err = run_script(*retrieve, "--top-k", 8)
    assert code == 0, err
    (home / "stage2" / f"{SFT}_tiny_top8.jsonl").rename(home / top)
    (home / "stage2" / f"{SFT}_tiny_top8.jsonl.run.json").rename(home / f"{top}.run.json")
    assert status()[0][top] == f"fresh    {top}"

    code, _, err = run_script("train_stage1.py", tiny_encoder, "tiny", "--loss", "infonce", "--epochs", 1, *FAST)
    assert code == 0, err
    setting = "loss was 'snn' and is now 'infonce'; epochs was 2.0 and is now 1.0"
    found, then = status()
    assert found[top].startswith("stale")
    assert setting in found[top]
    assert then.endswith(f"python retrieval.py {SFT} tiny --device cpu --top-k 8")
    compare = ("stage2/parse_comparison.py", "tiny", "--model", SFT, "--k", 3, "--llm", "replay")
    code, _, err = run_script(*compare)
    assert code == 2
    assert setting in err
    code, _, err = run_script("train_stage2.py", SFT, "tiny", "--epochs", 1, *FAST)  # the preferences are the user's own
    assert code == 0, err


# --- the commands as typed, from three working directories


def test_the_commands_run_from_anywhere(home, tiny_encoder, preferences, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    env = {**os.environ, "SYNTRIEVER_HOME": str(home)}
    commands = [
        (ROOT, [ROOT / "train_stage1.py", tiny_encoder, "tiny", "--epochs", 1, *FAST]),
        (elsewhere, [ROOT / "retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu"]),
        (ROOT / "stage2", ["../train_stage2.py", SFT, "tiny", "--epochs", 1, *FAST]),
        (ROOT / "datasets", ["../evaluate.py", SFT, "e5-small-tiny-final", "tiny", "--ks", "10", "--device", "cpu"]),
    ]
    for folder, command in commands:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert not list(elsewhere.iterdir())
