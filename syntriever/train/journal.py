"""What a training run leaves behind: the log, dev scores, the best weights, a picture, a model card."""

import argparse
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from syntriever.data import dataset
from syntriever.data.corpus import Corpus
from syntriever.encode import models, search
from syntriever.encode.encoder import Encoder
from syntriever.errors import Failed
from syntriever.files import jsonl, paths
from syntriever.report import metrics
from syntriever.report.pictures import picture
from syntriever.run import processes, terminal
from syntriever.train.checkpoint import put, trained


class DevScore:
    """nDCG@10 of some judged queries, read at the length used in training. Equal texts are one: `qrels` go by the first passage
    of a text. Ranked are all their judged passages and a random sample of the rest.

    With `from_start` the judged passages are those that the starting encoder found, so a better one would be punished for
    what it finds beside them: only a query's own judged passages are ranked (condensed lists, Sakai 2007).
    """

    def __init__(
        self, queries: dict[str, str], qrels: dataset.Qrels, corpus: Corpus, args: argparse.Namespace, from_start: bool = False
    ) -> None:
        self.max_length, self.from_start = args.max_length, from_start
        pool, rng = 0 if from_start else args.dev_pool, random.Random(args.seed)
        chosen = rng.sample(sorted(queries), min(args.dev_queries, len(queries)))
        self.queries, self.qrels = {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen}
        judged = {p for judgements in self.qrels.values() for p in map(corpus.position, judgements) if p is not None}
        drawn = corpus.twins(np.array(rng.sample(range(len(corpus)), min(pool, len(corpus)))))
        positions = sorted(judged | set(drawn.tolist()))
        self.ids, self.texts = [corpus.id(p) for p in positions], [corpus.text(p) for p in positions]

    def __call__(self, model: Any) -> dict[str, float]:
        with models.at_length(model, self.max_length):
            encode = Encoder(model)
            scores = search.similarity(encode(list(self.queries.values()), "query"), encode(self.texts, "document"))
        if self.from_start:
            scores[~np.array([[passage in judged for passage in self.ids] for judged in self.qrels.values()])] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        run = {q: {self.ids[p]: float(scores[i, p]) for p in best[i]} for i, q in enumerate(self.queries)}
        return metrics.evaluate(self.qrels, run, (10,))["nDCG@10"]


def dev_score(ds: str, corpus: Corpus, args: argparse.Namespace) -> DevScore | None:
    """The dev set for choosing the best epoch; None where the dataset has none."""
    if paths.qrels(ds, "dev").is_file():
        queries, qrels = dataset.load_split(ds, "dev")
        return DevScore(queries, dataset.by_text(queries, qrels, corpus), corpus, args)
    terminal.say(f"note:  {ds} has no dev split; the last epoch is kept")
    return None


START = "start.safetensors"  # weights before training, where they may be the best


def _write(weights: dict[str, Tensor], path: Path) -> None:
    with jsonl.atomic(path) as file:
        file.write(serialize({name: tensor.cpu().contiguous().clone() for name, tensor in weights.items()}))


class Journal:
    """Progress bar, `log.jsonl`, TensorBoard, and the best weights on dev (`best-<epoch>.safetensors`)."""

    def __init__(self, work: Path, dev: DevScore | None, total: int, every: int, state: dict[str, Any] | None) -> None:
        self.dev, self.work, self.every = dev, work, every
        self.log, self.rows = work / "log.jsonl", []
        self.best, self.best_epoch, seconds = -1.0, 0.0, 0.0
        self.averaged = False  # whether the best is the average of the last epoch and the start
        self.best_values: dict[str, float] = {}  # by query
        self.talks = processes.rank() == 0
        if state:
            self.best, self.best_epoch, seconds = state["best"], state["best_epoch"], state["seconds"]
            self.best_values = state.get("best_values", {})
            if self.talks:
                with self.log.open("ab") as file:
                    file.truncate(state["log_bytes"])  # what came after the checkpoint comes again
                self.rows = list(jsonl.read(self.log))
        parts = state["parts"] if state else {}
        self.parts = defaultdict(list, {name: list(map(torch.tensor, values)) for name, values in parts.items()})
        self.started = time.monotonic() - seconds
        self._saved = time.monotonic()
        at, self.total = state["step"] if state else 0, total
        self.bar = terminal.progress(total=total, initial=at, unit="step", desc="train")
        self.board = SummaryWriter(str(work / "tensorboard"), purge_step=at + 1 if at else None) if self.talks else None

    def state(self, step: int) -> dict[str, Any]:
        """What `state` of a resumed run needs."""
        with self.log.open("ab") as file:  # on disk before the checkpoint that counts on it
            os.fsync(file.fileno())
            size = file.tell()
        best = {"best": self.best, "best_epoch": self.best_epoch, "best_values": self.best_values}
        parts = {name: [float(value) for value in values] for name, values in self.parts.items()}
        return {**best, "step": step, "log_bytes": size, "parts": parts, "seconds": time.monotonic() - self.started}

    def add(self, step: int, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if self.board and name not in ("step", "epoch"):
                self.board.add_scalar(name, value, step)
        row["seconds"] = round(time.monotonic() - self.started, 1)
        self.rows.append(row)
        try:
            with self.log.open("ab") as file:
                file.write(jsonl.dumps(row))
        except OSError as error:
            raise Failed(f"cannot write {paths.shown(self.log)}: {error.strerror}") from error

    def score(self, model: Any, step: int, epoch: float) -> None:
        """Score the model on dev, once an epoch, and keep its weights where they are the best so far."""
        if self.dev is None or not self.talks or any(row["epoch"] == epoch for row in self.rows if "dev_ndcg@10" in row):
            return
        self.last = self.dev(model)
        value = metrics.mean(self.last)
        self.add(step, {"epoch": epoch, "dev_ndcg@10": value})
        terminal.say(f"       epoch {epoch:g}: dev nDCG@10 {value:.4f}" + ("" if epoch else " (before training)"))
        if not epoch and self.dev.from_start:
            _write(trained(model), self.work / START)
        if value > self.best and (epoch or self.dev.from_start):
            self._keep(model, self.last, epoch)

    def _keep(self, model: Any, values: dict[str, float], epoch: float, averaged: bool = False) -> None:
        self.best, self.best_epoch, self.averaged, self.best_values = metrics.mean(values), epoch, averaged, values
        _write(trained(model), self._best_file())

    def choose(self, model: Any, step: int, epoch: float) -> None:
        """Between the last epoch, whatever was best before it, and the average of its weights and those from the start. A few
        dozen queries measure little: the last epoch stays unless another is better by more than a standard error, which
        one query alone never is: there both are equal."""
        if self.dev is None or not self.dev.from_start:
            return
        start, last = load_file(self.work / START), {name: tensor.clone() for name, tensor in trained(model).items()}
        # Of an adapter's B A, where B starts at 0, the average is that of B, times the last A.
        floats = {name for name, tensor in last.items() if tensor.is_floating_point() and ".lora_A." not in name}
        put(model, {n: (t.cpu() + start[n]) / 2 if n in floats else t for n, t in last.items()})
        values = self.dev(model)
        self.add(step, {"epoch": epoch, "dev_ndcg@10_of_average": metrics.mean(values)})
        terminal.say(f"       average of epoch {epoch:g} and the start: dev nDCG@10 {metrics.mean(values):.4f}")
        if metrics.mean(values) > self.best:
            self._keep(model, values, epoch, averaged=True)
        put(model, last)
        gain = np.array([self.best_values[query] - self.last[query] for query in self.last])
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
        if gain.mean() <= error * (1 + 1e-9) and (self.averaged or self.best_epoch != epoch):
            how = f"better by {gain.mean():.4f}, within a standard error" if gain.any() else "just as good"
            terminal.say(f"note:  {self.best_name} is {how}: the last epoch stays")
            self._keep(model, self.last, epoch)

    def _best_file(self) -> Path:
        return self.work / f"best-{self.best_epoch:g}{'-average' if self.averaged else ''}.safetensors"

    @property
    def best_name(self) -> str:
        epoch = f"epoch {self.best_epoch:g}" if self.best_epoch else "the encoder as it was before training"
        return f"the average of {epoch} and the start" if self.averaged else epoch

    def restore_best(self, model: Any) -> None:
        if self._best_file().is_file():
            put(model, load_file(self._best_file()))
            terminal.say(f"best   {self.best_name} with dev nDCG@10 {self.best:.4f}")
            if not self.best_epoch:
                terminal.say("warning: no epoch is better; the checkpoint holds the untrained encoder")

    def step(self, done: int, epoch: float, parts: dict[str, Tensor], rate: float, norm: Tensor) -> None:
        """Take in one step. Means of the parts go into the log every few steps."""
        self.bar.update()
        for name, value in parts.items():
            self.parts[name].append(value)
        if done % self.every == 0 or done == self.total:
            means = {name: sum(map(float, values)) / len(values) for name, values in self.parts.items()}
            self.parts.clear()
            if self.talks:
                loss = means.pop("loss")
                row = {"step": done, "epoch": round(epoch, 4), "loss": loss, "learning_rate": rate, "grad_norm": float(norm)}
                self.add(done, row | means)
                self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def saved(self) -> None:
        self._saved = time.monotonic()
        for old in set(self.work.glob("best-*.safetensors")) - {self._best_file()}:
            old.unlink()

    def minutes_since_save(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def card(title: str, args: argparse.Namespace, journal: Journal, late: bool) -> str:
    """Model card: what it is, how it was made, how it is used."""
    dev = f"\nBest on dev: {journal.best_name}, nDCG@10 {journal.best:.4f}.\n" if journal.best >= 0 else ""
    kind = "MultiVectorEncoder" if late else "SentenceTransformer"
    options = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(args).items()))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\ntags: [dense-retrieval, syntriever]\n---\n"
        f"# {title}\n{dev}\n```python\nfrom sentence_transformers import {kind}\n\n"
        f'model = {kind}("path/to/this/folder")\n'
        'scores = model.similarity(model.encode_query(["..."]), model.encode_document(["..."]))\n```\n\n'
        f"| option | value |\n|---|---|\n{options}\n"
    )


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Picture of the log: the loss, its other parts, and dev nDCG@10."""
    steps = [row for row in rows if "loss" in row]
    dev = [row for row in rows if "dev_ndcg@10" in row]
    average = [row for row in rows if "dev_ndcg@10_of_average" in row]
    parts = list(steps[-1])[5:-1] if steps else []  # between grad_norm and seconds
    shares = [name for name in parts if name.endswith(("accuracy", "share"))]
    panels = {"loss": ["loss"], "its parts": [p for p in parts if p not in shares], "share of the batch": shares}
    with picture(path, title, 4, (16, 3.6)) as axes:
        for axis, (label, names) in zip(axes, panels.items(), strict=False):
            for name in names:
                axis.plot([row["epoch"] for row in steps], [row[name] for row in steps], label=name)
            axis.set(xlabel="epoch", title=label)
            if names:
                axis.legend(fontsize=8)
        axes[2].set_ylim(0, 1.02)
        axes[3].plot([row["epoch"] for row in dev], [row["dev_ndcg@10"] for row in dev], marker="o")
        axes[3].plot([row["epoch"] for row in average], [row["dev_ndcg@10_of_average"] for row in average], "x", label="average")
        axes[3].set(xlabel="epoch", title="dev nDCG@10" if dev else "no dev split")
