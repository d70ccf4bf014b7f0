"""What a training run leaves behind: the log, dev scores, the best weights, a picture, a model card."""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from syntriever import beir, metrics, models, paths, search, stage

if TYPE_CHECKING:
    from syntriever.training import EmbeddingLoss


class DevScore:
    """nDCG@10 on the dev split, over its judged passages and a random sample of the rest, read at
    the length used in training."""

    def __init__(
        self, ds: str, corpus: beir.Corpus, pool: int, max_queries: int, seed: int, max_length: int | None = None
    ) -> None:
        self.max_length = max_length
        queries, qrels = beir.load_split(ds, "dev")
        rng = random.Random(seed)
        chosen = rng.sample(sorted(queries), min(max_queries, len(queries)))
        self.queries, self.qrels = {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen}
        judged = {p for judgements in self.qrels.values() for p in map(corpus.position, judgements) if p is not None}
        positions = sorted(judged | set(rng.sample(range(len(corpus)), min(pool, len(corpus)))))
        self.ids, self.texts = [corpus.id(p) for p in positions], [corpus.text(p) for p in positions]

    def __call__(self, model: SentenceTransformer) -> float:
        with models.at_length(model, self.max_length):
            passages = search.encode(model, self.texts, "document")
            scores = search.encode(model, list(self.queries.values()), "query") @ passages.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        run = {q: {self.ids[p]: float(scores[i, p]) for p in best[i]} for i, q in enumerate(self.queries)}
        return metrics.mean(metrics.evaluate(self.qrels, run, (10,))["nDCG@10"])


def dev_score(ds: str, corpus: beir.Corpus, args: argparse.Namespace) -> DevScore | None:
    """The dev set for choosing the best epoch; None where the dataset has none."""
    if paths.qrels(ds, "dev").is_file():
        return DevScore(ds, corpus, args.dev_pool, args.dev_queries, args.seed, args.max_length)
    stage.say(f"note:  {ds} has no dev split; the last epoch is kept")
    return None


class Journal(TrainerCallback):
    """Progress bar, `log.jsonl`, and the best weights on dev."""

    def __init__(self, loss: EmbeddingLoss, log: Path, dev: DevScore | None) -> None:
        self.loss, self.dev, self.log = loss, dev, log
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_epoch = -1.0, 0.0
        self.best_weights: dict[str, Tensor] | None = None
        self.bar: Any = None
        self.started = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        row["seconds"] = round(time.monotonic() - self.started, 1)
        self.rows.append(row)
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def score(self, model: SentenceTransformer, epoch: float) -> None:
        if self.dev is None:
            return
        value = self.dev(model)
        self.add({"epoch": epoch, "dev_ndcg@10": value})
        tqdm.write(f"       epoch {epoch:g}: dev nDCG@10 {value:.4f}" + ("" if epoch else " (before training)"))
        if epoch and value > self.best:
            self.best, self.best_epoch = value, epoch
            self.best_weights = copy.deepcopy(model.state_dict())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.score(model, 0)
        self.bar = tqdm(total=state.max_steps, unit="step", desc="train")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            row = {"step": state.global_step, "epoch": round(state.epoch, 4), "loss": logs["loss"]}
            self.add({**row, "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"], **self.loss.take_parts()})
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.score(model, round(state.epoch, 4))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def card(title: str, args: argparse.Namespace, journal: Journal) -> str:
    """Model card: what it is, how it was made, how it is used."""
    dev = f"\nBest epoch {journal.best_epoch:g}, dev nDCG@10 {journal.best:.4f}.\n" if journal.best_epoch else ""
    options = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(args).items()))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\ntags: [dense-retrieval, syntriever]\n---\n"
        f"# {title}\n{dev}\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        'scores = model.similarity(model.encode_query(["..."]), model.encode_document(["..."]))\n```\n\n'
        f"| option | value |\n|---|---|\n{options}\n"
    )


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Picture of the log: the loss, its other parts, and dev nDCG@10."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if "loss" in row]
    dev = [row for row in rows if "dev_ndcg@10" in row]
    parts = list(steps[-1])[5:-1] if steps else []  # between grad_norm and seconds
    shares = [name for name in parts if name.endswith(("accuracy", "share"))]
    panels = {"loss": ["loss"], "its parts": [p for p in parts if p not in shares], "share of the batch": shares}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for axis, (label, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            axis.plot([row["epoch"] for row in steps], [row[name] for row in steps], label=name)
        axis.set(xlabel="epoch", title=label)
        if names:
            axis.legend(fontsize=8)
    axes[2].set_ylim(0, 1.02)
    axes[3].plot([row["epoch"] for row in dev], [row["dev_ndcg@10"] for row in dev], marker="o")
    axes[3].set(xlabel="epoch", title="dev nDCG@10" if dev else "no dev split")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
