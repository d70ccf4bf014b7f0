"""The training loop: gradients in chunks and over processes, masks, lists, checkpoints, kills."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, file_size_limit, fill_home, load_script, write_jsonl
from safetensors.torch import load_file

from syntriever.encode import models, search
from syntriever.encode.encoder import Encoder
from syntriever.train import batching, journal, loop, lora

train_stage1, train_stage2 = load_script("train_stage1.py"), load_script("train_stage2.py")
TAU = 0.05


@pytest.fixture(scope="session")
def dropout_encoder(tiny_encoder, tmp_path_factory):
    """The tiny encoder, with dropout."""
    folder = tmp_path_factory.mktemp("dropout") / tiny_encoder.name
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- gradients


def batch_of(model, docstrings, rows, chunk):
    def sample(row):
        _, query, passage = docstrings[row]
        texts = [("query", query), ("document", passage), None, ("document", query), ("document", passage[:40])]
        return texts, [1, row, row]

    with models.at_length(model, 32):
        return batching.Collator(model, sample, chunk)(rows)


def snn(args=("--no-mask-known-positives",)):
    parsed = train_stage1.parse_args(["minilm", "tiny", "--loss", "snn", "--view-weight", "0.3", *args])
    return train_stage1.make_loss(parsed, [{row} for row in range(60)])


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def equal_with_and_without_caching(model, docstrings, loss):
    """The gradients of a batch, after a check that gradient caching changes neither them nor the loss."""
    found = []
    for cached in (False, True):
        batch = batch_of(model, docstrings, list(range(12)), 5)
        value, _ = loop.backward(model, batch, snn(["--loss", loss]), seed=3, cached=cached)
        found.append((value, gradients(model)))
    (plain, ours), (cached, theirs) = found
    assert cached.item() == pytest.approx(plain.item(), abs=1e-6)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    return ours


@pytest.mark.parametrize(("loss", "rank"), [("snn", 0), ("cluster", 0), ("infonce", 0), ("authors", 0), ("snn", 4)])
def test_gradient_caching_changes_no_gradient(dropout_encoder, docstrings, loss, rank):
    model = models.load(models.resolve(str(dropout_encoder), "tiny"), "cpu")
    if rank:
        lora.add(model, rank, 1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # at 0 it hides the gradient of A
                torch.nn.init.normal_(parameter)
    model.train()
    ours = equal_with_and_without_caching(model, docstrings, loss)
    assert len(ours) > 20
    # Dropout is drawn anew at each step.
    loop.backward(model, batch_of(model, docstrings, list(range(12)), 5), snn(), seed=4)
    assert any((ours[name] - grad).abs().max() > 1e-3 for name, grad in gradients(model).items())


TWO = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from syntriever.encode import models
from syntriever.run import processes
from syntriever.train import batching, loop
processes.start(None)
import test_training as t
model = models.load(models.resolve({model!r}, "tiny"), "cpu").train()
docs = json.load(open({docs!r}))
batch = t.batch_of(model, docs, list(range(12)), 5)
loss, _ = loop.backward(model, batch, t.snn([]), 3, cached={cached})
if processes.rank() == 0:
    torch.save({{"loss": loss, **t.gradients(model)}}, {out!r})
"""


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(dropout_encoder, docstrings, tmp_path, cached):
    (tmp_path / "docs.json").write_text(json.dumps(docstrings))
    names = {"tests": str(ROOT / "tests"), "root": str(ROOT), "model": str(dropout_encoder), "out": str(tmp_path / "two.pt")}
    (tmp_path / "two.py").write_text(TWO.format(**names, docs=str(tmp_path / "docs.json"), cached=cached))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "two.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    model = models.load(models.resolve(str(dropout_encoder), "tiny"), "cpu").train()
    loss, _ = loop.backward(model, batch_of(model, docstrings, list(range(12)), 5), snn([]), 3)
    assert two.pop("loss").item() == pytest.approx(loss.item(), abs=1e-5)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(two[name], grad, rtol=0, atol=1e-5)


# --- which texts are candidates


def test_no_text_counts_twice_and_no_known_passage_is_a_negative():
    """Against plain loops: rows 0 and 1 share a query, row 2 has the gold passage of row 0, row 4 lacks texts."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator, dtype=torch.float64), dim=1)
    places = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 4], [1, 6, 7, 8], [9, 10, 11, 12], [13, -1, -1, 14]])
    query = [15, 15, 16, 17, 18]
    relevant = {15: {1, 5, 9}, 16: {1}, 17: {9}, 18: {13}}
    verified = torch.tensor([True, True, False, True, False])
    known = torch.tensor([[int(gold) in relevant[q] for gold in places[:, 0]] for q in query])
    columns = [texts[places[:, kind].clamp(min=0)] for kind in range(4)]
    ignore = train_stage1.ignored_candidates(places, known)
    given = verified, TAU, places[:, 1:] >= 0, ignore
    scores, own = train_stage1.score_candidates(texts[query], *columns, *given)
    expected = 0.0
    for row, q in enumerate(query):
        gold, positive, cot, _ = places[row].tolist()
        positives = [p for p in (gold, cot, positive if verified[row] else -1) if p >= 0]
        candidates = {p for p in places.flatten().tolist() if p >= 0} - (relevant[q] - {gold})
        score = {p: float(texts[q] @ texts[p]) / TAU for p in candidates}
        total = torch.tensor([score[p] for p in sorted(candidates)], dtype=torch.float64).logsumexp(0)
        expected += float(total - torch.tensor([score[p] for p in positives], dtype=torch.float64).logsumexp(0)) / 5
    assert train_stage1.snn_of(scores, own).item() == pytest.approx(expected, abs=1e-9)


def test_some_rows_of_a_query_stay_together():
    query_ids = [f"q{n}" for n in range(40) for _ in range(1 + 9 * (n % 7 == 0))]
    assert all(batching.deal(["q"] * 10 + ["r"] * 10, 2, 1, 0, together=10))  # no empty batch
    for epoch in range(2):
        batches = batching.deal(query_ids, 12, 1, epoch, together=4)
        assert any(len({query_ids[row] for row in rows}) < len(rows) for rows in batches)
        assert max(map(len, batches)) - min(map(len, batches)) <= 4
        assert sorted(row for rows in batches for row in rows) == list(range(len(query_ids)))
        for rows in batches:
            counts = [sum(query_ids[row] == query for row in rows) for query in {query_ids[row] for row in rows}]
            assert max(counts) <= 4
    whole = batching.deal(query_ids, 12, 1, 0, together=99)
    assert all(len({b for b, rows in enumerate(whole) for row in rows if query_ids[row] == q}) == 1 for q in set(query_ids))


# --- lists


def test_lists_equal_the_pairwise_formula_over_the_same_candidates():
    generator = torch.Generator().manual_seed(1)
    query, candidates = torch.randn(3, 8, generator=generator).double(), torch.randn(9, 8, generator=generator).double()
    pairs = torch.tensor([[0, 0, 1], [0, 2, 1], [0, 0, 2], [1, 4, 3], [2, 6, 8], [2, 1, 6]])
    score = torch.nn.functional.cosine_similarity(query[:, None], candidates[None], dim=2) / TAU
    expected = 0.0
    for q, better, worse in pairs.tolist():
        judged = {c for other, *two in pairs.tolist() if other == q for c in two}
        candidates_of = [c for c in range(9) if c in (better, worse) or c not in judged]
        rest = [c for c in candidates_of if c != better]
        first = score[q, candidates_of].logsumexp(0) - score[q, better]
        expected += float(first + score[q, rest].logsumexp(0) - score[q, worse]) / len(pairs)
    scores = models.similarity(query, candidates) / TAU
    assert train_stage2.plackett_luce_of(scores, pairs).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_lists_and_pairs_agree_where_no_text_occurs_twice(beta):
    generator = torch.Generator().manual_seed(2)
    embeddings, refs = (torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1) for _ in range(2))
    labels = torch.tensor([[3 * n, 3 * n + 1, 3 * n + 2, n, 2 * n, 2 * n + 1] for n in range(4)])
    found = []
    for how in ("pairs", "lists"):
        given = ["--loss", "partial-plackett-luce", "--beta", str(beta), "--batching", how]
        args = train_stage2.parse_args(["x-sft", "tiny", *given])
        loss, parts = train_stage2.make_loss(args, (refs[:4], refs[4:]) if beta else None)(embeddings, labels)
        found.append([loss.item(), *(value.item() for value in parts.values())])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_lists_encode_each_text_once(dropout_encoder):
    """Five passages and ten pairs of a query are six texts."""
    model = models.load(models.resolve(str(dropout_encoder), "tiny"), "cpu")
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    collate = batching.Collator(
        model, lambda row: ([("query", "query"), *(("document", f"passage {n}") for n in pairs[row])], []), 16
    )
    assert sum(collate(list(range(10))).sizes) == 6


# --- checkpoints

# Starts the script of its arguments once per line of input, to be killed at that fsync or rename (0: none).
LAUNCHER = """
import os, runpy, signal, sys
import matplotlib.pyplot, sentence_transformers, torch, torch.utils.tensorboard, transformers
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(2, 1)
        torch.set_num_threads(1)
        left = int(line)
        def count(real):
            def counted(*args):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return counted
        os.fsync, os.rename = count(os.fsync), count(os.rename)
        sys.argv = sys.argv[1:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print("operations:", int(line) - left, file=sys.stderr, flush=True)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    def __init__(self, home, *argv):
        env = {**os.environ, "SYNTRIEVER_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = (home / "log").open("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "env": env}
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *map(str, argv)], text=True, bufsize=1, **pipes)

    def start(self, kill_at=0):
        self.process.stdin.write(f"{kill_at}\n")
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def said(self):
        self.log.flush()
        return (self.log.name and open(self.log.name).read()) or ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


def weights(home):
    return hashlib.sha256((home / "output" / "e5-small-tiny-sft-tiny" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def two_homes(tmp_path, docstrings):
    homes = tmp_path / "calm", tmp_path / "killed"
    for home in homes:
        fill_home(home, docstrings)
    return homes


OPTIONS = ["tiny", "--epochs", "4", "--batch-size", "6", "--max-length", "32", "--dev-pool", "5", "--save-minutes", "0"]


def test_killed_twenty_times_ends_in_the_same_weights(two_homes, dropout_encoder):
    calm, killed = two_homes
    script = [ROOT / "train_stage1.py", dropout_encoder, *OPTIONS]
    with Launcher(calm, *script) as launcher:
        launcher.start()
        assert launcher.wait() == 0, launcher.said()
    rng, kills, in_save = random.Random(5), 0, 0
    work = killed / "output" / ".e5-small-tiny-sft-tiny.tmp"
    with Launcher(killed, *script, "--resume") as launcher:
        while kills < 20:
            at_fsync = rng.randint(2, 5) if kills % 2 else 0
            process = launcher.start(at_fsync)
            if not at_fsync:
                before = {p.name for p in work.glob("checkpoint-*")} if work.exists() else set()
                end = time.monotonic() + 60
                while not work.exists() or {p.name for p in work.glob("checkpoint-*")} <= before:
                    assert time.monotonic() < end, launcher.said()
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.02)
                os.killpg(process, signal.SIGKILL)
            code = launcher.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, launcher.said()
            kills += 1
            in_save += bool(list(work.glob(".checkpoint-*.tmp")))
        launcher.start()
        assert launcher.wait() == 0, launcher.said()
    print(f"{kills} kills, {in_save} of them inside a save: {weights(killed)[:16]} = {weights(calm)[:16]}")
    assert kills == 20
    assert in_save >= 5
    assert weights(killed) == weights(calm)
    assert not work.exists()


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, signal): this process gets the signal when that step is done; None takes it back."""
    real = journal.Journal.step

    def interrupt(at, number=signal.SIGTERM):
        def step(self, done, *rest):
            real(self, done, *rest)
            if done == at:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(journal.Journal, "step", step)

    return interrupt


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


SHORT = ["--epochs", "2", "--batch-size", "6", "--max-length", "32", "--dev-pool", "5", "--lr", "1e-3"]


@pytest.mark.parametrize("more", [[], ["--lora", "4"]])
def test_sigterm_saves_and_resume_goes_on(home, dropout_encoder, run_script, interrupt, more):
    output, work = home / "output" / "e5-small-tiny-sft-tiny", home / "output" / ".e5-small-tiny-sft-tiny.tmp"
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT, *more]
    assert run_script(*command)[0] == 0
    calm = digest(output)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    interrupt(5)
    code, _, err = run_script(*command)
    assert code == 1
    assert "stopped at step 5 of 12; the same command with --resume goes on" in err
    assert digest(output) == calm  # the old output stays until the new one is complete
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-5"]
    names = [name for name in load_file(work / "checkpoint-5" / "state.safetensors") if name.startswith("model.")]
    assert all((".lora_" in name) == bool(more) for name in names)

    code, _, err = run_script(*command, "--resume", "--temperature", "0.1")
    assert code == 2
    assert "temperature was 0.05 and is now 0.1" in err
    synthetic = home / "datasets" / "tiny_synthetic.jsonl"
    rows = synthetic.read_bytes()
    synthetic.write_bytes(rows[: rows.rindex(b"{")])
    code, _, err = run_script(*command, "--resume")
    assert code == 2
    assert "datasets/tiny_synthetic.jsonl was" in err
    synthetic.write_bytes(rows)

    interrupt(9, signal.SIGINT)
    code, out, _ = run_script(*command, "--resume", "--save-minutes", "60")
    assert code == 130
    assert "resume from step 5 of 12" in out
    interrupt(None)
    assert run_script(*command, "--resume")[0] == 0
    assert digest(output) == calm
    again = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in log]
    assert not work.exists()


def test_torn_checkpoints_are_passed_over(home, dropout_encoder, run_script, interrupt):
    output, work = home / "output" / "e5-small-tiny-sft-tiny", home / "output" / ".e5-small-tiny-sft-tiny.tmp"
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT]
    assert run_script(*command)[0] == 0
    calm = digest(output)
    interrupt(5)
    assert run_script(*command)[0] == 1
    shutil.copytree(work / "checkpoint-5", work / "checkpoint-7")
    tensors = work / "checkpoint-7" / "state.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    (work / "checkpoint-8").mkdir()
    (work / "checkpoint-8" / "state.json").write_text('{"step": 8')
    interrupt(None)
    code, out, err = run_script(*command, "--resume")
    assert code == 0, err
    assert [f"checkpoint-{n} is torn; it is passed over" in out for n in (8, 7)] == [True, True]
    assert "resume from step 5 of 12" in out
    assert digest(output) == calm


def test_resume_without_an_interrupted_run_starts_from_the_beginning(home, dropout_encoder, run_script, interrupt):
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT]
    code, out, _ = run_script(*command, "--resume")
    assert code == 0
    assert "no interrupted run" in out
    interrupt(5)
    assert run_script(*command)[0] == 1
    interrupt(None)
    code, out, _ = run_script(*command)
    assert code == 0
    assert "--resume would go on with it, this starts anew" in out


@pytest.mark.parametrize("batching", [["pairs"], ["lists"], ["lists", "--lora", "4"]])
def test_stage2_resumes_to_the_same_weights(home, docstrings, dropout_encoder, run_script, interrupt, batching):
    train = docstrings[:36]
    rows = [
        {"query_id": f"q-{train[n][0]}", "preferred_id": train[n][0], "rejected_id": train[(n + d) % 36][0]}
        for n in range(36)
        for d in (1, 2)
    ]
    write_jsonl(home / "stage2" / "own.jsonl", rows)
    given = ["--preferences", home / "stage2" / "own.jsonl", "--name", "own", "--batching", *batching]
    command = ["train_stage2.py", dropout_encoder, "tiny", *SHORT, *given]
    assert run_script(*command)[0] == 0
    output = home / "output" / "own-final-tiny"
    calm = digest(output)
    interrupt(4)
    code, _, err = run_script(*command)
    assert (code, "stopped at step 4" in err) == (1, True)
    assert not list((home / "output").glob(".*.reference"))
    interrupt(None)
    assert run_script(*command, "--resume")[0] == 0
    assert digest(output) == calm


@pytest.mark.parametrize("more", [["--candidates", "8"], ["--lora", "4", "--lr", "1e-3"]])
def test_two_processes_train_the_weights_of_one(two_homes, dropout_encoder, more):
    """The real command under torchrun: one checkpoint, the same weights to rounding."""
    alone, both = two_homes
    script = [str(ROOT / "train_stage1.py"), str(dropout_encoder), *OPTIONS, *more]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    found = []
    for home, command in ((alone, script), (both, [*launch, *script])):
        env = {**os.environ, "SYNTRIEVER_HOME": str(home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("next:  python retrieval.py") == 1
        found.append(load_file(home / "output" / "e5-small-tiny-sft-tiny" / "model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=2e-5)


def test_killed_while_the_finished_checkpoint_is_put_in_place(two_homes, dropout_encoder):
    """At each of the last file operations, with an older output there; afterwards that or the new one is complete."""
    home = two_homes[0]
    output = home / "output" / "e5-small-tiny-sft-tiny"
    script = [ROOT / "train_stage1.py", dropout_encoder, "tiny", *SHORT, "--resume"]
    with Launcher(home, *script) as launcher:
        launcher.start()
        assert launcher.wait() == 0, launcher.said()
        count = int(launcher.said().rpartition("operations:")[2])
        new = weights(home)
        (output / "model.safetensors").write_bytes(b"old")
        for back in range(1, 8):
            launcher.start(count - back)
            assert launcher.wait() == -signal.SIGKILL, launcher.said()
            there = output if output.exists() else output.with_name(f".{output.name}.old")
            found = (there / "model.safetensors").read_bytes()
            assert found == b"old" or hashlib.sha256(found).hexdigest() == new
            launcher.start()
            assert launcher.wait() == 0, launcher.said()
            assert weights(home) == new
            # Beside it only the corpus as the encoder embeds it before training.
            assert {p.name for p in (home / "output").iterdir()} == {output.name, "e5-small-tiny"}
            assert not [p.name for p in output.iterdir() if p.name.startswith((".", "best", "checkpoint"))]
            (output / "model.safetensors").write_bytes(b"old")


def test_full_disk_keeps_the_old_output_and_the_last_checkpoint(home, dropout_encoder, run_script, interrupt):
    output = home / "output" / "e5-small-tiny-sft-tiny"
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT]
    assert run_script(*command)[0] == 0
    calm = digest(output)
    interrupt(5)
    assert run_script(*command)[0] == 1
    interrupt(None)
    with file_size_limit(50_000):
        code, _, err = run_script(*command, "--resume")
    assert code == 1
    assert "failed: cannot write output/.e5-small-tiny-sft-tiny.tmp/" in err
    assert digest(output) == calm
    code, out, _ = run_script(*command, "--resume")
    assert code == 0
    assert "resume from step 5 of 12" in out
    assert digest(output) == calm


def test_sigterm_while_dev_is_scored_loses_nothing(home, dropout_encoder, run_script, monkeypatch):
    output = home / "output" / "e5-small-tiny-sft-tiny"
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT]
    assert run_script(*command)[0] == 0
    calm, real, calls = digest(output), journal.DevScore.__call__, []

    def score(self, model):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model)

    monkeypatch.setattr(journal.DevScore, "__call__", score)
    code, _, err = run_script(*command)
    assert code == 1
    assert "stopped while dev was scored after step 6 of 12" in err
    code, _, _ = run_script(*command, "--resume")
    assert code == 0
    assert len(calls) == 4  # 0, 1 (stopped), 1, 2
    assert digest(output) == calm


def test_without_dev_split_and_log_a_run_can_be_resumed(home, dropout_encoder, run_script, interrupt):
    (home / "datasets" / "tiny" / "qrels" / "dev.tsv").unlink()
    output = home / "output" / "e5-small-tiny-sft-tiny"
    command = ["train_stage1.py", dropout_encoder, "tiny", *SHORT, "--batch-size", "2"]  # every fourth step is logged
    assert run_script(*command)[0] == 0
    calm, log = digest(output), (output / "log.jsonl").read_text().splitlines()
    interrupt(2)
    assert run_script(*command)[0] == 1
    interrupt(None)
    assert run_script(*command, "--resume")[0] == 0
    assert digest(output) == calm
    again = (output / "log.jsonl").read_text().splitlines()
    for row, other in zip(map(json.loads, log), map(json.loads, again), strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-6)


def test_an_infinite_gradient_stops_before_the_weights_are_spoilt(home, dropout_encoder, run_script, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    code, _, err = run_script("train_stage1.py", dropout_encoder, "tiny", *SHORT)
    assert code == 1
    assert "its gradient inf at step 1" in err
    assert not (home / "output" / "e5-small-tiny-sft-tiny").exists()


@pytest.mark.parametrize("given", [[], ["--mini-batch-size", "999"]])
def test_the_advice_for_a_full_memory_makes_the_chunks_smaller(home, dropout_encoder, run_script, monkeypatch, given):
    """A chunk is also cut by its tokens: half of what was asked for may be what there was."""
    sizes = []

    def full(model, batch, *_):
        sizes.append(batch.sizes)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loop, "backward", full)
    code, _, err = run_script("train_stage1.py", dropout_encoder, "tiny", *given, *SHORT)
    said = int(re.search(r"Pass --mini-batch-size (\d+): the same loss", err)[1])
    assert (code, said) == (1, sizes[0][0] // 2 if given else sizes[0][0]), err


def test_bfloat16_on_a_cpu(home, dropout_encoder, run_script):
    """The same steps to the few digits that bfloat16 has; float32 weights."""
    found = []
    for more in ([], ["--bf16"]):
        code, _, err = run_script("train_stage1.py", dropout_encoder, "tiny", *SHORT, *more, "--force")
        assert code == 0, err
        output = home / "output" / "e5-small-tiny-sft-tiny"
        losses = [row["loss"] for row in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if "loss" in row]
        found.append((losses, load_file(output / "model.safetensors")))
    (plain, weights), (half, other) = found
    assert half != plain
    assert half == pytest.approx(plain, rel=0.02)
    for name, tensor in weights.items():
        assert other[name].dtype == torch.float32
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0.02)


def test_a_length_beyond_the_encoder_is_refused(home, dropout_encoder, run_script):
    code, _, err = run_script("train_stage1.py", dropout_encoder, "tiny", "--max-length", "999")
    assert code == 2
    assert "--max-length 999: this encoder reads at most 128 tokens" in err


# --- late interaction


def test_mean_max_sim_equals_the_loop():
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 5, 1], [4, 2, 6, 3]
    ragged = [[torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in side] for side in lengths]
    queries, passages = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in ragged)
    expected = [[sum(float((p @ token).max()) for token in q) / len(q) for p in ragged[1]] for q in ragged[0]]
    torch.testing.assert_close(models.similarity(queries, passages), torch.tensor(expected))
    arrays = [[texts.numpy() for texts in side] for side in ragged]
    torch.testing.assert_close(torch.from_numpy(search.similarity(*arrays)), torch.tensor(expected))


@pytest.mark.parametrize("loss", ["snn", "cluster"])
def test_gradient_caching_of_a_late_interaction_encoder(tiny_colbert, docstrings, loss):
    model = models.load(models.resolve(str(tiny_colbert), "tiny"), "cpu").train()
    ours = equal_with_and_without_caching(model, docstrings, loss)
    assert any(name.startswith("1.linear") for name in ours)


def test_training_sees_the_vectors_that_the_library_encodes(tiny_colbert, docstrings):
    """The tokens that count, the query expansion and the prefixes are those of sentence-transformers."""
    model = models.load(models.resolve(str(tiny_colbert), "tiny"), "cpu").eval()
    batch = batch_of(model, docstrings, [4, 7], 3)
    seen = {}
    loop.backward(model, batch, lambda e, labels: (e.sum(), seen.update(e=e.detach(), labels=labels) or {}), 0)
    with models.at_length(model, 32):
        queries = Encoder(model)([docstrings[row][1] for row in (4, 7)], "query")
        passages = Encoder(model)([docstrings[row][2] for row in (4, 7)], "document")
    for row in (0, 1):
        for place, vectors in ((seen["labels"][row, 0], queries[row]), (seen["labels"][row, 1], passages[row])):
            made = seen["e"][place]
            torch.testing.assert_close(made[made.abs().sum(1) > 0], torch.from_numpy(vectors), rtol=0, atol=1e-5)
    assert len(queries[0]) == 16


def test_late_interaction_through_both_stages(home, run_script, tiny_colbert):
    from sentence_transformers import MultiVectorEncoder

    common = ["--epochs", "1", "--batch-size", "8", "--lr", "1e-3"]
    code, _, err = run_script("train_stage1.py", tiny_colbert, "tiny", "--name", "colbert", *common)
    assert code == 0, err
    code, _, err = run_script("retrieval.py", "colbert-sft", "tiny", "--top-k", "10")
    assert code == 0, err
    top = [json.loads(line) for line in (home / "stage2" / "colbert-sft_tiny_top10.jsonl").read_text().splitlines()]
    folder = home / "output" / "colbert-sft-tiny"
    model = MultiVectorEncoder(str(folder), device="cpu")
    corpus = [json.loads(line) for line in (home / "datasets" / "tiny" / "corpus.jsonl").read_text().splitlines()]
    documents = model.encode_document([row["text"] for row in corpus])
    scores = model.similarity(model.encode_query([top[0]["query"]]), documents)[0] / 16
    score_of = {row["_id"]: float(score) for row, score in zip(corpus, scores, strict=True)}
    found = [p["score"] for p in top[0]["passages"]]
    assert found == pytest.approx(scores.topk(10).values.tolist(), abs=1e-5)
    assert found == pytest.approx([score_of[p["id"]] for p in top[0]["passages"]], abs=1e-5)

    rows = [
        {"query_id": row["query_id"], "preferred_id": a["id"], "rejected_id": b["id"]}
        for row in top
        for a, b in zip(row["passages"], row["passages"][1:3], strict=False)
    ]
    write_jsonl(home / "stage2" / "colbert-sft_tiny_preferences.jsonl", rows)
    for how in ("pairs", "lists"):
        code, _, err = run_script("train_stage2.py", "colbert-sft", "tiny", "--batching", how, *common)
        assert code == 0, err
    log = [json.loads(line) for line in (home / "output" / "colbert-final-tiny" / "log.jsonl").read_text().splitlines()]
    assert log[0]["epoch"] == 0
    assert [row for row in log if "kl" in row][-1]["kl"] > 0
    code, out, err = run_script("evaluate.py", "colbert-sft", "colbert-final", "tiny", "--ks", "1,10")
    assert code == 0, err
    assert "colbert-final" in out


# --- the corpus as candidates


def test_the_bank_has_what_each_query_looks_at(home, tiny_encoder, tmp_path, monkeypatch, capsys):
    import numpy as np

    from syntriever.data.corpus import Corpus
    from syntriever.encode import shards
    from syntriever.encode.encoder import Encoder
    from syntriever.train import bank

    monkeypatch.setattr(shards, "SHARD", 7)
    model, corpus = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu"), Corpus("tiny")
    queries, texts = ["sort a list", "open a file", "parse a date"], {0: ["a chain of thought", "a passage"], 2: ["one text"]}
    asked = [(query, texts.get(number, [])) for number, query in enumerate(queries)]
    relevant = [{0}, {1, 2}, {3}]
    made = bank.build(model, corpus, home / "b", tmp_path, asked, relevant, 6, None)
    said = capsys.readouterr().out
    encode, worth = Encoder(model), {"query": [], "view": []}
    passages = encode(list(corpus.texts()), "document")
    for number, query in enumerate(queries):
        view = encode([query], "query")[0] + sum(encode([text], "document")[0] for text in texts.get(number, []))
        view /= np.linalg.norm(view)
        np.testing.assert_allclose(made.views[number], view, atol=1e-5)
        assert set(made.top[number]) == set(np.argsort(-(passages @ view))[:6])
        if number in texts:  # one relevant passage each: nDCG is 1 / log2(1 + its rank)
            for name, vector in (("query", encode([query], "query")[0]), ("view", view)):
                scores = passages @ vector
                rank = 1 + (scores > scores[list(relevant[number])]).sum()
                worth[name].append(1 / np.log2(1 + rank) if rank <= 6 else 0.0)
    candidates, gold, known, views, told = made.batch(np.array([2, 1]), np.array([3, 2]))
    positions = sorted({*made.top[1].tolist(), *made.top[2].tolist(), 1, 2, 3})
    np.testing.assert_allclose(candidates, passages[positions], atol=1e-5)
    assert [positions[column] for column in gold] == [3, 2]
    assert [[positions[column] for column in row.nonzero()[0]] for row in known] == [[3], [1, 2]]
    np.testing.assert_array_equal(views, made.views[[2, 1]])
    assert told.tolist() == [True, False]
    assert f"of 2 training queries at nDCG@10 {np.mean(worth['query']):.4f} by the query, {np.mean(worth['view']):.4f} by" in said


def test_distill_trains_resumes_and_needs_no_texts(home, dropout_encoder, run_script, interrupt):
    args = ("train_stage1.py", dropout_encoder, "tiny", "--loss", "distill", "--candidates", 8, "--dims", "32,8", *SHORT)
    code, out, err = run_script(*args)
    assert code == 0, err
    (output,) = (home / "output").glob("*-sft-tiny")
    whole = digest(output)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    first, second = losses[: len(losses) // 2], losses[len(losses) // 2 :]  # the same rows, an epoch later
    assert len(first) == len(second)
    assert sum(second) < sum(first)
    assert not list((home / "output").glob(".*reference"))
    interrupt(5)
    assert run_script(*args)[0] == 1
    interrupt(None)
    code, out, err = run_script(*args, "--resume")
    assert code == 0, err
    assert "resume from step 5" in out
    assert digest(output) == whole
    code, out, err = run_script(*args, "--no-synthetic")
    assert code == 0, err
    assert digest(output) != whole


def test_distill_refuses_token_vectors(home, tiny_colbert, run_script):
    code, out, err = run_script("train_stage1.py", tiny_colbert, "tiny", "--loss", "distill")
    assert (code, "--loss distill needs one vector a text" in err) == (2, True), err


def test_dev_split_of_a_dataset_without_one(home, run_script):
    folder = home / "datasets" / "tiny"
    train = (folder / "qrels" / "train.tsv").read_text()
    code, out, err = run_script("datasets/split_dev.py", "tiny")
    assert (code, "has a dev split" in err) == (2, True), err
    (folder / "qrels" / "dev.tsv").unlink()
    code, out, err = run_script("datasets/split_dev.py", "tiny", "--share", "0.25")
    assert code == 0, err
    parts = [
        (home / "datasets" / "tiny-dev" / "qrels" / f"{split}.tsv").read_text().splitlines()[1:] for split in ("train", "dev")
    ]
    queries = [{line.split("\t")[0] for line in part} for part in parts]
    assert sorted(parts[0] + parts[1]) == sorted(train.splitlines()[1:])
    assert not queries[0] & queries[1]
    assert len(queries[1]) == round(0.25 * len(queries[0] | queries[1]))
    code, out, err = run_script("train_stage1.py", "minilm", "tiny-dev", "--no-synthetic", "--loss", "infonce", "--epochs", "0")
    assert code == 2  # of the option, not of the data
    assert "--epochs" in err
