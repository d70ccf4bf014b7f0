"""Benchmark of the training stages: the real commands on pydocs, against plain sentence-transformers.

Run      python bench/training.py                   all parts, about 25 minutes on two cores
         python bench/training.py step lists        some of: step, lists, memory, lora
         python bench/training.py lora --model sbert    LoRA against full training, of another encoder
Peer     step: SentenceTransformerTrainer with the same loss over five columns, one forward pass each, the
         same rows, batch size, length, optimiser and denormal flushing; in float32, its default, also on a GPU
Writes   bench/training.json

Every run is a process of its own and one at a time, so that its peak memory is its own. Seconds are of
the training loop, from its first log entry to its last: start-up is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
import common

from syntriever.files import jsonl

RECORDED = ROOT / "datasets" / "recorded" / "pydocs"
BATCH, LENGTH, STEPS = 32, 256, 6
CACHED = ["--mini-batch-size", "16"]
COMMON = ["--max-length", str(LENGTH), "--save-minutes", "999", "--force"]


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(jsonl.dumps, rows)))


def dataset(home: Path, name: str, passages: dict[str, str], queries: dict[str, tuple[str, str]]) -> None:
    """BEIR folder without a dev split; `queries`: id -> (text, id of the gold passage)."""
    folder = home / "datasets" / name
    write(folder / "corpus.jsonl", ({"_id": i, "title": "", "text": text} for i, text in passages.items()))
    write(folder / "queries.jsonl", ({"_id": i, "text": text} for i, (text, _) in queries.items()))
    (folder / "qrels").mkdir()
    rows = "".join(f"{query}\t{gold}\t1\n" for query, (_, gold) in queries.items())
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)


def fill(home: Path) -> None:
    """`small`: the queries with recorded texts; `few`: 64 of them. `large`: 1,024 queries; the recorded texts go round."""
    pairs = common.pydocs()
    passages = {name: passage for name, _, passage in pairs}
    everyone = {f"q-{name}": (query, name) for name, query, _ in pairs}
    texts = {row["query_id"]: row for row in jsonl.read(RECORDED / "synthesis.jsonl") if row["query_id"] in everyone}
    for name, number in (("small", len(texts)), ("few", 64)):
        dataset(home, name, passages, {query: everyone[query] for query in list(texts)[:number]})
        write(home / "datasets" / f"{name}_synthetic.jsonl", texts.values())
    some = dict(itertools.islice(everyone.items(), 1024))
    dataset(home, "large", passages, some)
    rows = zip(some, itertools.cycle(texts.values()))
    write(home / "datasets" / "large_synthetic.jsonl", ({**row, "query_id": query} for query, row in rows))
    # Ten pairs of five passages for each query whose recorded ranking has five levels.
    best = {
        row["query_id"]: [level[0] for level in row["ranking"]][:5]
        for row in jsonl.read(RECORDED / "preferences.jsonl")
        if row["query_id"] in texts and len(row["ranking"]) >= 5 and all(level[0] in passages for level in row["ranking"][:5])
    }
    preferences = (
        {"query_id": query, "preferred_id": better, "rejected_id": worse}
        for query, five in best.items()
        for better, worse in itertools.combinations(five, 2)
    )
    write(home / "stage2" / "minilm_small_preferences.jsonl", preferences)


def command(home: Path, *argv: str | Path) -> dict[str, float]:
    """Run a training command: seconds and steps between the first and the last entry of its log, peak MiB."""
    env = {**os.environ, "SYNTRIEVER_HOME": str(home)}
    with (home / "out").open("w+") as out:
        process = subprocess.Popen([sys.executable, *map(str, argv)], env=env, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        if status:
            raise SystemExit(f"{argv} failed:\n{out.read()[-2000:]}")
    log = max(home.glob("output/*/log.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    first, last = rows[0], rows[-1]
    return {
        "steps": last["step"] - first["step"],
        "seconds": last["seconds"] - first["seconds"],
        "seconds_per_step": (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"]),
        "peak_mib": usage.ru_maxrss / 1024,
    }


def sentence_transformers(home: Path, steps: int) -> None:
    """The peer, a process of its own: the same rows and loss, five columns."""
    import torch
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    sys.argv[1:] = []
    import train_stage1
    from syntriever.encode import models

    torch.set_flush_denormal(True)
    folder = home / "datasets" / "small"
    passages = {row["_id"]: row["text"] for row in jsonl.read(folder / "corpus.jsonl")}
    rows = list(jsonl.read(home / "datasets" / "small_synthetic.jsonl"))
    columns: dict[str, Any] = {"query": [row["query"] for row in rows]}
    columns["passage"] = [passages[row["query_id"].removeprefix("q-")] for row in rows]
    columns |= {name: [row[name] for row in rows] for name in ("positive", "cot", "negative")}
    columns["label"] = [int(row["verified"]) for row in rows]
    model = SentenceTransformer(models.resolve("minilm", "small").where)
    model.max_seq_length = LENGTH

    class Loss(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Any, labels: Any) -> Any:
            texts = [self.model(column)["sentence_embedding"] for column in features]
            return train_stage1.soft_nearest_neighbor_loss(*texts, labels.bool())

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.monotonic())

    times: list[float] = []
    cuda = torch.cuda.is_available()
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(home / "peer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-5,
        warmup_steps=0.1, batch_sampler="no_duplicates", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        weight_decay=0.0, seed=42, optim="adamw_torch_fused" if cuda else "adamw_torch",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=Dataset.from_dict(columns), loss=Loss(model), callbacks=[Clock()]
    )
    trainer.train()
    print(json.dumps({"steps": len(times) - 2, "seconds": times[-1] - times[1]}))


def stage1(home: Path, ds: str, *options: str, model: str = "minilm") -> dict[str, float]:
    return command(home, ROOT / "train_stage1.py", model, ds, *COMMON, "--loss", "snn", *options)


def step(home: Path) -> dict[str, Any]:
    """A stage-1 step of 32 rows, ours and theirs in turn, twice; the best of each."""
    ours, theirs = [], []
    for _ in range(2):
        ours.append(stage1(home, "small", "--batch-size", str(BATCH), "--epochs", str(STEPS * BATCH / 256))["seconds_per_step"])
        done = subprocess.run([sys.executable, __file__, "--peer", str(home)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        theirs.append(found["seconds"] / found["steps"])
        print(f"step: ours {ours[-1]:.2f} s, sentence-transformers {theirs[-1]:.2f} s", flush=True)
    share = flop_of_a_step(home) / min(ours) / matmul_peak()
    print(f"step: {share:.0%} of the measured matmul peak (attention scores and padding not counted as work)", flush=True)
    return {"ours_s": ours, "sentence_transformers_s": theirs, "ratio": min(theirs) / min(ours), "share_of_peak": share}


def flop_of_a_step(home: Path) -> float:
    """6 per parameter of the encoder's layers and token that is no padding."""
    from syntriever.encode import models

    model: Any = models.load(models.resolve("minilm", "small"), "cpu", LENGTH)
    corpus = {row["_id"]: row["text"] for row in jsonl.read(home / "datasets" / "small" / "corpus.jsonl")}
    rows = list(jsonl.read(home / "datasets" / "small_synthetic.jsonl"))
    texts = [row[name] for row in rows for name in ("query", "positive", "cot", "negative")]
    texts += [corpus[row["query_id"].removeprefix("q-")] for row in rows]
    tokens = sum(map(len, models.tokenize(model, [("document", text) for text in texts]))) / len(rows) * BATCH
    return 6.0 * tokens * sum(parameter.numel() for parameter in model[0].auto_model.encoder.parameters())


def matmul_peak() -> float:
    """FLOP/s of a large matrix product, the best of ten: float32 on a CPU, bfloat16 on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 2048
    a = torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        b = a @ a
        b.sum().item()  # waits for the GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def lists(home: Path) -> dict[str, Any]:
    """A step of 100 pairs of stage 2 (epochs have the same number of steps): every pair by itself, and lists."""
    found = {}
    for batching in ("pairs", "lists"):
        options = ["--loss=partial-plackett-luce", f"--batching={batching}", "--batch-size=100", "--epochs=0.5", "--beta=0"]
        run = command(home, ROOT / "train_stage2.py", "minilm", "small", *COMMON, *options)
        found[f"{batching}_s_per_step"] = run["seconds_per_step"]
        print(f"lists: {batching} {run['seconds_per_step']:.2f} s a step of 100 pairs, {run['steps']} steps timed", flush=True)
    return found | {"ratio": found["pairs_s_per_step"] / found["lists_s_per_step"]}


def memory(home: Path) -> dict[str, Any]:
    """Peak memory of steps of 32 rows, without and with gradient caching, and of 1,024 rows with it."""
    found = {}
    for rows, options in ((32, []), (32, CACHED), (1024, CACHED)):
        share = str(rows / 1024)
        run = stage1(home, "large", "--batch-size", str(rows), "--epochs", share, "--max-length", "128", *options)
        name = f"batch_{rows}" + ("_cached" if options else "")
        found[f"{name}_mib"] = run["peak_mib"]
        print(f"memory: {name} {run['peak_mib']:.0f} MiB", flush=True)
    return found | {"ratio": found["batch_1024_cached_mib"] / found["batch_32_mib"]}


def lora(home: Path, model: str) -> dict[str, Any]:
    """Peak memory and time of a step of 8 rows: full training, the same in bfloat16, and adapters of rank 16, each of the
    first and the last also with gradient caching."""
    found: dict[str, Any] = {"model": model}
    adapters = ["--lora", "16"]
    runs = {"full": [], "full_bf16": ["--bf16"], "lora": adapters, "full_cached": CACHED, "lora_cached": [*adapters, *CACHED]}
    for name, options in runs.items():
        run = stage1(home, "few", "--batch-size", "8", "--epochs", "0.5", *options, model=model)
        found |= {f"{name}_s_per_step": run["seconds_per_step"], f"{name}_mib": run["peak_mib"]}
        print(f"lora: {model} {name} {run['seconds_per_step']:.2f} s a step, {run['peak_mib']:.0f} MiB", flush=True)
    return found | {"ratio": found["full_mib"] / found["lora_mib"]}


def main() -> None:
    parts = {"step": step, "lists": lists, "memory": memory, "lora": lambda home: lora(home, args.model)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*parts, []), help="which (default: all)")
    parser.add_argument("--model", default="minilm", help="encoder of the part lora (default: %(default)s)")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        sentence_transformers(args.peer, STEPS)
        return
    common.run(parts, args.parts, ROOT / "bench" / "training.json", fill)


if __name__ == "__main__":
    main()
