"""Encoding, search and evaluation: the real scripts and libraries on a tiny real input."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, SFT, digest, library, write_jsonl

from syntriever.data import dataset, download
from syntriever.data.corpus import Corpus
from syntriever.encode import models, onnx_graph, search, shards
from syntriever.encode.encoder import Encoder
from syntriever.errors import BadInput, Failed
from syntriever.report import hub, metrics


@pytest.fixture
def model(tiny_encoder):
    return models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")


@pytest.fixture
def corpus(home):
    return Corpus("tiny")


def brute_force(model, corpus, queries):
    return library(model, queries, "query") @ library(model, corpus.texts(), "document").T


# --- encoding


@pytest.mark.parametrize("budget", [1, 50, 300, 100_000])
def test_vectors_are_those_of_the_library_whatever_the_budget(model, docstrings, budget):
    texts = [passage for _, _, passage in docstrings] + [""]
    for kind in ("query", "document"):
        made = Encoder(model, batch_tokens=budget)(texts, kind)
        np.testing.assert_allclose(made, library(model, texts, kind), atol=1e-6)


def test_any_text_has_a_finite_unit_vector(tiny_encoder):
    model = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    texts = ["", " \n", "\0", "word " * 200_000, "a" * 1_000_000, "\u2028", "\U0001f600" * 9]
    for kind in ("query", "document"):
        vectors = Encoder(model)(texts, kind)
        assert np.isfinite(vectors).all()
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_no_batch_is_over_the_budget_and_little_is_padded(model, docstrings, monkeypatch):
    encoder = Encoder(model, batch_tokens=200)
    shapes, real = [], encoder._forward
    monkeypatch.setattr(encoder, "_forward", lambda tokens: shapes.append(tokens["attention_mask"]) or real(tokens))
    encoder([passage for _, _, passage in docstrings], "document")
    assert max(mask.numel() for mask in shapes) <= 200
    assert [mask.shape[1] for mask in shapes] == sorted((mask.shape[1] for mask in shapes), reverse=True)
    assert sum(mask.sum() for mask in shapes) > 0.9 * sum(mask.numel() for mask in shapes)


def test_out_of_memory_halves_the_batch_and_keeps_the_vectors(model, docstrings, monkeypatch, capsys):
    texts = [passage for _, _, passage in docstrings]
    expected = Encoder(model)(texts, "document")
    encoder = Encoder(model, batch_tokens=2_000)
    sizes, real = [], encoder._forward

    def small(tokens):
        sizes.append(tokens["input_ids"].numel())
        if sizes[-1] > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(tokens)

    monkeypatch.setattr(encoder, "_forward", small)
    np.testing.assert_allclose(encoder(texts, "document"), expected, atol=1e-5)
    failed = [size for size in sizes if size > 400]
    assert 1 <= len(failed) <= 3  # the smaller budget is kept for the batches after
    assert f"--batch-tokens {encoder.budget}" in capsys.readouterr().out


def test_a_text_that_never_fits_is_a_failure_with_advice(model, monkeypatch):
    encoder = Encoder(model)
    monkeypatch.setattr(encoder, "_forward", lambda tokens: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(Failed, match=r"single text of \d+ tokens; lower --max-length"):
        encoder(["a text", "another"], "document")
    monkeypatch.setattr(encoder, "_forward", lambda tokens: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        encoder(["a text"], "document")


@pytest.mark.parametrize(("backend", "cosine"), [("onnx", 0.999999), ("onnx-int8", 0.98), ("compile", 0.999999)])
def test_backends_give_the_same_vectors(tiny_encoder, docstrings, backend, cosine):
    model = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    texts = [passage for _, _, passage in docstrings]
    expected = library(model, texts, "document")
    encoder = Encoder(model, backend, 300)
    made = encoder(texts, "document")
    assert (made * expected).sum(1).min() > cosine
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert encoder.settings()["backend"] == backend
    assert not any(module.training for module in model.modules())
    if backend != "compile":  # the model itself is as before
        np.testing.assert_allclose(library(model, texts[:3], "document"), expected[:3], atol=1e-6)


def test_auto_takes_onnx_where_that_pays_and_never_fails(home, tiny_encoder, monkeypatch, capsys):
    ref = models.resolve(str(tiny_encoder), "tiny")
    corpus, folders = Corpus("tiny"), []
    broken = BadInput("--backend onnx: this encoder cannot be exported (no symbol); use --backend torch")

    def embed(backend, worth=10, error=None):
        monkeypatch.setattr("syntriever.encode.encoder.WORTH_AN_EXPORT", worth)
        with monkeypatch.context() as patch:
            if error:
                patch.setattr(onnx_graph, "session", lambda *_: (_ for _ in ()).throw(error))
            encoder = Encoder(models.load(ref, "cpu"), backend)
            made = shards.embed(encoder, corpus, home / f"{backend}-{worth}-{bool(error)}")
        folders.append(made.folder.name)
        return made.shard(0), encoder._forward == encoder._torch, capsys.readouterr().out

    expected, *_ = embed("torch")
    vectors, by_torch, said = embed("auto")
    assert not by_torch
    assert "--backend auto: onnx" in said
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    for given, why in (
        ({"worth": 10_000}, "fewer than 10,000 passages"),
        ({"error": broken}, "this encoder cannot be exported (no symbol)"),
    ):
        vectors, by_torch, said = embed("auto", **given)
        assert by_torch
        assert f"--backend auto: torch ({why}" in said
        np.testing.assert_array_equal(vectors, expected)
    assert len(set(folders)) == 1  # what torch has encoded, auto reads
    assert "note:" not in embed("auto")[2]  # nothing to encode, nothing to choose


def test_late_interaction_goes_on_with_half_the_texts_when_memory_runs_out(tiny_colbert, docstrings, monkeypatch):
    model = models.load(models.resolve(str(tiny_colbert), "tiny"), "cpu")
    texts = [passage for _, _, passage in docstrings]
    expected = Encoder(model)(texts, "document")
    sizes, real = [], model.encode

    def small(*args, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 3:
            raise MemoryError
        return real(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(model, "encode", small)
    longest = models.longest(model, "document")
    for made, tokens in zip(Encoder(model, batch_tokens=12 * longest)(texts, "document"), expected, strict=True):
        np.testing.assert_allclose(made, tokens, atol=1e-5)
    assert sizes == [12, 6, 3]


def test_lengths_and_masks_of_late_interaction_have_embeddings_of_their_own(tiny_colbert):
    model = models.load(models.resolve(str(tiny_colbert), "tiny"), "cpu")
    seen = [Encoder(model).settings()]
    model[0].document_length = 7
    seen.append(Encoder(model).settings())
    (mask,) = [module for module in model if "skiplist_words" in module.get_config_dict()]
    mask.skiplist_words = ["other"]
    seen.append(Encoder(model).settings())
    assert len({json.dumps(one) for one in seen}) == 3


def test_pooling_without_the_prompt_is_refused(model, tmp_path):
    folder = tmp_path / "e5-small-other"
    models.save(model, folder, "")
    (config,) = folder.glob("*_Pooling/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"include_prompt": False}))
    with pytest.raises(BadInput, match="include_prompt"):
        models.load(models.resolve(str(folder), "tiny"), "cpu")


def test_an_export_that_goes_wrong_is_refused(model, monkeypatch):
    import onnxruntime

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no symbol for aten::roll\nmore")))
        with pytest.raises(BadInput, match=r"cannot be exported \(no symbol for aten::roll\); use --backend torch"):
            onnx_graph.session(model, quantize=False)

    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *a: [-real(*a)[0]])
    with pytest.raises(BadInput, match="does not survive the export"):
        onnx_graph.session(model, quantize=False)


# --- shards


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 7)
    monkeypatch.setattr(search, "BLOCK", 3)


@pytest.mark.parametrize("shard", [7, 25, 60, 1000])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_sharded_search_equals_brute_force(home, model, corpus, monkeypatch, shard, block):
    monkeypatch.setattr(shards, "SHARD", shard)
    monkeypatch.setattr(search, "BLOCK", block)
    queries = dataset.load_queries("tiny")
    scores = brute_force(model, corpus, list(queries.values()))
    for row, (_, found) in zip(scores, search.top_k(Encoder(model), corpus, home / "e", queries, 10), strict=True):
        positions = [corpus.position(passage) for passage, _ in found]
        assert len(set(positions)) == 10
        # Passages closer than rounding may change places, so their scores are compared.
        np.testing.assert_allclose(row[positions], np.sort(row)[::-1][:10], atol=1e-5)
        np.testing.assert_allclose([score for _, score in found], row[positions], atol=1e-5)


def test_float16_shards_are_half_as_large_and_find_the_same(home, model, corpus, small_shards):
    queries = dataset.load_queries("tiny")
    full, half = (dict(search.top_k(Encoder(model), corpus, home / dtype, queries, 5, dtype)) for dtype in ("float32", "float16"))
    for query in queries:
        np.testing.assert_allclose([s for _, s in half[query]], [s for _, s in full[query]], atol=2e-3)
    sizes = [sum(np.load(path).nbytes for path in (home / dtype).glob("*/*.npy")) for dtype in ("float32", "float16")]
    assert sizes == [60 * 32 * 4, 60 * 32 * 2]


def test_only_missing_shards_are_encoded_and_other_settings_start_anew(home, model, corpus, monkeypatch, capsys):
    monkeypatch.setattr(shards, "SHARD", 25)
    encoded = []
    real = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts, *a: encoded.append(len(texts)) or real(self, texts, *a))
    folder = home / "embeddings"

    def embed(**options):
        encoded.clear()
        shards.embed(Encoder(model), corpus, folder, **options)
        return sum(encoded)

    assert embed() == 60
    before = {path.name: digest(path) for path in folder.glob("*/*.npy")}
    assert len(before) == 3
    sorted(folder.glob("*/*.npy"))[1].unlink()
    assert embed() == 25
    assert {path.name: digest(path) for path in folder.glob("*/*.npy")} == before
    assert embed() == 0
    weight = next(model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1e-3  # same shapes, other weights
    capsys.readouterr()
    assert embed() == 60
    assert "stays; it was made with another model\n" in capsys.readouterr().out
    _, other = sorted(folder.glob("*/embeddings.json"), key=lambda path: path.stat().st_mtime_ns)
    own_length, model.max_seq_length = model.max_seq_length, 20
    assert embed() == 60
    assert "another max_length\n" in capsys.readouterr().out
    assert embed(dtype="float16") == 60
    assert "another dtype\n" in capsys.readouterr().out
    model.prompts["query"] = "other: "  # decides nothing about a passage
    assert embed(dtype="float16") == 0
    model.prompts["document"] = "text: "
    assert embed(dtype="float16") == 60
    assert "another prefix\n" in capsys.readouterr().out
    model.max_seq_length, model.prompts["document"] = own_length, "passage: "
    assert embed() == 0  # those of the first settings are still there
    other.write_text("{torn")
    assert embed() == 60
    assert "is not what its name says; encoding anew" in capsys.readouterr().out
    model[0].auto_model.config.layer_norm_eps *= 2
    assert embed() == 60
    model.tokenizer.add_tokens(["zzyzx"])
    assert embed() == 60


def test_a_shard_that_is_not_what_the_sidecar_says_is_named(home, model, corpus, small_shards):
    made = shards.embed(Encoder(model), corpus, home / "e")
    path = made.path(14)
    whole = path.read_bytes()
    np.save(path, np.zeros((7, 31), np.float32))
    with pytest.raises(BadInput, match=r"000000000014\.npy.*is not what its sidecar says; delete it"):
        search.exact(made, np.zeros((1, 32), np.float32), 5)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"000000000014\.npy: not a shard"):
        search.exact(made, np.zeros((1, 32), np.float32), 5)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)  # a pickle is not opened
    with pytest.raises(BadInput, match="not a shard"):
        search.exact(made, np.zeros((1, 32), np.float32), 5)


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
sys.argv = ["retrieval.py", {model!r}, "tiny", "--top-k", "8", "--device", "cpu"]
from syntriever.encode import shards
from syntriever.run import cli
from syntriever.encode.encoder import Encoder
import retrieval
shards.SHARD = 7
real = Encoder.__call__
def slow(self, *a):
    time.sleep(0.4)
    return real(self, *a)
Encoder.__call__ = slow
sys.exit(cli.run(retrieval.main, retrieval.parse_args))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_while_encoding_costs_one_shard(home, tiny_encoder, run_script, monkeypatch, number):
    """The run of the killed and resumed command equals the undisturbed one, byte for byte."""
    monkeypatch.setattr(shards, "SHARD", 7)
    env = {**os.environ, "SYNTRIEVER_HOME": str(home)}
    command = [sys.executable, "-c", SLOW.format(root=str(ROOT), model=str(tiny_encoder))]
    folder, top = home / "output" / "e5-small-tiny" / "embeddings" / "tiny", home / "stage2" / "e5-small-tiny_tiny_top8.jsonl"
    # A shell that starts tests in the background may have switched Ctrl-C off for its children.
    process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*/0*.npy"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("*/0*.npy")}
    assert 3 <= len(there) < 9
    assert not top.exists()
    again = ["retrieval.py", tiny_encoder, "tiny", "--top-k", 8, "--device", "cpu"]
    assert run_script(*again)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*/0*.npy") if path.name in there} == there
    assert len(list(folder.glob("*/0*.npy"))) == 9
    resumed = top.read_bytes()
    shutil.rmtree(folder)
    assert run_script(*again)[0] == 0
    assert top.read_bytes() == resumed


@pytest.mark.parametrize("options", [[], ["--fuse"]])
def test_two_processes_share_the_shards_and_find_the_same(home, tiny_encoder, tmp_path, run_script, monkeypatch, options):
    monkeypatch.setattr(shards, "SHARD", 7)
    env = {**os.environ, "SYNTRIEVER_HOME": str(home)}
    script = tmp_path / "run.py"
    script.write_text(SLOW.format(root=str(ROOT), model=str(tiny_encoder)).replace('"cpu"', f'"cpu", *{options}'))
    folder, top = home / "output" / "e5-small-tiny" / "embeddings" / "tiny", home / "stage2" / "e5-small-tiny_tiny_top8.jsonl"
    assert run_script("retrieval.py", tiny_encoder, "tiny", "--top-k", 8, "--device", "cpu", *options)[0] == 0
    alone = [json.loads(line) for line in top.read_text().splitlines()]
    made = {path.relative_to(folder): np.load(path) for path in folder.glob("*/0*.npy")}
    shutil.rmtree(folder)
    top.unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote  stage2/") == 1
    assert {path.relative_to(folder) for path in folder.glob("*/0*.npy")} == made.keys()
    for name, vectors in made.items():
        np.testing.assert_allclose(np.load(folder / name), vectors, atol=1e-6)
    together = [json.loads(line) for line in top.read_text().splitlines()]
    assert [row["query_id"] for row in together] == [row["query_id"] for row in alone]
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(*([p["score"] for p in row["passages"]] for row in (ours, theirs)), atol=2e-6)


# --- search


def test_search_on_the_device_equals_faiss():
    rng = np.random.default_rng(0)
    queries, block = (rng.standard_normal((n, 16), np.float32) for n in (37, 200))
    ours, theirs = search._on_device(queries, block, 9, "cpu", at_a_time=10), search._best_of_block(queries, block, 9, "cpu")
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_equal_scores_are_ordered_as_trec_eval_orders_them(home, model, corpus, small_shards):
    """Passages with one and the same text, in shards of their own."""
    rows = [
        {"_id": f"{name}", "title": "", "text": "the same text"} for name in ("b", "a", "d", "c", "e", "f", "g", "h", "i", "Z")
    ]
    write_jsonl(home / "datasets" / "same" / "corpus.jsonl", rows)
    ((_, hits),) = search.top_k(Encoder(model), Corpus("same"), home / "e", {"q": "text"}, 10)
    ids = [passage for passage, _ in hits]
    assert len({np.float32(score) for _, score in hits}) > 1 or ids == sorted(ids, reverse=True)
    run = {"q": dict(hits)}
    for relevant in ids:
        ((value,),) = ([*metrics.evaluate({"q": {relevant: 1}}, run, (10,))["MRR@10"].values()],)
        assert value == pytest.approx(1 / (ids.index(relevant) + 1))


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16", "Flat", "IVF4,SQ8"])
def test_an_index_looks_further_until_it_finds_what_is_asked(stage1, run_script, factory):
    args = ("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu", "--index", factory, "--recall", 0.9)
    code, out, err = run_script(*args)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "of the exact top 8" in line]
    assert float(line.split("finds ")[1].split()[0]) >= 0.9
    assert ("nprobe" in line) == factory.startswith("IVF")
    first = (stage1.parents[1] / "stage2" / f"{SFT}_tiny_top8.jsonl").read_bytes()
    code, out, err = run_script(*args)
    assert code == 0, err
    assert "index.faiss, made before" in out
    assert (stage1.parents[1] / "stage2" / f"{SFT}_tiny_top8.jsonl").read_bytes() == first


def test_an_index_of_other_embeddings_or_cut_short_is_not_read(stage1, home, run_script, monkeypatch):
    import faiss

    args = ("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu", "--index", "IVF4,Flat")
    assert run_script(*args)[0] == 0
    opened = []
    real = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda *a: opened.append(a) or real(*a))
    assert run_script(*args)[0] == 0
    assert len(opened) == 1
    (index,) = (stage1 / "embeddings" / "tiny").glob("*/index.faiss")
    index.write_bytes(index.read_bytes()[:-10])
    for change in ((), ("--seed", 1), ("--max-length", 20), ("--max-length", 20, "--dtype", "float16")):
        code, out, err = run_script(*args, *change)
        assert code == 0, err
        assert "index.faiss, made before" not in out
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "Nonsense7"], "'Nonsense7' is not a FAISS index-factory string for 32 dimensions"),
        (["--top-k", "0"], "--top-k 0"),
        (["--recall", "95"], "--recall 95 is a share"),
        (["--batch-tokens", "0"], "--batch-tokens must be positive"),
        (["--backend", "tpu"], "invalid choice"),
        (["--dim", "0"], "--dim must be positive"),
        (["--dim", "33"], "--dims: 33 is more than the 32 dimensions of e5-small-tiny-sft"),
    ],
)
def test_wrong_options_are_found_before_anything_is_encoded(stage1, run_script, options, message):
    code, out, err = run_script(
        "retrieval.py", SFT, "tiny", *options, "--device", "cpu", *([] if "--top-k" in options else ["--top-k", 8])
    )
    assert (code, message in err) == (2, True), err
    assert not (stage1 / "embeddings").exists()


def test_what_a_late_interaction_encoder_cannot_do_is_refused_before_it_is_loaded(home, tiny_colbert, run_script, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    for script, options in (
        ("retrieval.py", ["--index", "Flat"]),
        ("retrieval.py", ["--backend", "onnx"]),
        ("evaluate.py", ["--backend", "onnx"]),
        ("retrieval.py", ["--dim", "8"]),
        ("evaluate.py", ["--dim", "8"]),
        ("train_stage1.py", ["--dims", "16,8", "--loss", "snn"]),
        ("train_stage2.py", ["--dims", "16,8"]),
        ("train_stage1.py", ["--judgements", "llm"]),
        ("train_stage2.py", ["--judgements", "both"]),
        ("stage2/parse_comparison.py", ["--model", tiny_colbert, "--graded", "--llm", "replay"]),
    ):
        options += {"retrieval.py": ["--top-k", "8"], "evaluate.py": ["--ks", "5"]}.get(script, [])
        code, out, err = run_script(script, *([] if "--model" in options else [tiny_colbert]), "tiny", *options)
        assert (code, "late-interaction encoder" in err) == (2, True), err


def test_retrieval_writes_the_top_of_every_training_query(stage1, home, run_script):
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--top-k", 8, "--device", "cpu")
    assert code == 0, err
    rows = [json.loads(line) for line in (home / "stage2" / f"{SFT}_tiny_top8.jsonl").read_text().splitlines()]
    queries, qrels = dataset.load_split("tiny", "train")
    assert [row["query_id"] for row in rows] == list(queries)
    for row in rows:
        scores = [passage["score"] for passage in row["passages"]]
        assert len({passage["id"] for passage in row["passages"]}) == 8
        assert scores == sorted(scores, reverse=True)
        assert row["query"] == queries[row["query_id"]]
    assert len(list((stage1 / "embeddings" / "tiny").glob("*/embeddings.json"))) == 1


def test_a_query_from_the_shell(stage1, home, corpus, model, run_script):
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--query", "how to sort", "--top-k", 3, "--device", "cpu")
    assert code == 0, err
    trained = models.load(models.resolve(SFT, "tiny"), "cpu")
    order = np.argsort(-brute_force(trained, corpus, ["how to sort"])[0])[:3]
    assert [line.split()[-1] for line in out.splitlines() if line[:2] in ("1.", "2.", "3.")] == [corpus.id(p) for p in order]
    assert corpus.text(order[0]).split()[0] in out
    assert not (home / "stage2").exists()
    code, out, err = run_script("retrieval.py", SFT, "tiny", "--query", " ")
    assert (code, "--query is empty" in err) == (2, True)


# --- evaluation


def oracle(judged, ranked, k):
    """nDCG, MAP, Recall, P and MRR at k by their definitions."""
    gains = [max(0, judged.get(p, 0)) for p in ranked[:k]]
    ideal = sorted((max(0, grade) for grade in judged.values()), reverse=True)[:k]
    dcg = [sum(gain / math.log2(rank + 1) for rank, gain in enumerate(row, 1)) for row in (gains, ideal)]
    hits, relevant = [gain > 0 for gain in gains], sum(grade > 0 for grade in judged.values())
    precisions = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit]
    return {
        "nDCG": dcg[0] / dcg[1] if dcg[1] else 0.0,
        "MAP": sum(precisions) / relevant if relevant else 0.0,
        "Recall": sum(hits) / relevant if relevant else 0.0,
        "P": sum(hits) / k,
        "MRR": next((1 / rank for rank, hit in enumerate(hits, 1) if hit), 0.0),
    }


def test_measures_equal_their_definitions_with_ties_grades_and_missing_queries():
    rng = random.Random(7)
    passages = [f"p{number}" for number in range(60)]
    qrels = {f"q{n}": {p: rng.choice((0, 1, 1, 2, 3)) for p in rng.sample(passages, 9)} for n in range(320)}
    # Scores of one decimal: most are tied with others.
    run = {q: {p: round(rng.random(), 1) for p in rng.sample(passages, 30)} for q in list(qrels)[:300]}
    ks = (1, 3, 10, 100)
    made = metrics.evaluate(qrels, run, ks)
    for query, judged in qrels.items():
        scores = run.get(query, {})
        ranked = sorted(scores, key=lambda p: (scores[p], p), reverse=True)  # as trec_eval: then descending id
        for k in ks:
            for name, value in oracle(judged, ranked, k).items():
                assert made[f"{name}@{k}"][query] == pytest.approx(value, abs=1e-6), (query, name, k)


def test_the_run_file_gives_trec_eval_the_same_figures(stage1, home, run_script):
    import pytrec_eval

    code, out, err = run_script("evaluate.py", "bm25", SFT, "tiny", "--ks", "1,5,10", "--split", "train", "--device", "cpu")
    assert code == 0, err
    qrels = dataset.load_qrels("tiny", "train")
    for name in ("bm25", SFT):
        result = json.loads((home / "results" / f"{name}_tiny_train.json").read_text())
        with (home / "results" / f"{name}_tiny_train.trec").open() as file:
            run = pytrec_eval.parse_run(file)
        again = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.1,5,10", "map_cut.1,5,10", "recall.1,5,10"}).evaluate(run)
        for query, values in result["per_query"].items():
            for label, trec in (("nDCG", "ndcg_cut"), ("MAP", "map_cut"), ("Recall", "recall")):
                for k in (1, 5, 10):
                    assert values[f"{label}@{k}"] == pytest.approx(again.get(query, {}).get(f"{trec}_{k}", 0.0), abs=1e-6)


def test_paired_test_of_a_known_case():
    """Four queries, each better by one: of the 16 signings two are as extreme."""
    ours, theirs = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 0.0)
    test = metrics.paired_test(ours, theirs)
    assert (test["difference"], test["low"], test["high"]) == (1, 1, 1)
    assert test["p"] == pytest.approx(2 / 16, abs=0.01)
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1, 400)
    test = metrics.paired_test(dict(enumerate(values)), dict.fromkeys(range(400), 0.0))
    error = values.std(ddof=1) / 20
    assert (test["low"], test["high"]) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)
    assert test["p"] == pytest.approx(math.erfc(abs(values.mean()) / error / math.sqrt(2)), abs=0.02)


def test_evaluate_writes_measures_run_and_picture(stage1, home, tiny_encoder, run_script):
    code, out, err = run_script("evaluate.py", "bm25", str(tiny_encoder), SFT, "--ks", "1,5,10", "tiny", "--device", "cpu")
    assert code == 0, err
    for name in ("bm25", "e5-small-tiny", SFT):
        result = json.loads((home / "results" / f"{name}_tiny_test.json").read_text())
        assert result["queries"] == 12 == len(result["per_query"])
        run: metrics.Run = {}
        for line in (home / "results" / f"{name}_tiny_test.trec").read_text().splitlines():
            query, q0, passage, rank, score, tag = line.split()
            run.setdefault(query, {})[passage] = float(score)
            assert (q0, tag) == ("Q0", name)
        again = metrics.evaluate(dataset.load_qrels("tiny", "test"), run, (1, 5, 10))
        for measure, values in again.items():
            assert result["measures"][measure] == pytest.approx(metrics.mean(values), abs=1e-6)
        assert (home / "results" / f"{name}_tiny_test.png").read_bytes().startswith(b"\x89PNG")
        assert f"\n{name} " in out or f"\n{tiny_encoder}" in out
    assert result["tests"].keys() == {"bm25", str(tiny_encoder)}
    assert "two-sided p" in out


def test_models_of_one_short_name_would_overwrite_each_other(home, tiny_encoder, tmp_path, run_script):
    other = shutil.copytree(tiny_encoder, tmp_path / tiny_encoder.name)
    code, out, err = run_script("evaluate.py", tiny_encoder, other, "tiny", "--ks", "5")
    assert (code, "two models have one short name" in err) == (2, True), err
    assert not (home / "results").exists()


def test_evaluate_zero_shot_keeps_results_apart(stage1, home, docstrings, run_script):
    shutil.copytree(home / "datasets" / "tiny", home / "datasets" / "other")
    code, out, err = run_script("evaluate.py", SFT, "tiny", "other", "--trained-on", "tiny", "--ks", "10", "--device", "cpu")
    assert code == 0, err
    assert (home / "results" / f"{SFT}-tiny_other_test.json").is_file()
    assert "average" in out


def test_a_query_s_own_passage_is_left_out_only_where_the_dataset_asks(home, docstrings, run_script):
    """ArguAna's queries are passages of the corpus, under the same id."""
    for name in ("arguana", "other"):
        folder = home / "datasets" / name
        write_jsonl(folder / "corpus.jsonl", [{"_id": i, "title": "", "text": text} for i, _, text in docstrings])
        write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": text} for i, _, text in docstrings[:9]])
        (folder / "qrels").mkdir()
        rows = "".join(f"{docstrings[n][0]}\t{docstrings[n + 1][0]}\t1\n" for n in range(9))
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
        code, out, err = run_script("evaluate.py", "bm25", name, "--ks", "5")
        assert code == 0, err
        result = json.loads((home / "results" / f"bm25_{name}_test.json").read_text())
        run = [line.split() for line in (home / "results" / f"bm25_{name}_test.trec").read_text().splitlines()]
        own = [query for query, _, passage, *_ in run if query == passage]
        assert (result["own_passage_left_out"], len(own)) == ((True, 0) if name == "arguana" else (False, 9))
        assert max(sum(query == first for first, *_ in run) for query in {row[0] for row in run}) == 5
        assert ("own passage is left out" in out) == (name == "arguana")


def test_cqadupstack_is_the_mean_of_its_forums_and_counts_once(home, run_script):
    for number, forum in enumerate(download.FORUMS):
        shutil.copytree(home / "datasets" / "tiny", home / "datasets" / forum)
        path = home / "datasets" / forum / "qrels" / "test.tsv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:-number], lines[-1]] if number else lines))
    code, out, err = run_script("evaluate.py", "bm25", "cqadupstack", "tiny", "--ks", "10")
    assert code == 0, err
    values = [
        json.loads((home / "results" / f"bm25_{ds}_test.json").read_text())["measures"]["nDCG@10"] for ds in download.FORUMS
    ]
    alone = json.loads((home / "results" / "bm25_tiny_test.json").read_text())["measures"]["nDCG@10"]
    (row,) = [line.split() for line in out.split("nDCG@10 by dataset")[1].splitlines() if line.startswith("bm25")]
    mean = sum(values) / 12
    assert len(set(values)) > 3
    assert row == ["bm25", f"{mean:.4f}", f"{alone:.4f}", f"{(mean + alone) / 2:.4f}"]
    code, out, err = run_script("train_stage1.py", "minilm", "cqadupstack", "--no-synthetic")
    assert code == 2
    assert "twelve datasets: cqadupstack-android" in err


# --- the report


class Page(HTMLParser):
    """Every tag must be closed in its order, and nothing may be loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.seen = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "br", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "br", "path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.seen.append(data)


def test_the_report_is_one_page_that_escapes_what_it_shows(stage1, home, tiny_encoder, run_script):
    path = home / "datasets" / "tiny" / "corpus.jsonl"
    hostile = '</div><script>alert(1)</script><img src="http://x/"> & "quotes" '
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{**row, "text": hostile + row["text"]} for row in rows])
    code, out, err = run_script("evaluate.py", "bm25", tiny_encoder, SFT, "tiny", "--ks", "1,10", "--force", "--device", "cpu")
    assert code == 0, err
    text = (home / "results" / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert "script" not in page.tags
    seen = " ".join(page.seen)
    assert hostile in seen
    assert f"{SFT} against {tiny_encoder}" in seen
    assert "Gained most" in seen
    assert "loss curves" in text
    assert page.tags.count("circle") >= 3
    result = json.loads((home / "results" / f"{SFT}_tiny_test.json").read_text())
    assert f"{result['measures']['nDCG@10']:.4f}" in seen
    test = result["tests"][str(tiny_encoder)]
    assert f"nDCG@10 {test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p']:.4f}" in seen


# --- the model card and the Hub


def test_scores_go_into_the_model_card_once(stage1, home, run_script):
    from huggingface_hub import ModelCard
    from sentence_transformers import SentenceTransformer

    shutil.copytree(home / "datasets" / "tiny", home / "datasets" / "other")
    before = (stage1 / "README.md").read_text()
    weights = digest(stage1 / "model.safetensors")
    for names in (("tiny",), ("other", "--trained-on", "tiny"), ("tiny",)):
        code, out, err = run_script("evaluate.py", SFT, *names, "--ks", "1,10", "--device", "cpu")
        assert code == 0, err
    card = ModelCard.load(stage1 / "README.md")
    result = json.loads((home / "results" / f"{SFT}_tiny_test.json").read_text())["measures"]
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert len(found) == len(card.data.eval_results) == 10
    assert found["tiny", "nDCG@10"] == pytest.approx(result["nDCG@10"], abs=5e-5)
    assert card.text.count("## Scores") == 1
    assert f"| nDCG@10 | {round(result['nDCG@10'], 4)} |" in card.text
    assert card.text.startswith(before.split("---\n")[2].rstrip()[:200])
    assert card.data.library_name == "sentence-transformers"
    assert digest(stage1 / "model.safetensors") == weights
    SentenceTransformer(str(stage1), device="cpu")
    hub.add_scores(home / "nowhere", "tiny", "test", "", {"nDCG@10": 0.5})  # a folder without a card stays without
    assert run_script("evaluate.py", SFT, "tiny", "--ks", "1,10", "--device", "cpu", "--max-length", 20)[0] == 0
    assert len(ModelCard.load(stage1 / "README.md").data.eval_results) == 15  # a shorter text takes nothing's place


def test_what_others_wrote_into_a_model_card_stays(tmp_path):
    from huggingface_hub import ModelCard

    entry = "{task: {type: Clustering}, dataset: {type: mteb/x, name: X}, metrics: [{type: v_measure, value: high}]}"
    card = f"---\nmodel-index:\n- name: theirs\n  results: [{entry}]\n---\n# Title\n\n## Scores\n\nold\n\n## License\nfree\n"
    (tmp_path / "README.md").write_text(card)
    for value in (0.1, 0.2):
        hub.add_scores(tmp_path, "tiny", "test", "96 tokens", {"nDCG@10": value})
    text = (tmp_path / "README.md").read_text()
    made = ModelCard(text)
    assert [one.metric_value for one in made.data.eval_results] == ["high", 0.2]
    assert made.data.model_name == "theirs"
    assert text.count("## Scores\n\n| dataset |") == 1
    assert "# Title\n\n## Scores\n\nold\n\n## License\nfree" in text
    below = text + "\n# Below\n"
    (tmp_path / "README.md").write_text(below)
    hub.add_scores(tmp_path, "tiny", "test", "96 tokens", {"nDCG@10": 0.2})
    assert (tmp_path / "README.md").read_text() == below
    for broken in (
        "---\na: [\n---\nmine\n",
        "---\n- a\n---\nmine\n",
        "---\nmodel-index:\n- name: x\n  results: [{}]\n---\nmine\n",
    ):
        (tmp_path / "README.md").write_text(broken)
        hub.add_scores(tmp_path, "tiny", "test", "96 tokens", {"nDCG@10": 0.2})
        assert (tmp_path / "README.md").read_text() == broken
    assert "| X |  |  | v_measure | high |" in text
    assert "| tiny | test | 96 tokens | nDCG@10 | 0.2 |" in text


@pytest.fixture
def fake_hub():
    """The part of the Hub that an upload speaks to, on this machine: {path: bytes} of what was committed, and requests."""
    import base64
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.asked.append(f"{self.command} {self.path}")
            reply, status = {}, 200
            if self.headers.get("Authorization") != "Bearer hf_good":
                reply, status = {"error": "Invalid username or password."}, 401
            elif self.path.endswith("/auth-check/write") and server.read_only:
                reply, status = {"error": "You have read access only"}, 403
            elif self.path.endswith("/auth-check/write"):
                reply = {}
            elif self.path == "/api/repos/create":
                server.created = json.loads(body)
                reply = {"url": f"{server.url}/me/model", "id": "me/model", "name": "me/model"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                reply = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{server.url}/me/model/commit/0", "hookOutput": ""}
            made = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(made)))
            self.end_headers()
            self.wfile.write(made)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
        server.read_only = False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_push_uploads_the_checkpoint_with_its_scores_and_nothing_else(stage1, home, fake_hub, tmp_path_factory, run_script):
    env = {**os.environ, "SYNTRIEVER_HOME": str(home), "HF_ENDPOINT": fake_hub.url, "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    env |= {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_DISABLE_XET": "1"}
    options = ["--ks", "1,10", "--device", "cpu", "--push-to-hub"]

    def evaluate(token, *names):
        command = [sys.executable, ROOT / "evaluate.py", *names, *options, "me/model"]
        return subprocess.run(command, env=env | {"HF_TOKEN": token}, capture_output=True, text=True)

    refused = evaluate("hf_bad", SFT, "tiny")
    assert refused.returncode == 2
    assert "run `hf auth login`" in refused.stderr
    assert "read " not in refused.stdout  # before any work
    fake_hub.read_only = True
    refused = evaluate("hf_good", SFT, "tiny")
    assert (refused.returncode, "may write there" in refused.stderr) == (2, True)
    fake_hub.read_only = False
    code, _, error = run_script("evaluate.py", "bm25", SFT, "tiny", *options, "me/model")
    assert (code, "takes one model" in error) == (2, True)
    assert not fake_hub.files
    done = evaluate("hf_good", SFT, "tiny")
    assert done.returncode == 0, done.stderr + done.stdout + "\n".join(fake_hub.asked)
    assert fake_hub.created["visibility"] == "private"
    assert "## Scores" in fake_hub.files["README.md"].decode()
    assert fake_hub.files["model.safetensors"] == (stage1 / "model.safetensors").read_bytes()
    assert {"modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json"} <= fake_hub.files.keys()
    assert not [path for path in fake_hub.files if path.startswith(("embeddings", "tensorboard", "."))]
